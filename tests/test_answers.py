"""Answers of every kind of server, in the shapes of their public documents, read as one."""

import itertools
import json
import math

import pytest

from distill.recipe.base import Sampling
from distill.recipe.servers import Server
from distill.servers import Answer, Usage
from distill.servers.answers import BrokenAnswerError, compared, finish_of, reasoning_in, usage_of, whole_text
from distill.servers.protocols import protocol_of
from distill.servers.streams import folded

SAMPLING = Sampling(max_new_tokens=8)
MESSAGES = [{"role": "user", "content": "2+2?"}]
USED = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


def read(kind: str, body: object, *, logprobs: int | None = None, model: str = "m") -> Answer:
    protocol = protocol_of(Server(kind=kind, url="http://127.0.0.1:1"), model)
    prompt = [1, 2, 3] if protocol.facts.takes_ids else MESSAGES
    return protocol.answer(body, protocol.writing(prompt, SAMPLING, 7, stop_ids=[9], logprobs=logprobs))


def chat(message: object, finish: str | None = "stop", **further: object) -> dict:
    choice = {"index": 0, "message": message, "finish_reason": finish} | further
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": USED}


# What each server writes of the same thought and answer: a whole one, and one cut inside the thought.
THOUGHTS = {
    "vllm's field": {"reasoning": "so 4", "content": "4"},
    "deepseek, sglang, dashscope": {"reasoning_content": "so 4", "content": "4"},
    "openrouter": {"reasoning": "so 4", "reasoning_details": [{"type": "reasoning.text", "text": "so 4", "index": 0}], "content": "4"},
    "ollama": {"thinking": "so 4", "content": "4"},
    "text": {"content": "<think>so 4</think>4"},
    "text, opened by the template": {"content": "so 4</think>4"},
    "two names": {"reasoning": "so 4", "reasoning_content": "so 4", "content": "4"},
    "field and text": {"reasoning_content": "so 4", "content": "<think>so 4</think>4"},
    "tags in the field": {"reasoning_content": "<think>so 4</think>", "content": "4"},
    "parts": {"reasoning_content": "so 4", "content": [{"type": "text", "text": "4"}]},
    "close left in the content": {"reasoning_content": "so 4", "content": "</think>4"},
}


def called(name: str, arguments: object) -> dict[str, object]:
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


def block(inner: str) -> str:
    return f"<tool_call>\n{inner}\n</tool_call>"


@pytest.mark.parametrize("message", THOUGHTS.values(), ids=THOUGHTS)
def test_a_thought_is_put_between_tags_once_whatever_its_field(message: dict) -> None:
    text = read("openai", chat(message)).text
    assert text.split("</think>")[0].removeprefix("<think>").strip() == "so 4" and text.split("</think>")[1].strip() == "4"
    assert text.count("<think>") == text.count("</think>") == 1 and text.startswith("<think>")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_a_cut_thought_stays_open(name: str) -> None:
    """With a parser the content of a cut thought is null."""
    answer = read("deepseek", chat({"role": "assistant", name: "so", "content": None}, "length"))
    assert answer.text == "<think>\nso" and answer.finish_reason == "length"
    assert read("deepseek", chat({"content": "<think>\nso"}, "length")).text == "<think>\nso"
    cut_behind = read("deepseek", chat({name: "so", "content": "4 is"}, "length"))
    assert cut_behind.text == "<think>\nso\n</think>\n\n4 is" and cut_behind.finish_reason == "length"


PIECES = ["", "so 4", " a\n", "<think>", "</think>", "\n\n", "tags: <thinking>"]


APART = ["", "x y", "\nx\n", "<think>x", "x</think>", "<think>x</think>"]


def letters(text: str) -> str:
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


@pytest.mark.parametrize("finish", ["stop", "length", "error"])
def test_no_reasoning_is_lost_none_opened_twice_and_closed_iff_it_ended(finish: str) -> None:
    for apart, content in itertools.product(APART, map("".join, itertools.product(PIECES, repeat=3))):
        text = whole_text(apart, content, finish)
        assert letters(apart) in letters(text) and letters(content) in letters(text), (apart, content)
        if letters(apart):
            assert text.startswith("<think>\n") and text.count("<think>") <= 1 + content.lstrip().removeprefix("<think>").count("<think>")
            ended = finish != "length" or "</think>" in content or not (content.lstrip().startswith("<think>") or not content.strip())
            assert ("</think>" in text) == ended, (apart, content, text)
        else:
            assert text in (content, "<think>" + content)


