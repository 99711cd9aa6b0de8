"""Whether an answer is the right text, has it inside, fits a pattern, or is a piece of a context."""

from __future__ import annotations

import json
import re

from distill.checks import Found, Given
from distill.checks.final import bare, final_answer, folded
from distill.checks.form import answer_of
from distill.recipe.kinds import Text

_ARTICLE = "ال"
_BEFORE, _BEFORE_ARTICLE = "[وف]?[بكل]?", "[وف]?(?:[بك]?ال|لل)"
"""Of Arabic the words for and, so, in, as and to, which are written as one with the word behind them, and with its article."""


def check_text(given: Given, settings: Text) -> Found:
    """Whether the answer is right in every way that is asked. May never return, for a pattern that goes round in circles."""
    wanted = references_of(given.reference)
    if settings.asks_reference and not wanted:
        return None, "no_reference"
    answer = answer_of(given.completion)
    if answer is None or not answer.strip():
        return False, "no_answer"
    if settings.pattern is not None and not _fits(answer.strip(), settings.pattern, wanted):
        return False, "pattern_not_found"
    if settings.context is not None:
        context = given.fields.get(settings.context)
        if not isinstance(context, str):
            return None, "no_context"
        if not any(_form(part, settings.exact) in _form(context, settings.exact) for part in _candidates(answer)):
            return False, "not_in_context"
    if settings.reference == "ignore":
        return True, "fits"
    compare = _equal if settings.reference == "equal" else _contains
    right = any(compare(answer, reference, settings.exact) for reference in wanted)
    return (True, "right") if right else (False, "wrong_text")


def references_of(reference: str | None) -> list[str]:
    """The right answers: those of a JSON list, else the one text; none where there is none."""
    if reference is None:
        return []
    if reference.lstrip().startswith("["):
        try:
            found = json.loads(reference)
        except (ValueError, RecursionError):
            return [reference]
        if isinstance(found, list) and all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in found):
            return [str(item) for item in found]
    return [reference]


def _candidates(answer: str) -> list[str]:
    """What may be meant as the answer: all of it, or what is put forward as final."""
    return [answer.strip(), final_answer(answer)]


def _equal(answer: str, reference: str, exact: bool) -> bool:
    return _form(reference, exact) in [_form(part, exact) for part in _candidates(answer)]


def _contains(answer: str, reference: str, exact: bool) -> bool:
    if exact:
        return reference.strip() in answer
    text, wanted = folded(answer), bare(reference)
    if wanted.startswith(_ARTICLE):
        return re.search(rf"\b{_BEFORE_ARTICLE}{re.escape(wanted.removeprefix(_ARTICLE))}\b", text) is not None
    if _is_arabic(wanted[:1]) and " " in wanted:  # one word alone is too often the end of another
        return re.search(rf"\b{_BEFORE}{re.escape(wanted)}\b", text) is not None
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not (_joined(text, start) or _joined(text, end)):
            return True
        start = text.find(wanted, start + 1)
    return False


def _joined(text: str, place: int) -> bool:
    """Whether a word goes on across a place; scripts without spaces between words part anywhere, Arabic from a number (`1904م`)."""
    if not 0 < place < len(text):
        return False
    left, right = text[place - 1], text[place]
    if left.isdecimal() != right.isdecimal() and (_is_arabic(left) or _is_arabic(right)):
        return False
    return left.isalnum() and right.isalnum() and left < "\u0e00" and right < "\u0e00"


def _is_arabic(sign: str) -> bool:
    return "\u0620" <= sign <= "\u064a"


def _form(text: str, exact: bool) -> str:
    return text.strip() if exact else bare(text)


def _fits(answer: str, pattern: str, references: list[str]) -> bool:
    patterns = [pattern.replace("{reference}", re.escape(reference)) for reference in references] if "{reference}" in pattern else [pattern]
    return any(re.search(each, answer, re.MULTILINE) for each in patterns)
