"""The checks json and tool_calls: data is compared as data, schemas are kept to, and every family's calls are read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distill.checks import Given
from distill.checks.json_answer import check_json
from distill.checks.tool_calls import check_tool_calls
from distill.data.calls import tools_of
from distill.recipe.kinds import Json, ToolCalls

THOUGHT = "<think>\nread {\n</think>\n\n"
ORDER = {"item": "lamp", "number": 2, "day": {"of": [1, 2]}}
SCHEMA = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["item"]}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"number": 2, "item": "lamp", "day": {"of": [1, 2]}}', (True, "right")),
        ('{"number": 2.0, "item": "lamp", "day": {"of": [1, 2]}}', (True, "right")),
        ('```json\n{"item": "lamp", "number": 2, "day": {"of": [1, 2]}}\n```', (True, "right")),
        ('```\n{"item": "lamp", "number": 2, "day": {"of": [1, 2]}}\n```\nDone.', (True, "right")),
        ('Here: {"item": "lamp", "number": 2, "day": {"of": [1, 2]}} Done.', (True, "right")),
        ('See {1}: {"item": "lamp", "number": 2, "day": {"of": [1, 2]}}', (True, "right")),
        ('{"item": "lamp", "number": "2", "day": {"of": [1, 2]}}', (False, "other_values")),
        ('{"item": "lamp", "number": 2, "day": {"of": [2, 1]}}', (False, "other_values")),
        ('{"item": "lamp", "number": 2, "day": {"of": [1, 2]}, "more": null}', (False, "other_values")),
        ('{"item": "lamp", "item": "lamp", "number": 2, "day": {"of": [1, 2]}}', (False, "no_json")),  # a name twice
        ('{"item": "lamp", "number": NaN}', (False, "no_json")),
        ("{item: lamp}", (False, "no_json")),
        ('```json\n{"item": "lamp"\n```', (False, "no_json")),
        ("[" * 100_000, (False, "no_json")),
        ('{"item": {"item": "lamp", "number": 2, "day": {"of": [1, 2]}}, "m', (False, "no_json")),  # cut
        ('[{"item": "lamp", "number": 2, "day": {"of": [1, 2]}}, ', (False, "no_json")),
        ('As [agreed]: {"item": "lamp", "number": 2, "day": {"of": [1, 2]}}', (True, "right")),
        ("", (False, "no_answer")),
        ("true", (False, "other_values")),
    ],
)
def test_json_as_data(answer: str, expected: Any) -> None:
    assert check_json(Given(THOUGHT + answer, json.dumps(ORDER)), Json()) == expected


@pytest.mark.parametrize(
    ("left", "right", "same"), [("1", "1.0", True), ("1", "true", False), ("0", "false", False), ("null", "null", True)]
)
def test_what_is_the_same_data(left: str, right: str, same: bool) -> None:
    assert check_json(Given(f"[{left}]", f"[{right}]"), Json())[0] is same


def test_named_fields_and_what_cannot_be_judged() -> None:
    settings = Json(fields=["item", "day.of.1"])
    assert check_json(Given('{"item": "lamp", "day": {"of": [0, 2]}}', json.dumps(ORDER)), settings) == (True, "right")
    assert check_json(Given('{"item": "lamp", "day": {"of": [0]}}', json.dumps(ORDER)), settings) == (False, "other_values")
    assert check_json(Given("{}", "{item: lamp}"), Json()) == (None, "reference_is_no_json")
    assert check_json(Given("{}", None), Json()) == (None, "no_reference")


def test_schemas_of_the_recipe_and_of_the_row() -> None:
    good, bad = '{"item": "lamp", "number": 4}', '{"item": "lamp", "number": "4"}'
    for settings, fields in (
        (Json(json_schema=SCHEMA, reference="ignore"), {}),
        (Json(schema_column="s", reference="ignore"), {"s": SCHEMA}),
    ):
        assert check_json(Given(good, None, fields), settings) == (True, "fits")
        assert check_json(Given(bad, None, fields), settings) == (False, "against_schema")
    as_text = {"s": json.dumps(SCHEMA)}
    assert check_json(Given(bad, None, as_text), Json(schema_column="s", reference="ignore")) == (False, "against_schema")
    assert check_json(Given(good, None, {"s": None}), Json(schema_column="s", reference="ignore")) == (None, "no_schema")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [({"type": "nonsense"}, "schema_is_wrong"), ({"$ref": "https://example.org/s"}, "schema_not_resolved"), ({"$ref": "#"}, "too_deep")],
)
def test_a_schema_that_decides_nothing(schema: dict[str, Any], reason: str) -> None:
    """What it refers to elsewhere is not fetched."""
    assert check_json(Given("{}"), Json(json_schema=schema, reference="ignore")) == (None, reason)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_order",
            "parameters": {"type": "object", "properties": {"id": {"type": "string"}, "full": {"type": "boolean"}}, "required": ["id"]},
        },
    },
    {"name": "stop", "input_schema": {"type": "object", "properties": {}}},
]


def tagged(arguments: str, line: str) -> str:
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in json.loads(arguments).items()}
    return "".join(line.format(name=name, value=value) for name, value in values.items())


UNTYPED = {"hermes of glm", "hermes of newer qwens"}
BEGIN, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
FORMS = {
    "hermes": lambda name, arguments: f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
    "hermes of glm": lambda name, arguments: (
        f"<tool_call>{name}\n" + tagged(arguments, "<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n") + "</tool_call>"
    ),
    "hermes of newer qwens": lambda name, arguments: (
        f"<tool_call>\n<function={name}>\n" + tagged(arguments, "<parameter={name}>\n{value}\n</parameter>\n") + "</function>\n</tool_call>"
    ),
    "deepseek": lambda name, arguments: f"{BEGIN}function{SEP}{name}\n```json\n{arguments}\n```{END}",
    "deepseek 3.1": lambda name, arguments: f"{BEGIN}{name}{SEP}{arguments}{END}",
    "llama": lambda name, arguments: f'{{"name": "{name}", "parameters": {arguments}}}',
    "llama tagged": lambda name, arguments: f'<|python_tag|>{{"name": "{name}", "parameters": {arguments}}}',
    "llama pythonic": lambda name, arguments: f"[{name}({', '.join(f'{k}={v!r}' for k, v in json.loads(arguments).items())})]",
    "mistral": lambda name, arguments: f'[TOOL_CALLS][{{"name": "{name}", "arguments": {arguments}}}]',
    "mistral named": lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{arguments}",
    "structured": lambda name, arguments: f'[{{"id": "c", "function": {{"name": "{name}", "arguments": {json.dumps(arguments)}}}}}]',
    "structured turn": lambda name, arguments: f'{{"tool_calls": [{{"function": {{"name": "{name}", "arguments": {arguments}}}}}]}}',
}
REFERENCE = json.dumps([{"id": "call_1", "type": "function", "function": {"name": "get_order", "arguments": {"id": "17"}}}])


@pytest.mark.parametrize("form", FORMS)
def test_calls_of_every_family(form: str) -> None:
    settings = ToolCalls(reference="equal")
    named = settings.model_copy(update={"form": form.split()[0]})
    for name, arguments, expected in [
        ("get_order", '{"id": "17"}', (True, "right")),
        ("get_order", '{"id": "18"}', (False, "other_calls")),
        ("get_order", '{"id": 17}', (False, "arguments_not_valid")),
        ("get_order", "{}", (False, "arguments_not_valid")),
        ("get_order", '{"id": "17", "ip": 1}', (False, "unknown_argument")),
        ("get_orders", '{"id": "17"}', (False, "unknown_tool")),
        ("stop", "{}", (False, "other_calls")),
    ]:
        if form in UNTYPED and arguments == '{"id": 17}':
            expected = (True, "right")  # nothing tells it from "17", which the tool takes
        given = Given(THOUGHT + FORMS[form](name, arguments), REFERENCE, {"tools": TOOLS})
        assert check_tool_calls(given, settings) == expected, (name, arguments)
        assert check_tool_calls(given, named) == expected, (name, arguments)


def test_several_calls_their_order_and_none() -> None:
    first, second = FORMS["hermes"]("get_order", '{"id": "1"}'), FORMS["hermes"]("stop", "{}")
    wanted = json.dumps([{"name": "get_order", "arguments": {"id": "1"}}, {"name": "stop", "arguments": {}}])

    def found(answer: str, right: str | None = wanted, tools: Any = TOOLS, **settings: Any) -> Any:
        return check_tool_calls(Given(THOUGHT + answer, right, {"tools": tools}), ToolCalls(**{"reference": "equal", **settings}))

    assert found(first + second) == found(second + first) == found(f"I look it up.\n{first}\n{second}") == (True, "right")
    assert found(second + first, ordered=True) == (False, "other_calls")
    assert found(first) == found(first + second + second) == (False, "other_calls")
    assert found("Hello!", "[]") == (True, "right") and found(first, "[]") == (False, "other_calls")
    assert found("Hello!", None, reference="ignore") == (False, "no_call")
    assert found("Hello!", None, reference="ignore", required=False) == (True, "no_call")
    assert found(first + second, None, reference="ignore") == (True, "fits")
    assert found(first, json.dumps(TOOLS), tools="nothing") == (None, "tools_not_readable")
    assert found(first, "Paris") == (None, "reference_is_no_call") and found(first, None) == (None, "no_reference")
    assert found(first, tools=json.dumps(TOOLS), reference="ignore") == (True, "fits")


@pytest.mark.parametrize(
    "answer",
    ["<tool_call>{", '<tool_call>\n{"name": "get_order"', "<tool_call>get_order</tool_call>", f"{BEGIN}get_order", "[TOOL_CALLS]x",
     "<|python_tag|>{", "[get_order(17)]", '[get_order(id=open("x"))]', '{"name": "get_order"}'],
)  # fmt: skip
def test_what_begins_like_a_call_and_is_none(answer: str) -> None:
    assert check_tool_calls(Given(answer, None, {"tools": TOOLS}), ToolCalls()) == (False, "call_not_readable")


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ({"name": "live", "arguments": {"type": "beta"}}, (True, "fits")),
        ({"name": "live", "arguments": {}}, (True, "fits")),
        ({"name": "live", "arguments": {"kind": "beta"}}, (False, "unknown_argument")),
        ({"name": "top", "arguments": {"limit": 3, "tags": ["a"]}}, (True, "fits")),
        ({"name": "top", "arguments": {"limit": "three"}}, (False, "arguments_not_valid")),
        ({"name": "top", "arguments": {"tags": ["a"]}}, (False, "arguments_not_valid")),
        ({"name": "now", "arguments": {}}, (True, "fits")),
    ],
)
def test_parameters_may_stand_by_their_names_with_python_types_as_xlam_has_them(call: Any, found: Any) -> None:
    """One of them may be called as a keyword of JSON schema is."""
    tools = [
        {"name": "live", "description": "", "parameters": {"type": {"description": "of it", "type": "str", "default": "all"}}},
        {"name": "top", "parameters": {"limit": {"type": "int"}, "tags": {"type": "List[str], optional"}, "by": {"type": "Any, optional"}}},
        {"name": "now", "parameters": {}},
    ]
    given = Given(f"<tool_call>\n{json.dumps(call)}\n</tool_call>", None, {"tools": json.dumps(tools)})
    assert check_tool_calls(given, ToolCalls()) == found
    told = json.loads(tools_of(tools, "x") or "")
    assert told[0]["function"]["parameters"]["properties"] == {"type": {"type": "string", "description": "of it", "default": "all"}}
    assert told[1]["function"]["parameters"]["required"] == ["limit"] and tools_of(json.dumps(told), "x") == json.dumps(told)


SAY = {"name": "say", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}


def test_arguments_may_hold_the_marks_of_a_call() -> None:
    for text in ("</tool_call>", "<tool_call>", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'):
        call = {"name": "say", "arguments": {"text": text}}
        given = Given(f"Now.\n<tool_call>\n{json.dumps(call)}\n</tool_call>", json.dumps([call]), {"tools": json.dumps([SAY])})
        assert check_tool_calls(given, ToolCalls(reference="equal")) == (True, "right")


def test_a_reference_in_words_means_no_call_where_one_says_so() -> None:
    """As in a conversation, some turns of which call nothing."""
    call = '<tool_call>\n{"name": "get_order", "arguments": {"id": "17"}}\n</tool_call>'
    for answer, wanted in (
        ("I am sorry, I can't.", (True, "right")),
        (call, (False, "other_calls")),
        ("<tool_call>{", (False, "call_not_readable")),
    ):
        given = Given(answer, "That is not possible.", {"tools": TOOLS})
        assert check_tool_calls(given, ToolCalls(reference="equal", in_words="no_call")) == wanted
        assert check_tool_calls(given, ToolCalls(reference="equal")) == (None, "reference_is_no_call")
    broken = Given("Yes.", '{"id": 3}', {"tools": TOOLS})  # data, but no call
    assert check_tool_calls(broken, ToolCalls(reference="equal", in_words="no_call")) == (None, "reference_is_no_call")