def test_summaries_and_encrypted_thoughts_are_noted() -> None:
    summary = [{"type": "reasoning.summary", "summary": "about 4"}]
    assert reasoning_in({"reasoning": "about 4", "reasoning_details": summary}) == ("about 4", {"reasoning": "a summary came in its place"})
    assert reasoning_in({"reasoning_details": summary})[0] == "about 4"
    lost = read("openrouter", chat({"reasoning_details": [{"type": "reasoning.encrypted", "data": "xx"}], "content": "4"}))
    assert lost.text == "4" and "lost" in lost.notes["reasoning"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("STOP", "stop"),
        ("word", "stop"),
        ("length", "length"),
        ("limit", "length"),
        ("max_tokens", "length"),
        ("content_filter", "error"),
        ("tool_calls", "stop"),
        ("function_call", "stop"),
        ("something_new", "error"),
    ],
)
def test_why_it_ended(told: str, expected: str) -> None:
    finish, notes = finish_of(told)
    assert finish == expected and bool(notes) == (expected == "error")


def test_an_untold_end_is_found_from_what_is_known() -> None:
    assert finish_of(None, stopped=True) == ("stop", {})
    assert finish_of(None, written=8, longest=8) == ("length", {})
    assert finish_of(None, written=3, longest=8)[0] == "error"


@pytest.mark.parametrize("told", ["insufficient_system_resource", "abort", "error", "timeout"])
def test_what_the_server_ended_is_asked_again(told: str) -> None:
    with pytest.raises(BrokenAnswerError) as error:
        read("deepseek", chat({"content": "4"}, told))
    assert error.value.reason == told and not error.value.final


BROKEN = {
    "no object": "oops",
    "empty": {},
    "null": None,
    "no choices": {"choices": [], "usage": USED},
    "no message": {"choices": [{"index": 0, "finish_reason": "stop"}]},
    "nothing in it": chat({"role": "assistant", "content": None}),
    "an error with a status of success": {"error": {"message": "overloaded", "code": 502}},
    "an error in the choice": chat({"content": ""}, "error") | {"choices": [{"error": {"message": "x", "code": 502}}]},
    "a stream cut": [{"choices": [{"index": 0, "delta": {"content": "4"}, "finish_reason": None}]}],
    "a stream of nothing": [],
    "a stream with an error": [{"choices": [{"index": 0, "delta": {"content": "4"}}]}, {"error": {"message": "gone"}}],
    "a stream with an error as text": [{"error": "CUDA out of memory"}],
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama_cpp", "ollama", "transformers", "openrouter"])
def test_half_an_answer_is_none(kind: str, body: object) -> None:
    with pytest.raises(BrokenAnswerError) as error:
        read(kind, body)
    assert error.value.reason and "\n" not in str(error.value)


def test_a_refused_prompt_inside_an_answer_is_final() -> None:
    for code, words, reason in [(403, "flagged by moderation", "content_filter"), (400, "maximum context length is 8", "too_long")]:
        with pytest.raises(BrokenAnswerError) as error:
            read("openrouter", {"error": {"code": code, "message": words}})
        assert error.value.final and error.value.reason == reason
    with pytest.raises(BrokenAnswerError) as error:
        read("openrouter", {"error": {"code": 429, "message": "slow down"}})
    assert not error.value.final


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "tool_calls": [called("f", '{"a": 1}')]}, block('{"name": "f", "arguments": {"a": 1}}')),
        ({"content": "I look.", "tool_calls": [called("f", "{}")]}, "I look.\n" + block('{"name": "f", "arguments": {}}')),
        (
            {"content": "", "reasoning_content": "Hm.", "tool_calls": [called("f", '{"a":"é"}'), called("g", {"b": None})]},
            "<think>\nHm.\n</think>\n\n"
            + block('{"name": "f", "arguments": {"a": "é"}}')
            + "\n"
            + block('{"name": "g", "arguments": {"b": null}}'),
        ),
        ({"content": None, "tool_calls": [called("f", '{"a": ')]}, block('{"name": "f", "arguments": {"a":}')),
        ({"content": None, "tool_calls": [called("f", None)]}, block('{"name": "f", "arguments": {}}')),
    ],
)  # fmt: skip
def test_calls_are_a_part_of_an_answer(message: dict[str, object], text: str) -> None:
    found = read("openai", chat(message, "tool_calls"))
    assert (found.text, found.finish_reason) == (text, "stop") and "tool_calls" not in found.notes


