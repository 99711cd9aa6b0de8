"""Generate against the bare one: tokens/s of the kit's engine and of `model.generate`, and the sampler's share of the time.

A random model of Qwen2.5-1.5B's shape in bf16, prompts of 128 tokens, answers of 128, at 16 and 64 sequences at once. Both
draw at temperature 0.6 from a nucleus of 0.95: transformers from one random stream, the kit with a seed for every sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from distill.engines import Request, requests_for
from distill.engines.drawing import Sampler
from distill.engines.hf import HFEngine
from distill.models.chat import ChatFormat, chat_format
from distill.recipe.base import Sampling
from gpu_sections.frame import Bench, Case, Cases, Figures, ratio
from gpu_sections.shapes import build_model, shape_of, tokenizer

_TEMPLATE = "{% for message in messages %}{{ message.content }} <end> {% endfor %}"
_TEMPERATURE, _TOP_P = 0.6, 0.95
_CALLS, _ENOUGH_S = 2, 6.0


def cases(bench: Bench) -> Cases:
    """Two cases for each batch size: transformers' own first, then the kit's."""
    setting = _Setting(bench)
    for batch_size in (2, 3) if bench.rehearse else (16, 64):
        bare = yield Case(f"{batch_size} at once, model.generate", partial(_measure_bare, setting, batch_size))
        yield Case(f"{batch_size} at once, the kit", partial(_measure_kit, setting, batch_size, bare))


class _Setting:
    """The model, its tokenizer and the prompts; built by the first case, so that what fails there is a row."""

    def __init__(self, bench: Bench) -> None:
        self.device = bench.device
        self.shape = shape_of("1.5B", bench.rehearse)
        self.prompt_tokens, self.new_tokens, self.warm_up_tokens, self.sampler_steps = (8, 4, 2, 2) if bench.rehearse else (128, 128, 8, 24)

    @cached_property
    def model(self) -> Any:
        """Random weights, in evaluation mode."""
        return build_model(self.shape, self.device, torch.bfloat16).eval()

    @cached_property
    def chat(self) -> ChatFormat:
        """A token for every id of the model's head, and a template that ends every turn."""
        words = tokenizer(self.shape.vocab_size)
        words.chat_template = _TEMPLATE
        return chat_format(words)

    def requests(self, batch_size: int) -> list[Request]:
        """Different prompts, all of one length with the token that ends them."""
        rng = np.random.default_rng(0)
        rows: list[dict[str, Any]] = []
        for number in range(batch_size):
            words = " ".join(f"t{index}" for index in rng.integers(2, self.shape.vocab_size, self.prompt_tokens - 1))
            rows.append({"prompt_id": str(number), "messages": [{"role": "user", "content": words}], "reference": None})
        return requests_for(rows, 1, 0)

    def sampling(self, new_tokens: int, batch_size: int) -> Sampling:
        """How the kit draws."""
        return Sampling(max_new_tokens=new_tokens, temperature=_TEMPERATURE, top_p=_TOP_P, batch_size=batch_size)


def _measure_kit(setting: _Setting, batch_size: int, bare: Figures | None) -> Figures:
    """Tokens/s of `HFEngine.complete`: tokenised prompts to texts."""
    requests = setting.requests(batch_size)
    counts = (setting.warm_up_tokens, setting.new_tokens)
    engines = [HFEngine(setting.model, setting.chat, setting.sampling(count, batch_size)) for count in counts]
    assert {len(setting.chat.prompt_ids(request.messages)) for request in requests} == {setting.prompt_tokens}
    engines[0].complete(requests)
    figures = _timed(setting, lambda: sum(len(completion.completion_ids or []) for completion in engines[1].complete(requests)))
    sampler = Sampler(setting.sampling(1, batch_size), setting.shape.vocab_size)
    uniforms_B = torch.rand(batch_size, device=setting.device)
    step_ms = _sampler_ms(setting, batch_size, lambda _, logits_BV: sampler(logits_BV, uniforms_B))
    return _with_shares(figures, step_ms, bare)


@torch.inference_mode()
def _measure_bare(setting: _Setting, batch_size: int) -> Figures:
    """Tokens/s of `model.generate` as it samples by itself: ids to ids."""
    chat, model = setting.chat, setting.model
    input_ids = torch.tensor([chat.prompt_ids(request.messages) for request in setting.requests(batch_size)], device=setting.device)
    mask = torch.ones_like(input_ids)

    def generate(new_tokens: int) -> int:
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            top_k=0,
            eos_token_id=list(chat.stop_ids),
            pad_token_id=chat.pad_id,
        )
        output = model.generate(input_ids, attention_mask=mask, generation_config=config)
        # What an ended sequence is padded with was not written.
        return int((output[:, input_ids.shape[1] :] != chat.pad_id).sum())

    generate(setting.warm_up_tokens)
    figures = _timed(setting, lambda: generate(setting.new_tokens))
    processors: Any = LogitsProcessorList([TemperatureLogitsWarper(_TEMPERATURE), TopPLogitsWarper(_TOP_P)])
    step_ms = _sampler_ms(setting, batch_size, lambda ids_BT, logits_BV: processors(ids_BT, logits_BV).softmax(-1).multinomial(1))
    return _with_shares(figures, step_ms, None)


def _timed(setting: _Setting, write: Callable[[], int]) -> Figures:
    """Tokens/s, and milliseconds a step, over two calls, or one that is long enough."""
    start, tokens, calls = time.perf_counter(), 0, 0
    while calls == 0 or (calls < _CALLS and time.perf_counter() - start < _ENOUGH_S):
        tokens, calls = tokens + write(), calls + 1
    seconds = time.perf_counter() - start
    return {"tokens_per_s": tokens / seconds, "step_ms": 1000 * seconds / (calls * setting.new_tokens)}


@torch.inference_mode()
def _sampler_ms(setting: _Setting, batch_size: int, draw: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Milliseconds a step of the draw alone, on logits of the model's size."""
    logits_BV = torch.randn(batch_size, setting.shape.vocab_size, device=setting.device)
    ids_BT = torch.zeros(batch_size, setting.prompt_tokens + setting.sampler_steps, dtype=torch.long, device=setting.device)

    def step(number: int) -> None:
        # Processors may write into what they are given, as they may in `generate`.
        draw(ids_BT[:, : setting.prompt_tokens + number], logits_BV.clone())

    step(0)
    start = _now(setting)
    for number in range(setting.sampler_steps):
        step(number)
    return 1000 * (_now(setting) - start) / setting.sampler_steps


def _now(setting: _Setting) -> float:
    """Seconds, once the device has finished."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _with_shares(figures: Figures, sampler_ms: float, bare: Figures | None) -> Figures:
    """With the sampler's share of a step, and the throughput as a multiple of the bare one's."""
    of_bare = ratio(figures, bare, "tokens_per_s")
    shares = {"sampler_ms": sampler_ms, "sampler_share": sampler_ms / figures["step_ms"]}
    return figures | shares | ({} if of_bare is None else {"of_bare": of_bare})
