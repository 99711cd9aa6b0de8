"""What a server tells of some tokens, its most probable ones and the written one, as targets in the student's ids."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.engines.scored import KS, MIN_CARRIED, ScoredRow, Statistics, spread, without
from distill.engines.scoring import PROFILED_EVERY
from distill.errors import IntegrityError, ModelError
from distill.models.vocabulary import NONE, AlignedRow
from distill.targets.codec import Targets, log_one_minus_exp
from distill.targets.spec import ChosenToken, TargetSpec, TopK

FLOOR = -9000.0
"""Servers write -9999 for a probability of 0."""
_EXCESS = 1e-3  # of the sum of probabilities above 1: float32 and the server's own rounding

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Told:
    """What was told of the n aligned tokens of a row."""

    ids_nK: NDArray[np.int32]
    """In the student's ids; `NONE` where the student has no such token, and where there is no candidate."""
    log_probs_nK: Doubles
    """Nats at temperature 1, in any order; NaN, -inf or less than `FLOOR` is no candidate."""
    written_n: Doubles
    """Log-probability of the written token."""
    asked: int
    """Candidates that were asked for at each position; the mass of so many is known."""


def scored_row(row: AlignedRow, target: TargetSpec, told: Told, *, all_shared: bool, vocab_size: int, tokens: int) -> ScoredRow:
    """The targets of a row, and its statistics as far as they can be known.

    A position where less than `MIN_CARRIED` of the probability can lie on the student's tokens has no target.

    Args:
        row: Its aligned tokens are those that `told` speaks of.
        target: `top_k` or `chosen_token`.
        told: By a server.
        all_shared: Whether the student has all of the teacher's tokens.
        vocab_size: Number of the teacher's token ids.
        tokens: Read for this row.

    Raises:
        ModelError: no distribution: a position without a finite log-probability.
        IntegrityError: the probabilities of a position sum up to more than 1.
    """
    places = np.flatnonzero(row.positions >= 0)
    log_probs = np.where(np.nan_to_num(told.log_probs_nK, nan=-np.inf) > FLOOR, told.log_probs_nK, -np.inf)
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, : max(told.asked, 1)]
    ids, log_probs = np.take_along_axis(told.ids_nK, order, 1), np.take_along_axis(log_probs, order, 1)
    if len(places) and (np.isnan(told.written_n).any() or not (log_probs[:, :1] > -np.inf).all()):
        raise ModelError(
            f"trace {row.key}: the server's log-probabilities are no distribution at a position (NaN). Does it compute in float16?"
        )
    probs = np.exp(log_probs)
    if (probs.sum(1) > 1 + _EXCESS).any() or (told.written_n > _EXCESS).any():
        worst = float(probs.sum(1).max(initial=0))
        raise IntegrityError(
            f"trace {row.key}: the server's probabilities of one position sum up to {worst:.6g}, more than 1. They are none of the "
            "model at temperature 1: look at the server's own settings (vLLM: --logprobs-mode raw_logprobs)."
        )
    rest_n = np.zeros(len(places)) if told.asked >= vocab_size else np.clip(1 - probs.sum(1), 0, 1)
    lost = (ids == NONE) & (log_probs > -np.inf)
    lost_n = np.where(lost, probs, 0).sum(1)
    kept = np.flatnonzero(1 - lost_n >= MIN_CARRIED)
    targets = _targets(target, ids[kept], log_probs[kept], rest_n[kept], told.written_n[kept])
    whole = spread(spread(targets, kept, len(places), target), places, len(row.positions), target)
    unseen = 0.0 if all_shared else float(rest_n.sum())
    profiled = (places + zlib.crc32(row.key.encode())) % PROFILED_EVERY == 0
    captured = np.minimum(np.cumsum(probs[profiled], 1), 1)
    sizes = [k for k in KS if k <= told.asked and k <= probs.shape[1]]
    statistics = Statistics(
        tokens=tokens,
        positions=len(row.positions),
        aligned=len(places),
        stored=int((whole.log_probs > -np.inf).any(1).sum()),
        carried=float(len(places)) if all_shared else float((1 - lost_n).sum()) - unseen,
        unseen=unseen,
        profiled=int(profiled.sum()) if sizes else 0,
        profile=[float(captured[:, k - 1].sum()) for k in sizes],
    )
    return ScoredRow(row.key, whole, statistics)


def _targets(target: TargetSpec, ids: NDArray[np.int32], log_probs: Doubles, rest_n: Doubles, written_n: Doubles) -> Targets:
    if isinstance(target, ChosenToken):
        written = np.where(written_n > FLOOR, np.minimum(written_n, 0), -np.inf).astype(np.float32)[:, None]
        return Targets(np.empty((len(written), 0), np.int32), written, log_one_minus_exp(written[:, 0]))
    assert isinstance(target, TopK)
    keep = log_probs > -np.inf
    keep[:, target.k :] = False
    if target.min_probability:
        keep[:, 1:] &= log_probs[:, 1:] >= np.log(target.min_probability)
    rest_n = rest_n + np.where(keep, 0, np.exp(log_probs)).sum(1)
    with np.errstate(divide="ignore"):
        log_rest = np.minimum(np.log(rest_n), 0).astype(np.float32)
    most = int(keep.sum(1).max(initial=0))
    lost = (keep & (ids == NONE))[:, :most]
    found = Targets(
        np.where(keep, ids, NONE)[:, :most].astype(np.int32),
        np.where(keep, np.minimum(log_probs, 0), -np.inf)[:, :most].astype(np.float32),
        log_rest,
    )
    return without(found, lost) if lost.any() else found
