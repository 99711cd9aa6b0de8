"""Sections 1, 2 and 8: a KD step against an SFT step, ours against TRL's SFTTrainer, and fp16 as a card without bf16 has it."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.trainers import losshead
from distill.trainers.targets import StoredTargets
from gpu_sections import shapes
from gpu_sections.frame import Bench, Case, Cases, Figures, against
from gpu_sections.steps import Who, make_trainer, measure, profile

LENGTH = 4096


def kd_against_sft(bench: Bench) -> Cases:
    """The 1.5B shape under LoRA at batches of 1 and 4, then the 0.5B shape trained in full."""
    for size, batch, full in (("1.5B", 4, False), ("1.5B", 1, False), ("0.5B", 1, True)):
        label = f"{size}, {'full' if full else 'LoRA r 32'}, {batch} x {LENGTH:,}"
        run = functools.partial(_whole_rows, bench, size, batch, full)
        trl_sft = yield Case(f"{label}: TRL SFT", functools.partial(run, "TRL", None))
        sft = yield Case(f"{label}: SFT", lambda run=run, peer=trl_sft: against(run("ours", None), peer, "trl"))  # type: ignore[misc]
        for target, name in ((shapes.DRAWS, "KD sampled 50"), (shapes.TOP_K, "KD top_k 64")):
            yield Case(f"{label}: {name}", lambda run=run, t=target, p=sft: against(run("ours", t), p, "sft"))  # type: ignore[misc]


def _whole_rows(bench: Bench, size: str, batch: int, full: bool, who: Who, target: Any) -> Figures:
    """Rows that are all of the greatest length."""
    length = 32 if bench.rehearse else LENGTH
    return _trained(bench, who, size, [length] * 8 * batch, target, full=full, per_device_train_batch_size=batch)


def _trained(
    bench: Bench, who: Who, size: str, lengths: list[int], target: Any = None, *, profiled: bool = False, **options: Any
) -> Figures:
    shape = shapes.shape_of(size, bench.rehearse)
    full = options.get("full", False)
    # As the kit trains: frozen weights in the device's own type, trained ones in float32 under autocast.
    half = torch.float16 if options.get("fp16") else torch.bfloat16
    dtype = torch.float32 if bench.rehearse or full else half
    model = shapes.build_model(shape, bench.device, dtype)
    precision = {} if bench.rehearse or "fp16" in options else {"bf16": True}
    with tempfile.TemporaryDirectory() as folder:
        stored: StoredTargets | None = None
        if target is not None:
            stored = shapes.store_targets(Path(folder), lengths, target, shape.vocab_size)
        rows = shapes.make_rows(lengths, shape.vocab_size, stored)
        settings = {"max_length": max(lengths), "warmup_steps": 0} | precision | options
        trainer = make_trainer(who, model, rows, shapes.tokenizer(shape.vocab_size), stored=stored, **settings)
        if profiled:
            return profile(trainer, (losshead, "likelihood_loss") if who == "ours" else _TRL_LOSS)
        return measure(trainer)


_TRL_LOSS = (trl.trainer.utils._ChunkedLogProbFunction, "apply")


def ours_against_trl(bench: Bench) -> Cases:
    """SFT of the 1.5B shape on rows of real lengths, padded and packed; then where the time of a step goes."""
    lengths = shapes.trace_lengths(64, 64 if bench.rehearse else LENGTH)
    for packing in (False, True):
        batch = 1 if packing else 4
        run = functools.partial(_trained, bench, packing=packing, per_device_train_batch_size=batch)
        label = "packed to 4,096" if packing else "4 rows, padded"
        trl_sft = yield Case(f"1.5B, {label}: TRL", lambda run=run: run("TRL", "1.5B", lengths))  # type: ignore[misc]
        yield Case(f"1.5B, {label}: ours", lambda run=run, p=trl_sft: against(run("ours", "1.5B", lengths), p, "trl"))  # type: ignore[misc]
    for who in ("TRL", "ours"):
        yield Case(
            f"1.5B, 4 rows, padded, parts of a step: {who}",
            functools.partial(_trained, bench, who, "1.5B", lengths, profiled=True, per_device_train_batch_size=4),
        )


def old_chips(bench: Bench) -> Cases:
    """fp16 with the gradient scaler and attention without flash, forced, against bf16 with it."""
    length = 32 if bench.rehearse else 2048
    run = functools.partial(_trained, bench, "ours", "0.5B", [length] * 32, per_device_train_batch_size=4)
    new = yield Case(f"0.5B, 4 x {length:,}: bf16", run)
    half: dict[str, bool] = {"bf16": False, "fp16": not bench.rehearse}  # a CPU has no gradient scaler of float16
    yield Case(f"0.5B, 4 x {length:,}: fp16", lambda: against(run(**half), new, "bf16"))

    def without_flash() -> Figures:
        with _no_flash():
            return against(run(**half), new, "bf16")

    yield Case(f"0.5B, 4 x {length:,}: fp16, attention without flash", without_flash)


@contextlib.contextmanager
def _no_flash() -> Iterator[None]:
    """What a T4 has: the memory-efficient kernel, and plain products where that can't be used."""
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield
