"""What every protocol has in common: how a request is put together, and what an answer is compared with."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from distill.recipe.base import Sampling
from distill.recipe.servers import Server
from distill.run.schema import Message, spoken
from distill.servers import Answer, Call
from distill.servers.facts import FACTS, Facts

Prompt = list[int] | list[Message]
"""Token ids for kinds that take them, messages for the others."""


class Protocol(ABC):
    """How one kind of server is spoken to. Make it with `protocol_of`."""

    def __init__(self, server: Server, model: str) -> None:
        self.server = server
        self.model = model
        self.facts: Facts = FACTS[server.kind]

    @abstractmethod
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
        """A request for one completion.

        Args:
            prompt: Token ids where `facts.takes_ids`, else messages.
            sampling: All of its fields are sent, as far as the kind has them.
            seed: Of 64 bits; reduced to what the kind takes.
            stop_ids: Tokens that end an answer, where `facts.stops_at_ids`.
            logprobs: Alternatives wanted beside each written token; null asks for none.
            kwargs: The model's `chat_template_kwargs`, for kinds that render messages.
        """

    @abstractmethod
    def answer(self, body: Any, call: Call) -> Answer:
        """What came back, as an answer; what differs from what was asked is in its `notes`.

        Args:
            body: Parsed JSON, or the stream that the call asked for, or the list of the events of one that it did not.
            call: What was asked.

        Raises:
            BrokenAnswerError: it is no whole answer.
        """

    def reading(self, ids: list[int], k: int, first: int) -> Call:
        """A request for the log-probabilities of a prompt's own tokens.

        Args:
            ids: The prompt.
            k: Alternatives at each position.
            first: Place of the first token whose log-probability is wanted, at least 1; a kind may send more.
        """
        raise NotImplementedError(f"kind {self.server.kind} gives no log-probabilities of a prompt")

    def models(self) -> Call:
        """A request for the models that the server has."""
        return Call("/v1/models")

    def model_names(self, body: Any) -> list[str]:
        """Their names, from the answer to `models`."""
        return [str(entry["id"]) for entry in _entries(body) if "id" in entry]

    def context(self) -> Call:
        """A request whose answer tells the context, for `context_of`."""
        return self.models()

    def context_of(self, body: Any, model: str) -> int | None:
        """Tokens of prompt and answer together, from the answer to `context`; null where the server does not tell."""
        entries = [entry for entry in _entries(body) if entry.get("id") == model]
        for entry in entries or (_entries(body) if len(_entries(body)) == 1 else []):
            for name in ("max_model_len", "context_length", "context_window"):
                if isinstance(entry.get(name), int):
                    return int(entry[name])
        return None

    def _seeded(self, body: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
        return body | ({name: self.facts.seed(seed)} if self.facts.has_seeds else {})

    def _with_further(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request with the fields of `server.body`, which a recipe sets over the kit's neutral ones."""
        return merged(body, self.server.body)


def merged(ours: dict[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """A request with further fields, sections inside each other included."""
    result = dict(ours)
    for name, value in further.items():
        there = result.get(name)
        result[name] = merged(there, value) if isinstance(there, dict) and isinstance(value, Mapping) else value
    return result


def ids_of(prompt: Prompt) -> list[int]:
    """A prompt of token ids, as such."""
    return [index for index in prompt if isinstance(index, int)]


def conversation_of(prompt: Prompt, *, calls_as_text: bool = True) -> dict[str, Any]:
    """A prompt of messages as fields of a request: `messages`, and `tools` where there are any.

    Args:
        prompt: Of messages.
        calls_as_text: Whether the arguments of a call are JSON in a text, as OpenAI has them, or an object, which templates take.
    """
    turns, tools = spoken([message for message in prompt if not isinstance(message, int)])
    if calls_as_text:
        _name_calls(turns)
    for function in (call["function"] for turn in turns for call in turn.get("tool_calls", ()) if calls_as_text):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {"messages": turns} | ({} if tools is None else {"tools": tools})


def _name_calls(turns: list[dict[str, Any]]) -> None:
    """Gives calls and results ids, in their order, where the data have none: hosts refuse those without. Mistral wants nine letters."""
    waiting: list[str] = []
    for place, turn in enumerate(turns):
        if "tool_calls" in turn:
            for number, call in enumerate(turn["tool_calls"]):
                call.setdefault("id", f"call{place:03d}{number:02d}")
            waiting = [call["id"] for call in turn["tool_calls"]]
        elif turn["role"] == "tool":
            identity = turn.setdefault("tool_call_id", waiting[0] if waiting else f"call{place:03d}00")
            waiting = [name for name in waiting if name != identity]


def _entries(body: Any) -> list[dict[str, Any]]:
    found = body.get("data", body.get("models", [])) if isinstance(body, dict) else body
    return [entry for entry in found or [] if isinstance(entry, dict)]
