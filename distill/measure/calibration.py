"""Whether a model is right as often as it is sure: expected calibration error over bins with as many answers each.

After Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599), with bins of equal mass in place of equal width, which
would leave most of them empty. The error of few answers is too large, because it adds up what chance does in each bin.

Resamples add chance to chance, so their own errors are too large twice over, and their quantiles often leave the error itself out. The
interval is the basic one (Davison and Hinkley, Bootstrap Methods and their Application, section 5.2), which turns that bias round, widened
to hold the error; it begins at 0 where chance alone may have made an error so large of a model that is right as often as it is sure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.measure.intervals import Estimate, resampled_means

BINS = 10
Numbers = NDArray[np.float64]
Row = dict[str, Any]


class Bin(NamedTuple):
    """Answers of which a model is about equally sure."""

    sure: float
    """Mean of the probabilities it gave them."""
    right: float
    """Share of right ones."""
    answers: int


class Calibration(NamedTuple):
    """What sureness is worth."""

    error: Estimate
    """Mean distance of the two over answers."""
    bins: list[Bin]
    """From the least sure to the surest; fewer than `BINS` where many answers are equally sure."""


def calibration(sure_N: Numbers, right_N: Numbers, prompts: Sequence[str], confidence: float, seed: int) -> Calibration:
    """How far sureness and being right are apart, with an interval over prompts whose bins are those of all.

    Args:
        sure_N: Probability that the model gave each of its answers.
        right_N: 1 for a right one, 0 for a wrong one.
        prompts: Which prompt each answers.
        confidence: Coverage.
        seed: Of the resampling.
    """
    place_N = _bins(sure_N)
    _, prompt_N = np.unique(np.asarray(prompts), return_inverse=True)
    number, num_prompts = int(place_N.max()) + 1, int(prompt_N.max()) + 1
    apart_QP, answers_P = np.zeros((number, num_prompts)), np.bincount(prompt_N, minlength=num_prompts).astype(np.float64)
    np.add.at(apart_QP, (place_N, prompt_N), right_N - sure_N)
    apart_Q = apart_QP.sum(1) / len(sure_N)
    draws_QB = resampled_means(apart_QP, seed) / resampled_means(answers_P[None], seed)[0]
    error = _interval(apart_Q, draws_QB, confidence)
    members = [place_N == place for place in range(number)]
    bins = [Bin(float(sure_N[own].mean()), float(right_N[own].mean()), int(own.sum())) for own in members]
    return Calibration(error, bins)


def _interval(apart_Q: Numbers, draws_QB: Numbers, confidence: float) -> Estimate:
    """The error and its interval.

    Args:
        apart_Q: By bin how far its answers are apart in sum, over the number of all answers.
        draws_QB: What that came to in resamples.
        confidence: Coverage.
    """
    value = float(np.abs(apart_Q).sum())
    least, most = np.quantile(np.abs(draws_QB).sum(0), [(1 - confidence) / 2, (1 + confidence) / 2])
    by_chance = np.quantile(np.abs(draws_QB - apart_Q[:, None]).sum(0), (1 + confidence) / 2)
    low = 0.0 if value <= by_chance else min(value, max(0.0, 2 * value - float(most)))
    return Estimate(value, low, max(value, 2 * value - float(least)))


def _bins(sure_N: Numbers) -> NDArray[np.int64]:
    """(N,) number of the bin of each, from 0 without gaps; equal values share one."""
    edges = np.quantile(sure_N, np.arange(1, BINS) / BINS)
    _, places = np.unique(np.searchsorted(edges, sure_N, side="right"), return_inverse=True)
    return np.asarray(places, np.int64)


def calibration_scores(
    certainty: Iterable[dict[str, Any]],
    answers: Iterable[dict[str, Any]],
    roles: Sequence[str],
    *,
    of_label: bool,
    confidence: float,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, list[Bin]]]:
    """Rows of the table `scores`, without task and samples, and by model the bins.

    Args:
        certainty: Of the table `certainty`.
        answers: Of the table `answers`: those that were not judged are left out.
        roles: Models in them.
        of_label: Whether an answer is one of a closed set: its probability is then that of all its tokens together, else the geometric
            mean of a token, which does not shrink with its length.
        confidence: Coverage of the intervals.
        seed: Of the resampling.
    """
    right = {(row["model_role"], row["prompt_id"], row["sample_index"]): row["correct"] for row in answers}
    by_role: dict[str, list[tuple[float, float, str]]] = {role: [] for role in roles}
    for row in certainty:
        correct = right.get((row["model_role"], row["prompt_id"], row["sample_index"]))
        if row["log_prob"] is not None and correct is not None:
            sure = math.exp(row["log_prob"] / (1 if of_label else row["num_tokens"]))
            by_role[row["model_role"]].append((sure, float(correct), row["prompt_id"]))
    scores, bins = [], {}
    for role, rows in by_role.items():
        if rows:
            sure_N, right_N = (np.array([row[place] for row in rows]) for place in (0, 1))
            found = calibration(sure_N, right_N, [prompt for _, _, prompt in rows], confidence, seed)
            count = {"num_prompts": len({prompt for _, _, prompt in rows})}
            scores.append({"model_role": role, "metric": "calibration_error", **found.error._asdict(), **count})
            bins[role] = found.bins
    return scores, bins
