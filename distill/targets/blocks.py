"""The vocabulary in blocks: peak and sum of each, from which a GPU finds all that is stored without a second pass over it.

A pass over (n, V) logits takes a GPU as long as several layers of a small teacher, and torch needs some ten for a softmax
and a top-k. Here one gives two numbers a block; then only the few blocks are read again that can hold what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.losses import kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # as in `losses.kernels`
    triton = None

WIDTH = 128
"""Tokens of a block: k blocks of them are few beside the vocabulary, and V / 128 blocks are, too."""
_LEAST = 2**14  # tokens from which on the detour pays
_BLOCKS_AT_ONCE, _WARPS = 32, 4  # 32 numbers a thread, as in `losses.kernels`


class Blocks(NamedTuple):
    """Float32 statistics of the blocks of each position."""

    peaks_nB: Tensor
    """Largest logit; -inf if there is no other."""
    sums_nB: Tensor
    """Sum of exp(logit - peak): 0 if all are -inf, NaN if one is NaN or +inf."""

    def total(self) -> tuple[Tensor, Tensor]:
        """(n, 1) the largest logit, and the logarithm of the sum of exp(logit - largest), NaN where there is no distribution."""
        peak_n1 = self.peaks_nB.amax(1, keepdim=True)
        return peak_n1, self.sums_below(peak_n1).sum(1, keepdim=True).log()

    def sums_below(self, peak_n1: Tensor) -> Tensor:
        """(n, B) sums of exp(logit - peak) for one peak a position."""
        return self.sums_nB * (self.peaks_nB - peak_n1).exp()


class Best(NamedTuple):
    """The most probable tokens of each position."""

    logits_nk: Tensor
    """Falling, in the type they came in."""
    ids_nk: Tensor
    others_n1: Tensor
    """Sum of exp(logit - largest) over all other tokens, in float32."""


def pay(logits_nV: Tensor) -> bool:
    """Whether this is faster than torch's own operations: on a CPU, whose caches hold a row, they are."""
    return logits_nV.device.type == "cuda" and logits_nV.shape[1] >= _LEAST and logits_nV.dtype.itemsize <= 4


def statistics(logits_nV: Tensor) -> Blocks:
    """Of logits in any type of at most 32 bits, whose rows are contiguous each; the last block may be narrower."""
    rows, vocab_size = logits_nV.shape
    number = -(-vocab_size // WIDTH)
    if not kernels.available(logits_nV.device):
        logits_nBW = torch.nn.functional.pad(logits_nV.float(), (0, number * WIDTH - vocab_size), value=-math.inf).view(rows, number, WIDTH)
        peaks_nB = logits_nBW.amax(2)
        return Blocks(peaks_nB, (logits_nBW - peaks_nB.masked_fill(peaks_nB == -math.inf, 0)[..., None]).exp_().sum(2))
    peaks_nB, sums_nB = torch.empty((2, rows, number), dtype=torch.float32, device=logits_nV.device).unbind()
    programs = triton.cdiv(number, _BLOCKS_AT_ONCE)
    arguments = logits_nV, peaks_nB, sums_nB, logits_nV.stride(0), vocab_size, number, programs
    options = {"BLOCKS": _BLOCKS_AT_ONCE, "WIDTH": WIDTH, "num_warps": _WARPS, "enable_fp_fusion": True}
    if rows:
        with torch.accelerator.device_index(logits_nV.device.index):
            _statistics[(rows * programs,)](*arguments, **options)
    return Blocks(peaks_nB, sums_nB)


def members(logits_nV: Tensor, blocks_nb: Tensor) -> Tensor:
    """(n, b, WIDTH) logits of some blocks of each position; -inf stands behind the end of the vocabulary."""
    whole = logits_nV.shape[1] // WIDTH
    logits_nBW = logits_nV[:, : whole * WIDTH].unflatten(1, (whole, WIDTH))
    found_nbW: Tensor = logits_nBW.gather(1, blocks_nb.clamp(max=whole - 1)[..., None].expand(-1, -1, WIDTH))
    rest_nr = logits_nV[:, whole * WIDTH :]
    if not rest_nr.shape[1]:
        return found_nbW
    last_n1W = torch.nn.functional.pad(rest_nr, (0, WIDTH - rest_nr.shape[1]), value=-math.inf)[:, None]
    return torch.where((blocks_nb == whole)[..., None], last_n1W, found_nbW)


def best(logits_nV: Tensor, blocks: Blocks, k: int) -> Best:
    """The k largest logits of each position, k <= V.

    They lie in the k blocks of the largest peaks: a token of another block has k peaks above it or equal to it. Of equal
    tokens at the k-th place one may be taken that torch would not take of the whole row. An id of a logit -inf means nothing.
    """
    number = min(k, blocks.peaks_nB.shape[1])
    # In the order of the vocabulary, so that equal tokens stand as they do there.
    blocks_nb = blocks.peaks_nB.topk(number, sorted=False).indices.sort().values
    members_nM = members(logits_nV, blocks_nb).flatten(1)
    best_nk, places_nk = members_nM.topk(k)
    ids_nk = blocks_nb.gather(1, places_nk // WIDTH) * WIDTH + places_nk % WIDTH
    first_n1 = best_nk[:, :1].float()
    # Summed over the others rather than taken from the total, where a small rest would drown in rounding.
    inside_n1 = (members_nM - first_n1).exp_().scatter_(1, places_nk, 0.0).sum(1, keepdim=True)
    outside_n1 = blocks.sums_below(first_n1).scatter_(1, blocks_nb, 0.0).sum(1, keepdim=True)
    return Best(best_nk, ids_nk, inside_n1 + outside_n1)


def _jit(kernel: Callable[..., None]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _statistics(
    logits_nV: tl.tensor,
    peaks_nB: tl.tensor,
    sums_nB: tl.tensor,
    stride: tl.tensor,
    vocab_size: tl.tensor,
    number: tl.tensor,
    programs: tl.tensor,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The statistics of some neighbouring blocks of a row."""
    row = (tl.program_id(0) // programs).to(tl.int64)  # there may be more than 2^31 logits
    first = tl.program_id(0) % programs * BLOCKS
    blocks = first + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    places = logits_nV + row * stride + columns
    if (first + BLOCKS) * WIDTH <= vocab_size:
        logits = tl.load(places).to(tl.float32)  # a mask that may end anywhere would make it load single numbers
    else:
        logits = tl.load(places, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    peaks = tl.max(logits, 1)
    distances = logits - tl.where(peaks == float("-inf"), 0.0, peaks)[:, None]
    tl.store(peaks_nB + row * number + blocks, peaks, mask=blocks < number)
    tl.store(sums_nB + row * number + blocks, tl.sum(tl.exp(distances), 1), mask=blocks < number)
