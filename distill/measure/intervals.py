"""Intervals by the paired bootstrap: prompts are drawn anew, each with all its samples, and every model is scored on the same ones.

Prompts and samples are both chance. A prompt's own mean differs from its neighbour's by what was asked *and* by what was drawn, so drawing
prompts with their samples as they are has the noise of both in it. To draw samples once more inside a drawn prompt counts theirs twice
(Davison and Hinkley, Bootstrap Methods and their Application, section 3.8: with replacement outside, without inside), and ruins pass@k:
a second draw of samples holds copies, so that it finds fewer right answers than there were, and its interval lies below the estimate.

Keeping the models paired cancels in a difference what is hard for one and hard for the other (Efron and Tibshirani, An Introduction to the
Bootstrap, chapter 8).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples that are in memory
_FEW = 12  # pairs of which all signs are tried


class Estimate(NamedTuple):
    """A value and its interval; all null where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def is_beyond_noise(self) -> bool:
        """Whether a difference has an interval without zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def resamples(num_prompts: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each prompt is in each of some resamples, `(B, P)`, until there were `RESAMPLES` of them.

    Args:
        num_prompts: Prompts that are drawn from.
        seed: Of the drawing; by the same one they are the same.
    """
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES // _AT_ONCE):
        yield rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=_AT_ONCE)


def resampled_means(values_RP: np.ndarray, seed: int) -> np.ndarray:
    """Means over resampled prompts, float64 `(R, RESAMPLES)`.

    Args:
        values_RP: A row a model or a measure, a column a prompt; the same prompts for all.
        seed: Of the resampling.
    """
    num_prompts = values_RP.shape[1]
    return np.asarray(np.concatenate([values_RP @ counts.T for counts in resamples(num_prompts, seed)], axis=1) / num_prompts)


def mean_interval(values_P: np.ndarray, draws: np.ndarray, confidence: float) -> Estimate:
    """Mean over prompts, with the central interval of its resampled means."""
    return interval_of(float(values_P.mean()), draws, confidence)


def interval_of(value: float, draws: np.ndarray, confidence: float) -> Estimate:
    """A value with the central interval of what it came to in resamples."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def sign_flip_p(differences_P: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the mean of differences of pairs, if which of the two came first were chance.

    The bootstrap knows nothing that was not drawn: of three prompts of which three are won, every resample says the same. What the signs
    could have been by chance still says that this is nothing (Efron and Tibshirani, chapter 15). All of them are looked at where they are
    few, else `RESAMPLES` drawn ones, which can't fall under 1/(RESAMPLES + 1).

    Args:
        differences_P: A prompt each.
        seed: Of the drawing.
    """
    moved = np.abs(differences_P[differences_P != 0.0])
    if not len(moved):
        return 1.0
    seen, least = abs(float(differences_P.sum())), 1e-9  # sums in another order differ by that much
    if len(moved) <= _FEW:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float(np.mean(np.abs(signs @ moved) >= seen - least))
    rng = np.random.default_rng(seed)
    as_far = sum(
        int((np.abs((1 - 2 * rng.integers(0, 2, (_AT_ONCE, len(moved)), np.int8)) @ moved) >= seen - least).sum())
        for _ in range(RESAMPLES // _AT_ONCE)
    )
    return (as_far + 1) / (RESAMPLES + 1)


def gap_recovered(means: tuple[float, float, float], draws_RB: np.ndarray, confidence: float) -> Estimate:
    """Share of the gap between base and teacher that the student closed: (student - base) / (teacher - base).

    Not defined where the interval of teacher - base holds zero, or the teacher is worse: a share of what may be nothing says nothing.

    Args:
        means: Accuracies of base, student and teacher.
        draws_RB: Their resampled means, in this order.
        confidence: Coverage.
    """
    base, student, teacher = means
    gap_B = draws_RB[2] - draws_RB[0]
    lead = interval_of(teacher - base, gap_B, confidence)
    if lead.low is None or lead.low <= 0:
        return Estimate(None, None, None)
    usable = gap_B > 0  # all but fewer than the interval leaves out on one side
    return interval_of((student - base) / (teacher - base), (draws_RB[1] - draws_RB[0])[usable] / gap_B[usable], confidence)
