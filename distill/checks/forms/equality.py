"""Whether two texts say the same: one reading of each is equal. Symmetric.

A unit, a name before a sign of equality or the label of a choice counts where both texts have one. Percent is a unit, and also a hundredth:
12.5 % is 12.5 and 0.125, which are not each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from distill.checks.forms import expressions, numbers
from distill.checks.forms.cases import differ
from distill.checks.forms.dates import Clock
from distill.checks.forms.numbers import Number
from distill.checks.forms.plain import exact_key
from distill.checks.forms.reading import read
from distill.checks.forms.shapes import (
    Data,
    Equation,
    Expression,
    Form,
    Group,
    Intervals,
    Labelled,
    Piece,
    Quantity,
    Ratio,
    Readings,
    Table,
    Text,
)
from distill.checks.forms.units import PERCENT, converted, factor_free

_IN_ORDER = "()[]"


def same(one: str, other: str) -> bool:
    """Whether two plain texts say the same. May never return: see `distill/checks/math.py`."""
    return exact_key(one) == exact_key(other) or alike(read(one), read(other))


def alike(one: Readings, other: Readings) -> bool:
    """Whether a reading of one text equals one of another."""
    return any(_equal(first, second) for first in one for second in other)


def _equal(one: Form, other: Form) -> bool:
    if one == other:
        return True
    if type(one) is type(other):
        compare = _ALIKE.get(type(one))
        return compare is not None and compare(one, other)
    for kind, compare in _MIXED:
        for first, second in ((one, other), (other, one)):
            if isinstance(first, kind):
                return compare(first, second)
    return False


def _texts(one: Text, other: Text) -> bool:
    return one.key == other.key and not differ(one.written, other.written)


def _numbers(one: Number, other: Number) -> bool:
    return numbers.equal(one, other)


def _expressions(one: Expression, other: Expression) -> bool:
    return expressions.equal(one.text, other.text)


def _clocks(one: Clock, other: Clock) -> bool:
    return one.equals(other)


def _quantities(one: Quantity, other: Quantity) -> bool:
    if factor_free(one.unit, other.unit):
        return _equal(one.value, other.value)
    if not isinstance(one.value, Number) or not isinstance(other.value, Number) or PERCENT in (one.unit, other.unit):
        return False
    if one.value.value is None or other.value.value is None:
        return False
    found = converted(one.value.value, one.unit, other.unit)
    return found is not None and (found == other.value.value or numbers.close(found, other.value.value))


def _ratios(one: Ratio, other: Ratio) -> bool:
    first, second = ([term.value for term in ratio.terms] for ratio in (one, other))
    if len(first) != len(second) or None in first + second or not first[0] or not second[0]:
        return False
    values = [Fraction(a or 0) * (second[0] or 0) == Fraction(b or 0) * (first[0] or 0) for a, b in zip(first, second, strict=True)]
    return all(values)


def _equations(one: Equation, other: Equation) -> bool:
    if one.left == other.left or (one.is_value and other.is_value and _is_index(one.left, other.left)):
        return alike(one.right, other.right)
    return all(map(expressions.is_letters, (*one.sides, *other.sides))) and expressions.equations_equal(one.sides, other.sides)


def _is_index(one: str, other: str) -> bool:
    """Whether one name is the other's with a number that only counts solutions: x and x_1."""
    return one.partition("_")[0] == other.partition("_")[0] and "" in (one.partition("_")[2], other.partition("_")[2])


def _labelled(one: Labelled, other: Labelled) -> bool:
    return one.label == other.label and alike(one.content, other.content)


def _tables(one: Table, other: Table) -> bool:
    if one.bars != other.bars:
        return False
    shapes = [[len(row) for row in table.rows] for table in (one, other)]
    if shapes[0] != shapes[1]:
        return False
    return all(alike(a, b) for first, second in zip(one.rows, other.rows, strict=True) for a, b in zip(first, second, strict=True))


def _groups(one: Group, other: Group) -> bool:
    first, second = one.opening + one.closing, other.opening + other.closing
    if {first, second} == {"", "or"}:
        return False
    ordered = [brackets != "" and brackets[0] in _IN_ORDER for brackets in (first, second)]
    if any(ordered):
        if first and second and first != second:
            return False
        return len(one.parts) == len(other.parts) and all(alike(a, b) for a, b in zip(one.parts, other.parts, strict=True))
    if _is_named(one) != _is_named(other):  # x = 1, y = 2 against 1, 2: the names are left out, not their order
        return len(one.parts) == len(other.parts) and all(alike(a, b) for a, b in zip(one.parts, other.parts, strict=True))
    if first == second == "\\{\\}":  # sets: a part that is named twice is one
        return _within(one.parts, other.parts) and _within(other.parts, one.parts)
    return len(one.parts) == len(other.parts) and _matched(one.parts, other.parts, alike)


