"""Whose traces suit a student: the Rank-Surprisal Ratio of teachers, with intervals. Knows no models, only what one made of traces.

Of many traces the ratio is that of two means: of the traces' mean ranks, and of their mean surprisals, so that a long trace counts as much
as a short one and none whose surprisal is almost nothing decides alone. So the authors of the ratio compare teachers (arXiv 2601.14249,
appendix A.8; `compute_sample_metrics` in github.com/UmeanNever/RankSurprisalRatio).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.measure.intervals import Estimate, interval_of, resampled_means

CONFIDENCE = 0.95

Means = dict[str, tuple[float, float]]
"""Of a prompt the mean rank and the mean surprisal of the tokens of a teacher's trace."""


class Suited(NamedTuple):
    """How a teacher's traces suit."""

    rank: float
    """Mean over traces of the mean rank of their tokens."""
    surprisal: float
    """The same of their surprisal, in nats."""
    ratio: Estimate
    """The one over the other: lower suits better."""
    above_lowest: Estimate | None
    """How much it is above the lowest, on the prompts that both answered; null of that one, and where they have less than two in common."""


def compare(teachers: Sequence[Means], seed: int) -> list[Suited]:
    """Each teacher by itself and against the one with the lowest ratio, over resampled prompts.

    Args:
        teachers: At least one trace each.
        seed: Of the resampling.
    """
    ratios = [_ratio([means], sorted(means), seed) for means in teachers]
    best = min(range(len(teachers)), key=lambda number: ratios[number].value or 0.0)
    found = []
    for number, (means, ratio) in enumerate(zip(teachers, ratios, strict=True)):
        shared = sorted(means.keys() & teachers[best].keys()) if number != best else []
        above = _ratio([means, teachers[best]], shared, seed) if len(shared) > 1 else None
        rank, surprisal = np.mean(list(means.values()), axis=0).tolist()
        found.append(Suited(rank, surprisal, ratio, above))
    return found


def _ratio(teachers: Sequence[Means], prompts: Sequence[str], seed: int) -> Estimate:
    """The ratio of one teacher, or how much that of the first is above that of the second, on the same prompts."""
    values_RP = np.array([[means[prompt][column] for prompt in prompts] for means in teachers for column in (0, 1)])
    value, draws_B = (_difference(values) for values in (values_RP.mean(1, keepdims=True), resampled_means(values_RP, seed)))
    return interval_of(float(value[0]), draws_B, CONFIDENCE)


def _difference(means_RB: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        ratios = means_RB[0::2] / means_RB[1::2]
    difference: NDArray[np.float64] = ratios[0] - ratios[1] if len(ratios) > 1 else ratios[0]
    return difference


def sentences(names: Sequence[str], found: Sequence[Suited]) -> list[str]:
    """What the numbers say of teachers, in words.

    Args:
        names: Of the teachers.
        found: Of them, in that order.
    """
    lowest = min(range(len(found)), key=lambda number: found[number].ratio.value or 0.0)
    said = [f"Lowest, so best suited by this measure: {names[lowest]}."] if len(found) > 1 else []
    for number, (name, one) in enumerate(zip(names, found, strict=True)):
        if number == lowest:
            continue
        if one.above_lowest is None:
            said.append(f"{name} has no two prompts in common with it: compare the intervals.")
        elif one.above_lowest.is_beyond_noise:
            said.append(f"{name} is above it by {one.above_lowest.low:.3f} to {one.above_lowest.high:.3f} on the same prompts.")
        else:
            said.append(f"{name} can't be told from it on these prompts; look at more of them (--prompts).")
    return said
