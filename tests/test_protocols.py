"""Requests as each kind of server takes them, and what of a recipe a kind can't honour."""

import json
import re
from typing import get_args

import pytest
from transformers import GenerationConfig

from distill.recipe.base import Sampling
from distill.recipe.servers import Server, ServerKind
from distill.servers import Call
from distill.servers.facts import ALL_SAMPLING, FACTS
from distill.servers.faults import fault_of, words_of
from distill.servers.honouring import unhonoured
from distill.servers.protocols import Protocol, protocol_of

KINDS = get_args(ServerKind)
HOSTS = ("deepseek", "openrouter", "together", "fireworks", "dashscope", "openai")
SAMPLING = Sampling(max_new_tokens=100, temperature=0.7, top_p=0.9, top_k=20, min_p=0.1)
MESSAGES = [{"role": "system", "content": "Short."}, {"role": "user", "content": "2+2?"}]


def server(kind: str, **further: object) -> Server:
    return Server.model_validate({"kind": kind, "url": "http://127.0.0.1:1"} | further)


def spoken(kind: str, **further: object) -> Protocol:
    return protocol_of(server(kind, **further), "m")


def asked(protocol: Protocol, sampling: Sampling = SAMPLING, **further: object) -> Call:
    prompt = [5, 6, 7] if protocol.facts.takes_ids else MESSAGES
    return protocol.writing(prompt, sampling, 2**64 - 2, **further)  # type: ignore[arg-type]


def sent(protocol: Protocol, sampling: Sampling = SAMPLING, **further: object) -> dict:
    """Every field that decides an answer, wherever in a body its kind puts it."""
    body = asked(protocol, sampling, **further).body or {}
    inner = body.get("sampling_params") or body.get("options") or json.loads(body.get("generation_config", "{}"))
    return {name: value for name, value in body.items() if name not in ("sampling_params", "options", "generation_config")} | inner


