"""Answers from a closed set of labels: how often each was given for each, and precision, recall and F1 from that.

Macro-F1 is the mean of the F1 of all labels that are right somewhere in the set; a label that is only named in answers lowers the precision
of none of them, but its answers are missing in the recall of the right one. An answer that names no label, or several, names none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.measure.intervals import Estimate, interval_of, resamples


class OfLabel(NamedTuple):
    """How well a label is found. Null where nothing says."""

    label: str
    precision: float | None
    recall: float | None
    f1: float
    answers: int
    """Answers to prompts of which it is the right one."""


def confusion(answers: Iterable[dict[str, Any]], right: Mapping[str, str], labels: Sequence[str]) -> NDArray[np.int64]:
    """How often each label (a row) was answered by each (a column, the last for none), int64 `(L, L + 1)`.

    Args:
        answers: Rows of the table `answers`, of one model.
        right: Prompt and its right label; answers to others are passed over.
        labels: In the order of rows and columns.
    """
    places = {label: place for place, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), np.int64)
    for answer in answers:
        if answer["prompt_id"] in right:
            counts[places[right[answer["prompt_id"]]], places.get(answer["final"], -1)] += 1
    return counts


def of_labels(counts_LL: NDArray[np.int64], labels: Sequence[str]) -> list[OfLabel]:
    """Precision, recall and F1 of each label that is the right one somewhere.

    Args:
        counts_LL: As `confusion` gives them.
        labels: Of its rows.
    """
    hits, wanted, named = np.diag(counts_LL), counts_LL.sum(axis=1), counts_LL[:, :-1].sum(axis=0)
    return [
        OfLabel(label, hit / name if name else None, hit / want, float(2 * hit / (name + want)), want)
        for label, hit, want, name in zip(labels, hits.tolist(), wanted.tolist(), named.tolist(), strict=True)
        if want
    ]


def macro_f1(
    answers: Sequence[dict[str, Any]], right: Mapping[str, str], labels: Sequence[str], prompts: Sequence[str], seed: int, confidence: float
) -> Estimate:
    """Mean F1 of the labels that are right somewhere, of one model, with its interval by the bootstrap over prompts.

    Args:
        answers: Rows of the table `answers`, of one model.
        right: Prompt and its right label.
        labels: All there are.
        prompts: That are drawn from; those without a right label tell nothing.
        seed: Of the resampling, as for all models.
        confidence: Coverage.
    """
    wanted = [label for label in labels if label in set(right.values())]
    places, rows = {label: place for place, label in enumerate(wanted)}, {prompt: row for row, prompt in enumerate(prompts)}
    hits_PL, sums_PL = (np.zeros((len(prompts), len(wanted)), np.float32) for _ in range(2))
    for answer in answers:
        row, label = rows.get(answer["prompt_id"]), right.get(answer["prompt_id"])
        if row is None or label is None:
            continue
        named = places.get(answer["final"], -1)
        sums_PL[row, places[label]] += 1
        if named >= 0:
            sums_PL[row, named] += 1
            hits_PL[row, named] += named == places[label]
    draws = [_mean_f1(counts.astype(np.float32) @ hits_PL, counts.astype(np.float32) @ sums_PL) for counts in resamples(len(prompts), seed)]
    [value] = _mean_f1(hits_PL.sum(axis=0)[None], sums_PL.sum(axis=0)[None])
    return interval_of(float(value), np.concatenate(draws), confidence)


def _mean_f1(hits_BL: NDArray[np.float32], sums_BL: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean over labels; a label that a resample has nowhere is left out of its mean."""
    is_there = sums_BL > 0
    f1_BL = np.divide(2.0 * hits_BL, sums_BL, out=np.zeros(sums_BL.shape, np.float64), where=is_there)
    return np.asarray(f1_BL.sum(axis=1) / np.maximum(is_there.sum(axis=1), 1))
