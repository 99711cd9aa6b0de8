"""Whether an answer calls tools: well-formed, by their names, with arguments that they take, and as the reference does if asked."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from distill.checks import Found, Given
from distill.checks.form import answer_of
from distill.checks.json_answer import equal, find_json, is_missing, loaded, schema_problem
from distill.data.calls import schema_of
from distill.recipe.kinds import ToolCalls
from distill.run.calls import Call, parted

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_BAR, _BLOCK = "\uff5c", "\u2581"  # in DeepSeek's control tokens
_DEEPSEEK_CALL, _DEEPSEEK_PARTS = (f"<{_BAR}tool{_BLOCK}{name}{_BAR}>" for name in (f"call{_BLOCK}begin", "sep"))
_DEEPSEEK_ENDS = re.compile(f"<{_BAR}tool{_BLOCK}calls?{_BLOCK}end{_BAR}>")
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
_MISTRAL, _MISTRAL_PARTS = "[TOOL_CALLS]", "[ARGS]"
_LLAMA = "<|python_tag|>"
_LLAMA_OBJECT = re.compile(r'\A\{\s*"(?:type|name)"')
_PYTHONIC = re.compile(r"\A\[\s*[A-Za-z_][\w.]*\(.*\)\s*\]\Z", re.DOTALL)


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAME = re.compile(r"\s*([\w.-]+)(?:\n|(?=<arg_key>))")
_KEY_AND_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


class AsWritten(str):
    """A value as a form writes it that has no types: text as it stands, all else as JSON."""


class _UnreadableError(ValueError):
    """A call is begun, and is none."""


def check_tool_calls(given: Given, settings: ToolCalls) -> Found:
    """Whether the calls are right. May never return, for a schema with a pattern that goes round in circles."""
    tools = _tools_of(given.fields.get(settings.tools))
    if tools is None:
        return None, "tools_not_readable"
    wanted: list[Call] | None = None
    if settings.reference == "equal":
        if given.reference is None:
            return None, "no_reference"
        wanted = _of_reference(given.reference)
        if wanted is None and settings.in_words == "no_call" and is_missing(loaded(given.reference)):
            wanted = []
        if wanted is None:
            return None, "reference_is_no_call"
    answer = answer_of(given.completion)
    if answer is None:
        return False, "no_answer"
    try:
        calls = [_typed(call, tools) for call in _READERS[settings.form](answer.strip())]
    except _UnreadableError:
        return False, "call_not_readable"
    if not calls and wanted is None:
        return (False, "no_call") if settings.required else (True, "no_call")
    problem = next(filter(None, (_problem(call, tools) for call in calls)), None)
    if problem is not None or wanted is None:
        return problem or (True, "fits")
    return (True, "right") if _same(calls, wanted, settings.ordered) else (False, "other_calls")


def calls_in(answer: str) -> list[Call] | None:
    """The calls of an answer, in the form of whatever family; null where one is begun and can't be read."""
    try:
        return _any(answer.strip())
    except _UnreadableError:
        return None


def _typed(call: Call, tools: dict[str, Any]) -> Call:
    """A call whose values have the types that its tool takes."""
    schema = tools.get(call.name)
    known = schema.get("properties", {}) if isinstance(schema, dict) else {}

    def value_of(name: str, written: Any) -> Any:
        kind = known[name].get("type") if isinstance(known, dict) and isinstance(known.get(name), dict) else None
        if not isinstance(written, AsWritten):
            return written
        value = loaded(written) if kind != "string" else str(written)
        return str(written) if is_missing(value) else value

    return Call(call.name, {name: value_of(name, written) for name, written in call.arguments.items()})


def _tools_of(value: Any) -> dict[str, Any] | None:
    """The schema of each tool's arguments by its name; null where the column holds no tools."""
    tools = loaded(value) if isinstance(value, str) else value
    if not isinstance(tools, list):
        return None
    found = {}
    for tool in tools:
        described = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(described, dict) or not isinstance(described.get("name"), str):
            return None
        found[described["name"]] = schema_of(described.get("parameters", described.get("input_schema")) or {})
    return found


def _problem(call: Call, tools: dict[str, Any]) -> Found | None:
    if call.name not in tools:
        return False, "unknown_tool"
    schema = tools[call.name]
    problem = schema_problem(call.arguments, schema)
    if problem is not None:
        return problem if problem[0] is None else (False, "arguments_not_valid")
    # JSON schema takes names that it does not know; a function does not.
    known = schema.get("properties") if isinstance(schema, dict) and "additionalProperties" not in schema else None
    return (False, "unknown_argument") if known is not None and not call.arguments.keys() <= known.keys() else None


