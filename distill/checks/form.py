"""Checks of a trace's form: that it ended by itself, and that it is reasoning followed by an answer."""

from __future__ import annotations

import re

from distill.checks import Verdict
from distill.checks.forms.final import is_final
from distill.data.texts import is_blank, loops
from distill.run.schema import THINK_CLOSE, THINK_OPEN

_BRACES = re.compile(r"(?<!\\)[{}]")


def check_finish(finish_reason: str | None, completion: str, *, asks_final: bool = False) -> Verdict:
    """Whether the author ended the trace; a brought one of which nobody says so is taken to be whole, unless its text shows else.

    Args:
        finish_reason: As the author's server said; null where nobody said.
        completion: The trace.
        asks_final: Whether its final answer is checked too. Then one of which nobody said must have that, by its form: the last number
            before a cut is sometimes the right one.
    """
    if finish_reason in (None, "stop") and loops(completion):
        return Verdict("finish", False, "loops")
    if finish_reason is None:
        reason = "empty" if is_blank(completion) else "truncated" if _is_cut(completion) else "brought"
        if reason == "brought" and asks_final and not is_final(answer_of(completion) or ""):
            reason = "no_final_answer"
        return Verdict("finish", reason == "brought", reason)
    return Verdict("finish", finish_reason == "stop", {"stop": "ended", "length": "truncated"}.get(finish_reason, finish_reason))


def check_think(completion: str) -> Verdict:
    """Whether the completion is one `<think>...</think>` with text in it, and an answer after it."""
    before, opened, rest = completion.partition(THINK_OPEN)
    reasoning, closed, answer = rest.partition(THINK_CLOSE)
    problems = {
        "no_reasoning": not opened,
        "text_before_reasoning": not is_blank(before),
        "reasoning_not_closed": not closed,
        "several_reasonings": THINK_OPEN in rest or THINK_CLOSE in answer,
        "empty_reasoning": is_blank(reasoning),
        "no_answer": is_blank(answer),
    }
    found = next((name for name, there in problems.items() if there), None)
    return Verdict("think", found is None, found or "well_formed")


def _is_cut(completion: str) -> bool:
    """Whether something is left open that an answer closes: a thought, a box, a block of code."""
    answer = answer_of(completion)
    if answer is None:
        return True
    _, boxed, rest = answer.rpartition("\\boxed{")
    return (bool(boxed) and not _closes(rest)) or answer.count("```") % 2 == 1


def _closes(text: str) -> bool:
    """Whether a brace that was opened before a text is closed in it."""
    depth = 1
    for brace in _BRACES.findall(text):
        depth += 1 if brace == "{" else -1
        if not depth:
            return True
    return False


def answer_of(completion: str) -> str | None:
    """What stands after the last reasoning; the whole text where there is none; null where the reasoning never ends."""
    answer = completion.rpartition(THINK_CLOSE)[2]
    return None if THINK_OPEN in answer else answer
