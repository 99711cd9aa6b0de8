"""What lm-eval found as rows of a table, the student's difference from the base with its interval, and what was forgotten.

A metric that is the mean of its documents' values is compared document by document (paired bootstrap); any other by the standard errors
that lm-eval gives, as if the two models had been asked other questions, which makes the interval wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from distill.benchmarks.measuring import results_in, samples_in
from distill.measure.intervals import Estimate, mean_interval, resampled_means

Row = dict[str, Any]
DIFFERENCE = "student - base"
PAIRED, FROM_ERRORS = "paired bootstrap", "standard errors"
FORGOT, NO_LOSS, UNKNOWN = "forgot", "no loss beyond the noise", "not known"


class Metric(NamedTuple):
    """A number of a task: several filters of answers, and metrics, give several."""

    task: str
    """As lm-eval calls it: of a group also each task in it."""
    metric: str
    filter: str


class Found(NamedTuple):
    """What a model had."""

    value: float
    stderr: float | None
    values: dict[str, float] | None
    """By document, where their mean is the value."""
    row: Row


def rows_of(role: str, asked: str, folder: Path, scorer_version: str) -> Iterator[tuple[Metric, Found]]:
    """The numbers of one model on one task, group or tag.

    Args:
        role: The model's.
        asked: The recipe's name of the task.
        folder: With lm-eval's files.
        scorer_version: Of lm-eval.
    """
    found = results_in(folder)
    for task, numbers in found["results"].items():
        by_document = _by_document(folder, task, found)
        better = _flat(found.get("higher_is_better", {}).get(task))
        for name, value in numbers.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = numbers.get(f"{metric}_stderr,{kind}")
            values = by_document.get((metric, kind))
            documents = (found.get("n-samples", {}).get(task) or {}).get("effective") or numbers.get("sample_len")
            row = {
                "model_role": role,
                "asked": asked,
                "task": task,
                "metric": metric,
                "filter": kind,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                "num_documents": int(documents) if documents is not None else None,
                "num_fewshot": _whole(found.get("n-shot", {}).get(task)),
                "higher_is_better": better.get(metric),
                "task_version": _text(found.get("versions", {}).get(task)),
                "scorer": "lm-eval",
                "scorer_version": scorer_version,
            }
            is_mean = values is not None and math.isclose(float(np.mean(list(values.values()))), float(value), rel_tol=1e-9, abs_tol=1e-12)
            yield Metric(task, metric, kind), Found(float(value), row["stderr"], values if is_mean else None, row)


def differences(base: Mapping[Metric, Found], student: Mapping[Metric, Found], seed: int, confidence: float) -> Iterator[Row]:
    """Rows of the student's differences from the base.

    Args:
        base: What it had.
        student: What it had.
        seed: Of the resampling.
        confidence: Coverage of the intervals.
    """
    for metric in [metric for metric in student if metric in base]:
        before, after = base[metric], student[metric]
        estimate, method = _difference(before, after, seed, confidence)
        same = ("asked", "task", "metric", "filter", "num_fewshot", "higher_is_better", "task_version", "scorer", "scorer_version")
        counts = [found.row["num_documents"] for found in (before, after)]
        yield {
            "model_role": DIFFERENCE,
            **{key: after.row[key] for key in same},
            **estimate._asdict(),
            "num_documents": None if None in counts else min(counts),
            "interval_by": method,
        }


def forgetting(rows: Sequence[Row], tasks: Sequence[str]) -> list[Row]:
    """For each number of the tasks that must not have got worse, what the differences say in words.

    Args:
        rows: Of the table.
        tasks: By the recipe's names.
    """
    found = []
    for name in tasks:
        mine = [row for row in rows if row["asked"] == name and row["model_role"] == DIFFERENCE]
        # Of a group with a number of its own that one counts, not the many in it.
        own = [row for row in mine if row["task"] == name] or mine
        found += [{key: row[key] for key in ("asked", "task", "metric", "filter", "scorer")} | {"finding": _finding(row)} for row in own]
    return found


def _finding(row: Row) -> str:
    if row["higher_is_better"] is None or row["low"] is None:
        return UNKNOWN
    is_worse = row["high"] < 0 if row["higher_is_better"] else row["low"] > 0
    return FORGOT if is_worse else NO_LOSS


def _difference(before: Found, after: Found, seed: int, confidence: float) -> tuple[Estimate, str | None]:
    value = after.value - before.value
    if before.values is not None and after.values is not None and before.values.keys() == after.values.keys():
        names = sorted(before.values)
        values_RP = np.array([[found.values[name] for name in names] for found in (before, after) if found.values is not None])
        draws_RB = resampled_means(values_RP, seed)
        return mean_interval(values_RP[1] - values_RP[0], draws_RB[1] - draws_RB[0], confidence), PAIRED
    if before.stderr is None or after.stderr is None:
        return Estimate(value, None, None), None
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.hypot(before.stderr, after.stderr)
    return Estimate(value, value - reach, value + reach), FROM_ERRORS


def _by_document(folder: Path, task: str, found: Row) -> dict[tuple[str, str], dict[str, float]]:
    """The value of each document, by metric and filter; of a group those of all tasks in it."""
    leaves = _leaves(task, found)
    values: dict[tuple[str, str], dict[str, float]] = {}
    for leaf in leaves:
        for sample in samples_in(folder, leaf):
            for metric in sample["metrics"]:
                value = sample.get(metric)
                if isinstance(value, int | float):
                    values.setdefault((metric, sample["filter"]), {})[f"{leaf}/{sample['doc_id']}"] = float(value)
    return values


def _leaves(task: str, found: Row) -> list[str]:
    children = found.get("group_subtasks", {}).get(task)
    return [leaf for child in children for leaf in _leaves(child, found)] if children else [task]


def _flat(better: Any) -> dict[str, bool | None]:
    return better if isinstance(better, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _text(value: Any) -> str | None:
    return None if value is None or value == "Yaml" else str(value)
