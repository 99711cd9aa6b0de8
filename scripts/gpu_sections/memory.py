"""Section 5: the longest sequence that a step takes under a limit of memory, found by a few steps and a straight line.

With checkpointing and an attention that holds no scores, memory grows linearly with length. So the peaks at two lengths
say where the limit will be met; the step is then tried there under the limit itself, and shortened until it runs. One
that found no memory leaves gaps and half an adapter behind, so the next begins with a model built anew. The limit is what
the allocator may take, less what a driver's context takes; the kit sizes the loss's buffers by it, as it would on a card
of that size.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distill.models.loading import leave_as_loaded
from gpu_sections import shapes
from gpu_sections.frame import Bench, Case, Cases, Figures, Skipped, installed
from gpu_sections.steps import make_trainer, quiet

LIMITS_GIB = (24, 16, 12, 8)
CONTEXT_GIB = 0.6
"""What the driver's context takes of a card beside what torch's allocator counts, on recent cards."""
LENGTHS = (8192, 16_384)
"""Long enough that the backward, and not the buffers of the loss, makes the peak."""
STEP = 256
SHARES = (0.97, 0.9, 0.8, 0.7)
"""Lengths tried under a limit, of the predicted one: the limit is on what the allocator reserves, which is more than it uses."""
LONGEST = 32_768
"""No longer ones are tried, for their time: so many tokens means so many or more."""


def cases(bench: Bench) -> Cases:
    """The longest sequence of SFT and of KD, a row a step, under LoRA of rank 32."""
    for size, in_4_bits in (("1.5B", False), ("7B", True), ("0.5B", False)):
        name = f"{size}{' in 4 bits' if in_4_bits else ''}, LoRA r 32"
        if in_4_bits and not installed("bitsandbytes"):
            yield Case(name, _no_bitsandbytes)
            continue
        trial = _Trial(bench, size, in_4_bits)
        for method, target in (("SFT", None), ("KD top_k 64", shapes.TOP_K)):
            line = yield Case(f"{name}, {method}", functools.partial(trial.line, target))
            if line is None:
                continue
            for limit in _limits(bench):
                yield Case(f"{name}, {method}, {limit} GiB", functools.partial(trial.longest, target, line, limit))
        trial.model = None


def _limits(bench: Bench) -> list[int]:
    """Those that the card itself is not under; cards are sold by a little more than they have."""
    if bench.device.type != "cuda":
        return list(LIMITS_GIB)
    whole = torch.cuda.get_device_properties(bench.device).total_memory / 2**30
    return [limit for limit in LIMITS_GIB if limit <= 1.05 * whole]


def _no_bitsandbytes() -> Figures:
    raise Skipped("bitsandbytes is not installed: `pip install -e '.[qlora]'`")


class _Trial:
    """Steps of one model at several lengths.

    Args:
        bench: Where.
        size: Of the model.
        in_4_bits: Whether its weights are.
    """

    def __init__(self, bench: Bench, size: str, in_4_bits: bool) -> None:
        self._bench, self._size, self._in_4_bits = bench, size, in_4_bits
        self.model: Any = None

    def line(self, target: Any) -> Figures:
        """GiB that are there at any length, and for every thousand tokens, under the largest limit."""
        lengths = (16, 64) if self._bench.rehearse else LENGTHS
        peaks = [self._peak_gib(length, target, LIMITS_GIB[0]) for length in lengths]
        slope = max((peaks[1] - peaks[0]) / (lengths[1] - lengths[0]), 1e-9)
        return {"base_gib": peaks[0] - slope * lengths[0], "gib_per_1k_tokens": 1000 * slope}

    def longest(self, target: Any, line: Figures, limit_gib: float) -> Figures:
        """The longest length tried at which a step ran under the limit; 0 where by the line none does.

        Raises:
            RuntimeError: none of those tried did.
        """
        room = limit_gib - CONTEXT_GIB - line["base_gib"]
        predicted = 64 if self._bench.rehearse else int(1000 * room / line["gib_per_1k_tokens"])
        step = 1 if self._bench.rehearse else STEP
        # Shares that are all above the longest are one length.
        lengths = list(dict.fromkeys(min(int(share * predicted), LONGEST) // step * step for share in SHARES))
        for length in (length for length in lengths if length >= step):
            with contextlib.suppress(torch.OutOfMemoryError):
                return {"peak_gib": self._peak_gib(length, target, limit_gib), "tokens": length}
        if lengths[0] < step:
            return {"tokens": 0}
        raise RuntimeError(f"none of {', '.join(f'{length:,}' for length in lengths)} tokens fits")

    @contextlib.contextmanager
    def _limit(self, gib: float) -> Iterator[None]:
        device = self._bench.device
        if device.type != "cuda":
            yield
            return
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min((gib - CONTEXT_GIB) / whole, 1.0), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    def _peak_gib(self, length: int, target: Any, limit_gib: float) -> float:
        """Of the second of two steps: the optimizer's state is made in the first. Where they fail, `model` is none behind them."""
        cuda = self._bench.device.type == "cuda"
        gc.collect()  # a step that found no memory has left its model and trainer behind
        if cuda:
            torch.cuda.empty_cache()
        model, self.model = self.model or build(self._bench, self._size, self._in_4_bits), None
        vocab_size = model.config.vocab_size
        with tempfile.TemporaryDirectory() as folder:
            stored = None if target is None else shapes.store_targets(Path(folder), [length] * 2, target, vocab_size)
            rows = shapes.make_rows([length] * 2, vocab_size, stored)
            precision = {} if self._bench.rehearse else {"bf16": True}
            arguments: dict[str, Any] = {"max_length": length, "per_device_train_batch_size": 1, "warmup_steps": 0} | precision
            tokens = shapes.tokenizer(vocab_size)
            with self._limit(limit_gib), quiet():
                trainer: Any = make_trainer("ours", model, rows, tokens, stored=stored, steps=2, warm_up=1, **arguments)
                trainer.train()
            self.model = trainer.model.unload()  # without its adapter; the next length takes the same base
            trainer.optimizer = trainer.lr_scheduler = None
        return torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def build(bench: Bench, size: str, in_4_bits: bool) -> Any:
    """A random model, its linear layers in NF4 if asked for: as `student.quantization: nf4` loads one."""
    shape = shapes.shape_of(size, bench.rehearse)
    dtype = torch.float32 if bench.rehearse else torch.bfloat16
    if not in_4_bits:
        return shapes.build_model(shape, bench.device, dtype)
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    model: Any = shapes.build_model(shape, torch.device("meta"), dtype)
    options = {"bias": True, "compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": True}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"}
    for name, layer in layers.items():
        # A layer at a time, so that the whole model is never there in 16 bits.
        narrow = bnb.Linear4bit(layer.in_features, layer.out_features, **options | {"bias": layer.bias is not None}, device="meta")
        weight = torch.randn(layer.out_features, layer.in_features, device=bench.device, dtype=dtype) * 0.02
        narrow.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4").to(bench.device)
        model.set_submodule(name, narrow)
    for parameter_name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(parameter_name.rpartition(".")[0])
            filled = torch.randn(parameter.shape, device=bench.device, dtype=dtype) * 0.02
            setattr(owner, parameter_name.rpartition(".")[2], torch.nn.Parameter(filled, requires_grad=False))
    with torch.device(bench.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    leave_as_loaded(model)
    model.is_loaded_in_4bit = True  # what peft and TRL look at
    return model
