"""Rows of a source as finished answers, as the recipe says. Imports no torch.

In a run every answer has one form: its reasoning between think tags, whatever a family's template does with it; then the answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from distill.data.calls import UnusableError
from distill.data.files import Row
from distill.data.mapping import Asked, PromptMapping
from distill.data.marks import with_think
from distill.data.names import Spare, spare_at, text_at, value_at
from distill.data.texts import is_blank, without_end
from distill.data.turns import calls_apart, completion_of, is_parts, is_turn, turns_of
from distill.errors import DataError, visible
from distill.recipe.traces import Traces
from distill.run.schema import THINK_CLOSE, THINK_OPEN, Message

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
    marked: bool = False
    """Whether its reasoning stood between the marks of another family."""
    finish_reason: str | None = None
    """`stop`, `length` or `error`; null where nothing says how it ended."""
    verdict: bool | None = None
    """Whether its source calls the answer right; null where it does not say."""


def columns_of(traces: Traces) -> list[str]:
    """Names that are looked up in a row, besides those of its prompt."""
    answers = Spare(traces.column_of_answers) if traces.takes_last_turns else traces.column_of_answers
    return [name for name in (answers, traces.reasoning, traces.finish_reason, traces.verdict) if name is not None]


def traces_of(traces: Traces, mapping: PromptMapping, row: Row, where: str) -> list[tuple[Asked, Brought]]:
    """The traces of a row, each with what it answers.

    Args:
        traces: Where reasoning and answers are.
        mapping: Of the prompts.
        row: Of the source.
        where: It stands, for errors.
    """
    asked = mapping.asked(row, where)
    beside = traces.takes_last_turns and asked[-1].answer is None and spare_at(row, Spare(traces.column_of_answers)) is not None
    if not traces.takes_last_turns:
        return [(asked[-1], found) for found in brought(traces, row, where)]
    if beside:
        said = _of_turns(traces, asked[:-1], row, where)
        return [*said, *((asked[-1], found) for found in brought(traces, row, where))]
    return _of_turns(traces, asked, row, where)


def _of_turns(traces: Traces, asked: list[Asked], row: Row, where: str) -> list[tuple[Asked, Brought]]:
    """The turns of a conversation as answers."""
    found = []
    for each in asked:
        [told] = _told(traces, row, 1, where)
        answer = Brought("", reason="no_answer") if each.answer is None else _of(traces, each.answer, told, where)
        found.append((each, answer))
    return found


def brought(traces: Traces, row: Row, where: str) -> list[Brought]:
    """The whole answers of a row, in the form of the run; at least one, be it none.

    Args:
        traces: Where reasoning and answers are.
        row: Of the source.
        where: It stands, for errors.
    """
    name = traces.column_of_answers
    value = value_at(row, name, where)
    if value == []:
        return [Brought("", reason="empty_completion")]
    several = isinstance(value, list) and not is_parts(value)
    given = value if several else [value]
    if len(given) > 1 and all(map(is_turn, given)) and any(map(_asks, given)):
        raise DataError(
            f"{where}: {name} holds a conversation of {len(given)} turns, not an answer. Name it in traces.columns.messages, and leave "
            "traces.completion out."
        )
    found = []
    for place, (each, told) in enumerate(zip(given, _told(traces, row, len(given), where), strict=True)):
        here = f"{name}.{place}" if several else name
        answer = _answer(each, here, where)
        found.append(answer if isinstance(answer, Brought) else _of(traces, answer, told, where))
    return found


def _asks(turn: Row) -> bool:
    """Whether a turn is no assistant's."""
    try:
        return any(each["role"] != "assistant" for each in turns_of([turn], "", ""))
    except (DataError, UnusableError):
        return False


def _answer(value: Any, name: str, where: str) -> str | Message | Brought:
    """An answer as text or as an assistant's turn, or why there is none."""
    if is_parts(value):
        value = {"role": "assistant", "content": value}
    turns = [value] if is_turn(value) else value if isinstance(value, list) and len(value) == 1 and is_turn(value[0]) else None
    if turns is None:
        return text_at({name: value}, name, where) or ""
    try:
        [turn] = turns_of(turns, name, where)
    except UnusableError as error:
        return Brought("", reason=error.reason)
    if turn["role"] != "assistant":
        raise DataError(f"{where}: {name} holds a turn of {turn['role']}, not an answer. Correct traces.completion.")
    return turn


def _told(traces: Traces, row: Row, count: int, where: str) -> list[Row]:
    """What the other columns say of each answer of a row, by their names."""
    told: list[Row] = [{} for _ in range(count)]
    for name in (traces.reasoning, traces.finish_reason, traces.verdict):
        value = value_at(row, name, where) if name is not None else None
        if isinstance(value, list) and len(value) != count:
            answers = "the conversation" if traces.takes_last_turns else traces.column_of_answers
            raise DataError(
                f"{where}: {name} has {len(value)} entries, and {answers} has {count}. Give one for each answer, or one value for all."
            )
        for place, each in enumerate(told):
            each[name or ""] = value[place] if isinstance(value, list) else value
    return told


def _of(traces: Traces, answer: str | Message, told: Row, where: str) -> Brought:
    """An answer in the form of the run, as far as one can be made of it."""
    given = (answer if isinstance(answer, str) else answer["content"]).strip()
    ended = without_end(given)
    text = with_think(ended)
    found = Brought(
        text,
        end_removed=ended != given,
        marked=text != ended,
        finish_reason=_finish_reason(traces, told, where),
        verdict=_verdict(traces, told, where),
    )
    if not isinstance(answer, str):
        text = completion_of(calls_apart(answer, text))
        found = found._replace(text=text)
    if is_blank(text):
        return found._replace(text="", reason="empty_completion")
    return _with_reasoning(traces, found, told, where)


def _with_reasoning(traces: Traces, found: Brought, told: Row, where: str) -> Brought:
    """An answer with its reasoning, wherever the recipe says that this is."""
    text = found.text
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
        reasoning, answer = without_end(text_at(told, traces.reasoning, where) or ""), text
        if THINK_OPEN in text or THINK_CLOSE in text:
            return found._replace(reason="reasoning_in_completion")
    elif THINK_CLOSE in text and THINK_OPEN not in text:
        return found._replace(text=f"{THINK_OPEN}\n{text}", opened=True)
    else:
        return found
    reasoning = with_think(reasoning).replace(THINK_OPEN, "").replace(THINK_CLOSE, "").strip()
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
