"""What an answer puts forward as final, and whether it does so in the form that its checks expect: for votes and for the share in form."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from distill.checks import Found, Given
from distill.checks.agreement import final_key
from distill.checks.final import bare, final_answer
from distill.checks.form import answer_of
from distill.checks.forms.final import is_final
from distill.checks.label import named_label
from distill.recipe.checks import Check
from distill.recipe.kinds import Label

_LONGEST = 200
"""Characters of a final answer that is kept as it is; a longer one is known by its digest."""

_OUT_OF_FORM: dict[str, frozenset[str]] = {
    "label": frozenset({"no_answer", "no_label", "several_labels"}),
    "number": frozenset({"no_answer", "no_number", "several_numbers"}),
    "text": frozenset({"no_answer", "pattern_not_found"}),
    "json": frozenset({"no_answer", "no_json", "against_schema"}),
    "tool_calls": frozenset({"no_answer", "call_not_readable", "no_call", "unknown_tool", "arguments_not_valid", "unknown_argument"}),
    "code": frozenset({"no_answer", "no_code"}),
}
"""Reasons by which a check says that it found nothing of the kind it looks for; what is wrong beyond that is in form."""

_VOTED = ("label", "math", "number", "text")
"""Checks whose answers can be equal without being the same text word for word."""


def final_of(given: Given, checks: Sequence[Check]) -> str | None:
    """The final answer in a spelling that equal ones share, whatever their case and marks; null where there is none, or none to be equal.

    Args:
        given: The answer.
        checks: Those that say what is right; the one of labels decides, else the first that looks for a final answer.
    """
    labels = labels_of(checks)
    if labels is not None:
        return named_label(given, labels)
    check = next((check for check in checks if check.kind in _VOTED and check.settings.asks_reference), None)
    if check is None:
        return None
    if check.label is not None:
        return named_label(given, check.label)
    text = _final_text(given.completion) if check.text is not None else final_key(given.completion) or ""
    if len(text) > _LONGEST:
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return text or None


def _final_text(completion: str) -> str:
    answer = answer_of(completion)
    return "" if answer is None else bare(final_answer(answer))


def in_form(given: Given, found: Mapping[str, Found], checks: Sequence[Check]) -> bool | None:
    """Whether an answer has a final part in the form that its checks expect; null where none of them expects one, or none could judge.

    Args:
        given: The answer.
        found: What each check found, by its name.
        checks: Those that say what is right.
    """
    looked = [check for check in checks if check.math is not None or (check.kind in _OUT_OF_FORM and found[check.called][0] is not None)]
    return all(_is_in_form(check, given, found[check.called][1]) for check in looked) if looked else None


def _is_in_form(check: Check, given: Given, reason: str) -> bool:
    if check.math is not None:  # it reads an answer wherever it stands: what is asked is that it is put forward
        return is_final(answer_of(given.completion) or "")
    right_without = check.tool_calls is not None and reason == "no_call" and not check.tool_calls.required
    return right_without or reason not in _OUT_OF_FORM[check.kind]


def labels_of(checks: Sequence[Check]) -> Label | None:
    """The check by one closed set of labels, the same for all prompts; null where there is none."""
    return next((check.label for check in checks if check.label is not None and check.label.choices is not None), None)