def test_every_kind_has_a_row_that_says_where_it_is_known_from() -> None:
    assert set(FACTS) == set(KINDS)
    for facts in FACTS.values():
        assert facts.known_from and facts.sampling <= ALL_SAMPLING and "temperature" in facts.sampling
        assert not (facts.gives_ids and not facts.takes_ids) and (facts.prompt_logprobs == 0 or facts.takes_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_a_kind_honours_is_sent_and_no_other(kind: str) -> None:
    protocol = spoken(kind)
    body = sent(protocol)
    for name in ALL_SAMPLING:
        assert (body.get(name) == getattr(SAMPLING, name)) == (name in protocol.facts.sampling), name
    longest = {"max_tokens", "max_new_tokens", "n_predict", "num_predict"} & set(body)
    assert len(longest) == 1 and body[longest.pop()] == 100
    neutral = sent(protocol, Sampling(temperature=1.0, top_p=1.0))
    assert protocol.facts.sampling <= set(neutral), "neutral values are sent, too: a server has defaults of its own"
    json.dumps(asked(protocol).body)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_greedy(kind: str) -> None:
    body = sent(spoken(kind), Sampling(temperature=0.0))
    assert (body.get("do_sample") is False) if kind == "transformers" else body["temperature"] == 0
    assert body.get("top_p", 1.0) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_reduced_to_what_the_kind_takes(kind: str) -> None:
    facts, body = FACTS[kind], sent(spoken(kind))
    seeds = [body[name] for name in ("seed", "sampling_seed") if name in body]
    assert len(seeds) == bool(facts.seed_bits)
    assert all(0 <= seed < 2**facts.seed_bits for seed in seeds) and facts.seed_bits in (0, 31, 63)
    if facts.has_seeds:
        assert len({facts.seed(seed << 7 | seed) for seed in range(1000)}) == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_sent_as_the_kind_reads_it(kind: str) -> None:
    call = asked(spoken(kind))
    assert call.body is not None
    prompt = call.body.get("prompt", call.body.get("input_ids", call.body.get("messages")))
    assert prompt == ([5, 6, 7] if FACTS[kind].takes_ids else MESSAGES)
    assert bool(call.body.get("stream")) == (call.streams is not None) == FACTS[kind].streams


def test_paths() -> None:
    paths = {kind: asked(spoken(kind)).path for kind in KINDS}
    assert paths["vllm"] == "/v1/completions" and paths["sglang"] == "/generate" and paths["llama_cpp"] == "/completion"
    assert paths["ollama"] == "/api/chat" and paths["transformers"] == "/v1/chat/completions"
    assert {paths[kind] for kind in HOSTS} == {"/chat/completions"}


def test_an_address_may_end_in_v1_for_kinds_that_are_asked_elsewhere_too() -> None:
    assert server("vllm", url="http://127.0.0.1:8000/v1/").urls == ["http://127.0.0.1:8000"]
    assert server("openai", url="http://127.0.0.1:8000/v1").urls == ["http://127.0.0.1:8000/v1"]


def test_ids_come_back_whole_and_the_recipe_says_where_an_answer_ends() -> None:
    body = sent(spoken("vllm"), stop_ids=[9, 10], logprobs=5)
    assert body["return_token_ids"] is True and body["skip_special_tokens"] is False and body["stop_token_ids"] == [9, 10]
    assert body["logprobs"] == 5 and body["return_tokens_as_token_ids"] is True
    assert sent(spoken("vllm")).keys().isdisjoint({"logprobs", "prompt_logprobs"})
    assert sent(spoken("vllm"), Sampling(top_k=0))["top_k"] == -1
    body = sent(spoken("sglang"), stop_ids=[9], logprobs=5)
    assert body["stop_token_ids"] == [9] and body["return_logprob"] and body["top_logprobs_num"] == 5
    assert body["skip_special_tokens"] is False and body["spaces_between_special_tokens"] is False
    body = sent(spoken("llama_cpp"), logprobs=5)
    assert body["return_tokens"] is True and body["n_probs"] == 5 and body["repeat_penalty"] == 1.0
    order = body["samplers"]
    assert order.index("temperature") < order.index("top_k") < order.index("top_p") < order.index("min_p"), "as in this process"


def test_log_probabilities_as_hosts_are_asked_for_them() -> None:
    for kind in HOSTS:
        body = sent(spoken(kind), logprobs=5)
        assert (body["logprobs"], body.get("top_logprobs")) == ((5, None) if kind == "together" else (True, 5))
        assert "logprobs" not in sent(spoken(kind))
    assert sent(spoken("llama_cpp"), logprobs=0)["n_probs"] == sent(spoken("together"), logprobs=0)["logprobs"] == 1
    assert sent(spoken("llama_cpp"))["n_probs"] == 0


def test_transformers_takes_the_generation_config_as_it_is() -> None:
    """What its own class refuses, or fills from the checkpoint, would be another sampling than the recipe's."""
    body = asked(spoken("transformers"), stop_ids=[9], kwargs={"enable_thinking": False}).body or {}
    config = GenerationConfig(**json.loads(body["generation_config"]))
    config.validate(strict=True)
    assert config.do_sample and config.top_k == 20 and config.min_p == 0.1 and config.eos_token_id == [9] and config.repetition_penalty == 1
    assert set(body) == {"model", "messages", "generation_config", "stream", "seed", "chat_template_kwargs"}


def test_thinking_is_asked_for_in_the_words_of_each() -> None:
    def fields(kind: str, **kwargs: object) -> dict:
        return {name: value for name, value in sent(spoken(kind), kwargs=kwargs).items() if "think" in name or "reason" in name}

    assert fields("deepseek", enable_thinking=False) == {"thinking": {"type": "disabled"}} and fields("deepseek") == {}
    assert fields("openrouter", enable_thinking=True, reasoning_effort="high") == {"reasoning": {"enabled": True, "effort": "high"}}
    assert fields("dashscope") == {"enable_thinking": True} and fields("dashscope", enable_thinking=False) == {"enable_thinking": False}
    assert fields("ollama", enable_thinking=False) == {"think": False} and fields("ollama") == {}
    assert fields("fireworks", enable_thinking=False) == {"reasoning_effort": "none"}
    assert fields("openai", reasoning_effort="low") == {"reasoning_effort": "low"}


def test_openai_itself_has_another_name_for_the_longest_answer() -> None:
    own = protocol_of(Server(kind="openai"), "m")
    assert (asked(own).body or {})["max_completion_tokens"] == 100 and "max_tokens" not in (asked(own).body or {})
    assert (asked(spoken("openai")).body or {})["max_tokens"] == 100


def test_further_fields_go_where_a_kind_reads_them() -> None:
    assert sent(spoken("vllm", body={"repetition_penalty": 1.05}))["repetition_penalty"] == 1.05
    body = asked(spoken("sglang", body={"repetition_penalty": 1.05, "lora_path": "x"})).body or {}
    assert body["sampling_params"]["repetition_penalty"] == 1.05 and "repetition_penalty" not in body and body["lora_path"] == "x"
    body = asked(spoken("ollama", body={"options": {"num_ctx": 99}, "keep_alive": "1h"})).body or {}
    assert body["options"]["num_ctx"] == 99 and body["options"]["min_p"] == 0.1 and body["keep_alive"] == "1h"
    routed = {"provider": {"order": ["X"]}, "reasoning": {"exclude": False}}
    assert (asked(spoken("openrouter", body=routed), kwargs={"enable_thinking": True}).body or {})["reasoning"] == {
        "enabled": True,
        "exclude": False,
    }


def test_reading_asks_for_the_log_probabilities_of_a_prompt() -> None:
    body = spoken("vllm").reading([5, 6, 7], 64, 2).body or {}
    assert body["prompt"] == [5, 6, 7] and body["prompt_logprobs"] == 64 and body["max_tokens"] == 1 and body["stream"] is False
    body = spoken("sglang").reading([5, 6, 7], 64, 2).body or {}
    assert body["logprob_start_len"] == 1 and body["top_logprobs_num"] == 64 and body["return_logprob"] is True
    for kind in sorted(set(KINDS) - {"vllm", "sglang"}):
        with pytest.raises(NotImplementedError, match=kind):
            spoken(kind).reading([5], 1, 1)


def test_models_and_contexts() -> None:
    listed = {"object": "list", "data": [{"id": "m", "max_model_len": 4096}, {"id": "other"}]}
    for kind in ("vllm", "sglang"):
        assert spoken(kind).models() == Call("/v1/models") and spoken(kind).model_names(listed) == ["m", "other"]
        assert spoken(kind).context_of(listed, "m") == 4096 and spoken(kind).context_of(listed, "other") is None
    assert spoken("llama_cpp").context() == Call("/props")
    assert spoken("llama_cpp").context_of({"default_generation_settings": {"n_ctx": 2048}}, "m") == 2048
    assert spoken("openrouter").models() == Call("/models")
    assert spoken("together").context_of([{"id": "m", "context_length": 8192}], "m") == 8192
    tags = {"models": [{"name": "m:latest", "model": "m:latest"}, {"name": "m:8b"}]}
    assert spoken("ollama").model_names(tags) == ["m", "m:8b"]
    assert protocol_of(server("ollama"), "m:latest").model_names(tags) == ["m:latest", "m:8b"]
    for kind in KINDS:
        assert spoken(kind).model_names({}) == [] and spoken(kind).context_of({}, "m") is None


def test_a_key_that_was_set_and_cannot_be_honoured_is_an_error_that_names_both() -> None:
    found = unhonoured(server("deepseek"), SAMPLING, kwargs={"enable_thinking": False})
    named = [error for error in found.errors if "generate.min_p" in error]
    assert len(named) == 1 and "teacher.server.kind deepseek" in named[0] and "vllm" in named[0]
    assert any("generate.top_k" in error for error in found.errors)
    found = unhonoured(
        server("deepseek"), SAMPLING, fields={"top_k"}, kwargs={"enable_thinking": False}, role="student", section="rollouts"
    )
    assert [re.findall(r"rollouts\.\w+", error) for error in found.errors] == [["rollouts.top_k"]]
    assert "student.server.kind deepseek" in found.errors[0]
    assert any("rollouts.min_p" in warning for warning in found.warnings), "a default is a warning"
    neutral = Sampling(min_p=0.0, top_k=0)
    assert unhonoured(server("deepseek"), neutral, kwargs={"enable_thinking": False}).errors == [], "asks for nothing"


def test_what_is_ignored_while_it_thinks_is_a_warning() -> None:
    sampling = Sampling(temperature=0.7)
    assert any("generate.temperature" in warning for warning in unhonoured(server("deepseek"), sampling).warnings)
    quiet = [{"kwargs": {"enable_thinking": False}}, {"model": "deepseek-chat"}]
    for further in quiet:
        assert not any("generate.temperature" in warning for warning in unhonoured(server("deepseek"), sampling, **further).warnings)  # type: ignore[arg-type]
        assert unhonoured(server("deepseek"), sampling, logprobs=20, **further).errors == []  # type: ignore[arg-type]
    off = server("deepseek", body={"thinking": {"type": "disabled"}})
    assert not any("generate.temperature" in warning for warning in unhonoured(off, sampling).warnings)
    assert "while the model thinks" in unhonoured(server("deepseek"), sampling, logprobs=5).errors[0]


def test_log_probabilities_that_a_kind_does_not_give_are_errors() -> None:
    assert "transformers" in unhonoured(server("transformers"), logprobs=5).errors[0]
    assert "at most 20" in unhonoured(server("openai"), logprobs=64).errors[0]
    assert "vllm, sglang" in unhonoured(server("llama_cpp"), prompt_logprobs=1).errors[0]
    there = unhonoured(server("vllm"), prompt_logprobs=64)
    assert there.errors == [] and any("--max-logprobs 64" in warning for warning in there.warnings)
    started = unhonoured(Server(kind="vllm"), prompt_logprobs=64)
    assert not any("--max-logprobs 64" in warning for warning in started.warnings)


def test_what_a_host_is_asked_without_being_told_is_a_warning() -> None:
    def warned(**further: object) -> bool:
        found = unhonoured(server("dashscope", body=further.pop("body", {})), terms=False, **further)  # type: ignore[arg-type]
        return any("enable_thinking" in warning for warning in found.warnings)

    assert warned() and not warned(kwargs={"enable_thinking": False}) and not warned(body={"enable_thinking": False})
    assert sent(spoken("dashscope", body={"enable_thinking": False}))["enable_thinking"] is False
    assert unhonoured(server("vllm"), terms=False).warnings == [] != unhonoured(server("vllm")).warnings


def test_a_long_silence_is_a_warning() -> None:
    long = Sampling(max_new_tokens=32768)
    assert any("server.timeout_s (600 s)" in warning for warning in unhonoured(server("sglang"), long, terms=False).warnings)
    assert unhonoured(server("vllm"), long, terms=False).warnings == []


def test_a_template_that_is_not_ours_takes_only_what_the_host_can_be_asked_for() -> None:
    assert "teacher.chat_template_kwargs.tools" in unhonoured(server("openrouter"), kwargs={"tools": True}).errors[0]
    assert unhonoured(server("transformers"), kwargs={"anything": 1}).errors == []
    assert unhonoured(server("vllm"), kwargs={"anything": 1}).errors == [], "the kit renders"
    assert "options.seed" in unhonoured(server("ollama", body={"options": {"seed": 1}})).errors[0]


@pytest.mark.parametrize(
    ("status", "body", "verdict", "reason"),
    [
        (429, {"error": {"message": "Rate limit reached"}}, "retry", "http_429"),
        (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, "stage", "http_429"),
        (408, "", "retry", "http_408"),
        (409, "", "retry", "http_409"),
        (500, b"\xff<html>Internal</html>", "retry", "http_500"),
        (503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, "retry", "http_503"),
        (529, {"type": "error", "error": {"type": "overloaded_error"}}, "retry", "http_529"),
        (400, {"object": "error", "message": "This model's maximum context length is 8 tokens", "code": 400}, "row", "too_long"),
        (400, {"error": {"message": "The decoder prompt (length 9) is longer than the maximum model length of 8"}}, "row", "too_long"),
        (400, {"error": {"code": 400, "message": "the request exceeds the available context size", "n_ctx": 8}}, "row", "too_long"),
        (400, {"error": {"message": "Range of input length should be [1, 30720]"}}, "row", "too_long"),
        (413, "Payload Too Large", "row", "too_long"),
        (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}, "row", "content_filter"),
        (400, {"error": {"code": "data_inspection_failed", "message": "Input data may be bad"}}, "row", "content_filter"),
        (403, {"error": {"code": 403, "message": "Input flagged", "metadata": {"reasons": ["x"]}}}, "row", "content_filter"),
        (400, {"error": {"message": "Unknown field: foo"}}, "stage", "http_400"),
        (400, {"error": {"message": "max_tokens is too large: 100000"}}, "stage", "http_400"),
        (401, {"error": {"message": "Invalid API key"}}, "stage", "http_401"),
        (402, {"error": {"message": "Insufficient Balance"}}, "stage", "http_402"),
        (403, {"error": {"message": "Forbidden"}}, "stage", "http_403"),
        (404, {"detail": "Not Found"}, "stage", "http_404"),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "Extra inputs are not permitted"}]}, "stage", "http_422"),
    ],
)
def test_what_a_refusal_means(status: int, body: object, verdict: str, reason: str) -> None:
    fault = fault_of(status, body, "SOME_KEY")
    assert (fault.verdict, fault.reason) == (verdict, reason), fault
    assert bool(fault.advice) == (verdict == "stage") and "{" not in fault.advice
    if status == 401:
        assert "SOME_KEY" in fault.advice


def test_a_servers_words_are_found_cut_and_harmless() -> None:
    assert words_of(b'{"error": {"message": "no such model", "code": "model_not_found"}}') == "no such model (model_not_found)"
    assert words_of({"detail": "Unexpected fields: {'x'}"}) == "Unexpected fields: {'x'}"
    assert (
        words_of({"error": {"message": "Provider returned error", "metadata": {"raw": "too long"}}}) == "Provider returned error too long"
    )
    assert "\x1b" not in words_of("\x1b[31mred") and len(words_of("x" * 10_000)) < 400
    assert words_of("<html><h1>502</h1></html>") == "502" and words_of(None) == "None" and words_of(b"") == ""
