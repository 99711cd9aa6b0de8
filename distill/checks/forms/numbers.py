r"""Numbers as they are written: `-1,234.5`, `1.2e5`, `6.6\times10^{-34}`, `7/3`, `2 1/3`, `0.\overline{3}`, `1011_2`, `2^{10}`.

A number that is only written, not computed, is kept digit for digit: neither its length nor its exponent costs anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from distill.checks.forms.words import spelled

TOLERANCE = Fraction(1, 10**9)
"""Relative, where one side is a decimal and the other had to be computed."""
_SIZE = 4000  # digits of a number that is worked with; a longer one equals only its own digits

_SIGN = re.compile(r"[-+]\s*|(?:minus|negative)\s+(?=[\d.\\])", re.IGNORECASE)
_WHOLE = (
    r"\d{1,3}(?:,\d{3})+(?![\d])|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
    r"|\d{1,3}(?: \d{3})+(?!\d)|\d{1,3}(?:'\d{3})+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?![\d.])|\d+"
)
_POWER = r"(?:[eE](?P<e>[+-]?\d+)(?!\d)| ?(?:\\times|\\cdot|\*|x) ?10 ?(?:\^|\*\*) ?(?:\{ ?(?P<p>[+-]? ?\d+) ?\}|(?P<q>[+-]?\d+)))?"
_LITERAL = re.compile(rf"(?P<whole>{_WHOLE})?(?:\.(?P<part>\d+)(?!\d)|\.(?!\d))?{_POWER}")
_TEN = re.compile(r"10 ?\^ ?(?:\{ ?([+-]? ?\d+) ?\}|([+-]?\d+))(?![\d.])")
_DECIMAL_COMMA = re.compile(r"(\d{1,3}(?:\.\d{3})*|\d{1,3}(?: \d{3})+|\d+),(\d+)")
_SLASHED = re.compile(r"(?:\\frac ?\{ ?(-?[\d.,]+) ?\} ?\{ ?(-?[\d.,]+) ?\}|(\d[\d.]*) ?/ ?(\d[\d.]*))(?![\d.])")
_MIXED = re.compile(r"(\d+)(?: ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}| (?:and )?(\d+) ?/ ?(\d+))(?![\d.])")
_REPEATING = re.compile(r"(\d*)\.(?:(\d*)(?:\\overline|\\bar|\\dot) ?\{ ?(\d+) ?\}|(?:(?<=^0\.)(\d*))?\((\d+)\))")
_INTEGER_POWER = re.compile(r"(\d{1,9}) ?(?:\^|\*\*) ?(?:\{ ?(-?\d{1,6}) ?\}|(-?\d{1,6}))(?![\d.])")
_BASE = re.compile(
    r"\(?([0-9][0-9A-Za-z]*|[0-9A-F]{2,}|[0-9a-f]{2,}(?= ?_ ?\{? ?\(?16))\)?"
    r" ?(?:_ ?\{? ?|\(?base )\(?(\d{1,2}|two|eight|ten|twelve|sixteen)\)? ?\}?"
)
_BASES = {"two": 2, "eight": 8, "ten": 10, "twelve": 12, "sixteen": 16}
_PREFIXED = {"0b": 2, "0o": 8, "0x": 16}


@dataclass(frozen=True)
class Number:
    """A rational number: the digits that are written where there are any, else its value."""

    value: Fraction | None
    """Null for one whose digits or exponent are too many to work with."""
    digits: str | None = None
    """Sign, significant digits and exponent of ten; null where the number had to be computed."""

    @property
    def is_decimal(self) -> bool:
        """Whether it was written with digits after the point, so that it may be rounded."""
        return self.digits is not None and (self.value is None or self.value.denominator != 1)

    def scaled(self, factor: Fraction | int) -> Number:
        """So many times the number, computed."""
        return Number(None if self.value is None else self.value * factor)


def equal(one: Number, other: Number) -> bool:
    """Whether two numbers are the same: exactly where both are written, or both computed."""
    if one.digits is not None and other.digits is not None:
        return one.digits == other.digits
    if one.value is None or other.value is None:
        return False
    return one.value == other.value or (one.is_decimal != other.is_decimal and close(one.value, other.value))


def close(one: Fraction, other: Fraction) -> bool:
    """Whether two values differ by no more than rounding."""
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))


def number(text: str) -> Number | None:
    """The number that a plain text is, or null."""
    found = leading(text)
    if found is not None and not found[1]:
        return found[0]
    return _based(text) or _named(text)


def leading(text: str) -> tuple[Number, str] | None:
    """The number that a plain text begins with, as long as possible, and the rest of the text; null where there is none."""
    body = text.lstrip()
    sign = _SIGN.match(body)
    negative = sign is not None and sign.group()[0] != "+"
    body = body[sign.end() :] if sign else body
    for reader in (_mixed, _slashed, _repeating, _ten, _power, _literal):
        found = reader(body)
        if found is not None:
            value, rest = found
            return (_negated(value) if negative else value), rest
    return None


def with_decimal_comma(text: str) -> Number | None:
    """The number that a plain text is where a comma stands before its decimals: `3,14`, `1.234,5`, not `1,500`."""
    sign = "-" if text.startswith("-") else ""
    found = _DECIMAL_COMMA.fullmatch(text.removeprefix("-"))
    if found is None or (len(found[2]) == 3 and not found[1].startswith("0") and found[1].isdigit()):
        return None
    return number(f"{sign}{re.sub('[. ]', '', found[1])}.{found[2]}")


def written(negative: bool, whole: str, part: str, exponent: str) -> Number:
    """The number of a sign, digits before and after the point, and an exponent of ten."""
    digits = (whole + part).lstrip("0")
    kept = digits.rstrip("0")
    if not kept:
        return Number(Fraction(0), "0")
    if len(exponent) > 18:
        return Number(None, f"{'-' * negative}{whole}.{part}e{exponent}")
    power = int(exponent or "0") - len(part) + len(digits) - len(kept)
    is_small = len(kept) + abs(power) < _SIZE
    value = (-1 if negative else 1) * Fraction(int(kept)) * Fraction(10) ** power if is_small else None
    return Number(value, f"{'-' * negative}{kept}e{power}")


def exactly(value: Fraction) -> Number:
    """A number that is said in words: a whole one counts as written in digits."""
    return written(value < 0, str(abs(value)), "", "") if value.denominator == 1 else Number(value)


def _negated(value: Number) -> Number:
    if value.digits == "0":
        return value
    return Number(None if value.value is None else -value.value, None if value.digits is None else f"-{value.digits}")


def _literal(text: str) -> tuple[Number, str] | None:
    found = _LITERAL.match(text)
    if found is None or (found["whole"] is None and found["part"] is None):
        return None
    rest = text[found.end() :]
    if found["whole"] and re.match(r"[,.']\d", rest):  # digits go on in a way that is no number
        return None
    whole = re.sub(r"[ ,'.]", "", found["whole"] or "")
    exponent = (found["e"] or found["p"] or found["q"] or "").replace(" ", "")
    return written(False, whole, found["part"] or "", exponent), rest


def _ten(text: str) -> tuple[Number, str] | None:
    found = _TEN.match(text)
    return None if found is None else (written(False, "1", "", (found[1] or found[2]).replace(" ", "")), text[found.end() :])


def _power(text: str) -> tuple[Number, str] | None:
    found = _INTEGER_POWER.match(text)
    if found is None:
        return None
    base, exponent = int(found[1]), int(found[2] or found[3])
    if (exponent < 0 and not base) or abs(exponent) * len(found[1]) > _SIZE:
        return None
    return Number(Fraction(base) ** exponent), text[found.end() :]


def _slashed(text: str) -> tuple[Number, str] | None:
    found = _SLASHED.match(text)
    if found is None:
        return None
    above, below = number(found[1] or found[3]), number(found[2] or found[4])
    value = None if above is None or below is None else _quotient(above, below)
    return None if value is None else (value, text[found.end() :])


def _mixed(text: str) -> tuple[Number, str] | None:
    found = _MIXED.match(text)
    if found is None:
        return None
    part = _quotient(written(False, found[2] or found[4], "", ""), written(False, found[3] or found[5], "", ""))
    whole = written(False, found[1], "", "")
    if part is None or part.value is None or whole.value is None or part.value >= 1:
        return None
    return Number(whole.value + part.value), text[found.end() :]


def _quotient(above: Number, below: Number) -> Number | None:
    if above.value is None or not below.value:
        return None
    return Number(above.value / below.value)


def _repeating(text: str) -> tuple[Number, str] | None:
    found = _REPEATING.match(text)
    if found is None or len(found.group()) > _SIZE:
        return None
    whole, first, again = found[1], found[2] or found[4] or "", found[3] or found[5]
    ones = Fraction(int(again), 10 ** len(again) - 1)
    return Number(int(whole or 0) + (int(first or 0) + ones) / 10 ** len(first)), text[found.end() :]


def _based(text: str) -> Number | None:
    negative, body = text.startswith("-"), text.removeprefix("-").strip()
    found = _BASE.fullmatch(body)
    try:
        if found is not None:
            base = _BASES.get(found[2]) or int(found[2])
            value = int(found[1], base) if 2 <= base <= 36 else None
        else:
            value = int(body[2:], _PREFIXED[body[:2].lower()]) if body[:2].lower() in _PREFIXED and body.isalnum() else None
    except ValueError:  # a digit that the base does not have
        return None
    return None if value is None else Number(Fraction(-value if negative else value))


def _named(text: str) -> Number | None:
    found = spelled(text)
    return None if found is None or found[1] else exactly(found[0])
