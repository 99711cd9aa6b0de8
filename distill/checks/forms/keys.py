"""One text for all that says the same, where that needs no computing: so that many answers are grouped in one pass.

1/2 and 0.5 have one key, a list in any order, a date in any spelling. Less is one than for `equality`, never more: expressions have to be
spelled alike, and a unit is not converted, since sympy may never return and a number without a unit equals several that have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill.checks.forms.dates import Clock, Day
from distill.checks.forms.numbers import Number
from distill.checks.forms.plain import exact_key, text_key
from distill.checks.forms.reading import read
from distill.checks.forms.shapes import Equation, Expression, Group, Intervals, Labelled, Quantity, Ratio, Readings, Table, Text
from distill.checks.forms.units import PERCENT


def key_of(text: str) -> str:
    """What a plain text says, by its likeliest reading."""
    return _of(read(text))


def _of(readings: Readings | None) -> str:
    if readings is None:
        return ""
    form = readings[0]
    key = _KEYS.get(type(form))
    return str(form) if key is None else key(form)


def _number(form: Number) -> str:
    return str(form.digits if form.value is None else form.value)


def _quantity(form: Quantity) -> str:
    return f"{_of((form.value,))} {form.unit if form.unit == PERCENT else text_key(form.unit)}"


def _equation(form: Equation) -> str:
    return _of(form.right) if form.is_value else f"{form.left}={_of(form.right)}"


def _ratio(form: Ratio) -> str:
    values = [term.value for term in form.terms]
    if None in values or not values[-1]:
        return ":".join(map(_number, form.terms))
    shares = [str(value / values[-1]) for value in values if value is not None]
    return shares[0] if len(shares) == 2 else ":".join(shares)


def _group(form: Group) -> str:
    keys = [_of(part) for part in form.parts]
    is_ordered = form.opening in ("(", "[", "]")
    return f"{form.opening}{', '.join(keys)}{form.closing}" if is_ordered else ", ".join(sorted(keys))


def _table(form: Table) -> str:
    return f"{form.bars}[{'; '.join(', '.join(_of(cell) for cell in row) for row in form.rows)}]"


def _intervals(form: Intervals) -> str:
    pieces = [f"{'(['[piece.has_lower]}{_of(piece.lower)}, {_of(piece.upper)}{')]'[piece.has_upper]}" for piece in form.pieces]
    return " | ".join(sorted(pieces))


_KEYS: dict[type, Callable[[Any], str]] = {
    Number: _number,
    Text: lambda form: form.key,
    Quantity: _quantity,
    Expression: lambda form: exact_key(form.text).replace(" ", ""),
    Labelled: lambda form: form.label,
    Equation: _equation,
    Day: lambda form: f"{form.year}-{form.month}-{form.day}",
    Clock: lambda form: f"{form.hour}:{form.minute}:{form.second}",
    Ratio: _ratio,
    Group: _group,
    Table: _table,
    Intervals: _intervals,
}
