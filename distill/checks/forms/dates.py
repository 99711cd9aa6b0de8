"""Dates and times of day, in the ways in which they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date

from distill.checks.forms import locales

_DIGITS = [
    re.compile(pattern)
    for pattern in (
        r"(?P<year>\d{4})([-/.])(?P<month>\d{1,2})\2(?P<day>\d{1,2})",
        r"(?P<year>\d{4})-(?P<month>0[1-9]|1[0-2])",
        r"(?:(?P<year>\d{4}) ?年 ?)?(?P<month>\d{1,2}) ?月 ?(?P<day>\d{1,2}) ?[日号號]",
        r"(?P<year>\d{4}) ?年 ?(?P<month>\d{1,2}) ?月",
        r"(?:(?P<year>\d{4}) ?년 ?)?(?P<month>\d{1,2}) ?월 ?(?P<day>\d{1,2}) ?일",
        r"(?P<year>\d{4}) ?년 ?(?P<month>\d{1,2}) ?월",
    )
]
_PART = re.compile(r"[^\W\d_][^\s\d,./()+-]*|\d+")
_BETWEEN = re.compile(r"[\s,./-]*")
_BESIDE = frozenset("st nd rd th er º ª the of le el il den o de del года року".split())  # noqa: SIM905
_LONGEST = 60
_SHORT = re.compile(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4})")
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?(?: ?(?P<half>[ap])\.?m\.?)?(?: ?(?:h|hrs|uhr|o'clock))?", re.IGNORECASE
)
_HOUR = re.compile(r"(?P<hour>\d{1,2}) ?(?:(?P<half>[ap])\.?m\.?|o'clock(?: ?(?P<other>[ap])\.?m\.?)?)", re.IGNORECASE)
_ELSEWHERE = re.compile(r"(?P<before>\D{2,20}?)? ?(?P<hour>\d{1,2}) ?(?P<sign>[:h點点時时시]) ?(?:(?P<minute>[0-5]?\d) ?[分분]?)?")
_NAMED = {"noon": 12, "12 noon": 12, "midnight": 0, "12 midnight": 0}


@dataclass(frozen=True)
class Day:
    """A date, of which the year or the day may not be said."""

    year: int | None
    month: int
    day: int | None


@dataclass(frozen=True)
class Clock:
    """A time of day."""

    hour: int
    minute: int
    second: int
    either: bool
    """Whether it may be before or after noon: an hour of 1 to 11 that says neither, nor begins with 0; a bare 12 is noon."""
    half: bool
    """Whether it is said in halves of a day."""

    def equals(self, other: Clock) -> bool:
        """Whether the times are the same, or one of them is the other without saying which half of the day."""
        if (self.hour, self.minute, self.second) == (other.hour, other.minute, other.second):
            return True
        mixed = (self.either and other.half) or (other.either and self.half)
        return mixed and (self.hour % 12, self.minute, self.second) == (other.hour % 12, other.minute, other.second)


def days(text: str) -> tuple[Day, ...]:
    """The dates that a plain text can mean: two where day and month are said by numbers of which either could be the month."""
    if len(text) > _LONGEST or not any(letter.isdigit() for letter in text):
        return ()
    for pattern in _DIGITS:
        if found := pattern.fullmatch(text):
            parts = found.groupdict()
            return _valid(_number(parts.get("year")), int(parts["month"]), _number(parts.get("day")))
    if found := _SHORT.fullmatch(text):
        first, year, third = int(found[1]), int(found[4]), int(found[3])
        day_first = _valid(year, third, first)
        return day_first if found[2] == "." else tuple(dict.fromkeys(_valid(year, first, third) + day_first))
    return _in_words(text)


def clock(text: str) -> Clock | None:
    """The time of day that a plain text is, or null."""
    if text.lower() in _NAMED:
        return Clock(_NAMED[text.lower()], 0, 0, False, True)
    if not any(letter.isdigit() for letter in text[:_LONGEST]):
        return None
    found = _CLOCK.fullmatch(text) or _HOUR.fullmatch(text)
    if found is not None:
        parts = found.groupdict()
        return _clock(parts["hour"], parts.get("minute"), parts.get("second"), (parts.get("half") or parts.get("other") or "").lower())
    found = _ELSEWHERE.fullmatch(text)
    if found is None:
        return None
    half = locales.halves_of_day().get(locales.folded(found["before"])) if found["before"] else ""
    if half is None or (found["sign"] in ":h" and (found["minute"] is None or (found["sign"] == ":" and not half))):
        return None
    return _clock(found["hour"], found["minute"], None, half)


def _clock(hour: str, minute: str | None, second: str | None, half: str) -> Clock | None:
    said = int(hour)
    if said > 23 or (half and not 1 <= said <= 12):
        return None
    either = not half and 1 <= said < 12 and not hour.startswith("0")
    in_day = said % 12 + (12 if half == "p" else 0) if half else said
    return Clock(in_day, int(minute or 0), int(second or 0), either, bool(half))


def _in_words(text: str) -> tuple[Day, ...]:
    """A date whose month is a name in some language, among words that belong to dates and at most a day and a year."""
    if text[0] in "-+" or text.replace(" ", "").isdigit() or _BETWEEN.sub("", _PART.sub("", text)):
        return ()
    parts = _PART.findall(text)
    words = [locales.folded(part) for part in parts if not part[0].isdigit()]
    if not words or len(parts) > 9:
        return ()
    named = [locales.months()[word] for word in words if word in locales.months()]
    beside = [word for word in words if word not in locales.months()]
    if len(named) != 1 or not all(word in _BESIDE or word in locales.date_words() for word in beside):
        return ()
    numbers = [part for part in parts if part[0].isdigit()]
    years, dates = [part for part in numbers if len(part) == 4], [part for part in numbers if len(part) < 3]
    if len(years) + len(dates) != len(numbers) or len(years) > 1 or len(dates) > 1 or not numbers:
        return ()
    return _valid(_number(years[0] if years else None), named[0], _number(dates[0] if dates else None))


def _number(digits: str | None) -> int | None:
    return None if digits is None else int(digits)


def _valid(year: int | None, month: int, day: int | None) -> tuple[Day, ...]:
    try:
        date(year or 2000, month, day or 1)
    except ValueError:
        return ()
    return (Day(year, month, day),)