def test_calls_are_put_together_from_the_pieces_of_a_stream() -> None:
    def event(*pieces: object, **more: object) -> dict[str, object]:
        return {"choices": [{"index": 0, "delta": {"tool_calls": list(pieces)} if pieces else {}, **more}]}

    whole = block('{"name": "f", "arguments": {"a": 1}}') + "\n" + block('{"name": "g", "arguments": {}}')
    by_index = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]},
        event({"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": ""}}),
        event({"index": 0, "function": {"arguments": '{"a"'}}),
        event({"index": 1, "id": "y", "type": "function", "function": {"name": "g", "arguments": "{}"}}),
        event({"index": 0, "function": {"arguments": ": 1}"}}),
        event(finish_reason="tool_calls"),
    ]
    by_id = [  # whole calls, which all say that they are the first
        event({"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}}),
        event({"index": 0, "id": "y", "function": {"name": "g", "arguments": "{}"}}, finish_reason="tool_calls"),
    ]
    in_turn = [  # no index at all
        event({"id": "x", "function": {"name": "f", "arguments": '{"a": '}}),
        event({"function": {"name": "f", "arguments": "1}"}}),
        event({"id": "y", "function": {"name": "g", "arguments": {}}}, finish_reason="stop"),
    ]
    by_name = [  # whole calls with no more than a name, or an index that is always the first
        event({"index": 0, "id": "", "function": {"name": "f", "arguments": '{"a": 1}'}}, {"function": {"name": "g", "arguments": {}}}),
        event(finish_reason="tool_calls"),
    ]
    for stream in (by_index, by_id, in_turn, by_name):
        found = read("openai", stream)
        assert (found.text, found.finish_reason) == (whole, "stop")


def test_the_older_field_of_one_call_is_read() -> None:
    whole = block('{"name": "f", "arguments": {"a": 1}}')
    older = {"name": "f", "arguments": '{"a": 1}'}
    assert read("openai", chat({"content": None, "function_call": older}, "function_call")).text == whole
    pieces = [{"function_call": {"name": "f", "arguments": '{"a"'}}, {"function_call": {"arguments": ": 1}"}}]
    stream = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    assert read("openai", [*stream, {"choices": [{"index": 0, "delta": {}, "finish_reason": "function_call"}]}]).text == whole


def test_a_call_that_is_lost_is_noted_and_one_that_is_cut_stays_open() -> None:
    found = read("openai", chat({"content": None, "tool_calls": [called("f", "{}"), {"type": "custom", "custom": {"name": "g"}}]}, "stop"))
    assert found.text == block('{"name": "f", "arguments": {}}') and "tool_calls" in found.notes
    found = read("openai", chat({"content": None, "tool_calls": [called("f", "{}"), called("g", '{"a": "b')]}, "length"))
    assert found.finish_reason == "length"
    assert found.text == block('{"name": "f", "arguments": {}}') + '\n<tool_call>\n{"name": "g", "arguments": {"a": "b'


def test_refusals_are_no_answers() -> None:
    tool = read("openai", chat({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"))
    assert tool.text == "" and tool.notes["tool_calls"]
    refusal = read("openai", chat({"content": None, "refusal": "I can't"}, "stop"))
    assert refusal.text == "I can't" and refusal.notes["refusal"]
    filtered = read("openai", chat({"content": ""}, "content_filter"))
    assert filtered.finish_reason == "error" and filtered.notes["finish_reason"] == "content_filter"


def test_usage_in_the_words_of_each() -> None:
    openai = USED | {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 3}}
    assert usage_of({"usage": openai}) == Usage(5, 2, 4, 3, requests=1)
    deepseek = USED | {"prompt_cache_hit_tokens": 2, "prompt_cache_miss_tokens": 3}
    assert usage_of({"usage": deepseek}) == Usage(5, 2, 4, requests=1)
    beside = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 3}}
    assert usage_of({"usage": beside}) == Usage(5, 0, 4, 3, requests=1)
    assert usage_of({"usage": USED | {"prompt_tokens_details": None}}) == Usage(5, 0, 4, requests=1)
    assert usage_of({}) is None and usage_of({"usage": None}) is None and usage_of({"usage": {"prompt_tokens": None}}) is None
    untold = read("openai", chat({"content": "4"}) | {"usage": None})
    assert untold.usage == Usage(requests=1) and untold.notes["usage"] == "none was told"


def test_another_model_is_noted_and_a_dated_name_is_not() -> None:
    assert "model" not in read("openai", chat({"content": "4"}) | {"model": "m-2026-01-01"}).notes
    assert "other" in read("openai", chat({"content": "4"}) | {"model": "other"}).notes["model"]
    for name, asked, same in [
        ("gpt-4o", "gpt-4", False),
        ("gpt-4-0613", "gpt-4", True),
        ("/models/qwen3-8b-Q4_K_M.gguf", "Qwen/Qwen3-8B", True),
        ("deepseek/deepseek-r1:free", "deepseek/deepseek-r1", True),
        ("Qwen3-8B", "Qwen3-8B-FP8", True),
        ("qwen3-80b", "qwen3-8b", False),
        ("/runs/teacher@main", "/runs/teacher", True),
    ]:
        assert (compared(name, asked) == {}) == same, (name, asked)


def deltas(*pieces: dict, finish: str | None = "stop", **last: object) -> list:
    events: list = [{"model": "m", "choices": [{"index": 0, "delta": piece, "finish_reason": None}]} for piece in pieces]
    return [*events, {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]} | last]


def test_a_stream_is_the_body_it_would_have_been() -> None:
    events = deltas(
        {"role": "assistant", "content": ""}, {"reasoning_content": "so "}, {"reasoning_content": "4"}, {"content": "4"}, {"content": "."}
    )
    whole = read("deepseek", [*events, {"choices": [], "usage": USED}, "[DONE]"])
    assert whole.text == "<think>\nso 4\n</think>\n\n4." and whole.usage.output_tokens == 4 and whole.finish_reason == "stop"
    assert read("deepseek", [*events, {"choices": [], "usage": USED}]) == whole, "[DONE] says nothing more"
    details = [{"reasoning_details": [{"type": "reasoning.text", "text": text, "index": 0}], "reasoning": text} for text in ("so ", "4")]
    assert read("openrouter", deltas(*details, {"content": "4."}, usage=USED)).text == whole.text
    cut = read("deepseek", deltas({"reasoning_content": "so"}, finish="length", usage=USED))
    assert cut.text == "<think>\nso" and cut.finish_reason == "length"


def test_a_stream_of_several_choices_is_told_apart() -> None:
    events = [{"choices": [{"index": index, "delta": {"content": letter}}]} for letter in "ab" for index in (1, 0)]
    ends = [{"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]} for index in (0, 1)]
    assert [choice["message"]["content"] for choice in folded([*events, *ends])["choices"]] == ["ab", "ab"]


def test_vllm_with_ids_and_log_probabilities() -> None:
    logprobs = {
        "tokens": ["token_id:4", "token_id:9"],
        "token_logprobs": [-3.0, -0.1],
        "top_logprobs": [{"token_id:5": -0.5, "token_id:4": -3.0, "token_id:6": -1.0}, {"token_id:7": -9999.0, "token_id:9": -0.1}],
        "text_offset": [0, 1],
    }
    choice = {"index": 0, "text": "4", "token_ids": [4, 9], "prompt_token_ids": [1, 2, 3], "finish_reason": "stop", "stop_reason": 9}
    body = {"model": "m", "choices": [choice | {"logprobs": logprobs}], "usage": USED | {"completion_tokens": 2}}
    answer = read("vllm", body, logprobs=2)
    assert answer.completion_ids == [4, 9] and answer.prompt_ids == [1, 2, 3] and answer.notes == {} and answer.finish_reason == "stop"
    assert answer.alternatives is not None
    assert answer.alternatives.token_ids == [[5, 6], [9]], "the written one is beside the best only if it is one; floors are nothing"
    assert answer.alternatives.logprobs == [[-0.5, -1.0], [-0.1]] and answer.alternatives.token_logprobs == [-3.0, -0.1]

    first = choice | {"text": "4", "token_ids": [4], "finish_reason": None, "stop_reason": None}
    first["logprobs"] = {name: value[:1] for name, value in logprobs.items()}
    last = choice | {"text": "", "token_ids": [9], "prompt_token_ids": None}
    last["logprobs"] = {name: value[1:] for name, value in logprobs.items()}
    events = [{"model": "m", "choices": [first]}, {"model": "m", "choices": [last]}, {"model": "m", "choices": [], "usage": body["usage"]}]
    assert read("vllm", events, logprobs=2) == answer


def test_vllm_that_gives_less_than_was_asked_for_is_noted() -> None:
    choice = {"index": 0, "text": "4", "finish_reason": "stop", "logprobs": None}
    notes = read("vllm", {"model": "m", "choices": [choice], "usage": USED}, logprobs=2).notes
    assert set(notes) == {"ids", "logprobs"}
    other = choice | {"token_ids": [4], "prompt_token_ids": [0, 1, 2, 3]}
    assert "other tokens" in read("vllm", {"model": "m", "choices": [other], "usage": USED}).notes["prompt"]
    nan = choice | {"token_ids": [4], "logprobs": {"tokens": ["token_id:4"], "token_logprobs": [math.nan], "top_logprobs": [{}]}}
    assert read("vllm", {"model": "m", "choices": [nan], "usage": USED}, logprobs=2).alternatives is None
    shifted = choice | {"token_ids": [5], "logprobs": {"tokens": ["token_id:4"], "token_logprobs": [-1.0], "top_logprobs": [{}]}}
    assert "other tokens" in read("vllm", {"model": "m", "choices": [shifted], "usage": USED}, logprobs=2).notes["logprobs"]
    counted = read(
        "vllm", {"model": "m", "choices": [choice | {"token_ids": [4, 9], "prompt_token_ids": [1, 2, 3], "finish_reason": None}]}
    )
    assert counted.usage == Usage(3, 0, 2, requests=1) and counted.finish_reason == "stop", "by the token that ends it"


def sglang(reason: object, **meta: object) -> dict:
    told = {"id": "x", "finish_reason": reason, "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1, "e2e_latency": 0.1}
    return {"text": "4", "output_ids": [4, 9], "meta_info": told | meta}


def test_sglang_with_triples() -> None:
    tops = [[[-0.5, 5, None], [-3.0, 4, None]], [[-0.1, 9, None], [-0.1, 9, None]]]
    body = sglang({"type": "stop", "matched": 9}, output_token_logprobs=[[-3.0, 4, None], [-0.1, 9, None]], output_top_logprobs=tops)
    answer = read("sglang", body, logprobs=2)
    assert answer.completion_ids == [4, 9] and answer.finish_reason == "stop" and answer.usage == Usage(3, 1, 2, requests=1)
    assert answer.alternatives is not None and answer.alternatives.token_ids == [[5, 4], [9]] and answer.notes == {}
    assert read("sglang", sglang({"type": "length", "length": 2})).finish_reason == "length"
    assert read("sglang", sglang({"type": "stop", "matched": 9}), logprobs=2).notes["logprobs"]


def test_sglang_aborts() -> None:
    with pytest.raises(BrokenAnswerError) as error:
        read("sglang", sglang({"type": "abort", "message": "The input is longer than the context length", "status_code": 400}))
    assert error.value.final and error.value.reason == "too_long"
    with pytest.raises(BrokenAnswerError) as error:
        read("sglang", sglang({"type": "abort", "message": "shutting down", "status_code": 503}))
    assert not error.value.final


def llama(**changed: object) -> dict:
    entry = {"id": 4, "token": "4", "bytes": [52], "logprob": -0.5}
    end = {"id": 9, "token": "", "bytes": [], "logprob": -0.1}
    body = {
        "content": "4",
        "tokens": [4, 9],
        "stop": True,
        "stop_type": "eos",
        "model": "m",
        "tokens_evaluated": 3,
        "tokens_predicted": 2,
        "truncated": False,
        "timings": {"cache_n": 1, "prompt_n": 2},
        "generation_settings": {"seed": 7},
        "completion_probabilities": [entry | {"top_logprobs": [entry]}, end | {"top_logprobs": [end, entry]}],
    }
    return body | changed


def test_llama_server() -> None:
    answer = read("llama_cpp", llama(), logprobs=2)
    assert answer.completion_ids == [4, 9] and answer.usage == Usage(3, 1, 2, requests=1) and answer.finish_reason == "stop"
    assert answer.alternatives is not None and answer.alternatives.token_ids == [[4], [9, 4]] and answer.notes == {}
    assert read("llama_cpp", llama(stop_type="limit")).finish_reason == "length"
    assert read("llama_cpp", llama(stop_type="none", stopped_limit=True)).finish_reason == "length"
    assert set(read("llama_cpp", llama(truncated=True, generation_settings={"seed": 1})).notes) == {"truncated", "seed"}
    last = llama(content="", tokens=[9], completion_probabilities=llama()["completion_probabilities"][1:])
    first = {"content": "4", "tokens": [4], "stop": False, "completion_probabilities": llama()["completion_probabilities"][:1]}
    assert read("llama_cpp", [first, last], logprobs=2) == answer


def test_ollama() -> None:
    body = {"model": "m", "message": {"role": "assistant", "content": "4", "thinking": "so"}, "done": True, "done_reason": "stop"}
    body |= {"prompt_eval_count": 5, "eval_count": 4}
    answer = read("ollama", body)
    assert answer.text == "<think>\nso\n</think>\n\n4" and answer.usage == Usage(5, 0, 4, requests=1) and answer.completion_ids is None
    cut = body | {"message": {"role": "assistant", "content": "", "thinking": "so"}, "done_reason": "length"}
    assert read("ollama", cut).text == "<think>\nso"
    entry = {"token": "4", "logprob": -0.2, "bytes": [52], "top_logprobs": [{"token": "5", "logprob": -1.0, "bytes": [53]}]}
    told = read("ollama", body | {"logprobs": [entry]}, logprobs=1).alternatives
    assert told is not None and told.token_bytes == [[b"5"]] and told.written_bytes == [b"4"] and told.token_ids is None


def test_transformers_serve() -> None:
    body = {"id": "x", "object": "chat.completion", "model": "m@main", "system_fingerprint": "", "created": 1, "usage": USED}
    body |= {"choices": [{"index": 0, "finish_reason": "length", "message": {"content": "so 4", "role": "assistant"}}]}
    answer = read("transformers", body)
    assert answer.text == "so 4" and answer.finish_reason == "length" and answer.notes == {} and answer.completion_ids is None
    empty = read("transformers", chat({"content": "", "role": "assistant"}))
    assert empty.text == "" and empty.finish_reason == "stop", "a model may end its turn at once"


def test_log_probabilities_of_hosts_are_bytes() -> None:
    half = {"token": "\\xe2\\x82", "logprob": -0.3, "bytes": [226, 130]}
    other = {"token": "é", "logprob": -1.5, "bytes": None}
    logprobs = {"content": [half | {"top_logprobs": [other, half]}], "refusal": None}
    told = read("openai", chat({"content": "x"}, logprobs=logprobs), logprobs=2).alternatives
    assert told is not None and told.token_bytes == [[b"\xe2\x82", "é".encode()]] and told.logprobs == [[-0.3, -1.5]]
    older = {"tokens": ["x"], "token_logprobs": [-0.3], "top_logprobs": [{"x": -0.3, "y": -2.0}], "token_ids": None}
    told = read("together", chat({"content": "x"}, logprobs=older), logprobs=2).alternatives
    assert told is not None and told.token_bytes == [[b"x", b"y"]]
    assert read("openai", chat({"content": "x"}, logprobs=None), logprobs=2).notes["logprobs"] == "asked for, and none came"
    both = {"reasoning_content": [half | {"top_logprobs": []}], "content": [other | {"top_logprobs": []}]}
    told = read("deepseek", chat({"content": "x"}, logprobs=both), logprobs=2).alternatives
    assert told is not None and told.written_bytes == [b"\xe2\x82", "é".encode()]


def test_answers_survive_as_json() -> None:
    """Notes go into records."""
    json.dumps(read("vllm", {"model": "z", "choices": [{"index": 0, "text": "", "finish_reason": "tool_calls"}]}, logprobs=1).notes)
