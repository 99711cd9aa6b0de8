"""Dates and times of day, in the ways in which they are written."""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass
from datetime import date

_MONTHS = {name.lower(): number for names in (calendar.month_name, calendar.month_abbr) for number, name in enumerate(names) if name}
_MONTHS["sept"] = 9
_MONTH = rf"(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\.?"
_WEEKDAY = rf"(?:(?:{'|'.join([*calendar.day_name, *calendar.day_abbr])})\.?,? )?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_WRITTEN = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<year>\d{4})([-/.])(?P<digits>\d{1,2})\2(?P<day>\d{1,2})",
        r"(?P<year>\d{4})-(?P<digits>0[1-9]|1[0-2])",
        r"(?P<year>\d{4}) ?年 ?(?P<digits>\d{1,2}) ?月 ?(?P<day>\d{1,2}) ?[日号]",
        r"(?P<year>\d{4}) ?년 ?(?P<digits>\d{1,2}) ?월 ?(?P<day>\d{1,2}) ?일",
        rf"{_WEEKDAY}{_MONTH} (?:the )?{_DAY}(?:,? {_YEAR})?",
        rf"{_WEEKDAY}(?:the )?{_DAY}(?: of)?[ -]{_MONTH}(?:[, -]{{1,2}}{_YEAR})?",
        rf"{_MONTH},? {_YEAR}",
    )
]
_SHORT = re.compile(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4})")
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?(?: ?(?P<half>[ap])\.?m\.?)?(?: ?(?:h|hrs|uhr|o'clock))?", re.IGNORECASE
)
_HOUR = re.compile(r"(?P<hour>\d{1,2}) ?(?:(?P<half>[ap])\.?m\.?|o'clock(?: ?(?P<other>[ap])\.?m\.?)?)", re.IGNORECASE)


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
    """Whether it may be before or after noon: an hour up to twelve that says neither, nor begins with 0."""
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
    for pattern in _WRITTEN:
        if found := pattern.fullmatch(text):
            parts = found.groupdict()
            month = int(parts["digits"]) if parts.get("digits") else _MONTHS[parts["month"].lower()]
            return _valid(_number(parts.get("year")), month, _number(parts.get("day")))
    if found := _SHORT.fullmatch(text):
        first, year, third = int(found[1]), int(found[4]), int(found[3])
        day_first = _valid(year, third, first)
        return day_first if found[2] == "." else tuple(dict.fromkeys(_valid(year, first, third) + day_first))
    return ()


def clock(text: str) -> Clock | None:
    """The time of day that a plain text is, or null."""
    found = _CLOCK.fullmatch(text) or _HOUR.fullmatch(text)
    if found is None:
        return None
    parts = found.groupdict()
    hour, half = int(parts["hour"]), (parts.get("half") or parts.get("other") or "").lower()
    if hour > 23 or (half and not 1 <= hour <= 12):
        return None
    either = not half and 1 <= hour <= 12 and not parts["hour"].startswith("0")
    hour = hour % 12 + (12 if half == "p" else 0) if half else hour
    return Clock(hour, int(parts.get("minute") or 0), int(parts.get("second") or 0), either, bool(half))


def _number(digits: str | None) -> int | None:
    return None if digits is None else int(digits)


def _valid(year: int | None, month: int, day: int | None) -> tuple[Day, ...]:
    try:
        date(year or 2000, month, day or 1)
    except ValueError:
        return ()
    return (Day(year, month, day),)
