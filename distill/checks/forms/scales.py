"""Words behind a number that belong to its value: those that multiply or divide it, powers, factorials, letters of mathematics."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from distill.checks.forms import locales
from distill.checks.forms.plain import as_words
from distill.checks.forms.words import PARTS, SCALES

GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi omega".split()  # noqa: SIM905
)
"""Names of letters; without psi, which is a unit of pressure."""
POWERS = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}
"""What is done to the number before a word, as mathematics writes it."""
_ENGLISH = {**SCALES, "ten": 10, "dozen": 12, "lakh": 10**5, "crore": 10**7, "bn": 10**9}
_OTHER = {"十": 10, "百": 100, "千": 1000, "मिलियन": 10**6, "बिलियन": 10**9, "ट्रिलियन": 10**12}
"""What CLDR does not count by."""
_LONGEST = 3  # words of a name
_RUNNING = ("CJK", "HANGUL", "THAI")
_OF = re.compile(r"^(?:d'|d[ei] |of )")
_FIRST = re.compile(r"\S+")


def scaled(rest: str) -> tuple[Fraction, str]:
    """What the words at the beginning of a text multiply the number before it by, and the rest of the text.

    Args:
        rest: What follows a number.
    """
    factor = Fraction(1)
    words = as_words(rest)
    while words and (found := _first(words)) is not None:
        factor, words = factor * found[0], words[found[1] :].lstrip(" .")
    return factor, _OF.sub("", words) if factor != 1 else rest


def divisor_in(word: str, *, is_one: bool) -> int | None:
    """What a fraction word divides the number before it by; null where it is none, or is not in the plural that the number wants.

    Args:
        word: Such as `quarters`.
        is_one: Whether the number is 1.
    """
    return PARTS.get(word.lower()) if word.lower().endswith(("s", "halves")) is not is_one else None


def is_value_word(rest: str) -> bool:
    """Whether what follows a number is no unit, but begins with a word that belongs to its value."""
    words = rest.lower().split()
    if not words or _is_unit(rest):
        return False
    if all(word in GREEK or len(word) == 1 for word in words) and words[0] in GREEK:
        return True
    return words[0] in POWERS or (len(words) == 1 and words[0] in PARTS) or _first(rest) is not None


def _first(text: str) -> tuple[int, int] | None:
    """The scale that a text begins with and where it ends; null where it begins with none, or is a unit as a whole."""
    if _is_unit(text):
        return None
    ends = [found.end() for found in _FIRST.finditer(text)][:_LONGEST]
    for end in reversed(ends):
        name = locales.folded(text[:end])
        if (factor := _factor(name)) is not None:
            return factor, end
    if text[0].isascii() or not unicodedata.name(text[0], "").startswith(_RUNNING):
        return None
    for end in (4, 3, 2, 1):  # letters of a name in a script without spaces
        if (factor := _factor(text[:end])) is not None:
            return factor, min(end, len(text))
    return None


def _factor(name: str) -> int | None:
    return _ENGLISH.get(name) or _ENGLISH.get(name.removesuffix("s")) or _OTHER.get(name) or locales.scales().get(name)


def _is_unit(text: str) -> bool:
    """Whether a text is a name of a unit in some language, such as 千克."""
    return not text.isascii() and locales.folded(text) in locales.units()
