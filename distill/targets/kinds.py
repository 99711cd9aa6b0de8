"""From the teacher's logits at some positions to the targets that are kept of them.

All functions take `logits_nV` (n positions, any float type and device) and cut off the rows that pad the model's head
before anything is normalised. They hold a few float32 or float64 copies of what they are given, so give them a chunk of
positions at a time. `find_...` leaves what it finds on the device and never waits for it; `to_targets` makes targets of
that when it lies in memory. `top_k`, `chosen_token` and `sampled` are the two together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import DataError, ModelError
from distill.targets import blocks
from distill.targets.codec import Floats, Targets, log_one_minus_exp
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

_BLOCK = 256  # tokens of which one cumulative sum is made, see `_draw`


class Found(NamedTuple):
    """What is kept of some positions, before it is put into the order of `Targets`."""

    ids_nK: Tensor
    """int32: the candidates, -1 where there is none. For `sampled` the draws, rising; (n, 0) for `chosen_token`."""
    log_probs_nK: Tensor
    """float32 log-probabilities. For `sampled` the log p/q of the draws."""
    log_rest_n: Tensor
    """float32; 0 for other kinds than `top_k`."""
    broken_n: Tensor
    """Whether the logits make no distribution: NaN, or +inf, or all -inf."""


def to_targets(found: Found, target: TargetSpec) -> Targets:
    """The targets of what was found.

    Args:
        found: On the CPU.
        target: What it was found for.

    Raises:
        ModelError: the logits make no distribution.
    """
    refuse_broken(found.broken_n)
    ids, log_probs = found.ids_nK.numpy(), found.log_probs_nK.numpy()
    if isinstance(target, ChosenToken):
        return Targets(ids, log_probs, log_one_minus_exp(log_probs[:, 0]))
    if isinstance(target, Sampled):
        return _distinct(ids, log_probs)
    most = int((ids >= 0).sum(1).max(initial=0))
    return Targets(ids[:, :most], log_probs[:, :most], found.log_rest_n.numpy())


def top_k(logits_nV: Tensor, target: TopK, vocab_size: int) -> Targets:
    """The k most probable tokens of each position, most probable first, and the logarithm of what the rest holds.

    Tokens of probability 0 are no candidates, so a position may have fewer than k. Which of several equally probable
    tokens at the k-th place is taken is torch's choice.

    Raises:
        ModelError: the logits make no distribution (NaN, or +inf, or all -inf).
    """
    return to_targets(_on_cpu(find_top_k(logits_nV, target, vocab_size)), target)


def find_top_k(logits_nV: Tensor, target: TopK, vocab_size: int) -> Found:
    """What `top_k` makes targets of."""
    best_nk, ids_nk, others_n1 = _best(_cut(logits_nV, vocab_size), min(target.k, vocab_size))
    best_nk = best_nk.float() - best_nk[:, :1].float()
    log_total_n1 = (others_n1 + best_nk.exp().sum(-1, keepdim=True)).log()
    best_nk = best_nk - log_total_n1
    log_floor = np.log(target.min_probability) if target.min_probability else -np.inf
    keep_nk = (best_nk >= log_floor) & (best_nk > -torch.inf)
    keep_nk[:, 0] = True
    dropped_nk = best_nk.masked_fill(keep_nk, -torch.inf)
    log_rest_n = torch.cat([others_n1.log() - log_total_n1, dropped_nk], 1).logsumexp(-1).clamp(max=0)
    ids_nk = torch.where(keep_nk, ids_nk, -1).to(torch.int32)
    return Found(ids_nk, torch.where(keep_nk, best_nk, -torch.inf).clamp(max=0), log_rest_n, best_nk[:, 0].isnan())


def _best(logits_nV: Tensor, k: int) -> blocks.Best:
    """The k best of each position. This is where the time goes."""
    if blocks.pay(logits_nV):
        return blocks.best(logits_nV, blocks.statistics(logits_nV), k)
    best_nk, ids_nk = logits_nV.topk(k, dim=-1)
    # The rest is summed over the others rather than taken from 1, where a small one would drown in rounding. One pass
    # over the vocabulary gives it, and with the k best the normaliser.
    others_nV = (logits_nV.float() - best_nk[:, :1].float()).exp_().scatter_(1, ids_nk, 0.0)
    return blocks.Best(best_nk, ids_nk, others_nV.sum(-1, keepdim=True))


def chosen_token(logits_nV: Tensor, written_ids_n: Tensor, vocab_size: int) -> Targets:
    """The log-probability of the token that stands in the trace at each position.

    Args:
        logits_nV: Logits that predict the written tokens: position i's come from the token before it.
        written_ids_n: (n,) ids of the trace.
        vocab_size: Number of token ids, without padding of the head.

    Raises:
        DataError: a written id lies outside the vocabulary.
        ModelError: the logits make no distribution.
    """
    outside = (written_ids_n < 0) | (written_ids_n >= vocab_size)
    if outside.any():
        raise DataError(
            f"targets: the trace holds token id {int(written_ids_n[outside][0])}, the teacher's vocabulary ends at {vocab_size - 1}. "
            "Score traces in the teacher's own ids."
        )
    return to_targets(_on_cpu(find_chosen_token(logits_nV, written_ids_n.to(logits_nV.device), vocab_size)), ChosenToken())


def find_chosen_token(logits_nV: Tensor, written_ids_n: Tensor, vocab_size: int) -> Found:
    """What `chosen_token` makes targets of; the ids lie on the device, within the vocabulary."""
    logits_nV, ids_n1 = _cut(logits_nV, vocab_size), written_ids_n[:, None].long()
    if blocks.pay(logits_nV):
        peak_n1, log_total_n1 = blocks.statistics(logits_nV).total()
        log_probs_n1, broken_n = logits_nV.gather(1, ids_n1) - peak_n1 - log_total_n1, log_total_n1[:, 0].isnan()
    else:
        log_probs_nV = logits_nV.float().log_softmax(-1)
        # -inf for a token is fine; NaN, +inf or -inf everywhere turn the whole position into NaN.
        log_probs_n1, broken_n = log_probs_nV.gather(1, ids_n1), log_probs_nV[:, 0].isnan()
    ids_n0 = torch.empty((len(ids_n1), 0), dtype=torch.int32, device=logits_nV.device)
    return Found(ids_n0, log_probs_n1.clamp(max=0), torch.zeros_like(log_probs_n1[:, 0]), broken_n)


def uniforms(target: Sampled, key: str, positions: int) -> NDArray[np.float64]:
    """(positions, draws) numbers in [0, 1) that depend on the seed, the trace's key, and the place in it, on nothing else.

    Make them once for a trace and slice them with its chunks.
    """
    digest = hashlib.sha256(f"{target.seed}/{key}".encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))
    numbers = np.random.Generator(philox).random((positions, target.draws))
    return (np.arange(target.draws) + numbers) / target.draws if target.stratified else numbers


def sampled(logits_nV: Tensor, target: Sampled, vocab_size: int, uniforms_nN: NDArray[np.float64]) -> Targets:
    """N draws with replacement at each position: the distinct ids with the logarithms of their weights (arXiv 2503.16870).

    A draw is the token at a quantile of the proposal q ∝ p^(1/τ). The weight count / N · p / q is an unbiased estimate of
    p for every token of the vocabulary, and so is any sum of them: a loss linear in the target keeps its expectation.

    Args:
        logits_nV: Logits of the teacher.
        target: Number of draws and proposal.
        vocab_size: Number of token ids, without padding of the head.
        uniforms_nN: From `uniforms`, for these positions.

    Raises:
        ModelError: the logits make no distribution.
    """
    numbers_nN = torch.from_numpy(uniforms_nN).to(logits_nV.device, exact_type(logits_nV.device))
    return to_targets(_on_cpu(find_sampled(logits_nV, target, vocab_size, numbers_nN)), target)


def find_sampled(logits_nV: Tensor, target: Sampled, vocab_size: int, uniforms_nN: Tensor) -> Found:
    """What `sampled` makes targets of; the numbers lie on the device, in its `exact_type`."""
    logits_nV = _cut(logits_nV, vocab_size)
    if not blocks.pay(logits_nV):
        logits_nV = logits_nV.float()
    proposal_nV = logits_nV.float() / target.proposal_temperature if target.weighted else logits_nV
    draws_nN, broken_n = _draw(proposal_nV, uniforms_nN)
    # Sorted here, where it costs nothing. Only where there is no distribution could one lie outside.
    draws_nN = draws_nN.clamp(max=vocab_size - 1).sort(-1).values
    log_ratios_nN = torch.zeros(draws_nN.shape, dtype=torch.float32, device=draws_nN.device)
    if target.weighted:
        log_p_nN, log_q_nN = (each.gather(1, draws_nN) - _log_total(each) for each in (logits_nV, proposal_nV))
        log_ratios_nN = log_p_nN - log_q_nN
    return Found(draws_nN.to(torch.int32), log_ratios_nN, torch.zeros_like(log_ratios_nN[:, 0]), broken_n)


def exact_type(device: torch.device) -> torch.dtype:
    """Of cumulative sums: float32 would lose what is less probable than 6e-8. Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _draw(logits_nV: Tensor, numbers_nN: Tensor) -> tuple[Tensor, Tensor]:
    """(n, N) tokens at quantiles of the distributions, and (n,) whether there is none.

    In two steps, since a cumulative sum over a large vocabulary takes longer than all else: which block of tokens a
    quantile lies in, and then which token of that block. Sums of a block are good enough in float32: which token of it is
    drawn is decided by its own sums alone.
    """
    (n, vocab_size), exact = logits_nV.shape, numbers_nN.dtype
    if blocks.pay(logits_nV):
        found = blocks.statistics(logits_nV)
        peak_n1 = found.peaks_nB.amax(-1, keepdim=True)
        ends_nB = found.sums_below(peak_n1).cumsum(-1, dtype=exact)
        return _draw_in(ends_nB, numbers_nN, lambda blocks_nN: (blocks.members(logits_nV, blocks_nN) - peak_n1[..., None]).exp_())
    if numbers_nN.shape[1] * _BLOCK >= vocab_size:
        ends_nV = (logits_nV - logits_nV.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=exact)
        return _first_above(ends_nV, numbers_nN * ends_nV[:, -1:]), ends_nV[:, -1].isnan()
    number = -(-vocab_size // _BLOCK)
    weights_nV = logits_nV.new_zeros(n, number * _BLOCK)
    torch.sub(logits_nV, logits_nV.amax(-1, keepdim=True), out=weights_nV[:, :vocab_size]).exp_()
    weights_nBW = weights_nV.view(n, number, _BLOCK)
    ends_nB = weights_nBW.sum(-1).cumsum(-1, dtype=exact)
    return _draw_in(ends_nB, numbers_nN, lambda blocks_nN: weights_nBW.gather(1, blocks_nN[..., None].expand(-1, -1, _BLOCK)))


def _draw_in(ends_nB: Tensor, numbers_nN: Tensor, weights_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`_draw` from cumulative sums of blocks, and what gives the (n, N, W) weights of the tokens of (n, N) blocks."""
    quantiles_nN = numbers_nN * ends_nB[:, -1:]
    blocks_nN = _first_above(ends_nB, quantiles_nN)
    edges_nB = torch.nn.functional.pad(ends_nB, (1, 0))
    starts_nN = edges_nB.gather(1, blocks_nN)
    shares_nN = (quantiles_nN - starts_nN) / (edges_nB.gather(1, blocks_nN + 1) - starts_nN)
    inside_nNW = weights_of(blocks_nN).cumsum(-1, dtype=ends_nB.dtype)
    inside_nN1 = _first_above(inside_nNW, shares_nN[..., None] * inside_nNW[..., -1:])
    return blocks_nN * inside_nNW.shape[-1] + inside_nN1[..., 0], ends_nB[:, -1].isnan()


def _first_above(ends: Tensor, quantiles: Tensor) -> Tensor:
    """Index of the first cumulative sum above each quantile, which ends a part that has weight.

    A quantile that rounding put at the total or above it, as strata and float32 allow, is taken to lie just below.
    """
    total = ends[..., -1:]
    below = torch.minimum(quantiles, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(ends, below.clamp(min=0), right=True)
    return found.clamp(max=ends.shape[-1] - 1)  # NaN is above all


def _distinct(draws_nN: NDArray[np.int32], log_ratios_nN: Floats) -> Targets:
    """Rising draws with their log p/q as distinct ids with log-weights, the heaviest first and equal ones by id."""
    n, draws = draws_nN.shape
    is_first = np.ones((n, draws), np.bool_)
    is_first[:, 1:] = draws_nN[:, 1:] != draws_nN[:, :-1]
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=n * draws)
    weights = np.log(counts / draws) + log_ratios_nN.reshape(-1)[starts]
    heaviest_first = np.lexsort((-weights, starts // draws))  # stable: equal weights stay in the order of ids
    numbers_n = is_first.sum(1)
    filled = np.arange(int(numbers_n.max(initial=0))) < numbers_n[:, None]
    ids, log_weights = np.full(filled.shape, -1, np.int32), np.full(filled.shape, -np.inf, np.float32)
    ids[filled] = draws_nN.reshape(-1)[starts[heaviest_first]]
    log_weights[filled] = weights[heaviest_first]
    return Targets(ids, log_weights, np.full(n, -np.inf, np.float32))


def mass_profile(logits_nV: Tensor, vocab_size: int, ks: Sequence[int], draws: Sequence[int]) -> NDArray[np.float64]:
    """(n, ks + draws) share of probability in the k most probable tokens, then expected distinct ids of so many draws.

    Args:
        logits_nV: Logits of the teacher.
        vocab_size: Number of token ids, without padding of the head.
        ks: Rising sizes of a top-k target, at most the vocabulary's.
        draws: Numbers of independent draws.

    Raises:
        ModelError: the logits make no distribution.
    """
    profile_nm = find_mass_profile(logits_nV, vocab_size, ks, draws).cpu()
    refuse_broken(profile_nm.isnan().any(1))
    return profile_nm.double().numpy()


def find_mass_profile(logits_nV: Tensor, vocab_size: int, ks: Sequence[int], draws: Sequence[int]) -> Tensor:
    """The same as a float32 tensor on the device; NaN where the logits make no distribution."""
    logits_nV = _cut(logits_nV, vocab_size)
    if blocks.pay(logits_nV):
        found = blocks.statistics(logits_nV)
        peak_n1, log_total_n1 = found.total()
        probs_nV = (logits_nV - (peak_n1 + log_total_n1)).exp_()
        best_nk = (blocks.best(logits_nV, found, ks[-1]).logits_nk - peak_n1 - log_total_n1).exp_() if ks else probs_nV[:, :0]
    else:
        probs_nV = logits_nV.float().log_softmax(-1).exp()
        best_nk = probs_nV.topk(ks[-1], dim=-1).values if ks else probs_nV[:, :0]
    captured_nk = best_nk.cumsum(-1)
    columns = [captured_nk[:, k - 1] for k in ks]
    for number in draws:
        # A token is seen at least once with probability 1 - (1-p)^N.
        columns.append(-probs_nV.clamp(max=1).neg_().log1p_().mul_(number).expm1_().sum(-1))
    return torch.stack(columns, 1)


class MassSummary:
    """Averages over positions that tell which k and which number of draws a teacher needs.

    Args:
        vocab_size: Number of token ids, without padding of the head.
        ks: Sizes of a top-k target to be judged.
        draws: Numbers of draws to be judged.
    """

    def __init__(self, vocab_size: int, ks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256), draws: Sequence[int] = (50,)) -> None:
        self._vocab_size = vocab_size
        self._ks = [k for k in ks if k <= vocab_size]
        self._draws = list(draws)
        self._sums = np.zeros(len(self._ks) + len(self._draws))
        self.positions = 0

    def add(self, logits_nV: Tensor) -> None:
        """Counts the positions of a chunk in.

        Raises:
            ModelError: the logits make no distribution.
        """
        profile = mass_profile(logits_nV, self._vocab_size, self._ks, self._draws)
        self.add_profile(profile.sum(0), len(profile))

    def add_profile(self, sums: NDArray[np.float64], positions: int) -> None:
        """Counts positions in whose `mass_profile` was summed before."""
        self._sums += sums
        self.positions += positions

    @property
    def captured_mass(self) -> dict[int, float]:
        """For each k, the share of probability that the k most probable tokens hold, averaged over positions."""
        return dict(zip(self._ks, (self._sums[: len(self._ks)] / self.positions).tolist(), strict=True))

    @property
    def distinct_ids(self) -> dict[int, float]:
        """For each number of independent draws, the expected number of distinct ids, averaged over positions."""
        return dict(zip(self._draws, (self._sums[len(self._ks) :] / self.positions).tolist(), strict=True))


def _log_total(logits_nV: Tensor) -> Tensor:
    """(n, 1) logarithm of the sum of all exponentials, in float32."""
    if blocks.pay(logits_nV):
        peak_n1, log_total_n1 = blocks.statistics(logits_nV).total()
        return peak_n1 + log_total_n1
    return logits_nV.logsumexp(-1, keepdim=True)


def _cut(logits_nV: Tensor, vocab_size: int) -> Tensor:
    """Logits without the rows that pad the head."""
    if logits_nV.shape[1] < vocab_size:
        raise ModelError(f"targets: the teacher has {logits_nV.shape[1]} logits, fewer than its vocabulary's {vocab_size} tokens.")
    return logits_nV[:, :vocab_size]


def _on_cpu(found: Found) -> Found:
    return Found(*(tensor.cpu() for tensor in found))


def refuse_broken(broken_n: Tensor) -> None:
    """Raises where the logits of a position make no distribution."""
    if broken_n.any():
        raise ModelError(
            f"targets: the teacher's logits are no distribution at {int(broken_n.sum())} of {len(broken_n)} positions (NaN or infinite). "
            "Load it in bfloat16 or float32: `teacher.dtype`."
        )
