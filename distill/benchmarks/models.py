"""The models of a recipe as lm-eval asks them: in this process by lm-eval's own code for transformers, or behind a server by the kit's.

A model behind a server is sent each question as a conversation, and writes; what it is asked for and what that costs is counted and
limited as in every stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text

from distill.benchmarks.kept import Kept
from distill.benchmarks.tasks import calm
from distill.engines.written import Completion, Request, request_seed
from distill.errors import ServerError
from distill.models.chat import ChatFormat
from distill.models.loading import free_memory, load_chat_format, load_model, load_trained, model_record, pick_device
from distill.recipe.base import Sampling
from distill.recipe.benchmarks import Benchmarks
from distill.recipe.experiment import Recipe
from distill.run.files import digest_json
from distill.run.log import say
from distill.servers.opening import Writer, open_writer


class Ready(NamedTuple):
    """A model that lm-eval can ask."""

    lm: Any
    record: dict[str, Any]
    """Name, revision and size, for the manifest."""
    device: str
    spent: dict[str, Any]
    """What a server was asked for; filled when the model is left."""


_ONLY_WRITES = "a model behind a server only writes, and tells nothing of how probable a given text is"


class Here(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A model in this process, loaded as the recipe says.

    Args:
        model: In evaluation mode, on its device.
        chat: Its tokenizer and template.
        kwargs: Of the template.
        section: How it is asked.
        kept: What it answered before.
    """

    def __init__(self, model: Any, chat: ChatFormat, kwargs: dict[str, Any], section: Benchmarks, kept: Kept) -> None:
        think = section.think_end if section.apply_chat_template else None
        super().__init__(
            pretrained=model,
            tokenizer=chat.tokenizer,
            batch_size=section.batch_size,
            think_end_token=think,
            chat_template_args=kwargs,
        )
        self.batch_size_per_gpu: int = section.batch_size
        self.kept = kept
        self.cache_hook = kept

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Nothing else is told of answers."""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-probability in nats of each continuation, and whether it is the most probable one."""
        return self._answer("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-probability in nats of each text."""
        return self._answer("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """What the model writes to each."""
        return self._answer("generate_until", super().generate_until, requests)

    def _answer(self, kind: str, ask: Any, requests: Sequence[Any]) -> list[Any]:
        """Where memory runs out, half as many at once are asked for what is still missing."""
        while True:
            try:
                return self.kept.answer(kind, requests, lambda todo: ask(todo, disable_tqdm=True))
            except torch.OutOfMemoryError:
                if self.batch_size_per_gpu == 1:
                    raise
                self.batch_size_per_gpu = max(1, self.batch_size_per_gpu // 2)
            free_memory()
            say(f"out of memory: going on with {self.batch_size_per_gpu} sequences at once")


class Served(LM):  # type: ignore[misc]  # lm-eval has no types
    """A model behind a server, asked through the kit's own client.

    Args:
        writer: The server's.
        section: How it is asked.
        kept: What it answered before.
        seed: Of the requests.
    """

    def __init__(self, writer: Writer, section: Benchmarks, kept: Kept, seed: int) -> None:
        super().__init__()
        self._writer, self._section, self._seed = writer, section, seed
        self.kept = kept

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval keeps questions that were put into a template; it keeps none here."""
        return "messages"

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Nothing else is told of answers."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as it stands, which the server's protocol puts into words."""
        return json.dumps([{"role": turn["role"], "content": turn["content"]} for turn in chat_history], ensure_ascii=False)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not to be had; `benchmarks.tasks` refuses them before a server is asked."""
        raise NotImplementedError(_ONLY_WRITES)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        """Not to be had; `benchmarks.tasks` refuses them before a server is asked."""
        raise NotImplementedError(_ONLY_WRITES)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """What the model writes to each."""
        return self.kept.answer("generate_until", requests, lambda missing: self._write(missing, len(requests)))

    def _write(self, requests: list[Any], of: int) -> list[str]:
        """What comes back for what is missing of so many; a failure is an empty answer, of which nothing is kept, so it is asked again."""
        asked = []
        for request in requests:
            messages = json.loads(request.args[0])
            name = digest_json(messages)[:16]
            asked.append(Request(name, 0, messages, None, request_seed(self._seed, name, 0)))
        texts = [""] * len(requests)
        failed: list[str] = []
        for group in self._writer.engine.write(asked):
            for place, found in group:
                if isinstance(found, Completion):
                    texts[place] = self._answer_in(found.text, requests[place].args[1])
                    self.kept.add_partial("generate_until", requests[place].args, texts[place])
                else:
                    failed.append(found.reason)
                    self.kept.advance()
        if len(failed) > self._writer.max_failed * of:
            raise ServerError(
                f"server.max_failed: {len(failed):,} of {of:,} requests failed for good ({', '.join(sorted(set(failed)))}). "
                "Look into the server's log, or raise max_failed: they count as wrong answers."
            )
        return texts

    def _answer_in(self, text: str, asked: dict[str, Any]) -> str:
        """What counts of a text: behind the thought, before the first of the task's own ends."""
        stops = handle_stop_sequences(asked.get("until"), eos=None)
        found: str = postprocess_generated_text(text, stops, self._section.think_end)
        return found


@contextmanager
def open_model(recipe: Recipe, role: str, place: Path, run: Path, trained: Path | None, kept: Kept) -> Iterator[Ready]:
    """The model of a role, ready to be asked for as long as the context lasts.

    Args:
        recipe: The recipe.
        role: `teacher`, `student` or `base`.
        place: The stage's folder.
        run: The run's folder.
        trained: The folder of the student that was trained; null: as it was before.
        kept: What this model answered before.
    """
    section, spec = recipe.benchmarks, recipe.teacher if role == "teacher" else recipe.student
    assert section is not None and spec is not None
    if spec.server is None:
        free_memory()
        device = pick_device()
        model: Any = load_model(spec, device) if trained is None else load_trained(spec, recipe.student.adapter, trained, device)
        with calm():
            lm = Here(model, load_chat_format(spec), spec.chat_template_kwargs, section, kept)
        ready = [Ready(lm, model_record(spec, model), str(device), {})]
        del lm
        del model
        try:
            yield ready[0]
        finally:
            ready.clear()
            free_memory()
        return
    assert section.max_gen_toks is not None  # the recipe was validated
    sampling = Sampling(max_new_tokens=section.max_gen_toks, temperature=0.0, batch_size=section.batch_size)
    with open_writer(recipe, role, sampling, place, run, section="benchmarks", trained=trained) as writer:
        found = Ready(Served(writer, section, kept, recipe.seed), writer.record, writer.device, {})
        yield found
        found.spent.update(writer.spent())
