"""Servers that take a prompt as token ids and give back those that they drew: vLLM and SGLang (llama-server: `llama`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.recipe.base import Sampling
from distill.servers import Answer, Call
from distill.servers.alternatives import checked, completion_entries, triple_entries
from distill.servers.answers import BrokenAnswerError, compared, counted, drawn, finish_of, first_choice, object_of, refused, usage_of
from distill.servers.streams import ChoiceStream, folded
from distill.servers.wire import Prompt, Protocol, ids_of, merged

_TOKENS_AT_ONCE = 16  # of a stream, which is there to show that a long answer is under way
# What a server would take from the checkpoint or from its own defaults if nothing were sent.
_NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class VLLM(Protocol):
    """vLLM's `/v1/completions`, with ids in and out."""

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
            "model": self.model,
            "prompt": ids_of(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature else 1.0,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "n": 1,
            "stop_token_ids": list(stop_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stream_interval": _TOKENS_AT_ONCE,
        }
        if logprobs is not None:
            body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
        return Call("/v1/completions", self._with_further(self._seeded(_NO_PENALTIES | body, "seed", seed)), streams=ChoiceStream)

    def answer(self, body: Any, call: Call) -> Answer:
        """A completion with its ids; see `Protocol`."""
        told, asked = object_of(folded(body)), call.body or {}
        choice = first_choice(told)
        if not isinstance(choice.get("text"), str):
            raise BrokenAnswerError("no_text", f"the choice has no text; it has {sorted(map(str, choice))}")
        ids, prompt_ids = drawn(choice.get("token_ids")), drawn(choice.get("prompt_token_ids"))
        usage, notes = counted(usage_of(told), prompt_ids, ids)
        stopped = bool(ids) and ids is not None and ids[-1] in asked.get("stop_token_ids", ())
        finish, more = finish_of(choice.get("finish_reason"), written=usage.output_tokens, longest=asked.get("max_tokens"), stopped=stopped)
        probabilities, missing = checked(completion_entries(choice.get("logprobs") or {}), asked.get("logprobs"), ids)
        notes = compared(told.get("model"), self.model) | notes | more | missing | _same_prompt(prompt_ids, asked.get("prompt"))
        if ids is None:
            notes["ids"] = "asked for, and none came"
        return Answer(
            text=choice["text"],
            finish_reason=finish,
            usage=usage,
            prompt_ids=prompt_ids,
            completion_ids=ids,
            alternatives=probabilities,
            model=told.get("model"),
            notes=notes,
        )

    def reading(self, ids: list[int], k: int, first: int) -> Call:
        """Log-probabilities of all tokens of a prompt but the first; one token is written, because none is not allowed."""
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        return Call("/v1/completions", self._with_further(body | {"return_token_ids": True, "stream": False}))


def _same_prompt(read: list[int] | None, sent: Any) -> dict[str, Any]:
    if read is None or read == sent:
        return {}
    return {"prompt": "other tokens were read than were sent"}


class SGLang(Protocol):
    """SGLang's native `/generate`."""

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
        settings: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature else 1.0,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "n": 1,
            "stop_token_ids": list(stop_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        further = dict(self.server.body)
        settings = _NO_PENALTIES | self._seeded(settings, "sampling_seed", seed)
        settings |= {name: further.pop(name) for name in _NO_PENALTIES if name in further}
        body: dict[str, Any] = {
            "input_ids": ids_of(prompt),
            "sampling_params": settings,
            "stream": False,
            "return_logprob": logprobs is not None,
        }
        if logprobs is not None:
            body |= {"top_logprobs_num": logprobs, "logprob_start_len": -1, "return_text_in_logprobs": False}
        return Call("/generate", merged(body, further))

    def answer(self, body: Any, call: Call) -> Answer:
        """A completion with its ids; see `Protocol`."""
        told, asked = object_of(body[-1] if isinstance(body, list) and body else body), call.body or {}
        refused(told)
        meta, settings = told.get("meta_info"), asked.get("sampling_params", {})
        if not isinstance(meta, Mapping):
            raise BrokenAnswerError("broken_answer", f"no meta_info; the answer has {sorted(map(str, told))}")
        ids = drawn(told.get("output_ids"))
        reason = meta.get("finish_reason")
        kind = reason.get("type") if isinstance(reason, Mapping) else reason
        if kind == "abort" and isinstance(reason, Mapping):
            final = 400 <= int(reason.get("status_code") or 0) < 500
            raise BrokenAnswerError("too_long" if final else "abort", str(reason.get("message") or "the server ended it"), final=final)
        usage, notes = counted(usage_of({"usage": meta}), drawn(asked.get("input_ids")), ids)
        stopped = bool(ids) and ids is not None and ids[-1] in settings.get("stop_token_ids", ())
        finish, more = finish_of(kind, written=usage.output_tokens, longest=settings.get("max_new_tokens"), stopped=stopped)
        found = triple_entries(meta.get("output_token_logprobs") or [], meta.get("output_top_logprobs") or [])
        probabilities, missing = checked(found, asked.get("top_logprobs_num"), ids)
        notes |= more | missing | ({"ids": "asked for, and none came"} if ids is None else {})
        return Answer(
            text=str(told.get("text") or ""),
            finish_reason=finish,
            usage=usage,
            completion_ids=ids,
            alternatives=probabilities,
            notes=notes,
        )

    def reading(self, ids: list[int], k: int, first: int) -> Call:
        """Log-probabilities of a prompt's tokens; the entry of the place before the first wanted one has none."""
        settings = {"max_new_tokens": 1, "temperature": 0.0}
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": settings, "stream": False, "return_logprob": True}
        body |= {"logprob_start_len": max(first - 1, 0), "top_logprobs_num": k, "return_text_in_logprobs": False}
        return Call("/generate", merged(body, self.server.body))
