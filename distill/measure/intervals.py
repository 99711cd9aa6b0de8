"""Intervals by the paired bootstrap over prompts: prompts are drawn anew, and every model is scored on the same ones.

Resampling prompts, not answers, keeps the answers of a prompt together and the models paired, so that what is hard for
one and hard for the other cancels in a difference (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 8).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A value and its interval; all null where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def resampled_means(values_RP: np.ndarray, seed: int) -> np.ndarray:
    """Means over resampled prompts, float64 `(R, RESAMPLES)`.

    Args:
        values_RP: A row a model, a column a prompt; the same prompts for all.
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    num_prompts = values_RP.shape[1]
    # Counts of each prompt in each resample, in slices that stay small for thousands of prompts.
    slices = [rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=500) for _ in range(RESAMPLES // 500)]
    return np.asarray(np.concatenate([values_RP @ counts.T for counts in slices], axis=1) / num_prompts)


def mean_interval(values_P: np.ndarray, draws: np.ndarray, confidence: float) -> Estimate:
    """Mean over prompts, with the central interval of its resampled means."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values_P.mean()), float(low), float(high))


def gap_recovered(means: tuple[float, float, float], draws_RB: np.ndarray, confidence: float) -> Estimate:
    """Share of the gap between base and teacher that the student closed: (student - base) / (teacher - base).

    Not defined where the teacher is no better than the base; without interval where that is so in more resamples than
    the interval leaves out on one side.

    Args:
        means: Accuracies of base, student and teacher.
        draws_RB: Their resampled means, in this order.
        confidence: Coverage.
    """
    base, student, teacher = means
    if teacher <= base:
        return Estimate(None, None, None)
    value = (student - base) / (teacher - base)
    gap_B = draws_RB[2] - draws_RB[0]
    if np.mean(gap_B <= 0) > (1 - confidence) / 2:
        return Estimate(value, None, None)
    usable = gap_B > 0
    ratios = (draws_RB[1] - draws_RB[0])[usable] / gap_B[usable]
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))
