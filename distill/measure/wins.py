"""How often one model's answers are preferred to another's: over prompts, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.measure.intervals import mean_interval, resampled_means

TIE = "tie"


def win_rate(pairs: Sequence[dict[str, Any]], seed: int, confidence: float) -> dict[str, Any] | None:
    """A row of the table `wins`: the share of prompts that are won, a tie counted as half; null where no pair could be judged.

    Pairs of one prompt count as one, by their mean, so that prompts are what is drawn anew. What could not be judged is left out, and
    its share stands beside.

    Args:
        pairs: Rows of the table `preferences`, all of the same two models.
        seed: Of the resampling.
        confidence: Coverage.
    """
    points: dict[str, list[float]] = {}
    for pair in pairs:
        if pair["winner"] is not None:
            points.setdefault(pair["prompt_id"], []).append({pair["model_role"]: 1.0, TIE: 0.5}.get(pair["winner"], 0.0))
    if not points:
        return None
    values_P = np.array([np.mean(of_prompt) for of_prompt in points.values()])
    estimate = mean_interval(values_P, resampled_means(values_P[None], seed)[0], confidence)
    judged = sum(map(len, points.values()))
    ties = sum(pair["winner"] == TIE for pair in pairs)
    return {
        "model_role": pairs[0]["model_role"],
        "against": pairs[0]["against"],
        **estimate._asdict(),
        "num_prompts": len(points),
        "tie_rate": ties / judged,
        "unjudged_rate": 1 - judged / len(pairs),
    }
