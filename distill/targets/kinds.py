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


def top_k(logits_nV: torch.Tensor, target: TopK, vocab_size: int) -> Targets:
    """The k most probable tokens of each position, most probable first, and the logarithm of what the rest holds.

    Tokens of probability 0 are no candidates, so a position may have fewer than k. Which of several equally probable
    tokens at the k-th place is taken is torch's choice.

    Raises:
        ModelError: the logits make no distribution (NaN, or +inf, or all -inf).
    """
    log_probs_nV = _log_probs(logits_nV, vocab_size)
    best_nk, ids_nk = log_probs_nV.topk(min(target.k, vocab_size), dim=-1)
    log_floor = np.log(target.min_probability) if target.min_probability else -np.inf
    keep_nk = (best_nk >= log_floor) & (best_nk > -torch.inf)
    keep_nk[:, 0] = True
    # Summed over the others rather than taken from 1, where a small rest would drown in rounding.
    taken_nk = torch.where(keep_nk, -torch.inf, best_nk)
    log_rest_n = log_probs_nV.scatter(1, ids_nk, taken_nk).logsumexp(-1).clamp(max=0)
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
    log_probs_nV = _log_probs(logits_nV, vocab_size)
    log_q_nV = (log_probs_nV / target.proposal_temperature).log_softmax(-1) if target.weighted else log_probs_nV
    # In float32 the sums would lose what is less probable than 6e-8. Apple's GPUs have no float64.
    cumulative_nV = log_q_nV.exp().to(torch.float32 if logits_nV.device.type == "mps" else torch.float64).cumsum(-1)
    total_n1 = cumulative_nV[:, -1:]
    quantiles_nN = torch.from_numpy(uniforms_nN).to(cumulative_nV) * total_n1
    # Strictly below the total: a number that rounds to 1, as strata and float32 allow, would draw behind the last token.
    quantiles_nN = torch.minimum(quantiles_nN, total_n1.nextafter(torch.zeros_like(total_n1)))
    draws_nN = torch.searchsorted(cumulative_nV, quantiles_nN, right=True)
    ratios_nN = (log_probs_nV - log_q_nV).gather(1, draws_nN) if target.weighted else torch.zeros(())
    return _distinct(draws_nN.cpu().numpy(), np.broadcast_to(ratios_nN.cpu().numpy(), draws_nN.shape))


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
        probs_nV = _log_probs(logits_nV, self._vocab_size).exp()
        if self._ks:
            captured = probs_nV.topk(max(self._ks), dim=-1).values.cumsum(-1)
            self._sums[: len(self._ks)] += captured[:, [k - 1 for k in self._ks]].double().sum(0).cpu().numpy()
        for place, draws in enumerate(self._draws, start=len(self._ks)):
            # A token is seen at least once with probability 1 - (1-p)^N.
            self._sums[place] -= torch.expm1(draws * torch.log1p(-probs_nV.clamp(max=1))).sum(dtype=torch.float64).item()
        self.positions += len(logits_nV)

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
    if logits_nV.shape[1] < vocab_size:
        raise ModelError(f"targets: the teacher has {logits_nV.shape[1]} logits, fewer than its vocabulary's {vocab_size} tokens.")
    log_probs_nV = logits_nV[:, :vocab_size].float().log_softmax(-1)
    # -inf for a token is fine; NaN, +inf or -inf everywhere turn the whole position into NaN.
    broken = log_probs_nV[:, 0].isnan()
    if broken.any():
        raise ModelError(
            f"targets: the teacher's logits are no distribution at {int(broken.sum())} of {len(broken)} positions (NaN or infinite). "
            "Load it in bfloat16 or float32: `teacher.dtype`."
        )
    return log_probs_nV
