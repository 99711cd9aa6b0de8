"""Tool calls and tools in the forms that sources have them, as the kit's JSON. Knows nothing of conversations.

A call is `{"id"?, "type": "function", "function": {"name", "arguments": object}}`. Where arguments or tools are given as objects, keys
without a value are left out: Parquet gives every object of a column the keys of all.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from typing import Any

from distill.data.names import json_text
from distill.errors import DataError, shown
from distill.run.calls import Call as Named
from distill.run.calls import parted, written
from distill.run.schema import THINK_CLOSE, THINK_OPEN

Call = dict[str, Any]
_BLOCKS = re.compile(r"(?:\s*<tool_call>(?:(?!</?tool_call>).)*</tool_call>)+\s*\Z", re.DOTALL)
_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_MEANT_NULL = frozenset({"default", "const", "enum"})
_PYTHON_TYPES = {
    **{"str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number"},
    **{"bool": "boolean", "boolean": "boolean", "list": "array", "array": "array", "tuple": "array", "set": "array"},
    **{"dict": "object", "object": "object"},
}


UNUSABLE = ("not_text", "call_not_readable")
"""Reasons to drop a row that no recipe can make right: an image, a sound or the like in a turn, and a call that is none."""


class UnusableError(Exception):
    """A row can't be used, by no fault of the recipe: it is dropped for a reason that is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def calls_of(value: Any) -> list[Call]:
    """Calls as the kit has them: of a list, of one, or of either as JSON; flat (name, arguments), or as servers write them.

    Raises:
        UnusableError: one has no name, or arguments that are no object.
    """
    loaded = _loaded(value)
    if loaded is None or loaded == "":
        return []
    is_text = isinstance(value, str)  # which nothing has padded
    return [_call(item, is_text=is_text) for item in (loaded if isinstance(loaded, list) else [loaded]) if not _is_padding(item)]


def in_hermes_form(calls: Iterable[Call]) -> str:
    """Calls as text, a block each: the form in which completions have them."""
    return "\n".join(written(Named(call["function"]["name"], call["function"]["arguments"])) for call in calls)


def without_calls(text: str) -> tuple[str, list[Call]]:
    """A text, and the calls in blocks of Hermes' form at its end; all is text where one can't be read."""
    found = _BLOCKS.search(text) if "<tool_call>" in text else None
    if found is None or THINK_OPEN in text[: found.start()].rpartition(THINK_CLOSE)[2]:  # none, or within a thought
        return _parted(text)
    try:
        return text[: found.start()], [call for block in _BLOCK.findall(found[0]) for call in calls_of(_as_json(block.strip() or "?"))]
    except UnusableError:
        return _parted(text)


def _parted(text: str) -> tuple[str, list[Call]]:
    """The same of calls whose arguments hold the marks of a call themselves."""
    before, calls = parted(text)
    return (before.rstrip(), [call.described() for call in calls]) if calls else (text, [])


def _as_json(block: str) -> str:
    """A call inside of a text; of one that Python has written, as most of Hermes' own data are, as JSON."""
    try:
        json.loads(block)
    except (ValueError, RecursionError):
        try:
            return json.dumps(ast.literal_eval(block))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass
    return block


def tools_of(value: Any, where: str) -> str | None:
    """Tools as JSON, each as `{"type": "function", "function": {...}}`; null for none.

    Args:
        value: A list of tools, one, or either as JSON, also of each alone; flat or as servers take them.
        where: It stands, for errors.

    Raises:
        DataError: one has no name.
    """
    loaded = _loaded(value, where)
    if loaded is None or loaded in ("", [], {}):
        return None
    tools = [_tool(_loaded(tool, where), where) for tool in (loaded if isinstance(loaded, list) else [loaded])]
    return json_text(tools, "tools", where)


def schema_of(parameters: Any) -> Any:
    """A tool's parameters as JSON schema, where each stands by its name with a Python type, as in xLAM's data; else as given."""
    if not isinstance(parameters, dict) or not parameters or "properties" in parameters or parameters.get("type") == "object":
        return parameters
    if not all(isinstance(each, dict) and isinstance(each.get("type"), str) for each in parameters.values()):
        return parameters
    properties = {}
    for name, each in parameters.items():
        kind = _PYTHON_TYPES.get(re.split(r"\W", each["type"], maxsplit=1)[0].lower())
        rest = {key: item for key, item in each.items() if key not in ("type", "required")}
        properties[name] = ({"type": kind} if kind else {}) | rest
    asked = [name for name, each in parameters.items() if each.get("required", "default" not in each and "optional" not in each["type"])]
    return {"type": "object", "properties": properties} | ({"required": asked} if asked else {})


def _tool(value: Any, where: str) -> dict[str, Any]:
    described = value.get("function") if isinstance(value, dict) and isinstance(value.get("function"), dict) else value
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        raise DataError(f"{where} must hold tools, each with a name, got {shown(value)}. Name the right column in columns.tools.")
    function = {name: item for name, item in _without_nulls(described).items() if name != "type"}
    if "input_schema" in function:  # as Anthropic calls it
        function["parameters"] = function.pop("input_schema")
    if "parameters" in function:
        function["parameters"] = schema_of(function["parameters"])
    return {"type": "function", "function": function}


def _call(value: Any, *, is_text: bool) -> Call:
    value, is_text = _loaded(value), is_text or isinstance(value, str)
    described = value.get("function") if isinstance(value, dict) and isinstance(value.get("function"), dict) else value
    name = described.get("name") if isinstance(described, dict) else None
    if not isinstance(described, dict) or not isinstance(name, str) or not name:
        raise UnusableError("call_not_readable")
    given = next((described[key] for key in _ARGUMENTS if described.get(key) is not None), None)
    arguments = given if is_text or not isinstance(given, dict) else _without_nulls(given)
    arguments = _loaded(_loaded(arguments)) if given not in (None, "") else {}  # some wrote a text of a text
    if not isinstance(arguments, dict):
        raise UnusableError("call_not_readable")
    identity = next((value[key] for key in ("id", "tool_call_id") if isinstance(value.get(key), str) and value[key]), None)
    call = ({"id": identity} if identity else {}) | {"type": "function", "function": {"name": name, "arguments": arguments}}
    try:
        json.dumps(call, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError):  # half a character, a date
        raise UnusableError("call_not_readable") from None
    return call


def _is_padding(value: Any) -> bool:
    """Whether an object is there only because others of its column are."""
    return value is None or (isinstance(value, dict) and all(item is None for item in value.values()))


def _loaded(value: Any, where: str | None = None) -> Any:
    """What a text holds as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return value if not isinstance(value, str) else None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if where is not None:
            raise DataError(f"{where} must hold tools, as a list or as JSON, got {shown(value)}. Correct or remove the row.") from None
        raise UnusableError("call_not_readable") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key in _MEANT_NULL}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
