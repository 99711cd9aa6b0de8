"""Values by name inside a row: `question`, `reward_model.ground_truth`, `messages.-1.content`. Knows nothing of files.

A dot goes into an object, an integer counts into a list, from its end if negative. A key that has the dot in its own name wins.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from distill.errors import DataError, shown

_NAMES = 20  # of columns, shown in an error


class Spare(str):
    """A name that is looked up in rows which have it."""


def value_at(row: dict[str, Any], name: str, where: str) -> Any:
    """A row's value under a name; null where something on the way is null.

    Raises:
        DataError: there is no such value; names what there is at the level where the way ends, and the nearest.
    """
    if name in row:
        return row[name]
    value: Any = row
    way, rest = "", name
    while rest and value is not None:
        key, rest_after = _step(value, rest)
        if key is None:
            raise DataError(f"{where}: {_absent(value, way, rest)}")
        value = value[key]
        way, rest = f"{way}.{key}" if way else str(key), rest_after
    return value


def text_at(row: dict[str, Any], name: str, where: str) -> str | None:
    """A row's text under a name; null where it is empty. Numbers become text, whole ones without `.0`.

    Raises:
        DataError: there is no such value, or it is something else, or half a character.
    """
    value = row[name] if name in row else value_at(row, name, where)
    if isinstance(value, str):
        return whole_text(value, name, where) if value and not value.isspace() else None
    if value is None or value != value:  # not a number is how pandas writes an absent value
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int | float):
        raise DataError(f"{where}: {name} must be text or a number, got {type(value).__name__}: {shown(value)}.")
    try:
        return str(value)
    except ValueError:  # thousands of digits, which Parquet's decimals and JSON can hold
        raise DataError(f"{where}: {name} is a number of too many digits to be written out. Give it as text.") from None


def reference_at(row: dict[str, Any], name: str, where: str, *, as_json: bool) -> str | None:
    """A row's right answer under a name, as text; null where it is empty.

    Args:
        row: Of the source.
        name: Of the value.
        where: It stands, for errors.
        as_json: Whether what is neither text nor number is written as JSON.

    Raises:
        DataError: there is no such value, or it is something else, or half a character.
    """
    value = value_at(row, name, where)
    if not as_json and isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list | dict):  # one right answer
        value, row = value[0], {name: value[0]}
    if not isinstance(value, list | dict | bool):
        return text_at(row, name, where)
    if as_json:
        return json_text(value, name, where)
    if isinstance(value, bool):
        return str(value)
    raise DataError(
        f"{where}: {name} must be text or a number, got {type(value).__name__}: {shown(value)}. Name a value inside it, or set "
        "prompts.json_reference for a check that takes data."
    )


def lines_at(row: dict[str, Any], name: str, where: str) -> str:
    """A row's value under a name as a text to be read: a list as lines, an object as JSON, nothing as nothing.

    Raises:
        DataError: there is no such value, or it holds half a character.
    """
    value = value_at(row, name, where)
    return "\n".join(_line(item, name, where) for item in (value if isinstance(value, list) else [value]))


def _line(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return whole_text(value, name, where)
    return json_text(value, name, where) if isinstance(value, bool | list | dict) else text_at({name: value}, name, where) or ""


def json_text(value: Any, name: str, where: str) -> str:
    """A value as JSON; what JSON does not know, such as a date, as its text.

    Raises:
        DataError: it holds half a character, or itself.
    """
    try:
        return whole_text(json.dumps(value, ensure_ascii=False, default=str), name, where)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: {name} can't be written as JSON: {shown(value)}. Correct or remove the row.") from None


def whole_text(text: str, name: str, where: str) -> str:
    r"""The text, if it can be written as UTF-8: JSON can hold `\ud83d` alone, half of a surrogate pair.

    Raises:
        DataError: it can't.
    """
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{where}: {name} holds half of a surrogate pair ({half!a} at character {error.start + 1:,}), which is no text. "
            "Correct or remove the row."
        ) from None
    return text


def top_levels(names: Iterable[str], columns: Sequence[str]) -> list[str] | None:
    """The columns in which some names lie; null, for all columns, where one lies in none: the error about it shows them."""
    heads = ((name, next((head for head, _ in _splits(name) if head in columns), None)) for name in names)
    found = [head for name, head in heads if head is not None or not isinstance(name, Spare)]
    return None if None in found else list(dict.fromkeys(head for head in found if head is not None))


def spare_at(row: dict[str, Any], name: Spare) -> Any:
    """A row's value under a name; null where there is none."""
    inside, _, last = name.rpartition(".")
    values = value_at(row, inside, "") if inside else row
    return values.get(last) if isinstance(values, dict) else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name's heads and what is left behind them, the longest head first."""
    parts = name.split(".")
    for place in range(len(parts), 0, -1):
        yield ".".join(parts[:place]), ".".join(parts[place:])


def _step(value: Any, rest: str) -> tuple[str | int | None, str]:
    """The key or place to go on with inside a value, null where there is none, and what is left of the name behind it."""
    if isinstance(value, dict):
        return next(((head, tail) for head, tail in _splits(rest) if head in value), (None, rest))
    head, _, tail = rest.partition(".")
    if isinstance(value, list) and head.removeprefix("-").isdecimal() and -len(value) <= int(head) < len(value):
        return int(head), tail
    return None, rest


def _absent(value: Any, way: str, rest: str) -> str:
    inside = f" in {shown(way)}" if way else ""
    if isinstance(value, dict):
        head = rest if not way and "." not in rest else rest.partition(".")[0]
        close = difflib.get_close_matches(head, map(str, value), n=1)
        hint = f"Did you mean {shown(close[0])}?" if close else "Name the right one in the recipe."
        return f"there is no column {shown(head)}{inside}, only {_listed(value)}. {hint}"
    if isinstance(value, list):
        return f"there is no place {rest.partition('.')[0]!r}{inside}, which has {len(value)} entries. Count from 0, or back from -1."
    found = f"{type(value).__name__} {shown(value)}"
    return f"there is nothing{inside} to look for {shown(rest)} in: it is {found}. Shorten the name in the recipe."


def _listed(names: Iterable[Any]) -> str:
    """Names of columns, of which a file may have thousands."""
    known = list(names)
    more = f" and {len(known) - _NAMES:,} more" if len(known) > _NAMES else ""
    return ", ".join(shown(name) for name in known[:_NAMES]) + more
