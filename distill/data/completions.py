"""Rows of a source as finished answers, as the recipe says. Imports no torch.

In a run every answer has one form: its reasoning between think tags, whatever a family's template does with it; then the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from distill.data.files import Row
from distill.data.names import text_at
from distill.data.texts import is_blank, without_end
from distill.errors import DataError, visible
from distill.recipe.traces import Traces
from distill.run.schema import THINK_CLOSE, THINK_OPEN

_NOT_KNOWN = frozenset({"null", "none", "nan"})
_ENDED = frozenset(
    (
        *("stop", "eos", "eos_token", "end_turn", "end", "stop_sequence", "complete", "completed", "finished"),
        *("tool_calls", "function_call", "tool_use"),  # the turn is over, with calls
    )
)
_CUT_OFF = frozenset(
    {"length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "truncated", "incomplete"}
)

_VERDICTS = {
    **dict.fromkeys(("true", "1", "yes", "right", "correct", "pass", "passed", "accept", "accepted", "ok", "valid", "verified"), True),
    **dict.fromkeys(("false", "0", "no", "wrong", "incorrect", "fail", "failed", "reject", "rejected", "invalid", "error"), False),
    **dict.fromkeys((*_NOT_KNOWN, "unknown", "n/a"), None),
}


class Brought(NamedTuple):
    """An answer from elsewhere."""

    text: str
    reason: str | None = None
    """To drop it; null keeps it."""
    end_removed: bool = False
    """Whether a mark of the turn's end was taken off."""
    opened: bool = False
    """Whether its reasoning began without `<think>`, as R1's templates leave it, and was given one."""
    finish_reason: str | None = None
    """`stop`, `length` or `error`; null where nothing says how it ended."""
    verdict: bool | None = None
    """Whether its source calls the answer right; null where it does not say."""


def columns_of(traces: Traces) -> list[str]:
    """Names that are looked up in a row, besides those of its prompt."""
    return [name for name in (traces.completion, traces.reasoning, traces.finish_reason, traces.verdict) if name is not None]


def brought(traces: Traces, row: Row, where: str) -> Brought:
    """The whole answer of a brought trace, in the form of the run.

    Args:
        traces: Where reasoning and answer are.
        row: Of the source.
        where: It stands, for errors.
    """
    given = (text_at(row, traces.completion, where) or "").strip()
    text = without_end(given)
    found = Brought(text, end_removed=text != given, finish_reason=_finish_reason(traces, row, where), verdict=_verdict(traces, row, where))
    if is_blank(text):
        return found._replace(text="", reason="empty_completion")
    if traces.answer_separator is not None:
        reasoning, separated, answer = text.rpartition(traces.answer_separator)
        if not separated:
            return found._replace(reason="no_answer_separator")
        if is_blank(answer):
            return found._replace(reason="empty_answer")
        if separated.count("{") > separated.count("}"):  # what it opens is closed in the answer
            answer = separated + answer
        answer = answer.strip() if "\\boxed" in answer else f"\\boxed{{{answer.strip()}}}"
    elif traces.reasoning is not None:
        reasoning, answer = without_end(text_at(row, traces.reasoning, where) or ""), text
        if THINK_OPEN in text or THINK_CLOSE in text:
            return found._replace(reason="reasoning_in_completion")
    elif THINK_CLOSE in text and THINK_OPEN not in text:
        return found._replace(text=f"{THINK_OPEN}\n{text}", opened=True)
    else:
        return found
    reasoning = reasoning.replace(THINK_OPEN, "").replace(THINK_CLOSE, "").strip()
    if is_blank(reasoning):
        return found._replace(reason="empty_reasoning")
    return found._replace(text=f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{answer}")


def _finish_reason(traces: Traces, row: Row, where: str) -> str | None:
    if traces.finish_reason is None:
        return None
    value = text_at(row, traces.finish_reason, where)
    if value is None:
        return None
    if len(value) > 40:
        raise DataError(f"{where}: {traces.finish_reason} should say in a word how the trace ended, got {visible(value, 60)!r}.")
    word = value.strip().lower().removeprefix("finishreason.")  # as Python writes a member of an enumeration
    if word in _NOT_KNOWN:
        return None
    return "stop" if word in _ENDED or not without_end(word) else "length" if word in _CUT_OFF else "error"


def _verdict(traces: Traces, row: Row, where: str) -> bool | None:
    """Whether the source calls an answer right.

    Raises:
        DataError: it says something else: a score is no verdict.
    """
    value = text_at(row, traces.verdict, where) if traces.verdict is not None else None
    word = value.strip().lower() if value is not None else "none"
    if word not in _VERDICTS:
        raise DataError(
            f"{where}: {traces.verdict} should say whether the answer is right, as true or false, got {visible(word, 60)!r}. Name a column "
            "of verdicts in traces.verdict, or leave it out."
        )
    return _VERDICTS[word]
