"""Names of months, days, units and money, and the words of lists, in many languages, as Unicode's CLDR has them (by babel).

A name that means two things in two languages is left out, unless English has it. Loading takes a third of a second, once a process.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar, cast

Meaning = TypeVar("Meaning")

LANGUAGES = (
    "en es fr de it pt nl pl ru uk ar hi bn zh zh_Hant ja ko tr vi id sv da nb fi cs sk hu ro el he fa th".split()  # noqa: SIM905
)
_CODES = ("USD", "EUR", "GBP", "CNY", "JPY", "INR", "KRW", "RUB", "CHF", "BRL")
_PERIODS = {"am": "a", "pm": "p", "morning2": "a", "afternoon2": "p"}  # the last two are what Chinese calls them
_RARE = re.compile(
    r"-person$|-jp|imperial|scandinavian|cloth|^graphics|^temperature-generic|^concentr-(?!percent$)|-of-|^light|-metric$|^(?:per|times|power|10)"
)


@lru_cache(maxsize=1)
def months() -> dict[str, int]:
    """Numbers of months by their names and short names."""
    return _certain(lambda data: ((name, number) for number, name in _named(data, "months") if not re.search(r"\d", name)))


@lru_cache(maxsize=1)
def date_words() -> frozenset[str]:
    """What may stand in a date beside the month: days of the week, and words such as `de` in Spanish."""
    words = {name for data in _all() for _, name in _named(data, "days") if len(name) > 2 or not name.isascii()}
    for data in _all():
        for form in ("long", "full"):
            words.update(re.findall(r"'([^']+)'", data["date_formats"][form].pattern))
    return frozenset(word for found in words for word in folded(found).split())


@lru_cache(maxsize=1)
def halves_of_day() -> dict[str, str]:
    """`a` and `p` by the words for before and after noon in other scripts."""

    def named(data: Any) -> Iterator[tuple[str, str]]:
        for names in data["day_periods"]["format"].values():
            yield from ((names[key], half) for key, half in _PERIODS.items() if key in names and not names[key].isascii())

    return _certain(named)


@lru_cache(maxsize=1)
def units() -> dict[str, str]:
    """Units as pint spells most of them, by their names."""

    def named(data: Any) -> Iterator[tuple[str, str]]:
        for unit, lengths in data["unit_patterns"].items():
            for length, forms in lengths.items() if not _RARE.search(unit) else ():
                names = {folded(str(pattern).replace("{0}", " ")) for number, pattern in forms.items() if number != "per"}
                for name in names:
                    if "{" not in name and (len(name) > 2 if name.isascii() else name) and (length == "long" or not name.isascii()):
                        yield name, _as_pint(unit)

    return _certain(named)


@lru_cache(maxsize=1)
def money() -> dict[str, str]:
    """Codes of money by its names."""

    def named(data: Any) -> Iterator[tuple[str, str]]:
        for code in _CODES:
            yield data["currency_names"].get(code, code), code
            yield from ((name, code) for name in data.get("currency_names_plural", {}).get(code, {}).values())

    return _certain(named)


@lru_cache(maxsize=1)
def scales() -> dict[str, int]:
    """What a word for thousands, millions and so on multiplies the number before it by: full names before short ones."""

    def named(kind: str) -> Callable[[Any], Iterator[tuple[str, int]]]:
        def of(data: Any) -> Iterator[tuple[str, int]]:
            for forms in data["compact_decimal_formats"][kind].values():
                for power, pattern in forms.items():
                    text = "".join(letter for letter in pattern.pattern.replace("'", "") if unicodedata.category(letter) != "Cf")
                    name = folded(text.replace("0", ""))
                    if len(name) > 2 or (name and not name.isascii()):
                        yield name, int(power) // 10 ** (text.count("0") - 1 if "0" in text else 0)

        return of

    return _certain(named("short")) | _certain(named("long"))


@lru_cache(maxsize=1)
def joining() -> frozenset[str]:
    """The words between the last two parts of a list: `and` and `or`."""
    ends = [data["list_patterns"][kind]["end"] for data in _all() for kind in ("standard", "or")]
    return frozenset(re.sub(r"\{\d\}|,", " ", end).strip() for end in ends) - {""}


def folded(text: str) -> str:
    """A name without case, its full stops and kinds of space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace(".", " ").split())


@lru_cache(maxsize=1)
def _all() -> list[Any]:
    from babel.localedata import LocaleDataDict, load

    return [LocaleDataDict(cast("dict[str | int | None, Any]", load(language))) for language in LANGUAGES]


def _named(data: Any, kind: str) -> Iterator[tuple[int, str]]:
    for context in ("format", "stand-alone"):
        for width in ("wide", "abbreviated"):
            yield from data[kind][context][width].items()


def _certain(named: Callable[[Any], Iterator[tuple[str, Meaning]]]) -> dict[str, Meaning]:
    """What each name means where all languages agree, else in English."""
    found: dict[str, set[Meaning]] = {}
    english: dict[str, Meaning] = {}
    for language, data in zip(LANGUAGES, _all(), strict=True):
        for name, meaning in named(data):
            found.setdefault(folded(name), set()).add(meaning)
            if language == "en":
                english.setdefault(folded(name), meaning)
    return {name: english.get(name, next(iter(all_))) for name, all_ in found.items() if name in english or len(all_) == 1}


def _as_pint(unit: str) -> str:
    """`speed-kilometer-per-hour` as `kilometer/hour`."""
    parts = unit.partition("-")[2].split("-per-")
    parts = [re.sub(r"^(square|cubic)-(.+)$", lambda found: f"{found[2]}**{2 if found[1] == 'square' else 3}", part) for part in parts]
    return "/".join(part.replace("-", "_") for part in parts)
