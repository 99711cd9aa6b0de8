"""Numbers in words: `twenty-one`, `two thirds`, `two and a half`, and those of Chinese and Japanese."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty"
)
_VALUES = {name: number for number, name in enumerate(_ONES.split())} | {
    name: ten * 10
    for ten, name in enumerate("thirty forty fifty sixty seventy eighty ninety".split(), start=3)  # noqa: SIM905
}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
_PARTS |= {"twelfth": 12, "sixteenth": 16, "twentieth": 20, "hundredth": 100, "thousandth": 1000, "millionth": 10**6, "billionth": 10**9}
PARTS = {name + "s": number for name, number in _PARTS.items()} | {"halves": 2} | _PARTS
_MINUS = frozenset(("minus", "negative"))
_WORD = re.compile(r"([a-z]+)(?:[\s-]+|$)", re.IGNORECASE)
_HAN = frozenset("〇零一二三四五六七八九十百千万萬亿億两兩")


def spelled(text: str) -> tuple[Fraction, str] | None:
    """The number in words that a text begins with, and the rest of the text; null where it begins with none."""
    if text[:1] in _HAN:  # behind one there may be a name: a kingdom of three, a hundred degrees
        return _han(text) if set(text) <= _HAN else None
    words: list[str] = []
    ends, place = [0], 0
    while (found := _WORD.match(text, place)) and len(words) < 20 and _is_known(found[1].lower()):
        words.append(found[1].lower())
        place = found.end()
        ends.append(place)
    sign = -1 if words[:1] and words[0] in _MINUS else 1
    for count in range(len(words), 0, -1):
        value = _value(words[sign < 0 : count])
        if value is not None:
            rest = text[ends[count] :]
            return None if rest and spelled(rest) is not None else (sign * value, rest)
    return None


def _is_known(word: str) -> bool:
    return word in _VALUES or word in SCALES or word in PARTS or word in _MINUS or word in ("a", "and")


def _value(words: list[str]) -> Fraction | None:
    """The number that all the words are, or null."""
    if words == ["half"]:
        return Fraction(1, 2)
    if len(words) > 1 and words[-1] in PARTS:
        above, denominator = words[:-1], PARTS[words[-1]]
        if "and" in above:
            cut = len(above) - 1 - above[::-1].index("and")
            whole, part = _whole(above[:cut]), _value([*above[cut + 1 :], words[-1]])
            return None if whole is None or part is None or part >= 1 else whole + part
        count = 1 if above == ["a"] else _whole(above)
        is_one = words[-1] in _PARTS
        return None if count is None or is_one != (count == 1) else Fraction(count, denominator)
    whole = _whole(words)
    return None if whole is None else Fraction(whole)


def _whole(words: list[str]) -> int | None:
    """A whole number: ones after tens, hundreds after ones, each scale smaller than the one before."""
    total, group, last, smallest = 0, 0, "", 10**15
    for place, word in enumerate(words):
        if word == "and":
            if place == len(words) - 1 or last not in SCALES:
                return None
        elif word in _VALUES:
            value = _VALUES[word]
            if last in _VALUES and not (_VALUES[last] >= 20 and 0 < value < 10):
                return None
            group += value
        elif word == "hundred" and last in _VALUES and 0 < group < 100:
            group *= 100
        elif word in SCALES and word != "hundred" and group and SCALES[word] < smallest:
            smallest = SCALES[word]
            total, group = total + group * smallest, 0
        else:
            return None
        last = word if word != "and" else last + " and"
    return total + group if words else None


def _han(text: str) -> tuple[Fraction, str] | None:
    """A number in Chinese characters: digits before ten, hundred, thousand; those before ten thousand and its powers."""
    length = next((place for place, letter in enumerate(text) if letter not in _HAN), len(text))
    total = group = 0
    digit = None
    for letter in text[:length]:
        value = int(unicodedata.numeric({"两": "二", "兩": "二", "萬": "万", "億": "亿"}.get(letter, letter)))
        if value < 10:
            if digit:
                return None  # digits in a row: a year, a telephone number
            digit = value
        elif value < 10_000:
            group, digit = group + (1 if digit is None or digit == 0 else digit) * value, None
        else:
            total, group, digit = (total + group + (digit or 0)) * value, 0, None
    return Fraction(total + group + (digit or 0)), text[length:]
