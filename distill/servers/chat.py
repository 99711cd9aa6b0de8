"""Servers that take messages and render them themselves: hosts, `transformers serve`, and Ollama."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from distill.recipe.base import Sampling
from distill.run.calls import with_calls
from distill.run.schema import THINK_CLOSE, THINK_OPEN
from distill.servers import Answer, Call
from distill.servers.alternatives import Entry, chat_entries, checked, completion_entries
from distill.servers.answers import (
    BrokenAnswerError,
    called,
    calls_told,
    compared,
    counted,
    finish_of,
    first_choice,
    object_of,
    reasoning_in,
    refused,
    text_in,
    usage_of,
    whole_text,
)
from distill.servers.streams import ChoiceStream, folded
from distill.servers.wire import Prompt, Protocol, conversation_of, merged


class Chat(Protocol):
    """OpenAI's chat completions, as hosts speak them; the address holds the version (`https://.../v1`)."""

    path = "/chat/completions"

    def writing(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        *,
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Call:
        """An answer to messages; see `Protocol`."""
        body: dict[str, Any] = {
            "model": self.model,
            **conversation_of(prompt),
            self._longest: sampling.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.server.kind == "deepseek":
            body["messages"] = thoughts_apart(body["messages"])
        body |= {name: value for name, value in self._sampling(sampling).items() if name in self.facts.sampling}
        if logprobs is not None:
            together = self.server.kind == "together"
            body |= {"logprobs": max(logprobs, 1)} if together else {"logprobs": True, "top_logprobs": logprobs}
        body |= thinking(self.server.kind, kwargs or {})
        return Call(self.path, self._with_further(self._seeded(body, "seed", seed)), streams=ChoiceStream)

    def answer(self, body: Any, call: Call) -> Answer:
        """An answer with its thought between think tags; see `Protocol`."""
        told, asked = object_of(folded(body)), call.body or {}
        choice = first_choice(told)
        message = choice.get("message")
        if not isinstance(message, Mapping):
            raise BrokenAnswerError("no_message", f"the choice has no message; it has {sorted(map(str, choice))}")
        usage, notes = counted(usage_of(told), None, None)
        longest = asked.get("max_tokens", asked.get("max_completion_tokens"))
        finish, more = finish_of(choice.get("finish_reason"), written=usage.output_tokens, longest=longest)
        text, lost = message_text(message, finish)
        wanted = asked.get("top_logprobs") if asked.get("logprobs") is True else asked.get("logprobs")
        probabilities, missing = checked(_entries(choice.get("logprobs")), wanted)
        notes = compared(told.get("model"), self.model) | notes | more | lost | missing
        return Answer(text=text, finish_reason=finish, usage=usage, alternatives=probabilities, model=told.get("model"), notes=notes)

    def models(self) -> Call:
        """A request for the models that the host has."""
        return Call("/models")

    @property
    def _longest(self) -> str:
        """OpenAI's own address has a newer name for the longest answer, which other hosts of its protocol may not know."""
        own = self.server.kind == "openai" and any(urlsplit(url).hostname == "api.openai.com" for url in self.server.urls)
        return "max_completion_tokens" if own else "max_tokens"

    def _sampling(self, sampling: Sampling) -> dict[str, Any]:
        top_k = sampling.top_k or (-1 if self.server.kind == "together" else 0)
        top_p = sampling.top_p if sampling.temperature else 1.0
        return {"temperature": sampling.temperature, "top_p": top_p, "top_k": top_k, "min_p": sampling.min_p}


def thoughts_apart(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns as DeepSeek wants them: the reasoning behind the last question in a field of its own, without which it refuses results of
    tools; that before it left out.
    """
    asked = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    found = []
    for place, turn in enumerate(turns):
        thought, closed, text = turn["content"].partition(THINK_CLOSE)
        if turn["role"] == "assistant" and closed and thought.lstrip().startswith(THINK_OPEN):
            reasoning = thought.lstrip().removeprefix(THINK_OPEN).strip()
            turn = turn | {"content": text.lstrip()} | ({"reasoning_content": reasoning} if place > asked else {})
        found.append(turn)
    return found


def thinking(kind: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A template's arguments for thinking, as the fields in which a kind is asked for it; other arguments have none."""
    on, effort = kwargs.get("enable_thinking", kwargs.get("thinking")), kwargs.get("reasoning_effort")
    efforts = {} if effort is None else {"reasoning_effort": effort}
    if kind == "dashscope":
        budget = {"thinking_budget": kwargs["thinking_budget"]} if "thinking_budget" in kwargs else {}
        return {"enable_thinking": True if on is None else on} | budget
    if kind == "deepseek":
        return efforts if on is None else efforts | {"thinking": {"type": "enabled" if on else "disabled"}}
    if kind == "openrouter":
        asked = ({} if on is None else {"enabled": on}) | ({} if effort is None else {"effort": effort})
        return {"reasoning": asked} if asked else {}
    if kind == "together":
        return efforts if on is None else efforts | {"reasoning": {"enabled": on}}
    if kind == "fireworks" and on is False:
        return {"reasoning_effort": "none"}
    if kind == "ollama":
        asked = on if effort is None else effort
        return {} if asked is None else {"think": asked}
    return efforts


def message_text(message: Mapping[str, Any], finish: str) -> tuple[str, dict[str, Any]]:
    """A message's thought, text and calls as one, and notes.

    Raises:
        BrokenAnswerError: it is finished, and holds nothing at all.
    """
    reasoning, notes = reasoning_in(message)
    content, refusal = text_in(message.get("content")), text_in(message.get("refusal"))
    if content is None and refusal is None and not reasoning and not calls_told(message) and finish == "stop":
        raise BrokenAnswerError("empty_answer", "it has neither content nor reasoning")
    if refusal:
        notes = notes | {"refusal": "the model refused in a field of its own"}
    told = calls_told(message)
    calls = called(told, cut=finish == "length")
    if len(calls) < len(told):
        notes = notes | {"tool_calls": "a tool was called, and it can't be read which"}
    return with_calls(whole_text(reasoning, content or refusal or "", "stop" if calls else finish), calls), notes


def _entries(told: Any) -> list[tuple[Entry, list[Entry]]]:
    """Log-probabilities of a choice, in the newer or the older form; those of a thought come first."""
    if not isinstance(told, Mapping):
        return []
    if told.get("tokens"):
        return completion_entries(told)
    items = [*(told.get("reasoning_content") or []), *(told.get("content") or [])]
    return chat_entries([item for item in items if isinstance(item, Mapping)])


class TransformersServe(Chat):
    """`transformers serve`: messages in; sampling as a `generation_config`, which replaces the checkpoint's."""

    path = "/v1/chat/completions"

    def writing(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        *,
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Call:
        """An answer to messages; see `Protocol`. What `generation_config` leaves open would be the checkpoint's."""
        settings: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
        settings |= {"repetition_penalty": 1.0, "num_beams": 1}
        if sampling.temperature:
            settings |= {name: value for name, value in self._sampling(sampling).items()}
        if stop_ids:
            settings["eos_token_id"] = list(stop_ids)
        further = dict(self.server.body)
        settings |= {name: further.pop(name) for name in list(further) if name in _GENERATION}
        conversation = conversation_of(prompt, calls_as_text=False)  # its templates are given what comes
        body: dict[str, Any] = {"model": self.model, **conversation, "generation_config": json.dumps(settings)}
        if kwargs:
            body["chat_template_kwargs"] = dict(kwargs)
        return Call(self.path, merged(self._seeded(body | {"stream": False}, "seed", seed), further))

    def models(self) -> Call:
        """The models in its machine's cache, whether or not it serves them."""
        return Call("/v1/models")

    def answer(self, body: Any, call: Call) -> Answer:
        """An answer with its thought; see `Protocol`."""
        settings = json.loads((call.body or {}).get("generation_config", "{}"))
        return super().answer(body, Call(call.path, {"max_tokens": settings.get("max_new_tokens")}))


_GENERATION = frozenset({"repetition_penalty", "no_repeat_ngram_size", "typical_p", "epsilon_cutoff", "eta_cutoff"})
"""Fields of `server.body` that belong into transformers' generation config."""

_OLLAMA_NEUTRAL = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "typical_p": 1.0}


class Ollama(Protocol):
    """Ollama's `/api/chat`."""

    def writing(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        *,
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Call:
        """An answer to messages; see `Protocol`."""
        options: dict[str, Any] = {
            "num_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature else 1.0,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
        }
        options = _OLLAMA_NEUTRAL | dict(self.server.body.get("options") or {}) | self._seeded(options, "seed", seed)
        body: dict[str, Any] = {"model": self.model, **conversation_of(prompt, calls_as_text=False), "stream": False}
        body |= thinking("ollama", kwargs or {}) | ({} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs})
        further = {name: value for name, value in self.server.body.items() if name != "options"}
        return Call("/api/chat", merged(body | {"options": options}, further))

    def answer(self, body: Any, call: Call) -> Answer:
        """An answer with its thought; see `Protocol`."""
        told, asked = object_of(body), call.body or {}
        refused(told)
        message = told.get("message")
        if not isinstance(message, Mapping) or not told.get("done"):
            raise BrokenAnswerError("half_answer", "it has no message, or is not done")
        used = {"prompt_tokens": told.get("prompt_eval_count"), "completion_tokens": told.get("eval_count")}
        usage, notes = counted(usage_of({"usage": used}), None, None)
        longest = asked.get("options", {}).get("num_predict")
        finish, more = finish_of(told.get("done_reason"), written=usage.output_tokens, longest=longest)
        text, lost = message_text(message, finish)
        probabilities, missing = checked(chat_entries(told.get("logprobs") or []), asked.get("top_logprobs"))
        notes = compared(told.get("model"), self.model) | notes | more | lost | missing
        return Answer(text=text, finish_reason=finish, usage=usage, alternatives=probabilities, model=told.get("model"), notes=notes)

    def models(self) -> Call:
        """The models that it has."""
        return Call("/api/tags")

    def model_names(self, body: Any) -> list[str]:
        """Their names, that of a newest version as short as it may be written, unless it was asked for in full."""
        names = [str(entry["name"]) for entry in body.get("models") or [] if "name" in entry] if isinstance(body, Mapping) else []
        return names if self.model.endswith(":latest") else [name.removesuffix(":latest") for name in names]
