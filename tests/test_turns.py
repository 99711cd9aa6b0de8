"""Conversations in the forms that people have them: whatever the form, the same prompt and the same completion."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from typing import Any

import pytest

from distill.data.calls import UnusableError, calls_of, in_hermes_form, tools_of, without_calls
from distill.data.completions import traces_of
from distill.data.mapping import PromptMapping
from distill.data.marks import with_think
from distill.data.turns import turns_of
from distill.errors import DataError
from distill.recipe.prompts import Columns, Prompts
from distill.recipe.traces import Traces
from distill.run.schema import Message, prompt_id

Row = dict[str, Any]

TOOL = {"name": "stock", "description": "Counts.", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"type": "function", "function": {"name": "stock", "arguments": {"item": "\u0645\u0635\u0628\u0627\u062d"}}}
RESULT = '{"left": 3}'
PROMPT: list[Message] = [
    {"role": "system", "content": "Be brief.", "tools": json.dumps(TOOLS)},
    {"role": "user", "content": "How many lamps?"},
    {"role": "assistant", "content": "<think>\nlook\n</think>\n\nI look.", "tool_calls": json.dumps([CALL], ensure_ascii=False)},
    {"role": "tool", "content": RESULT},
]
COMPLETION = "<think>\nthree\n</think>\n\nThere are 3."
SAID = "<think>\nlook\n</think>\n\nI look."


def openai(calling: Row, result: Row | None = None, final: Any = COMPLETION, **more: Any) -> Row:
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many lamps?"}]
    answer = final if isinstance(final, dict) else {"content": final}
    turns = [*first, {"role": "assistant"} | calling, {"role": "tool", "content": RESULT} | (result or {}), {"role": "assistant"} | answer]
    return {"messages": turns, "tools": TOOLS} | more


def sharegpt(*calling: Row, final: str = COMPLETION, **more: Any) -> Row:
    talk = [{"from": "human", "value": "How many lamps?"}, *calling, {"from": "observation", "value": RESULT}]
    return {"messages": [*talk, {"from": "gpt", "value": final}], "system": "Be brief.", "tools": json.dumps([TOOL])} | more


def text(value: str) -> list[Row]:
    return [{"type": "text", "text": value, "image_url": None}]


_PLAIN_CALL = CALL["function"]
_AS_TEXT = json.dumps(_PLAIN_CALL, ensure_ascii=False)
_OPENAI_CALL = {"type": "function", "function": {"name": "stock", "arguments": json.dumps(_PLAIN_CALL["arguments"])}}
_PADDED = {"type": "function", "id": None, "function": {"name": "stock", "arguments": _PLAIN_CALL["arguments"] | {"city": None}}}
_MARKED = "<|begin_of_thought|>\n\nthree\n<|end_of_thought|>\n\n<|begin_of_solution|>\nThere are 3.\n<|end_of_solution|>"

FORMS: dict[str, Row] = {
    "openai": openai({"content": SAID, "tool_calls": [CALL]}),
    "arguments as text": openai({"content": SAID, "tool_calls": [_OPENAI_CALL]}),
    "arguments as text of text": openai(
        {"content": SAID, "tool_calls": [{"name": "stock", "parameters": json.dumps(json.dumps(_PLAIN_CALL["arguments"]))}]}
    ),
    "calls as text": openai({"content": SAID, "tool_calls": json.dumps([_OPENAI_CALL])}),
    "an older call": openai(
        {"content": SAID, "function_call": _OPENAI_CALL["function"]}, {"role": "function"}, functions=[TOOL], tools=None
    ),
    "as parquet pads": openai(
        {"content": SAID, "tool_calls": [_PADDED], "function_call": None}, {"tool_call_id": None, "tool_calls": None}
    ),
    "reasoning beside": openai(
        {"content": "I look.", "reasoning_content": "look", "tool_calls": [CALL]}, final={"content": "There are 3.", "reasoning": "three"}
    ),
    "thinking beside, twice": openai(
        {"content": SAID, "thinking": "look", "tool_calls": [CALL]}, final={"content": COMPLETION, "thinking": "three"}
    ),
    "parts": openai({"content": text(SAID), "tool_calls": [CALL]}, {"content": text(RESULT)}, {"content": text(COMPLETION)}),
    "a result as data": openai({"content": SAID, "tool_calls": [CALL]}, {"content": {"left": 3}}),
    "blocks of hermes": openai(
        {"content": SAID + "\n" + in_hermes_form([CALL])}, {"content": f"<tool_response>\n{RESULT}\n</tool_response>"}
    ),
    "anthropic": openai(
        {
            "content": [
                {"type": "thinking", "thinking": "look"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "name": "stock", "input": _PLAIN_CALL["arguments"]},
            ]
        },
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": RESULT}]}]},
        tools=[{"name": "stock", "description": "Counts.", "input_schema": TOOL["parameters"]}],
    ),
    "gpt-oss": openai(
        {
            "content": "<|channel|>analysis<|message|>look<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant<|channel|>commentary to=functions.stock <|constrain|>json<|message|>"
            f"{json.dumps(_PLAIN_CALL['arguments'])}<|call|>"
        },
        final="<|channel|>analysis<|message|>three<|end|><|start|>assistant<|channel|>final<|message|>There are 3.<|return|>",
    ),
    "sharegpt": sharegpt({"from": "gpt", "value": SAID}, {"from": "function_call", "value": _AS_TEXT}),
    "sharegpt, of other names": sharegpt(
        {"from": "GPT", "value": SAID, "weight": 1}, {"from": "function-call", "value": f"[{_AS_TEXT}]"}, final=_MARKED
    ),
    "sharegpt in blocks": sharegpt({"from": "gpt", "value": SAID}, {"from": "tool_call", "value": in_hermes_form([CALL])}),
}
FORMS["json"] = {key: json.dumps(value) if value is not None else None for key, value in FORMS["openai"].items()}
_TALK = FORMS["sharegpt"]["messages"]
FORMS["an object of lists"] = FORMS["sharegpt"] | {"messages": {key: [turn[key] for turn in _TALK] for key in ("from", "value")}}
FORMS["inside"] = {"talk": FORMS["sharegpt"]}
FORMS["under other names"] = {"turns": FORMS["openai"]["messages"][1:], "rules": "Be brief.", "api": TOOLS}


def read(row: Row, completion: str | None = None, template: str = "{prompt}", **more: Any) -> list[tuple[list[Message], str, str | None]]:
    """Prompts, completions and reasons to drop them."""
    name = next((name for name in ("messages", "turns") if name in row), "talk.messages")
    names = {"messages": name} | ({"system": "rules", "tools": "api"} if name == "turns" else {})
    section = Prompts(source="x.jsonl", columns=Columns(**names), template=template)
    mapping, traces = (
        PromptMapping(section, section.columns, "x.jsonl"),
        Traces(source="x.jsonl", columns=section.columns, completion=completion, **more),
    )
    prompts = mapping.prompt_rows(row, "x.jsonl:3")
    found = traces_of(traces, mapping, row, "x.jsonl:3")
    assert {prompt["prompt_id"] for prompt, _ in prompts} == {prompt_id(asked.messages) for asked, _ in found}
    return [(asked.messages, brought.text, asked.reason or brought.reason) for asked, brought in found]


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_the_same_in_every_form(form: str) -> None:
    assert read(FORMS[form]) == [(PROMPT, COMPLETION, None)]


def test_an_answer_may_be_calls_alone_and_ids_stay() -> None:
    call = CALL | {"id": "c1"}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call, CALL]}]
    block = "<tool_call>\n" + json.dumps(_PLAIN_CALL, ensure_ascii=False) + "\n</tool_call>"
    assert read({"messages": turns}) == [([{"role": "user", "content": "?"}], f"{block}\n{block}", None)]
    turns[1]["reasoning_content"] = "I must look."
    assert read({"messages": turns})[0][1] == f"<think>\nI must look.\n</think>\n\n{block}\n{block}"
    answered = [*turns, {"role": "tool", "tool_call_id": "c1", "name": "stock", "content": 3}]
    [(prompt, _, reason)] = read({"messages": answered})
    assert reason == "no_answer"  # a prompt it is all the same, which ends with the result
    assert prompt[-1] == {"role": "tool", "tool_call_id": "c1", "name": "stock", "content": "3"}
    assert json.loads(prompt[1]["tool_calls"]) == [{"id": "c1"} | CALL, CALL]


def test_a_prompt_ends_where_an_assistant_answers() -> None:
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<think>d</think>e")]
    turns = [{"role": role, "content": content} for role, content in talk]
    assert read({"messages": turns}, template="So: {prompt}!")[0][0] == [*turns[:2], {"role": "user", "content": "So: c!"}]
    assert read({"messages": turns[:3]})[0] == (turns[:3], "", "no_answer")
    assert read({"messages": turns, "best": "f"}, completion="best")[0] == (turns[:3], "f", None)
    assert read({"messages": turns}, completion="messages.-1")[0] == (turns[:3], "<think>d</think>e", None)
    assert read({"messages": turns, "best": turns[-1:]}, completion="best")[0][1] == "<think>d</think>e"
    before = [turns[0], {"role": "assistant", "content": "<think>\nr</think>b"}]
    assert read({"messages": [turns[0], {"role": "assistant", "content": "r</think>b<|im_end|>"}, *turns[2:]]})[0][0][:2] == before
    for nothing in ([], turns[1:2], [{"role": "system", "content": "s"}], [{"role": "user", "content": " "}, turns[1]]):
        assert read({"messages": nothing})[0][2] == "empty_prompt"


def test_a_system_turn_and_tools_beside_the_conversation() -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    own = [{"role": "system", "content": "mine"}, *turns]
    assert read({"messages": own, "system": "other"})[0][0] == own[:2]  # what a conversation says itself comes first
    assert read({"messages": turns, "system": None, "tools": ["hammer"]})[0][0] == turns[:1]  # called so by chance
    assert read({"messages": [turns[0] | {"tools": json.dumps(TOOLS)}, turns[1]]})[0][0][0]["tools"] == json.dumps(TOOLS)
    section = Prompts(source="x", columns=Columns(messages="messages"), system_prompt="S")
    [(row, _)] = PromptMapping(section, section.columns, "x").prompt_rows({"messages": turns, "system": "other", "tools": TOOLS}, "x:1")
    assert row["messages"] == [{"role": "system", "content": "S", "tools": json.dumps(TOOLS)}, turns[0]]
    columns = Columns(prompt="q", system="rules", tools="api")
    [asked] = PromptMapping(Prompts(source="x", columns=columns), columns, "x").asked({"q": "?", "rules": "R", "api": TOOLS}, "x:1")
    assert asked.messages == [{"role": "system", "content": "R", "tools": json.dumps(TOOLS)}, turns[0]]
    with pytest.raises(DataError, match="x:1: the conversation has a system turn of its own, and rules says another"):
        named = Columns(messages="messages", system="rules")
        PromptMapping(Prompts(source="x", columns=named), named, "x").asked({"messages": own, "rules": "R"}, "x:1")
    for columns in (Columns(prompt="q", system="rules"), Columns(messages="messages", system="rules")):
        with pytest.raises(DataError, match=r"x:1: rules has a system turn of its own, and prompts\.system_prompt is set"):
            PromptMapping(section, columns, "x").asked({"q": "?", "messages": turns, "rules": "R", "api": TOOLS}, "x:1")
    with pytest.raises(ValueError, match=r"columns\.system and system_prompt exclude each other"):
        Prompts(source="x", columns=columns, system_prompt="S")


USER = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("no list", "m must be a list of turns"),
        ("[{", "m holds text that is no JSON"),
        ([USER, {"role": "asistant", "content": "a"}], r"m\.1: has the role 'asistant'\. It must be system, user, a.* \(human, gpt, func"),
        ([USER, {"role": "assistant", "content": {"a": 1}}], r"m\.1: content must be text, or a list of parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"m\.0: content must be text, or a list of parts"),
        ([USER, {"role": "assistant", "content": "<think>a</think>b", "reasoning": "c"}], r"m\.1: has a reasoning in its text and another"),
        ([{"role": "user", "contents": "?"}], r"m\.0: has no content, only 'role', 'contents'"),
        ([USER | {"tools": [{"type": "function"}]}], r"m\.0: tools must hold tools, each with a name"),
        ([USER | {"tools": "[{"}], r"m\.0: tools must hold tools, as a list or as JSON"),
    ],
)
def test_what_is_no_conversation_says_row_and_turn(turns: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^x\.jsonl:3: {message}"):
        turns_of(turns, "m", "x.jsonl:3")


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]},
            "not_text",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "not_text"),
        ({"role": "assistant", "content": None, "audio": {"id": "x"}}, "not_text"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": '}}]}, "call_not_readable"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {}}}]}, "call_not_readable"),
        ({"from": "function_call", "value": "stock(lamp)"}, "call_not_readable"),
    ],
)
def test_what_no_recipe_could_make_right_is_dropped_for_a_reason(turn: Row, reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        turns_of([turn], "m", "x")
    talk = [USER, turn, {"role": "assistant", "content": "a"}]
    assert read({"messages": talk}) == [([], "", reason)]


@pytest.mark.parametrize(
    ("turn", "content"),
    [
        ({"role": "assistant", "content": None, "refusal": "No."}, "No."),
        ({"role": "assistant", "content": None, "function_call": {"name": None, "arguments": None}}, ""),
        ({"role": "assistant", "content": "a", "reasoning": {"effort": "high"}}, "a"),
        ({"role": "assistant", "content": "a", "thinking": "<thinking>r</thinking>"}, "<think>\nr\n</think>\n\na"),
        ({"role": "assistant", "content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]}, "a"]},
         "<think>\nr\n</think>\n\na"),
        ({"role": "tool", "content": [{"left": 3}, None]}, '[{"left": 3}, null]'),
        ({"role": "tool", "content": ["a", "b"]}, '["a", "b"]'),
        ({"role": "tool", "content": 0.5}, "0.5"),
        ({"role": "tool", "content": text("a") + text("b")}, "a\nb"),
        ({"role": "developer", "value": "a"}, "a"),
        ({"from": "Human", "content": {"type": "text", "text": "a"}}, "a"),
    ],
)  # fmt: skip
def test_what_a_turn_says(turn: Row, content: str) -> None:
    [found] = turns_of([turn], "m", "x")
    assert found["content"] == content and not found.keys() & {"tool_calls", "tools"}


def test_results_of_several_calls_in_one_turn_are_several() -> None:
    turns = [{"from": "tool", "value": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>\n"}]
    assert turns_of(turns, "m", "x") == [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    [kept] = turns_of([{"from": "tool", "value": "<tool_response>1</tool_response> and more"}], "m", "x")
    assert kept["content"] == "<tool_response>1</tool_response> and more"


def test_what_is_named_inside_a_conversation_may_have_parts() -> None:
    row = {"messages": [{"role": "user", "content": text("q")}, {"role": "assistant", "content": text("<thinking>r</thinking>a")}]}
    columns = Columns(prompt="messages.0.content", reference="messages.-1.content")
    mapping, traces = (
        PromptMapping(Prompts(source="x", columns=columns), columns, "x"),
        Traces(source="x", completion="messages.-1.content"),
    )
    [(prompt, reason)] = mapping.prompt_rows(row, "x:1")
    assert (prompt["messages"], prompt["reference"], reason) == ([{"role": "user", "content": "q"}], "<thinking>r</thinking>a", None)
    [(_, found)] = traces_of(traces, mapping, row, "x:1")
    assert (found.text, found.marked) == ("<think>\nr\n</think>\n\na", True)
    for place in (0, 1):
        seen = [turn | {"content": [{"type": "image"}]} if place == number else turn for number, turn in enumerate(row["messages"])]
        assert mapping.prompt_rows({"messages": seen}, "x:1")[0][1] == "not_text"


def test_parts_stand_on_lines_of_their_own() -> None:
    parts = [{"type": "text", "text": "a"}, "b ", {"type": "input_text", "text": "c"}, {"type": "text", "text": ""}]
    assert turns_of([{"role": "user", "content": parts}], "m", "x")[0]["content"] == "a\nb c"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("<|begin_of_thought|>\n1\n<|end_of_thought|>\n<|begin_of_solution|>\n2\n<|end_of_solution|>", "<think>\n1\n</think>\n\n2"),
        ("<Thinking>1</THINKING>2", "<think>\n1\n</think>\n\n2"),
        ("<thought>1</thought>2", "<think>\n1\n</think>\n\n2"),
        ("<reasoning>1</reasoning>2", "<think>\n1\n</think>\n\n2"),
        ("<|START_THINKING|>1<|END_THINKING|><|START_RESPONSE|>2<|END_RESPONSE|>", "<think>\n1\n</think>\n\n2"),
        ("\u25c1think\u25b71\u25c1/think\u25b72", "<think>\n1\n</think>\n\n2"),
        ("[THINK]1[/THINK]2", "<think>\n1\n</think>\n\n2"),
        ("<seed:think>1</seed:think>2", "<think>\n1\n</think>\n\n2"),
        ("<thinking>1 </think> 1</thinking>2", "<think>\n1  1\n</think>\n\n2"),
        ("<thinking>1 is cut", "<think>\n1 is cut"),
        ("<|channel|>analysis<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>2", "<think>\n1\n</think>\n\n2"),
        ("<|channel|>analysis<|message|>1<|channel|>final<|message|>2", "<think>\n1\n</think>\n\n2"),
        ("<|channel|>analysis<|message|>1 is <b> cut", "<think>\n1 is <b> cut"),
        ("<|channel|>final<|message|>2", "2"),
        ("<think>\n1 <thinking>a</thinking>\n</think>\n\n2", None),
        ("Write <thinking>a</thinking>.", None),
        ("<|channel|>1", None),
        ("2", None),
    ],
)
def test_marks_of_reasoning_become_the_kits_at_the_start_alone(given: str, expected: str | None) -> None:
    assert with_think(given) == (given if expected is None else expected)
    assert with_think(with_think(given)) == with_think(given)


def test_tools_and_calls() -> None:
    assert json.loads(tools_of([json.dumps(TOOL)], "x") or "") == json.loads(tools_of(TOOL, "x") or "") == TOOLS
    padded = [{"type": "function", "function": TOOL | {"strict": None, "parameters": TOOL["parameters"] | {"required": None}}}]
    assert json.loads(tools_of(padded, "x") or "") == TOOLS
    assert [tools_of(nothing, "x") for nothing in (None, "", [], "[]")] == [None] * 4
    whole = "Now:\n" + in_hermes_form([CALL, CALL])
    assert without_calls(whole) == ("Now:", [CALL, CALL])
    pythons = "<tool_call>\n{'arguments': {'item': 'it\\'s', 'n': None, 'all': True}, 'name': 'stock'}\n</tool_call>"  # Hermes' own data
    assert without_calls(pythons)[1][0]["function"] == {"name": "stock", "arguments": {"item": "it's", "n": None, "all": True}}
    assert calls_of('[{"name": "f", "arguments": {"a": null}}]')[0]["function"]["arguments"] == {"a": None}, "a text has no padding"
    assert calls_of([{"name": "f", "arguments": {"a": None}}])[0]["function"]["arguments"] == {}
    for mark in ("</tool_call>", "<tool_call>", f"\n{whole}"):
        nested = {"type": "function", "function": {"name": "stock", "arguments": {"item": mark}}}
        assert without_calls("Now:\n" + in_hermes_form([CALL, nested])) == ("Now:", [CALL, nested])
    many = in_hermes_form([CALL] * 200)
    assert without_calls(f"{many}\n.") == (f"{many}\n.", []) and without_calls(many)[1] == [CALL] * 200  # in no time
    for broken in ("Now: <tool_call>\n{\n</tool_call>", "<tool_call>", f"{whole} and more", "plain", f"<think>a\n{whole}"):
        assert without_calls(broken) == (broken, [])


_IMAGE = {"type": "image", "image": "x"}
JUNK: list[Any] = [None, True, 0.5, "", "a", "[", "[]", "{}", [], {}, [None], [[]], [{}], {"role": 3}, ["a"], {"function": "f"}, "\ud83d"]
JUNK += [{"type": "text"}, _IMAGE, [_IMAGE]]


def damaged(value: Any, rng: random.Random) -> Any:
    """The value, of which something inside is something else."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        value = copy.copy(value)
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = damaged(value[key], rng)
        return value
    return rng.choice(JUNK)


def test_whatever_a_row_holds_is_read_dropped_or_one_error() -> None:
    rng = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(3000):
        row = rng.choice([row for row in FORMS.values() if "messages" in row])
        column = rng.choice(["messages", "messages", *row])
        row = row | {column: damaged(row[column], rng)}
        try:
            for messages, text, reason in read(row, completion=rng.choice([None, None, "messages.-1", "messages.-1.content"])):
                seen[reason or "read"] += 1
                assert reason or (messages and text.strip())
                assert all(isinstance(value, str) for message in messages for value in message.values())
                assert [place for place, message in enumerate(messages) if "tools" in message] in ([], [0])
                json.dumps(messages, ensure_ascii=False).encode()
        except DataError as error:
            seen["error"] += 1
            assert str(error).startswith("x.jsonl:3: ")
    assert min(seen[kind] for kind in ("read", "error", "empty_prompt", "call_not_readable", "empty_completion", "not_text")) > 10, seen
