"""Whether a trace reasons as it is asked to: it must, it may, or it must not."""

from __future__ import annotations

from distill.checks import Found, Given
from distill.checks.form import check_think
from distill.data.texts import is_blank
from distill.recipe.kinds import Think
from distill.run.schema import THINK_CLOSE, THINK_OPEN


def check_thinking(given: Given, settings: Think) -> Found:
    """Whether reasoning stands where it should, with an answer after it."""
    completion = given.completion
    if settings.reasoning == "always" or (settings.reasoning == "optional" and _reasons(completion)):
        _, passed, reason = check_think(completion)
        return passed, reason
    if _reasons(completion):
        return False, "has_reasoning"
    return (False, "no_answer") if is_blank(completion) else (True, "without_reasoning")


def _reasons(completion: str) -> bool:
    return THINK_OPEN in completion or THINK_CLOSE in completion
