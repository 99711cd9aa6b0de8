"""A few short requests to a server, and what they show of it. Nothing here says whether that is good."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill.errors import ServerError
from distill.recipe.base import Sampling
from distill.recipe.models import ModelSpec
from distill.run.schema import Message
from distill.servers import Answer, Call, Failure, Stream, Usage

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat
    from distill.servers.client import Client
    from distill.servers.protocols import Protocol

_REASONING = ("reasoning_details", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Seen:
    """An answer, and the JSON that it was read from."""

    answer: Answer
    raw: Any


class Asking:
    """Asks a server that holds a model of a recipe.

    Args:
        spec: The model.
        client: Of the server.
        protocol: How the server is spoken to.
        chat: The model's tokenizer and template; needed where the server takes token ids.
        sampling: As its stage draws.
    """

    def __init__(self, spec: ModelSpec, client: Client, protocol: Protocol, chat: ChatFormat | None, sampling: Sampling) -> None:
        self.protocol = protocol
        self._spec, self._client, self._chat, self._sampling = spec, client, chat, sampling

    def call(self, messages: list[Message], longest: int, *, seed: int = 1, logprobs: int | None = None, **changed: Any) -> Call:
        """A request for one answer of at most so many tokens."""
        sampling = self._sampling.plain(max_new_tokens=longest, **changed)
        prompt: Any = messages
        if self.protocol.facts.takes_ids:
            assert self._chat is not None  # whoever asks looks
            prompt = self._chat.prompt_ids(messages)
        stop_ids = () if self._chat is None else self._chat.stop_ids
        return self.protocol.writing(prompt, sampling, seed, stop_ids=stop_ids, logprobs=logprobs, kwargs=self._spec.chat_template_kwargs)

    def answers(self, calls: Sequence[Call]) -> list[Seen]:
        """Whole answers, in the order of the requests.

        Raises:
            ServerError: one failed for good.
        """
        found: dict[int, Seen] = {}

        def read(raw: Any, call: Call) -> Seen:
            whole = _whole(raw)
            return Seen(self.protocol.answer(whole, call), whole)

        for place, seen in self._client.run(enumerate(calls), read, lambda seen: seen.answer.usage):
            if isinstance(seen, Failure):
                raise ServerError(f"a short request failed: {seen.reason}{f' ({seen.detail})' if seen.detail else ''}")
            found[place] = seen
        return [found[place] for place in range(len(calls))]

    def timed(self, calls: Sequence[Call]) -> tuple[float, list[Seen]]:
        """Tokens written a second, of all requests at once; and the answers."""
        start_s = time.perf_counter()
        seen = self.answers(calls)
        written = sum(written_tokens(one.answer) for one in seen)
        return written / max(time.perf_counter() - start_s, 1e-9), seen

    def samples(self, call: Call) -> int:
        """How many samples come where two are asked for in one request; of one that fails none."""
        asked = replace(call, body={**(call.body or {}), "n": 2})
        counted = self._client.run([(0, asked)], lambda raw, _: _choices(_whole(raw)), lambda _: Usage(requests=1))
        return next((number for _, number in counted if isinstance(number, int)), 0)

    def raw(self, call: Call) -> Any:
        """One request's JSON."""
        return self._client.ask(call)


def written_tokens(answer: Answer) -> int:
    """Tokens of an answer, as far as it is told."""
    return answer.usage.output_tokens or len(answer.completion_ids or ())


def read_tokens(answer: Answer) -> int | None:
    """Tokens of its prompt as the server read it; null where it doesn't tell."""
    return len(answer.prompt_ids) if answer.prompt_ids is not None else answer.usage.input_tokens or None


def reasoning_field(raw: Any) -> str | None:
    """Which field of an answer holds the reasoning; null where none does."""
    for event in raw if isinstance(raw, list) else [raw]:
        choices = event.get("choices") or [event] if isinstance(event, dict) else []
        for choice in choices:
            message = choice.get("message") or choice.get("delta") or {}
            for name in _REASONING:
                if isinstance(message, dict) and message.get(name):
                    return name
    return None


def prompt_logprobs(raw: Any) -> int | None:
    """Most entries that came at a token of a prompt that was read, as vLLM or SGLang tell them; null where none came."""
    choice = (raw.get("choices") or [{}])[0] if isinstance(raw, dict) else {}
    places = choice.get("prompt_logprobs") or (raw.get("meta_info") or {} if isinstance(raw, dict) else {}).get("input_token_logprobs")
    tops = (raw.get("meta_info") or {} if isinstance(raw, dict) else {}).get("input_top_logprobs") or places
    return max((len(place) for place in tops or [] if place), default=None)


def _whole(raw: Any) -> Any:
    return raw.whole() if isinstance(raw, Stream) else raw


def _choices(raw: Any) -> int:
    events = raw if isinstance(raw, list) else [raw]
    return len({choice.get("index", 0) for event in events if isinstance(event, dict) for choice in event.get("choices") or []})
