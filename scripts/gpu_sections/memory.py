"""Section 5: the longest sequence that a step takes under a limit of memory, found by a few steps and a straight line.

With checkpointing and an attention that holds no scores, memory grows linearly with length. So the peaks at two lengths
say where the limit will be met; the step is then tried there under the limit itself, and shortened until it runs.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_sections import shapes
from gpu_sections.frame import Bench, Case, Cases, Figures, Skipped, installed
from gpu_sections.steps import make_trainer, quiet

LIMITS_GIB = (24, 16, 12, 8)
CONTEXT_GIB = 0.6
"""What the driver's context takes of a card beside what torch's allocator counts, on recent cards."""
LENGTHS = (1024, 4096)
STEP = 256
TRIES = 3
"""Lengths tried under a limit: 3 % under the predicted one, then each time 4 % shorter."""
LONGEST = 65_536


def cases(bench: Bench) -> Cases:
    """The longest sequence of SFT and of KD, a row a step, under LoRA of rank 32."""
    plans = [("1.5B", False), ("7B", True), ("0.5B", False)]
    for size, in_4_bits in plans:
        if in_4_bits and not installed("bitsandbytes"):
            yield Case(f"{size} in 4 bits", _no_bitsandbytes)
            continue
        for method, target in (("SFT", None), ("KD top_k 64", shapes.TOP_K)):
            label = f"{size}{' in 4 bits' if in_4_bits else ''}, LoRA r 32, {method}"
            yield Case(label, functools.partial(_longest, bench, size, in_4_bits, target))


def _no_bitsandbytes() -> Figures:
    raise Skipped("bitsandbytes is not installed: `pip install -e '.[qlora]'`")


def _longest(bench: Bench, size: str, in_4_bits: bool, target: Any) -> Figures:
    """Tokens under each limit, 0 where not even a short one fits; and GiB a thousand tokens."""
    lengths = (16, 64) if bench.rehearse else LENGTHS
    model = build(bench, size, in_4_bits)
    peaks = [_peak_gib(bench, model, length, target) for length in lengths]
    slope = max((peaks[1] - peaks[0]) / (lengths[1] - lengths[0]), 1e-9)
    base = peaks[0] - slope * lengths[0]
    found = {"base_gib": base, "gib_per_1k_tokens": 1000 * slope}
    for limit in LIMITS_GIB:
        if bench.allowance.left_s <= 0:
            break
        predicted = int((limit - CONTEXT_GIB - base) / slope)
        found[f"tokens_in_{limit}_gib"] = _confirmed(bench, model, min(predicted, LONGEST), limit, target)
    return found


def _confirmed(bench: Bench, model: Any, predicted: int, limit_gib: float, target: Any) -> float:
    """The longest length tried, from the predicted one down, at which a step ran under the limit; 0 where none did."""
    if bench.rehearse:
        return 64 if _fits(bench, model, 64, limit_gib, target) else 0
    length = int(0.97 * predicted) // STEP * STEP
    for _ in range(TRIES):
        if length < STEP:
            return 0
        if _fits(bench, model, length, limit_gib, target):
            return length
        length = int(0.96 * length) // STEP * STEP
    return 0


def _fits(bench: Bench, model: Any, length: int, limit_gib: float, target: Any) -> bool:
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(bench.device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min((limit_gib - CONTEXT_GIB) / whole, 1.0), bench.device)
    try:
        _peak_gib(bench, model, length, target)
    except torch.OutOfMemoryError:
        return False
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    return True


def _peak_gib(bench: Bench, model: Any, length: int, target: Any) -> float:
    """Of two steps: the optimizer's state is made in the first."""
    vocab_size = model.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        stored = None if target is None else shapes.store_targets(Path(folder), [length] * 2, target, vocab_size)
        rows = shapes.make_rows([length] * 2, vocab_size, stored)
        precision = {} if bench.rehearse else {"bf16": True}
        arguments: dict[str, Any] = {"max_length": length, "per_device_train_batch_size": 1, "warmup_steps": 0} | precision
        trainer = make_trainer("ours", model, rows, shapes.tokenizer(vocab_size), stored=stored, steps=2, warm_up=1, **arguments)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with quiet():
                trainer.train()
        finally:
            unwrapped: Any = trainer.model
            unwrapped.unload()  # the adapter; the next length takes the same base
            trainer.optimizer = trainer.lr_scheduler = None
    return torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0


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
        narrow = bnb.Linear4bit(layer.in_features, layer.out_features, **options | {"bias": layer.bias is not None}, device="cpu")
        weight = torch.randn(layer.out_features, layer.in_features, device=bench.device, dtype=dtype) * 0.02
        narrow.weight = bnb.Params4bit(weight.cpu() if bench.rehearse else weight, requires_grad=False, quant_type="nf4")
        narrow.to(bench.device)
        model.set_submodule(name, narrow)
    for parameter_name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(parameter_name.rpartition(".")[0])
            filled = torch.randn(parameter.shape, device=bench.device, dtype=dtype) * 0.02
            setattr(owner, parameter_name.rpartition(".")[2], torch.nn.Parameter(filled, requires_grad=False))
    with torch.device(bench.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    model.is_loaded_in_4bit = True  # what peft and TRL look at
    return model
