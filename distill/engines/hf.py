"""transformers as an engine, on CPU or GPU: every sequence with a seed of its own, and room made anew where one has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from distill.engines import Completion, Request
from distill.engines.batching import MemoryGuard, by_length
from distill.engines.decoding import Decoder, Job, can_refill
from distill.engines.drawing import DrawnOnly, Sampler
from distill.models.chat import ChatFormat
from distill.models.loading import free_memory
from distill.recipe.base import Sampling


class HFEngine:
    """Writes completions with a model in this process.

    Args:
        model: In evaluation mode, on its device.
        chat: Its tokenizer and template.
        sampling: How tokens are drawn.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, chat: ChatFormat, sampling: Sampling) -> None:
        self._model = model
        self._chat = chat
        self._sampling = sampling
        self._sampler = Sampler(sampling, max(chat.tokenizer.get_vocab().values()) + 1)
        if can_refill(model):
            self.decoder: Decoder | None = Decoder(
                model, self._sampler, chat.stop_ids, chat.pad_id, sampling.max_new_tokens, sampling.batch_size
            )
        else:
            self.decoder = None
            self._guard = MemoryGuard(self._complete, free_memory)
            # `generate` fills what a config leaves open from the checkpoint's own (Qwen2.5 brings a repetition penalty).
            model.generation_config = self._generation_config()

    def drawing(self, sampling: Sampling) -> HFEngine:
        """The same model, drawing otherwise."""
        return HFEngine(self._model, self._chat, sampling)

    def write(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion]]]:
        """Completions as they end, each with its place among the requests."""
        rendered: dict[str, list[int]] = {}
        for request in requests:
            if request.prompt_id not in rendered:
                rendered[request.prompt_id] = self._chat.prompt_ids(request.messages)
        jobs = [Job(rendered[request.prompt_id], request.seed) for request in requests]
        for ended in self._batches(jobs) if self.decoder is None else self.decoder.run(jobs):
            yield [(place, self._completion(requests[place], jobs[place], written)) for place, written in ended]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in order."""
        found = dict(pair for ended in self.write(requests) for pair in ended)
        return [found[place] for place in range(len(requests))]

    def _batches(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, list[int]]]]:
        """The tokens of each job by transformers' own loop, a batch at a time."""
        for places in by_length(range(len(jobs)), lambda place: len(jobs[place].prompt_ids), self._sampling.batch_size):
            yield list(zip(places, self._guard.run([jobs[place] for place in places]), strict=True))

    @torch.inference_mode()
    def _complete(self, batch: list[Job]) -> list[list[int]]:
        length = max(len(job.prompt_ids) for job in batch)
        pad, device = self._chat.pad_id, self._model.device
        input_ids = torch.tensor([[pad] * (length - len(job.prompt_ids)) + job.prompt_ids for job in batch], device=device)
        mask = torch.tensor([[0] * (length - len(job.prompt_ids)) + [1] * len(job.prompt_ids) for job in batch], device=device)
        longest = self._sampling.max_new_tokens
        uniforms = np.stack([np.random.default_rng(job.seed).random(longest, dtype=np.float32) for job in batch])
        generate: Any = self._model.generate  # typed as a tensor or a module by torch
        output = generate(
            input_ids,
            attention_mask=mask,
            generation_config=self._generation_config(),
            logits_processor=LogitsProcessorList([DrawnOnly(self._sampler, torch.from_numpy(uniforms).to(device), length)]),
        )
        written: list[list[int]] = output[:, length:].tolist()
        return written

    def _generation_config(self) -> GenerationConfig:
        """Greedy, because `DrawnOnly` has drawn already; the recipe alone decides the rest."""
        return GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._chat.stop_ids),
            pad_token_id=self._chat.pad_id,
        )

    def _completion(self, request: Request, job: Job, written: list[int]) -> Completion:
        stop = next((place for place, token in enumerate(written) if token in self._chat.stop_ids), None)
        ids = written if stop is None else written[: stop + 1]
        return Completion(
            text=self._chat.text_of(ids, self._chat.opening(request.messages)),
            prompt_ids=job.prompt_ids,
            completion_ids=ids,
            finish_reason="length" if stop is None else "stop",
        )
