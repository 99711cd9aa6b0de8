"""Whether an answer is JSON, satisfies a schema, and equals the reference as data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from distill.checks import Found, Given
from distill.checks.form import answer_of
from distill.recipe.kinds import Json

_FENCE = re.compile(r"```[ \t]*(?:json[c5]?)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_OPENS = re.compile(r"[{\[]")
_MISSING = object()
_MOST_TRIES = 1000  # places where JSON may begin


def check_json(given: Given, settings: Json) -> Found:
    """Whether the answer's JSON is right. May never return, for a schema with a pattern that goes round in circles."""
    schema = settings.json_schema
    if settings.schema_column is not None:
        schema = _schema_of(given.fields.get(settings.schema_column))
        if schema is None:
            return None, "no_schema"
    wanted: Any = _MISSING
    if settings.reference == "equal":
        if given.reference is None:
            return None, "no_reference"
        wanted = loaded(given.reference)
        if wanted is _MISSING:
            return None, "reference_is_no_json"
    answer = answer_of(given.completion)
    if answer is None or not answer.strip():
        return False, "no_answer"
    found = find_json(answer)
    if found is _MISSING:
        return False, "no_json"
    if schema is not None and (problem := schema_problem(found, schema)) is not None:
        return problem
    if wanted is _MISSING:
        return True, "fits"
    return (True, "right") if _equal_in(found, wanted, settings.fields) else (False, "other_values")


def loaded(text: str) -> Any:
    """The value of a JSON text; `_MISSING` where it is none, holds a name twice, or NaN."""
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return _MISSING


def find_json(answer: str) -> Any:
    """The last object or list of an answer: fenced, alone, or among words; any other value only where it is all there is."""
    fenced = _FENCE.findall(answer)
    if fenced:
        return loaded(fenced[-1])
    whole = loaded(answer)
    if whole is not _MISSING:
        return whole
    found = _MISSING
    for value in _inside(answer):
        found = value
    return found


def is_missing(value: Any) -> bool:
    """Whether no JSON was found."""
    return value is _MISSING


def _inside(text: str) -> Iterator[Any]:
    """Objects and lists that stand in a text, one behind the other; none of those inside one that is broken."""
    place = 0
    for _ in range(_MOST_TRIES):
        start = _OPENS.search(text, place)
        if start is None:
            return
        try:
            value, place = _DECODER.raw_decode(text, start.start())
            yield value
        except (ValueError, RecursionError):
            end = _closed(text, start.start())
            if end is None:  # it was cut
                return
            place = end if start.group() == "{" else start.end()  # brackets stand around words, too


def _closed(text: str, start: int) -> int | None:
    """Behind the bracket that closes the one at a place; null where none does."""
    kind = "{}" if text[start] == "{" else "[]"
    depth = 0
    for found in re.finditer(rf"[{re.escape(kind)}]", text[start:]):
        depth += 1 if found.group() == kind[0] else -1
        if not depth:
            return start + found.end()
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)


def _schema_of(value: Any) -> dict[str, Any] | None:
    """A schema as a column holds it: an object, or its text."""
    schema = loaded(value) if isinstance(value, str) else value
    return schema if isinstance(schema, dict) else None


def schema_problem(value: Any, schema: Any) -> Found | None:
    """What speaks against a value by a schema: it does not satisfy it, or the schema is none. Null where it does.

    References to other documents are not followed, least of all over a network.
    """
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
        right = kind(schema, registry=Registry()).is_valid(value)
    except SchemaError:
        return None, "schema_is_wrong"
    except Unresolvable:
        return None, "schema_not_resolved"
    except RecursionError:
        return None, "too_deep"
    return None if right else (False, "against_schema")


def _equal_in(found: Any, wanted: Any, fields: list[str] | None) -> bool:
    if fields is None:
        return equal(found, wanted)
    pairs = [(_at(found, field), _at(wanted, field)) for field in fields]
    return all(right is not _MISSING and left is not _MISSING and equal(left, right) for left, right in pairs)


def equal(left: Any, right: Any) -> bool:
    """Whether two values are the same data: 1 and 1.0 are, 1 and true are not; the order of names does not count."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left == right
    return type(left) is type(right) and bool(left == right)


def _at(value: Any, field: str) -> Any:
    """What stands under a dotted name; `_MISSING` where nothing does."""
    for name in field.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _MISSING
    return value
