"""Students of several runs on the held-out prompts that all of them answered: each one's accuracy, and the best one's lead over the others.

All are resampled on the same prompts. The best is found by looking at all, so that the lead over one of them is called beyond the noise
only where its p-value holds for as many comparisons as are made (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill.measure.intervals import Estimate, interval_of, mean_interval, resampled_means, sign_flip_p


class Lead(NamedTuple):
    """How much better one is than another."""

    better: str
    other: str
    difference: Estimate
    by_chance: float
    """How often chance alone gives a difference as large, of this pair."""
    is_beyond_noise: bool
    """Whether the interval leaves zero out, and chance is unlikely enough for one of so many comparisons."""


class Between(NamedTuple):
    """Several on the same prompts."""

    num_prompts: int
    confidence: float
    accuracies: dict[str, Estimate]
    leads: list[Lead]
    """Of the best, over each of the others."""


def between(right: Mapping[str, Mapping[str, float]], prompts: Sequence[str], confidence: float, seed: int = 0) -> Between:
    """Compares them on prompts that all have.

    Args:
        right: By name, each one's share of right answers to its prompts.
        prompts: That all have; at least one.
        confidence: Coverage of the intervals.
        seed: Of the resampling.
    """
    names = list(right)
    values_RP = np.array([[right[name][prompt] for prompt in prompts] for name in names])
    draws_RB = resampled_means(values_RP, seed)
    accuracies = {name: mean_interval(values_RP[row], draws_RB[row], confidence) for row, name in enumerate(names)}
    best = int(values_RP.mean(axis=1).argmax())
    leads = []
    for row, name in enumerate(names):
        if row == best:
            continue
        difference = interval_of(float((values_RP[best] - values_RP[row]).mean()), draws_RB[best] - draws_RB[row], confidence)
        chance = sign_flip_p(values_RP[best] - values_RP[row], seed)
        beyond = difference.is_beyond_noise and chance <= (1 - confidence) / (len(names) - 1)
        leads.append(Lead(names[best], name, difference, chance, beyond))
    return Between(len(prompts), confidence, accuracies, leads)