def _same(calls: list[Call], wanted: list[Call], ordered: bool) -> bool:
    if ordered:
        return len(calls) == len(wanted) and all(map(_equal, calls, wanted))
    left = list(calls)
    for call in wanted:
        place = next((place for place, other in enumerate(left) if _equal(call, other)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _equal(left: Call, right: Call) -> bool:
    return left.name == right.name and equal(left.arguments, right.arguments)


def _of_reference(reference: str) -> list[Call] | None:
    value = loaded(reference)
    try:
        return None if is_missing(value) else _calls(value)
    except _UnreadableError:
        return None


def _calls(value: Any) -> list[Call]:
    """Calls as data: a list of them, one, or a turn that has them under `tool_calls`."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def _call(value: Any) -> Call:
    described = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(described, dict):
        raise _UnreadableError
    name = described.get("name")
    arguments = described.get("arguments", described.get("parameters"))
    if isinstance(arguments, str):  # the OpenAI protocol has them as the text of JSON
        arguments = loaded(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise _UnreadableError
    return Call(name, arguments)


def _value(text: str) -> Any:
    value = loaded(text)
    if is_missing(value):
        raise _UnreadableError
    return value


def _hermes(text: str) -> list[Call]:
    if "<tool_call>" in text and text.count("<tool_call>") != text.count("</tool_call>"):
        return _with_marks_inside(text)
    try:
        return [_tagged(found) or _call(_value(found)) for found in _HERMES.findall(text)]
    except _UnreadableError:
        return _with_marks_inside(text)


def _with_marks_inside(text: str) -> list[Call]:
    """Calls that end an answer, and whose arguments hold the marks of a call."""
    said, calls = parted(text)
    if not calls or "<tool_call>" in said or "</tool_call>" in said:
        raise _UnreadableError
    return calls


def _tagged(text: str) -> Call | None:
    """What stands between those tags at GLM's, or at newer Qwens': every argument between tags of its own."""
    function = _FUNCTION.fullmatch(text)
    if function is not None:
        return Call(function[1].strip(), {name: AsWritten(value) for name, value in _PARAMETER.findall(function[2])})
    named = _NAME.match(text)
    rest = text[named.end() :] if named is not None else text
    if named is None or _KEY_AND_VALUE.sub("", rest).strip():
        return None
    return Call(named[1], {key.strip(): AsWritten(value) for key, value in _KEY_AND_VALUE.findall(rest)})


def _deepseek(text: str) -> list[Call]:
    """`function`, the name and fenced arguments, as V3 and R1 write them; name and arguments, as V3.1 does."""
    found = []
    for part in text.split(_DEEPSEEK_CALL)[1:]:
        kind, parts, rest = _DEEPSEEK_ENDS.split(part)[0].partition(_DEEPSEEK_PARTS)
        if not parts:
            raise _UnreadableError
        fenced = _FENCE.search(rest)
        name, arguments = (rest[: fenced.start()], fenced[1]) if fenced else (kind, rest)
        found.append(_call({"name": name.strip(), "arguments": _value(arguments)}))
    return found


def _mistral(text: str) -> list[Call]:
    """A list behind the mark, or, as newer ones write, the mark, the name and the arguments of each."""
    _, *parts = text.split(_MISTRAL)
    if len(parts) == 1 and _MISTRAL_PARTS not in parts[0]:
        return _calls(_value(parts[0]))
    found = []
    for part in parts:
        name, _, arguments = part.partition(_MISTRAL_PARTS)
        found.append(_call({"name": name.partition("[CALL_ID]")[0].strip(), "arguments": _value(arguments)}))
    return found


def _llama(text: str) -> list[Call]:
    """Objects apart by `;`, or a Python list of calls, behind the mark or alone."""
    text = text.removeprefix(_LLAMA).strip()
    if _PYTHONIC.match(text):
        return _pythonic(text)
    if not text.startswith("{"):
        return []
    found, decoder, place = [], json.JSONDecoder(), 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            raise _UnreadableError from None
        found.append(_call(value))
        place += len(text[place:]) - len(text[place:].lstrip("; \n\t"))
    return found


def _pythonic(text: str) -> list[Call]:
    try:
        nodes = ast.parse(text, mode="eval").body
        return [_pythonic_call(node) for node in nodes.elts] if isinstance(nodes, ast.List) else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _UnreadableError from None


def _pythonic_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        raise _UnreadableError
    return Call(ast.unparse(node.func), {str(word.arg): ast.literal_eval(word.value) for word in node.keywords})


def _structured(text: str) -> list[Call]:
    value = find_json(text)
    looks_so = (isinstance(value, dict) and value.keys() & {"name", "function", "tool_calls"}) or (
        isinstance(value, list) and all(isinstance(item, dict) and item.keys() & {"name", "function"} for item in value)
    )
    return _calls(value) if looks_so else []


def _any(text: str) -> list[Call]:
    """By the mark of a family, the first that stands there: others may stand in arguments; without any, as data."""
    if text.startswith(_LLAMA) or _PYTHONIC.match(text) or _LLAMA_OBJECT.match(text):
        return _llama(text)
    marks = {"<tool_call>": _hermes, "</tool_call>": _hermes, _DEEPSEEK_CALL: _deepseek, _MISTRAL: _mistral}
    places = {text.find(mark): read for mark, read in marks.items() if mark in text}
    return places[min(places)](text) if places else _structured(text)


_READERS: dict[str, Callable[[str], list[Call]]] = {
    "any": _any,
    "hermes": _hermes,
    "deepseek": _deepseek,
    "llama": _llama,
    "mistral": _mistral,
    "structured": _structured,
}
