"""The loss alone: time and peak memory of a forward and backward, against whole logits, TRL's chunked NLL and Liger's JSD.

8,192 tokens in bf16, all supervised, at the vocabularies of Qwen2.5 and Llama 3 and the widths of Qwen2.5 at 0.5B, 1.5B and 7B. The
contenders are those of `bench_loss.py`. Whole logits are measured for their memory, TRL's NLL for its time: the loss that a step
without distillation takes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import bench_loss
import torch
from torch import Tensor

from gpu_sections.frame import Bench, Case, Cases, Figures, installed, ratio

TRL, WHOLE = "TRL NLL", "whole logits"
_CONTENDERS: dict[str, Callable[[bench_loss.Inputs], Tensor]] = {
    TRL: bench_loss.CONTENDERS["TRL NLL"],
    WHOLE: bench_loss.CONTENDERS["whole logits"],
    "ours, KD top_k 64": bench_loss.CONTENDERS["ours"],
    "ours, NLL": bench_loss.CONTENDERS["ours, NLL"],
}
_LIGER = partial(bench_loss.liger_jsd, compiled=False)
_WARM_UPS, _LEAST, _MOST = 2, 3, 9
_MEASURED_S, _COMPILING_S = 0.4, 60.0


@dataclass(frozen=True)
class _Shape:
    vocab_size: int
    hidden: int
    trainable: bool
    tokens: int = 8192

    def __str__(self) -> str:
        return f"V {self.vocab_size:,}, H {self.hidden:,}, {'trainable' if self.trainable else 'frozen'}"


def cases(bench: Bench) -> Cases:
    """A case for each contender at each shape, the most important shapes first; Liger at the first, compiled at the very end."""
    found: dict[_Shape, dict[str, Figures | None]] = {shape: {} for shape in _shapes(bench.rehearse)}
    first = next(iter(found))
    liger = installed("liger-kernel")
    for shape, peers in found.items():
        contenders = _CONTENDERS | ({"Liger JSD, not compiled": _LIGER} if liger and shape == first else {})
        for name, contender in contenders.items():
            peers[name] = yield Case(f"{shape}: {name}", partial(_measure, bench, shape, contender, peers))
    if liger and not bench.rehearse:
        yield Case(f"{first}: Liger JSD, compiled", partial(_measure_compiled, bench, first, found[first]))


def _shapes(rehearse: bool) -> list[_Shape]:
    if rehearse:
        return [_Shape(1024, 64, trainable, tokens=256) for trainable in (False, True)]
    large = [(151_936, hidden) for hidden in (1536, 896, 3584)]
    small = [(128_256, hidden) for hidden in (1536, 896, 3584)]
    return [_Shape(vocab_size, hidden, trainable) for vocab_size, hidden in large + small for trainable in (False, True)]


def _measure_compiled(bench: Bench, shape: _Shape, found: dict[str, Figures | None]) -> Figures:
    """Liger's loss as it is meant to be run; compiling it takes long, and can't be broken off."""
    if bench.allowance.left_s < _COMPILING_S:
        raise TimeoutError(f"less than {_COMPILING_S:.0f} s were left to compile it in")
    return _measure(bench, shape, partial(bench_loss.liger_jsd, compiled=True), found)


def _measure(bench: Bench, shape: _Shape, contender: Callable[[bench_loss.Inputs], Tensor], found: dict[str, Figures | None]) -> Figures:
    """Milliseconds of a forward and backward, the median of several, and GiB of its peak over what stood before it.

    On a CPU milliseconds are the processor's, and the peak is the rise of the process's own, 0 where it was as high before.
    """
    cuda = bench.device.type == "cuda"
    inputs = bench_loss.inputs_of(shape.tokens, shape.hidden, shape.vocab_size, shape.trainable, bench.device, torch.bfloat16)
    for _ in range(1 if bench.rehearse else _WARM_UPS):
        _step(contender, inputs)
    before = bench_loss.peak_bytes(cuda, reset=True)
    times: list[float] = []
    while len(times) < (1 if bench.rehearse else _LEAST) or (sum(times) < _MEASURED_S and len(times) < _MOST):
        start = bench_loss.clock(cuda)
        _step(contender, inputs)
        times.append(bench_loss.clock(cuda) - start)
    figures = {"time_ms": 1000 * statistics.median(times), "peak_gib": (bench_loss.peak_bytes(cuda) - before) / 2**30}
    return figures | _ratios(figures, found)


def _step(contender: Callable[[bench_loss.Inputs], Tensor], inputs: bench_loss.Inputs) -> None:
    """A forward and backward; the gradients are gone behind it, as behind an optimizer's step."""
    contender(inputs).backward()
    for tensor in inputs.values():
        tensor.grad = None


def _ratios(figures: Figures, found: dict[str, Figures | None]) -> Figures:
    """Against TRL's time and whole logits' memory, where those were measured."""
    pairs = {
        "time_of_trl": ratio(figures, found.get(TRL), "time_ms"),
        "peak_of_whole": ratio(figures, found.get(WHOLE), "peak_gib"),
    }
    return {name: value for name, value in pairs.items() if value is not None}
