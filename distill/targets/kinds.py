"""From the teacher's logits at some positions to the targets that are kept of them.

All functions take `logits_nV` (n positions, any float type and device) and cut off the rows that pad the model's head
before anything is normalised. They hold a few float32 or float64 copies of what they are given, so give them a chunk of
positions at a time and put the results together with `concatenate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from distill.errors import DataError, ModelError
from distill.targets.codec import Floats, Targets, log_one_minus_exp
from distill.targets.spec import Sampled, TopK

_BLOCK = 256  # tokens of which one cumulative sum is made, see `_draw`


def top_k(logits_nV: torch.Tensor, target: TopK, vocab_size: int) -> Targets:
    """The k most probable tokens of each position, most probable first, and the logarithm of what the rest holds.

    Tokens of probability 0 are no candidates, so a position may have fewer than k. Which of several equally probable
    tokens at the k-th place is taken is torch's choice.

    Raises:
        ModelError: the logits make no distribution (NaN, or +inf, or all -inf).
    """
    logits_nV = _cut(logits_nV, vocab_size)
    best_nk, ids_nk = logits_nV.topk(min(target.k, vocab_size), dim=-1)
    # The rest is summed over the others rather than taken from 1, where a small one would drown in rounding. One pass
    # over the vocabulary gives it, and with the k best the normaliser: this is where the time goes.
    best_nk, first_n1 = best_nk.float() - best_nk[:, :1].float(), best_nk[:, :1].float()
    others_nV = (logits_nV.float() - first_n1).exp_().scatter_(1, ids_nk, 0.0)
    others_n1 = others_nV.sum(-1, keepdim=True)
    log_total_n1 = (others_n1 + best_nk.exp().sum(-1, keepdim=True)).log()
    best_nk = best_nk - log_total_n1
    _refuse_broken(best_nk[:, 0])
    log_floor = np.log(target.min_probability) if target.min_probability else -np.inf
    keep_nk = (best_nk >= log_floor) & (best_nk > -torch.inf)
    keep_nk[:, 0] = True
    dropped_nk = best_nk.masked_fill(keep_nk, -torch.inf)
    log_rest_n = torch.cat([others_n1.log() - log_total_n1, dropped_nk], 1).logsumexp(-1).clamp(max=0)
    ids = torch.where(keep_nk, ids_nk, -1).to(torch.int32).cpu().numpy()
    log_probs = torch.where(keep_nk, best_nk, -torch.inf).clamp(max=0).cpu().numpy()
    most = int((ids >= 0).sum(1).max(initial=0))
    return Targets(ids[:, :most], log_probs[:, :most], log_rest_n.cpu().numpy())


def chosen_token(logits_nV: torch.Tensor, written_ids_n: torch.Tensor, vocab_size: int) -> Targets:
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
    log_probs_n1 = _log_probs(logits_nV, vocab_size).gather(1, written_ids_n[:, None].to(logits_nV.device))
    log_probs = log_probs_n1.clamp(max=0).cpu().numpy()
    return Targets(np.empty((len(log_probs), 0), np.int32), log_probs, log_one_minus_exp(log_probs[:, 0]))


def uniforms(target: Sampled, key: str, positions: int) -> NDArray[np.float64]:
    """(positions, draws) numbers in [0, 1) that depend on the seed, the trace's key, and the place in it, on nothing else.

    Make them once for a trace and slice them with its chunks.
    """
    digest = hashlib.sha256(f"{target.seed}/{key}".encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))
    numbers = np.random.Generator(philox).random((positions, target.draws))
    return (np.arange(target.draws) + numbers) / target.draws if target.stratified else numbers


def sampled(logits_nV: torch.Tensor, target: Sampled, vocab_size: int, uniforms_nN: NDArray[np.float64]) -> Targets:
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
    logits_nV = _cut(logits_nV, vocab_size).float()
    proposal_nV = logits_nV / target.proposal_temperature if target.weighted else logits_nV
    draws_nN = _draw(proposal_nV, uniforms_nN)
    if not target.weighted:
        return _distinct(draws_nN.cpu().numpy(), np.zeros(draws_nN.shape, np.float32))
    log_p_nN, log_q_nN = (each.gather(1, draws_nN) - each.logsumexp(-1, keepdim=True) for each in (logits_nV, proposal_nV))
    return _distinct(draws_nN.cpu().numpy(), (log_p_nN - log_q_nN).cpu().numpy())


def _draw(logits_nV: torch.Tensor, uniforms_nN: NDArray[np.float64]) -> torch.Tensor:
    """(n, N) tokens at quantiles of the distributions.

    In two steps, since a cumulative sum over a large vocabulary takes longer than all else: which block of tokens a
    quantile lies in, and then which token of that block.
    """
    n, vocab_size = logits_nV.shape
    # In float32 the sums would lose what is less probable than 6e-8. Apple's GPUs have no float64.
    exact = torch.float32 if logits_nV.device.type == "mps" else torch.float64
    numbers_nN = torch.from_numpy(uniforms_nN).to(logits_nV.device, exact)
    if numbers_nN.shape[1] * _BLOCK >= vocab_size:
        ends_nV = (logits_nV - logits_nV.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=exact)
        _refuse_broken(ends_nV[:, -1])
        return _first_above(ends_nV, numbers_nN * ends_nV[:, -1:])
    blocks = -(-vocab_size // _BLOCK)
    weights_nV = logits_nV.new_zeros(n, blocks * _BLOCK)
    torch.sub(logits_nV, logits_nV.amax(-1, keepdim=True), out=weights_nV[:, :vocab_size]).exp_()
    weights_nBW = weights_nV.view(n, blocks, _BLOCK)
    # Sums of a block are good enough in float32: which token of it is drawn is decided by its own sums alone.
    block_ends_nB = weights_nBW.sum(-1).cumsum(-1, dtype=exact)
    _refuse_broken(block_ends_nB[:, -1])
    quantiles_nN = numbers_nN * block_ends_nB[:, -1:]
    blocks_nN = _first_above(block_ends_nB, quantiles_nN)
    edges_nB = torch.nn.functional.pad(block_ends_nB, (1, 0))
    starts_nN = edges_nB.gather(1, blocks_nN)
    shares_nN = (quantiles_nN - starts_nN) / (edges_nB.gather(1, blocks_nN + 1) - starts_nN)
    ends_nNW = weights_nBW.gather(1, blocks_nN[..., None].expand(-1, -1, _BLOCK)).cumsum(-1, dtype=exact)
    inside_nN1 = _first_above(ends_nNW, shares_nN[..., None] * ends_nNW[..., -1:])
    return blocks_nN * _BLOCK + inside_nN1[..., 0]


def _first_above(ends: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Index of the first cumulative sum above each quantile, which ends a part that has weight.

    A quantile that rounding put at the total or above it, as strata and float32 allow, is taken to lie just below.
    """
    total = ends[..., -1:]
    below = torch.minimum(quantiles, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(ends, below.clamp(min=0), right=True)


def _distinct(draws_nN: NDArray[np.int64], log_ratios_nN: Floats) -> Targets:
    """Draws with their log p/q as distinct ids with log-weights, the heaviest first and equal ones by id."""
    n, draws = draws_nN.shape
    order = np.argsort(draws_nN, axis=1, kind="stable")
    draws_nN, log_ratios_nN = np.take_along_axis(draws_nN, order, 1), np.take_along_axis(log_ratios_nN, order, 1)
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


def mass_profile(logits_nV: torch.Tensor, vocab_size: int, ks: Sequence[int], draws: Sequence[int]) -> NDArray[np.float64]:
    """(n, ks + draws) share of probability in the k most probable tokens, then expected distinct ids of so many draws.

    Args:
        logits_nV: Logits of the teacher.
        vocab_size: Number of token ids, without padding of the head.
        ks: Rising sizes of a top-k target, at most the vocabulary's.
        draws: Numbers of independent draws.

    Raises:
        ModelError: the logits make no distribution.
    """
    probs_nV = _log_probs(logits_nV, vocab_size).exp()
    columns = []
    if ks:
        captured = probs_nV.topk(ks[-1], dim=-1).values.cumsum(-1)
        columns += [captured[:, k - 1] for k in ks]
    for number in draws:
        # A token is seen at least once with probability 1 - (1-p)^N.
        columns.append(-torch.expm1(number * torch.log1p(-probs_nV.clamp(max=1))).sum(-1))
    return torch.stack(columns, 1).double().cpu().numpy()


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

    def add(self, logits_nV: torch.Tensor) -> None:
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


def _log_probs(logits_nV: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """float32 log-probabilities of the vocabulary proper."""
    log_probs_nV = _cut(logits_nV, vocab_size).float().log_softmax(-1)
    # -inf for a token is fine; NaN, +inf or -inf everywhere turn the whole position into NaN.
    _refuse_broken(log_probs_nV[:, 0])
    return log_probs_nV


def _cut(logits_nV: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits without the rows that pad the head."""
    if logits_nV.shape[1] < vocab_size:
        raise ModelError(f"targets: the teacher has {logits_nV.shape[1]} logits, fewer than its vocabulary's {vocab_size} tokens.")
    return logits_nV[:, :vocab_size]


def _refuse_broken(log_probs_n: torch.Tensor) -> None:
    """Raises where one log-probability of each position shows that its logits make no distribution."""
    broken = log_probs_n.isnan()
    if broken.any():
        raise ModelError(
            f"targets: the teacher's logits are no distribution at {int(broken.sum())} of {len(broken)} positions (NaN or infinite). "
            "Load it in bfloat16 or float32: `teacher.dtype`."
        )
