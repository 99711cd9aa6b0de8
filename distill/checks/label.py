"""Whether an answer names the right one of a closed set: its text, its letter, or both; and no second one."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

from distill.checks import Found, Given
from distill.checks.final import bare, boxed, folded, plain
from distill.checks.form import answer_of
from distill.recipe.kinds import Label

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_FIRST = re.compile(r"^\W*([A-Z])\s*[):.\-–—]+\s*(?=\S)")  # noqa: RUF001
_INSIDE = re.compile(r"(?<![A-Za-z0-9_À-ɏ'’\\])\(?([A-Z])\)?(?![A-Za-z0-9_À-ɏ'’])")  # noqa: RUF001
_ARTICLE = re.compile(r"\s+[a-z]")
_NEGATED = re.compile(  # in the languages that data sets of labels are in most often; up to the label, in one clause
    r"(?:\b(?:not|never|neither|nor|non|no|\w*n\Wt|nicht|keine?[nrms]?|weder|pas|aucune?|ningun[ao]?|ningún|nunca|não|не|ليست?|غير|नहीं)"
    r"|不是|非|并非|不属于)(?:[\s\-]+(?:an?|the|really|actually|any|du|de|une?|un[ao]?|eine?[nrms]?|das|der|die))*[^\w.,;:!?\n]*$"
)
_POINTED = re.compile(r"(?:answer|option|choice|letter)(?:\s+is)?\W*$", re.IGNORECASE)


def check_label(given: Given, settings: Label) -> Found:
    """Whether the answer names the reference's label and no other; null where the reference or the choices can't be read."""
    choices = settings.choices if settings.column is None else _listed(given.fields.get(settings.column))
    if not choices:
        return None, "no_choices"
    if given.reference is None:
        return None, "no_reference"
    lettered = settings.column is not None
    right = _right(given.reference, choices, settings.numbered_from, lettered)
    if right is None:
        return None, "reference_is_no_choice"
    named = _put_forward(given.completion, choices, settings)
    if named is None:
        return False, "no_answer"
    if len(named) != 1:
        return False, "several_labels" if named else "no_label"
    return (True, "right") if named == {right} else (False, "wrong_label")


def named_label(given: Given, settings: Label) -> str | None:
    """The one label that an answer names, whether it is right or not, as the choices have it; null for none and for several."""
    choices = settings.choices if settings.column is None else _listed(given.fields.get(settings.column))
    named = _put_forward(given.completion, choices, settings) if choices else None
    return choices[named.pop()] if choices and named and len(named) == 1 else None


def right_label(reference: str | None, settings: Label) -> str | None:
    """The label that a reference means, where all prompts have the same choices; null where it is none of them."""
    if reference is None or settings.choices is None:
        return None
    place = _right(reference, settings.choices, settings.numbered_from, lettered=False)
    return None if place is None else settings.choices[place]


def _put_forward(completion: str, choices: list[str], settings: Label) -> set[int] | None:
    """The places of the choices that an answer puts forward; null where there is no answer."""
    answer = answer_of(completion)
    if answer is None or not answer.strip():
        return None
    box = boxed(answer)
    said = plain(unicodedata.normalize("NFKC", answer if box is None else box))
    place = _place_of(said, len(choices), settings.numbered_from)
    named = _named(said, tuple(choices), settings.column is not None) if place is None else {place}
    return set() if len(named) == 1 and _is_negated(said, tuple(choices)) else named


def _listed(value: Any) -> list[str] | None:
    """Choices as a column holds them: a list, or an object whose values are the choices."""
    values = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(values, list) or not values or len(values) > len(_LETTERS):
        return None
    return [str(choice) for choice in values] if all(isinstance(choice, str | int | float) for choice in values) else None


def _right(reference: str, choices: list[str], numbered_from: int | None, lettered: bool) -> int | None:
    """The place of the choice that a reference means: by its text, else its number, else its letter, alone or before its text."""
    wanted = bare(reference)
    texts = [bare(choice) for choice in choices]
    if numbered_from is not None and reference.strip().isdecimal():
        return _place_of(reference.strip(), len(choices), numbered_from)
    if wanted in texts:
        return texts.index(wanted)
    named = _named(plain(reference), tuple(choices), lettered) if lettered else set()
    return named.pop() if len(named) == 1 else None


def _place_of(text: str, count: int, numbered_from: int | None) -> int | None:
    """The place that a number alone means; null where the choices have no numbers, or not this one."""
    number = text.strip().strip("().")
    if numbered_from is None or not number.isdecimal():
        return None
    place = int(number) - numbered_from
    return place if 0 <= place < count else None


def _is_negated(text: str, choices: tuple[str, ...]) -> bool:
    """Whether a label stands behind a `not`: `This is not spam.` names no spam."""
    if bare(text) in _places(choices):
        return False
    line = folded(text)
    return any(_NEGATED.search(line[: found.start()]) for found in _pattern(choices).finditer(line))


def _named(text: str, choices: tuple[str, ...], lettered: bool) -> set[int]:
    """The places of the choices that a text names."""
    exact = _places(choices).get(bare(text))
    if exact is not None:
        return {exact}
    if lettered:
        alone = _ALONE.match(text)
        if alone:
            return _of_letter(alone[1].upper(), choices)
        first = _FIRST.match(text)
        if first:
            rest = text[first.end() :]
            return _of_letter(first[1], choices) | _in_text(rest, choices)
    return _in_text(text, choices) | (_in_letters(text, choices) if lettered else set())


def _of_letter(letter: str, choices: tuple[str, ...]) -> set[int]:
    place = _LETTERS.index(letter)
    return {place} if place < len(choices) else set()


def _in_text(text: str, choices: tuple[str, ...]) -> set[int]:
    places = _places(choices)
    return {places[found.group()] for found in _pattern(choices).finditer(folded(text))}


def _in_letters(text: str, choices: tuple[str, ...]) -> set[int]:
    """Choices named by a capital that stands alone; not an article, nor the speaker."""
    found: set[int] = set()
    for match in _INSIDE.finditer(text):
        letter, bracketed = match[1], match.group() != match[1]
        pointed = bracketed or _POINTED.search(text[: match.start()])
        if letter in "AI" and not pointed and _ARTICLE.match(text[match.end() :]):
            continue
        found |= _of_letter(letter, choices)
    return found


@lru_cache(maxsize=64)
def _places(choices: tuple[str, ...]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, choice in enumerate(choices):
        for form in (folded(choice), bare(choice)):
            places.setdefault(form, place)
    return places


@lru_cache(maxsize=64)
def _pattern(choices: tuple[str, ...]) -> re.Pattern[str]:
    """Finds any choice as whole words, the longest first, so that `refund status` is no `refund`."""
    forms = sorted(_places(choices), key=len, reverse=True)
    return re.compile("|".join(f"{_edge(form[0], '<')}{re.escape(form)}{_edge(form[-1], '')}" for form in forms if form) or r"(?!)")


def _edge(sign: str, behind: str) -> str:
    """Where a word must begin or end; in scripts without spaces between words, and beside signs, anywhere."""
    is_word = (sign.isalnum() or sign == "_") and unicodedata.category(sign) != "Lo"
    return rf"(?{behind}!\w)" if is_word else ""
