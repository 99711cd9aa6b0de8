"""What the loss does to every logit, in two passes over memory on a GPU: statistics of a position, and its gradient.

Written one operation of torch after the other these are some sixteen passes, which take longer than the products with the
head. Both kernels give a tile of one row to a program, so that few long rows fill a GPU as well as many short ones do.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # It comes with torch for GPUs only: not on macOS, on Windows, or with torch for CPUs.
    triton = None

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# 32 numbers a thread: eight loads of 16 bytes under way at once, and registers for several programs a multiprocessor.
_TILE = 4096
_WARPS = 4


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run there. The first call compiles one: a compiler may be missing, or the GPU be too old."""
    if triton is None or not (_IS_INTERPRETED or device.type in ("cuda", "xpu")):
        return False
    try:
        statistics(torch.zeros((1, 1), device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # C compilers, Triton and drivers raise many kinds, of which the message alone tells
        warnings.warn(f"loss and scoring work without Triton's kernels, slower: {error}", stacklevel=2)
        return False
    return True


def statistics(logits_nV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) peak, sum of exp(logit - peak), and sum of exp(logit - peak) times (logit - peak), of each row.

    A logit of -inf adds nothing; a row of nothing else gives 0 three times. Rows are float32, each contiguous.
    """
    rows, parts = len(logits_nV), triton.cdiv(logits_nV.shape[1], _TILE)
    of_tiles, of_rows = logits_nV.new_empty((3, rows, parts)), logits_nV.new_empty((3, rows))
    if rows:
        _launch(_statistics, logits_nV, *of_tiles, logits_nV.stride(0))
        with torch.accelerator.device_index(logits_nV.device.index):
            _combined[(rows,)](*of_tiles, *of_rows, parts, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return of_rows[0], of_rows[1], of_rows[2]


def gradient(logits_nV: Tensor, peak_n: Tensor, factor_n: Tensor, out_nV: Tensor, softcap: float | None = None) -> Tensor:
    """`out_nV`, filled with exp(logit - peak) · factor in its own type; 0 where the logit is -inf.

    Args:
        logits_nV: float32, each row contiguous.
        peak_n: Of each row, as `statistics` gives it.
        factor_n: The gradient by the logits of a row is this times their exponentials.
        out_nV: float32, bfloat16 or float16; it may be `logits_nV`.
        softcap: c, if the logits are c · tanh(x / c): then the gradient is by x, which is 1 - (logit / c)² times as large.
    """
    _launch(_gradient, logits_nV, peak_n.contiguous(), factor_n.contiguous(), out_nV, softcap, logits_nV.stride(0), out_nV.stride(0))
    return out_nV


def _launch(kernel: Any, logits_nV: Tensor, *arguments: Any) -> None:
    """Starts a program a tile, on the GPU that holds the logits, which need not be the current one."""
    rows, vocab_size = logits_nV.shape
    parts = triton.cdiv(vocab_size, _TILE)
    with torch.accelerator.device_index(logits_nV.device.index):
        # Versions differ in whether products and sums fuse by default.
        kernel[(rows * parts,)](logits_nV, *arguments, vocab_size, parts, TILE=_TILE, num_warps=_WARPS, enable_fp_fusion=True)


def _jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _statistics(
    logits_nV: tl.tensor,
    peak_nP: tl.tensor,
    sum_nP: tl.tensor,
    gap_nP: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    parts: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """The statistics of a tile; the peak of one whose logits are all -inf is -inf."""
    program = tl.program_id(0)
    columns = program % parts * TILE + tl.arange(0, TILE)
    start = (program // parts).to(tl.int64) * stride  # a buffer may have more than 2^31 elements
    logits = tl.load(logits_nV + start + columns, mask=columns < vocab_size, other=float("-inf"))
    peak = tl.max(logits, 0)
    distances = logits - tl.where(peak == float("-inf"), 0.0, peak)
    exponentials = tl.exp(distances)
    tl.store(peak_nP + program, peak)
    tl.store(sum_nP + program, tl.sum(exponentials, 0))
    tl.store(gap_nP + program, tl.sum(tl.where(distances == float("-inf"), 0.0, exponentials * distances), 0))


@_jit
def _combined(
    peak_nP: tl.tensor,
    sum_nP: tl.tensor,
    gap_nP: tl.tensor,
    peak_n: tl.tensor,
    sum_n: tl.tensor,
    gap_n: tl.tensor,
    parts: tl.tensor,
    PARTS: tl.constexpr,
) -> None:
    """The statistics of a row from those of its tiles: each is taken from its own peak to the row's."""
    row = tl.program_id(0)
    columns = tl.arange(0, PARTS)
    places, there = row * parts + columns, columns < parts
    peaks = tl.load(peak_nP + places, mask=there, other=float("-inf"))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    shifts = peaks - peak
    scales = tl.exp(shifts)
    sums = tl.load(sum_nP + places, mask=there, other=0.0) * scales
    gaps = tl.load(gap_nP + places, mask=there, other=0.0) * scales
    tl.store(peak_n + row, peak)
    tl.store(sum_n + row, tl.sum(sums, 0))
    # A tile of nothing is infinitely far away, and adds nothing.
    tl.store(gap_n + row, tl.sum(tl.where(scales == 0, 0.0, gaps + shifts * sums), 0))


@_jit
def _gradient(
    logits_nV: tl.tensor,
    peak_n: tl.tensor,
    factor_n: tl.tensor,
    out_nV: tl.tensor,
    softcap: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    vocab_size: tl.tensor,
    parts: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """The gradient of a tile. Each thread reads its elements before it writes them, so that it works in place."""
    program = tl.program_id(0)
    columns = program % parts * TILE + tl.arange(0, TILE)
    row = (program // parts).to(tl.int64)
    logits = tl.load(logits_nV + row * stride + columns, mask=columns < vocab_size, other=float("-inf"))
    gradients = tl.exp(logits - tl.load(peak_n + row)) * tl.load(factor_n + row)
    if softcap is not None:
        capped = logits / softcap
        gradients *= 1 - capped * capped
    gradients = tl.where(logits == float("-inf"), 0.0, gradients)
    tl.store(out_nV + row * out_stride + columns, gradients, mask=columns < vocab_size)
