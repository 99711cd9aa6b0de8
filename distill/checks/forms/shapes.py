"""What a text can be read as, besides a number, a date and a time of day."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from distill.checks.forms.dates import Clock, Day
from distill.checks.forms.numbers import Number


@dataclass(frozen=True)
class Text:
    """Words, a label, or whatever else is equal only to itself."""

    key: str
    written: str = ""
    """As it stands, where its case may count: a formula of chemistry, a product of letters."""


@dataclass(frozen=True)
class Expression:
    """Mathematics that has to be computed."""

    text: str


@dataclass(frozen=True)
class Quantity:
    """A value with a unit, percent among them."""

    value: Number | Expression
    unit: str


@dataclass(frozen=True)
class Ratio:
    """Numbers between colons."""

    terms: tuple[Number, ...]


@dataclass(frozen=True)
class Group:
    """Parts in brackets, whose kind says whether their order counts; without brackets it does not, and words may be joined by `or`."""

    opening: str
    closing: str
    parts: tuple[Readings, ...]


@dataclass(frozen=True)
class Piece:
    """An interval; an end of null goes on for ever."""

    lower: Readings | None
    upper: Readings | None
    has_lower: bool
    has_upper: bool


@dataclass(frozen=True)
class Intervals:
    """A union of intervals, perhaps of a letter."""

    letter: str | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Equation:
    """A left side, and what the last right side of it is."""

    left: str
    right: Readings
    sides: tuple[str, str]
    is_value: bool
    """Whether the left only names the right, or is its sum: `x`, `f(2)`, `Area`, `2+3`."""


@dataclass(frozen=True)
class Labelled:
    """The label of a choice and what it stands for."""

    label: str
    content: Readings


@dataclass(frozen=True)
class Table:
    """A matrix, by rows."""

    rows: tuple[tuple[Readings, ...], ...]
    bars: str = ""
    """What stands around it where that is no bracket: `v` for a determinant, `V` for a norm."""


@dataclass(frozen=True)
class Formula:
    """Of chemistry, a reaction too, without what sets its numbers low."""

    text: str


@dataclass(frozen=True)
class Data:
    """An object or a list in JSON, in its one spelling."""

    text: str


Form: TypeAlias = (
    Text | Number | Expression | Quantity | Day | Clock | Ratio | Group | Intervals | Equation | Labelled | Table | Formula | Data
)
Readings: TypeAlias = tuple[Any, ...]
"""Forms, of which each is a way to read one text."""