def _is_named(group: Group) -> bool:
    """Whether each part is of another letter."""
    lefts = {form.left for part in group.parts for form in part if isinstance(form, Equation)}
    return 1 < len(lefts) == len(group.parts) and len({left.partition("_")[0] for left in lefts}) > 1


def _within(parts: Sequence[Readings], others: Sequence[Readings]) -> bool:
    return all(any(alike(part, other) for other in others) for part in parts)


def _matched(parts: Sequence[Any], others: Sequence[Any], equal: Callable[[Any, Any], bool]) -> bool:
    """Whether each part has a partner of its own among the others, which are as many."""
    left = list(others)
    for part in parts:
        place = next((place for place, other in enumerate(left) if equal(part, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _intervals(one: Intervals, other: Intervals) -> bool:
    if one.letter is not None and other.letter is not None and one.letter != other.letter:
        return False
    return len(one.pieces) == len(other.pieces) and _matched(one.pieces, other.pieces, _pieces)


def _pieces(one: Piece, other: Piece) -> bool:
    if (one.has_lower, one.has_upper) != (other.has_lower, other.has_upper):
        return False
    for a, b in ((one.lower, other.lower), (one.upper, other.upper)):
        if (a is None) != (b is None) or (a is not None and b is not None and not alike(a, b)):
            return False
    return True


def _expression_and(one: Expression, other: Form) -> bool:
    if not isinstance(other, Number) or other.value is None:
        return False
    return expressions.equal_to(one.text, other.value, is_decimal=other.is_decimal)


def _quantity_and(one: Quantity, other: Form) -> bool:
    if isinstance(other, Ratio):
        return one.unit == PERCENT and _ratio_and(other, one)
    if not isinstance(other, Number | Expression):
        return False
    if _equal(one.value, other):
        return True
    if isinstance(other, Expression) and isinstance(one.value, Number) and "\\pi" in other.text and factor_free(one.unit, "°"):
        value = one.value.value
        return value is not None and expressions.equal(f"\\frac{{{value.numerator}\\pi}}{{{180 * value.denominator}}}", other.text)
    return one.unit == PERCENT and isinstance(one.value, Number) and _equal(one.value.scaled(Fraction(1, 100)), other)


def _ratio_and(one: Ratio, other: Form) -> bool:
    if len(one.terms) != 2 or one.terms[0].value is None or not one.terms[1].value:
        return False
    return isinstance(other, Number | Expression | Quantity) and _equal(Number(one.terms[0].value / one.terms[1].value), other)


def _equation_and(one: Equation, other: Form) -> bool:
    return one.is_value and alike(one.right, (other,))


def _labelled_and(one: Labelled, other: Form) -> bool:
    if isinstance(other, Text) and len(other.key) == 1 and other.key.isascii():  # a label alone
        return other.key == one.label
    return alike(one.content, (other,))


def _group_and(one: Group, other: Form) -> bool:
    if one.opening == "\\{" and len(one.parts) == 1:
        return alike(one.parts[0], (other,))
    if isinstance(other, Table) and one.opening == "[" and not other.bars:
        rows = [form.parts for part in one.parts for form in part if isinstance(form, Group) and form.opening == "["]
        return len(rows) == len(one.parts) and _tables(Table(tuple(rows)), other)
    if isinstance(other, Table) and one.opening == "(":
        cells = [cell for row in other.rows for cell in row]
        is_vector = len(other.rows) == 1 or all(len(row) == 1 for row in other.rows)
        return is_vector and len(cells) == len(one.parts) and all(alike(a, b) for a, b in zip(one.parts, cells, strict=True))
    if not isinstance(other, Intervals) or len(one.parts) != 2 or one.opening not in ("(", "[", "]") or len(other.pieces) != 1:
        return False
    return _pieces(Piece(one.parts[0], one.parts[1], one.opening == "[", one.closing == "]"), other.pieces[0])


_ALIKE: dict[type, Callable[[Any, Any], bool]] = {
    Text: _texts,
    Number: _numbers,
    Expression: _expressions,
    Quantity: _quantities,
    Clock: _clocks,
    Ratio: _ratios,
    Equation: _equations,
    Labelled: _labelled,
    Table: _tables,
    Group: _groups,
    Intervals: _intervals,
}
_MIXED: list[tuple[type, Callable[[Any, Any], bool]]] = [
    (Data, lambda one, other: False),
    (Labelled, _labelled_and),
    (Equation, _equation_and),
    (Quantity, _quantity_and),
    (Ratio, _ratio_and),
    (Group, _group_and),
    (Expression, _expression_and),
]
