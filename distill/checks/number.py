"""Whether an answer is one number, with its unit or percent sign, and the right one. Digits are compared by their value, not as floats."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from distill.checks import Found, Given
from distill.checks.final import boxed, digit_of, final_answer, plain
from distill.checks.form import answer_of
from distill.recipe.kinds import Number

_LONGEST = 10_000
"""Characters at the end of an answer that are looked at."""
_MOST_DIGITS = 500
_LARGEST_EXPONENT = 1000  # of ten: what is written out for an exact comparison
_SPACES = "\u00a0\u2007\u2009\u202f\u200a"
_MINUS: dict[int, str] = str.maketrans(dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-") | {"\u066b": ".", "\u066c": ","})
_SIGN = r"(?<![\w.,])[+-]?"
_PLAIN = r"\d+(?:(?P<group>[, '])\d{3})?(?:(?P=group)\d{3})*(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"{_SIGN}[$€£¥₹]?\s?(?:(?P<fraction>\\[dt]?frac\{{?(?P<top>\d+)\}}?\{{?(?P<below>\d+)\}}?)|(?P<number>{_PLAIN})"
    r"(?:(?P<exponent>[eE][+-]?\d+)|\s*(?:\\times|\\cdot|\u00d7|x|\*|·)\s*10(?:\^|\*\*)\{?(?P<power>[+-]?\d+)\}?)?"
    r"(?:\s*/\s*(?P<over>\d+)(?![\w.]))?(?:\s?(?P<mixed>\d+)\s*/\s*(?P<of>\d+)(?![\w.]))?)"
)  # fmt: skip
_WORD = r"[^\W\d_](?:[^\W\d_]|[/^·*²³]|(?<=\^)-?\d)*(?:\s?/\s?[^\W\d_][^\W\d_²³]*)?"  # km, m^2, m/s
_UNIT = re.compile(rf"\s*(?P<unit>\\?%|per ?cent\b|{_WORD}|°\s?[CF]?|[$€£¥₹])?")
_EITHER = re.compile(r"\d\W*\s(?:or|oder|ou|o|or else)\s\W*\d")  # two guesses


class _Value(NamedTuple):
    """A number as it was written."""

    value: Fraction
    percent: bool
    unit: str
    """As text, folded; empty where there is none."""


def check_number(given: Given, settings: Number) -> Found:
    """Whether the number put forward as final is the reference's."""
    if given.reference is None:
        return None, "no_reference"
    wanted = _read(given.reference[:_LONGEST], settings.decimal)
    if len(wanted) != 1:
        return None, "reference_is_no_number"
    answer = answer_of(given.completion)
    if answer is None or not answer.strip():
        return False, "no_answer"
    answer = answer.strip()[-_LONGEST:]
    box = boxed(answer)
    found = _read(answer if box is None else plain(box), settings.decimal)
    if box is None and len(found) > 1:  # of a sentence what is put forward, else the last
        final = final_answer(answer)
        found = _read(final, settings.decimal)[0 if _EITHER.search(final) else -1 :] or found[-1:]
    if len(found) != 1:
        return False, "several_numbers" if found else "no_number"
    return _compare(found[0], wanted[0], settings)


def _compare(found: _Value, wanted: _Value, settings: Number) -> Found:
    if not _fits(found.unit, wanted.unit, settings.units):
        return False, "wrong_unit"
    right = wanted.value / 100 if wanted.percent else wanted.value
    readings = [found.value / 100 if found.percent else found.value]
    if wanted.percent and not found.percent:  # 12.5 is meant as 12.5 % where the reference is
        readings.append(found.value / 100)
    room = max(abs(right) * Fraction(settings.tolerance), Fraction(settings.absolute_tolerance) / (100 if wanted.percent else 1))
    return (True, "right") if any(abs(value - right) <= room for value in readings) else (False, "wrong_number")


def _fits(unit: str, wanted: str, names: list[str] | None) -> bool:
    """Whether an answer's unit may stand there: none, or that of the reference, or one of the names for it; any where neither is told."""
    if not unit:
        return True
    known = [_unit_form(name) for name in names or []]
    return unit in known if known else not wanted or unit == wanted


def _read(text: str, decimal: str) -> list[_Value]:
    """The numbers in a text, in their order, each with its unit."""
    text = _normal(text, decimal)
    found: list[_Value] = []
    place = 0
    while match := _NUMBER.search(text, place):
        place = max(match.end(), match.start() + 1)
        value = _value(match)
        if value is None:
            continue
        unit = _UNIT.match(text, match.end())
        raw = (unit and unit["unit"]) or ""
        if raw and unit and text[unit.end() : unit.end() + 1].isdigit():  # 5x5, 3rd2: no number with a unit
            continue
        percent = raw in ("%", "\\%") or raw.startswith("per")
        after = "" if percent else raw
        before = re.search(r"[$€£¥₹]", match.group())
        name = before.group() if before else after
        if name and not before and not _is_unit(name, text, match.end()):
            name = ""
        found.append(_Value(value, percent, _unit_form(name)))
        place = max(place, unit.end() if unit and raw and (percent or name) else place)
    return found


def _is_unit(name: str, text: str, end: int) -> bool:
    """Whether a word behind a number is its unit: nothing but marks follows it in the text. `5 apples are left` has none."""
    rest = text[end:].strip()
    return not rest.removeprefix(name).strip(" .!*$)]}\n")


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a number; null where it is too long to be written out."""
    sign = -1 if match.group().startswith("-") else 1
    if len(match.group()) > _MOST_DIGITS:
        return None
    if match["fraction"]:
        return sign * Fraction(int(match["top"]), int(match["below"])) if int(match["below"]) else None
    exponent = int(match["exponent"][1:] if match["exponent"] else match["power"] or 0)
    if abs(exponent) > _LARGEST_EXPONENT:
        return None
    value = Fraction(re.sub(r"[, ']", "", match["number"])) * Fraction(10) ** exponent
    for top, below, whole in ((None, match["over"], False), (match["mixed"], match["of"], True)):
        if below is None:
            continue
        if not int(below):
            return None
        value = value + Fraction(int(top), int(below)) if whole and top else value / int(below)
    return sign * value


def _normal(text: str, decimal: str) -> str:
    r"""Digits of ASCII, `.` before decimals, `,` between thousands, ½ as 1/2, and none of LaTeX's spaces."""
    text = re.sub(r"\\[,!; ]|\\(?:left|right|quad)\b|\{,\}", "", text)
    parts = []
    for sign in text:
        value = unicodedata.numeric(sign, None) if unicodedata.category(sign) == "No" and sign not in "²³¹" else None
        if value is not None and not unicodedata.normalize("NFKC", sign).isdecimal():
            shape = unicodedata.normalize("NFKC", sign).replace("\u2044", "/")
            parts.append(f" {shape}" if "/" in shape else sign)
        else:
            parts.append(" " if sign in _SPACES else digit_of(sign))
    text = "".join(parts).translate(_MINUS)
    text = "".join(unicodedata.normalize("NFKC", sign) if "\uff01" <= sign <= "\uff5e" else sign for sign in text)
    return text if decimal == "." else text.translate(str.maketrans(",.", ".,"))


def _unit_form(name: str) -> str:
    """A unit as text: case counts, since mW is no MW."""
    return re.sub(r"[\s^{}]", "", unicodedata.normalize("NFKC", plain(name))).rstrip(".")
