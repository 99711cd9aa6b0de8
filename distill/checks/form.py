"""Checks of a trace's form: that it ended by itself, and that it is reasoning followed by an answer."""

from __future__ import annotations

from distill.checks import Verdict
from distill.run.schema import THINK_CLOSE, THINK_OPEN


def check_finish(finish_reason: str | None, completion: str) -> Verdict:
    """Whether the author ended the trace; one that was brought along is taken to be whole unless it is empty."""
    if finish_reason is None:
        return Verdict("finish", bool(completion.strip()), "brought" if completion.strip() else "empty")
    return Verdict("finish", finish_reason == "stop", {"stop": "ended", "length": "truncated"}.get(finish_reason, finish_reason))


def check_think(completion: str) -> Verdict:
    """Whether the completion is one `<think>...</think>` with text in it, and an answer after it."""
    before, opened, rest = completion.partition(THINK_OPEN)
    reasoning, closed, answer = rest.partition(THINK_CLOSE)
    problems = {
        "no_reasoning": not opened,
        "text_before_reasoning": bool(before.strip()),
        "reasoning_not_closed": not closed,
        "several_reasonings": THINK_OPEN in rest or THINK_CLOSE in answer,
        "empty_reasoning": not reasoning.strip(),
        "no_answer": not answer.strip(),
    }
    found = next((name for name, there in problems.items() if there), None)
    return Verdict("think", found is None, found or "well_formed")


def answer_of(completion: str) -> str | None:
    """What stands after the last reasoning; the whole text where there is none; null where the reasoning never ends."""
    answer = completion.rpartition(THINK_CLOSE)[2]
    return None if THINK_OPEN in answer else answer
