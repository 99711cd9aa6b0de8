"""Tools, calls and their results as parts of a conversation: in ids, in tables, before templates and servers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.data.normal import normal_numbers
from distill.models.chat import chat_format
from distill.recipe.base import Sampling
from distill.recipe.servers import Server
from distill.run.schema import EXTRAS, MESSAGES, PROMPT, Message, extras_of, prompt_id, spoken
from distill.run.tables import TableWriter, rows_of
from distill.servers.protocols import protocol_of
from distill.servers.wire import conversation_of

TOOLS = [
    {"type": "function", "function": {"name": "get_order", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}}}
]
CALLS = [{"type": "function", "id": "call_1", "function": {"name": "get_order", "arguments": {"id": "é<|im_end|>"}}}]
TALK: list[Message] = [
    {"role": "user", "content": "Where is it?", "tools": json.dumps(TOOLS)},
    {"role": "assistant", "content": "", "tool_calls": json.dumps(CALLS, ensure_ascii=False)},
    {"role": "tool", "content": "sent", "tool_call_id": "call_1", "name": "get_order"},
]
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}"
    "<call>{{ c.function.name }} {{ c.function.arguments.id }}</call>{% endfor %}{% endif %}"
    "{% if 'tool_call_id' in m %}#{{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_an_id_is_another_for_each_extra_and_the_same_as_ever_without() -> None:
    plain = [{"role": "user", "content": "What is 3 + 4?"}]
    assert prompt_id(plain) == "4506079f63c8000f", "as the kit's first version had it: runs may be gone on with"
    assert prompt_id([{**plain[0], **dict.fromkeys(EXTRAS, None)}]) == prompt_id(plain)  # type: ignore[dict-item]
    others = {prompt_id([{**plain[0], name: "[]"}]) for name in EXTRAS}
    assert len(others | {prompt_id(plain)}) == len(EXTRAS) + 1


def test_tables_keep_them_and_have_no_key_for_what_a_turn_lacks(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, "train", PROMPT)
    writer.append({"prompt_id": prompt_id(TALK), "messages": TALK, "tags": []})
    writer.close()
    [row] = [row for piece in writer.pieces() for row in rows_of(piece)]
    assert row["messages"] == TALK and prompt_id(row["messages"]) == row["prompt_id"]


def test_tables_of_a_kit_that_knew_none_are_read_with_the_schema_of_today(tmp_path: Path) -> None:
    old = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    messages = [{"role": "user", "content": "hello"}]
    writer = TableWriter(tmp_path, "train", pa.schema([("prompt_id", pa.string()), ("messages", old)]))
    writer.append({"prompt_id": prompt_id(messages), "messages": messages})
    [shard] = writer.close()
    assert pq.read_schema(tmp_path / shard.file).field("messages").type == old
    [piece] = writer.pieces()
    assert piece.schema.field("messages").type == MESSAGES and rows_of(piece)[0]["messages"] == messages


def test_templates_get_calls_as_objects_and_text_of_them_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = chat_format(tokenizer)
    text = chat.prompt_text(TALK)
    assert json.dumps(TOOLS) in text and "<call>get_order é<|im_end|></call>" in text and "sent#call_1" in text
    ids = chat.prompt_ids(TALK)
    assert ids.count(chat.end_of_turn_id) == len(TALK), "the one in the argument is read in pieces"
    assert tokenizer.decode(ids) == text


def test_deepseek_gets_the_reasoning_of_calls_apart() -> None:
    said = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nNo."}
    called = {**TALK[1], "content": "<think>\nI look.\n</think>\n\n"}
    talk = [TALK[0], said, TALK[0] | {"content": "And now?"}, called, TALK[2]]
    for kind, sent in (("deepseek", ["No.", None, "", "I look."]), ("openai", [said["content"], None, called["content"], None])):
        protocol = protocol_of(Server.model_validate({"kind": kind, "url": "http://127.0.0.1:1"}), "m")
        body = protocol.writing(talk, Sampling(max_new_tokens=8), 1).body
        assert body is not None
        turns = body["messages"]
        found = [turns[1]["content"], turns[1].get("reasoning_content"), turns[3]["content"], turns[3].get("reasoning_content")]
        assert found == sent and turns[3]["tool_calls"] and "tools" in body


def test_hosts_get_arguments_as_text_and_others_as_objects() -> None:
    of_host = conversation_of(TALK)
    assert of_host["tools"] == TOOLS and "tools" not in of_host["messages"][0]
    assert of_host["messages"][1]["tool_calls"][0]["function"]["arguments"] == json.dumps({"id": "é<|im_end|>"}, ensure_ascii=False)
    assert conversation_of(TALK, calls_as_text=False)["messages"][1]["tool_calls"] == CALLS
    assert conversation_of([{"role": "user", "content": "x"}]) == {"messages": [{"role": "user", "content": "x"}]}
    assert spoken(TALK)[1] == TOOLS and extras_of(TALK[2]) == {"tool_call_id": "call_1", "name": "get_order"}


def test_hosts_get_ids_of_calls_and_results_that_have_none() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"n": number}}} for number in (1, 2)]
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}, *[{"role": "tool", "content": "1"}] * 2]
    turns = conversation_of(talk)["messages"]
    ids = [call["id"] for call in turns[1]["tool_calls"]]
    assert ids == [turn["tool_call_id"] for turn in turns[2:]] == ["call00100", "call00101"]
    assert "id" not in conversation_of(talk, calls_as_text=False)["messages"][1]["tool_calls"][0]


def test_ids_of_calls_and_the_order_of_keys_make_no_other_prompt() -> None:
    def talk(identity: str, *, turned: bool) -> list[Message]:
        call = {"id": identity, "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": 2}}}
        written = [dict(reversed(list(item.items()))) if turned else item for item in (TOOLS[0], call)]
        called: Message = {"role": "assistant", "content": "", "tool_calls": json.dumps([written[1]])}
        asked: Message = {"role": "user", "content": "?", "tools": json.dumps([written[0]])}
        return [asked, called, {"role": "tool", "content": "1", "tool_call_id": identity}]

    first, second = normal_numbers([talk("x", turned=False), talk("y", turned=True)])
    assert first == second != normal_numbers([talk("x", turned=False)[:2]])[0]
