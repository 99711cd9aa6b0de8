"""transformers as an engine: `model.generate` on CPU or GPU, with a seed for every sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distill.engines import Completion, Request
from distill.engines.batching import MemoryGuard
from distill.models.chat import ChatFormat
from distill.models.loading import free_memory
from distill.recipe.base import Sampling

_PROMPTS_KEPT = 8192  # as ids: more than are asked for at once


class SeededSampler(LogitsProcessor):
    """Draws each sequence's next token by its own random numbers, and leaves only that token possible.

    `generate` samples a whole batch from one random stream, so a sequence changes with its neighbours. Here sequence b
    takes its t-th token at the quantile u[b, t] of its own distribution (inverse transform sampling), with u from the
    request's seed, and `generate` then decodes greedily what is left.

    Args:
        uniforms_BT: Numbers in [0, 1), one for each sequence and step.
        prompt_length: Padded length of the prompts.
    """

    def __init__(self, uniforms_BT: torch.Tensor, prompt_length: int) -> None:
        self._uniforms_BT = uniforms_BT
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with 0 at the drawn token and -inf elsewhere."""
        step = input_ids.shape[1] - self._prompt_length
        cumulative_BV = scores.float().softmax(-1).cumsum(-1)
        total_B1 = cumulative_BV[:, -1:]  # 1 up to rounding
        # Strictly below the total, or rounding could draw a token of probability 0 behind it.
        quantile_B1 = torch.minimum(self._uniforms_BT[:, step, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
        token_B1 = torch.searchsorted(cumulative_BV, quantile_B1, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


class OnlyTokens(LogitsProcessor):
    """Leaves out the ids behind the vocabulary: rows that pad a head are nothing that can be written or read.

    Args:
        vocab_size: Number of token ids.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with -inf behind the vocabulary."""
        scores[:, self._vocab_size :] = -torch.inf
        return scores


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
        self._guard = MemoryGuard(self._complete, free_memory)
        self._prompts: dict[str, list[int]] = {}
        self._vocab_size = max(chat.tokenizer.get_vocab().values()) + 1
        # `generate` fills what a config leaves open from the checkpoint's own (Qwen2.5 brings a repetition penalty).
        model.generation_config = self._generation_config()

    def prompt_length(self, request: Request) -> int:
        """Tokens of the rendered prompt."""
        return len(self._prompt_ids(request))

    def complete(self, batch: list[Request]) -> list[Completion]:
        """One completion for each request, in order."""
        return list(self._guard.run(batch))

    def _prompt_ids(self, request: Request) -> list[int]:
        if request.prompt_id not in self._prompts:
            if len(self._prompts) == _PROMPTS_KEPT:
                self._prompts.clear()
            self._prompts[request.prompt_id] = self._chat.prompt_ids(request.messages)
        return self._prompts[request.prompt_id]

    @torch.inference_mode()
    def _complete(self, batch: list[Request]) -> list[Completion]:
        prompts = [self._prompt_ids(request) for request in batch]
        length = max(map(len, prompts))
        pad = self._chat.pad_id
        device = self._model.device
        input_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        generate: Any = self._model.generate  # typed as a tensor or a module by torch
        output = generate(
            input_ids,
            attention_mask=mask,
            generation_config=self._generation_config(),
            logits_processor=self._processors(batch, length, device),
        )
        return [
            self._completion(request, ids, written)
            for request, ids, written in zip(batch, prompts, output[:, length:].tolist(), strict=True)
        ]

    def _generation_config(self) -> GenerationConfig:
        """Greedy, because `SeededSampler` has drawn already; the recipe alone decides the rest."""
        return GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._chat.stop_ids),
            pad_token_id=self._chat.pad_id,
        )

    def _processors(self, batch: list[Request], length: int, device: torch.device) -> LogitsProcessorList:
        sampling = self._sampling
        if sampling.temperature == 0:
            return LogitsProcessorList([OnlyTokens(self._vocab_size)])
        uniforms = np.stack([np.random.default_rng(request.seed).random(sampling.max_new_tokens, dtype=np.float32) for request in batch])
        processors: list[Any] = [OnlyTokens(self._vocab_size), TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            processors.append(MinPLogitsWarper(float(sampling.min_p)))
        return LogitsProcessorList([*processors, SeededSampler(torch.from_numpy(uniforms).to(device), length)])

    def _completion(self, request: Request, prompt_ids: list[int], written: list[int]) -> Completion:
        stop = next((place for place, token in enumerate(written) if token in self._chat.stop_ids), None)
        ids = written if stop is None else written[: stop + 1]
        opening = self._chat.opening(request.messages)
        return Completion(
            text=self._chat.text_of(ids, opening),
            prompt_ids=prompt_ids,
            completion_ids=ids,
            finish_reason="length" if stop is None else "stop",
        )
