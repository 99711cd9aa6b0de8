"""llama-server's native `/completion`: ids in and out, every setting of its own made neutral."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from distill.recipe.base import Sampling
from distill.servers import Answer, Call, Usage
from distill.servers.alternatives import chat_entries, checked
from distill.servers.answers import BrokenAnswerError, compared, counted, drawn, finish_of, object_of, refused, usage_of
from distill.servers.streams import folded
from distill.servers.wire import Prompt, Protocol, ids_of

# Its own order draws the temperature last, so that top_p and min_p would look at other probabilities than everywhere else.
_ORDER = ["penalties", "dry", "temperature", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc"]
_NEUTRAL: dict[str, Any] = {
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "typical_p": 1.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "top_n_sigma": -1.0,
}


class LlamaServer(Protocol):
    """llama-server's native `/completion`."""

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
        """A completion of ids; see `Protocol`."""
        body: dict[str, Any] = {
            "prompt": ids_of(prompt),
            "n_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature else 1.0,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "samplers": _ORDER,
            "n_probs": 0 if logprobs is None else max(logprobs, 1),  # none would also leave out the written token's
            "return_tokens": True,
            "cache_prompt": True,
            "stream": True,
        }
        return Call("/completion", self._with_further(self._seeded(_NEUTRAL | body, "seed", seed)), streams=LlamaStream)

    def answer(self, body: Any, call: Call) -> Answer:
        """A completion with its ids; see `Protocol`."""
        told, asked = object_of(folded(body, LlamaStream)), call.body or {}
        refused(told)
        if "content" not in told:
            raise BrokenAnswerError("broken_answer", f"no content; the answer has {sorted(map(str, told))}")
        ids = drawn(told.get("tokens")) or None
        usage, notes = _usage(told)
        finish, more = finish_of(_end(told), written=usage.output_tokens, longest=asked.get("n_predict"))
        wanted = asked.get("n_probs") or None
        probabilities, missing = checked(chat_entries(told.get("completion_probabilities") or []), wanted, ids)
        notes |= more | missing | compared(told.get("model"), self.model)
        settings = told.get("generation_settings") or {}
        if "seed" in settings and settings["seed"] != asked.get("seed"):
            notes["seed"] = "another was taken than was sent"
        if told.get("truncated"):
            notes["truncated"] = "the server cut the prompt or shifted its context"
        if ids is None and told["content"]:
            notes["ids"] = "asked for, and none came"
        return Answer(
            text=str(told["content"]),
            finish_reason=finish,
            usage=usage,
            completion_ids=ids,
            alternatives=probabilities,
            model=told.get("model"),
            notes=notes,
        )

    def context(self) -> Call:
        """Its properties, where the context of one slot is."""
        return Call("/props")

    def context_of(self, body: Any, model: str) -> int | None:
        """Context of one slot."""
        settings = body.get("default_generation_settings") if isinstance(body, Mapping) else None
        found = settings.get("n_ctx") if isinstance(settings, Mapping) else None
        return found if isinstance(found, int) and found > 0 else None


def _end(told: Mapping[str, Any]) -> str | None:
    """Why it ended; older servers say it in three fields."""
    kind = told.get("stop_type")
    if kind in (None, "none"):
        old = {"stopped_eos": "eos", "stopped_word": "word", "stopped_limit": "limit"}
        return next((word for name, word in old.items() if told.get(name)), None)
    return str(kind)


def _usage(told: Mapping[str, Any]) -> tuple[Usage, dict[str, Any]]:
    timings = told.get("timings") or {}
    used = {
        "prompt_tokens": told.get("tokens_evaluated"),
        "completion_tokens": told.get("tokens_predicted"),
        "cached_tokens": timings.get("cache_n"),
    }
    return counted(usage_of({"usage": used}), None, None)


class LlamaStream:
    """Its stream as one body: the last event tells everything but what was written."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._text, self._tokens, self._probabilities = StringIO(), list[Any](), list[Any]()

    def add(self, event: Any) -> None:
        """What an event says; one with an error is the last that counts."""
        if isinstance(event, Mapping) and not self._last.get("error"):
            self._last = dict(event)
            self._text.write(str(event.get("content") or ""))
            self._tokens += event.get("tokens") or []
            self._probabilities += event.get("completion_probabilities") or []

    def whole(self) -> dict[str, Any]:
        """The one body.

        Raises:
            BrokenAnswerError: it stops before it says why it ended, or holds an error.
        """
        refused(self._last)
        if not self._last.get("stop"):
            raise BrokenAnswerError("half_answer", "the stream stopped before it said why the answer ended")
        written = {"content": self._text.getvalue(), "tokens": self._tokens, "completion_probabilities": self._probabilities}
        return self._last | written
