"""How alike models are to a teacher, by the answers that it wrote to held-out prompts: numbers a token, with intervals over prompts.

A number a token is a ratio of sums, so that long answers count by their tokens; prompts are drawn anew, with all that belongs to them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.measure.intervals import Estimate, gap_recovered, interval_of, resampled_means

Row = dict[str, Any]
DIVERGENCE, LEAST_DIVERGENCE = "kl_nats", "kl_nats_lower_bound"
"""Metrics: KL(teacher ‖ model) over the whole vocabulary, and over the teacher's candidates with one outcome for all others."""
_SUMS = ("num_tokens", "num_bytes", "log_prob", "predicted", "compared", "kl_nats", "agreed", "held")
_NOISE = 1e-3
"""Nats a token that 16-bit arithmetic alone can make of two equal models: of a base that is no farther away nothing can be recovered."""


def likeness_scores(rows: Iterable[Row], roles: Sequence[str], confidence: float, seed: int, *, exact: bool) -> list[Row]:
    """Rows of the table `scores`, without task and samples.

    Args:
        rows: Of the table `likeness`.
        roles: Models in them.
        confidence: Coverage of the intervals.
        seed: Of the resampling.
        exact: Whether the divergence is that over the whole vocabulary.
    """
    by_role: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_role[row["model_role"]].append(row)
    found: list[Row] = []
    draws: dict[str, tuple[float, NDArray[np.float64]]] = {}
    for role in roles:
        sums, num_prompts = _sums(by_role[role])
        if not num_prompts:
            continue
        means = dict(zip(_SUMS, resampled_means(np.stack([sums[name] for name in _SUMS]), seed), strict=True))
        for name, (value, values) in _ratios(sums, means, exact=exact).items():
            found.append(
                {"model_role": role, "metric": name, **interval_of(value, values, confidence)._asdict(), "num_prompts": num_prompts}
            )
            if name in (DIVERGENCE, LEAST_DIVERGENCE):
                draws[role] = value, values
    found += _texts(by_role, [role for role in roles if role != "teacher"], confidence, seed)
    if {"base", "student"} <= set(draws):
        recovered = _recovered(draws["base"], draws["student"], confidence)
        num_prompts = max(score["num_prompts"] for score in found)
        found.append({"model_role": "gap", "metric": "divergence_recovered", **recovered._asdict(), "num_prompts": num_prompts})
    return found


def lengths(answers: Sequence[Row], roles: Sequence[str]) -> list[Row]:
    """Rows of the table `scores` that need neither a right answer nor a reader.

    Args:
        answers: Of the table `answers`.
        roles: Models in them.
    """
    found = []
    for role in roles:
        mine = [answer for answer in answers if answer["model_role"] == role]
        known = [answer["num_tokens"] for answer in mine if answer["num_tokens"] is not None]
        rates = {
            "mean_tokens": float(np.mean(known)) if known else None,
            "truncation_rate": float(np.mean([row["truncated"] for row in mine])),
        }
        count = len({answer["prompt_id"] for answer in mine})
        found += [{"model_role": role, "metric": metric, "value": value, "num_prompts": count} for metric, value in rates.items()]
    return found


def _sums(rows: list[Row]) -> tuple[dict[str, NDArray[np.float64]], int]:
    """(P,) of each number, summed over the answers to a prompt that were read; and P."""
    places: dict[str, int] = {}
    for row in rows:
        if row["reason"] is None:
            places.setdefault(row["prompt_id"], len(places))
    sums = {name: np.zeros(len(places)) for name in _SUMS}
    for row in rows:
        for name in _SUMS if row["reason"] is None else ():
            sums[name][places[row["prompt_id"]]] += np.nan if row[name] is None else row[name]
    return sums, len(places)


Value = tuple[float, NDArray[np.float64]]
"""A value and its resampled ones."""


def _ratios(sums: dict[str, Any], means: dict[str, Any], *, exact: bool) -> dict[str, Value]:
    """What is told of a model by metric."""

    def a(name: str, each: str) -> Value:
        return float(sums[name].sum() / sums[each].sum()), means[name] / means[each]

    found: dict[str, Value] = {}
    surprise, draws = a("log_prob", "num_tokens")
    bits, bits_B = a("log_prob", "num_bytes")
    if sums["compared"].sum() and not np.isnan(sums["kl_nats"]).any():
        found[DIVERGENCE if exact else LEAST_DIVERGENCE] = a("kl_nats", "compared")
        found["top1_agreement"] = a("agreed", "compared")
        found["compared_share"], found["held_share"] = a("compared", "num_tokens"), a("held", "compared")
    else:
        found["top1_of_written"] = a("predicted", "num_tokens")
    found["perplexity"] = float(np.exp(-surprise)), np.exp(-draws)
    found["bits_per_byte"] = -bits / float(np.log(2)), -bits_B / np.log(2)
    return found


def _texts(by_role: dict[str, list[Row]], roles: list[str], confidence: float, seed: int) -> list[Row]:
    """chrF, averaged over the answers to a prompt and over the prompts that all models answered."""
    scores: dict[str, dict[str, list[float]]] = {role: defaultdict(list) for role in roles}
    for role in roles:
        for row in by_role[role]:
            if row["chrf"] is not None:
                scores[role][row["prompt_id"]].append(row["chrf"])
    answered = [prompt for prompt in dict.fromkeys(row["prompt_id"] for rows in by_role.values() for row in rows)]
    answered = [prompt for prompt in answered if all(prompt in scores[role] for role in roles)]
    if not answered or not roles:
        return []
    values_RP = np.array([[np.mean(scores[role][prompt]) for prompt in answered] for role in roles])
    return [
        {
            "model_role": role,
            "metric": "chrf",
            **interval_of(float(values.mean()), draws, confidence)._asdict(),
            "num_prompts": len(answered),
        }
        for role, values, draws in zip(roles, values_RP, resampled_means(values_RP, seed), strict=True)
    ]


def _recovered(base: Value, student: Value, confidence: float) -> Estimate:
    """Share of the base's divergence from the teacher that is gone; not defined where the base's can't be told from none."""
    if np.quantile(base[1], (1 - confidence) / 2) < _NOISE:
        return Estimate(None, None, None)
    draws_RB = np.stack([-base[1], -student[1], np.zeros_like(base[1])])
    return gap_recovered((-base[0], -student[0], 0.0), draws_RB, confidence)
