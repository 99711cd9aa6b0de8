"""Answers marked right, wrong or not judged, as shares of right ones: once with every unjudged answer wrong, once with every one right.

A prompt of which some answers could not be judged stays: leaving it out would favour the model that is unjudged where it is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np


class Shares(NamedTuple):
    """Shares of right answers, float64 `(R, P)`; true values lie between the two."""

    least_RP: np.ndarray
    """Where unjudged answers are wrong."""
    most_RP: np.ndarray
    """Where they are right."""

    @property
    def num_prompts(self) -> int:
        """Prompts of which at least one answer was judged."""
        return int(self.least_RP.shape[1])


def shares(answers: Iterable[dict[str, Any]], roles: Sequence[str]) -> Shares:
    """Shares of right answers by model and prompt.

    Args:
        answers: Rows of the table `answers`.
        roles: Models, in the order of the rows.
    """
    by_prompt: dict[str, dict[str, list[bool | None]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        by_prompt[answer["prompt_id"]][answer["model_role"]].append(answer["correct"])
    judged = [marks for marks in by_prompt.values() if any(mark is not None for role in roles for mark in marks[role])]
    least, most = (
        np.array([[np.mean([mark in counted for mark in marks[role]]) for marks in judged] for role in roles], dtype=np.float64)
        for counted in ((True,), (True, None))
    )
    return Shares(least.reshape(len(roles), len(judged)), most.reshape(len(roles), len(judged)))


def in_doubt(bounds: dict[str, tuple[float, float]]) -> list[tuple[str, str]]:
    """Pairs of models of which unjudged answers could change which is better.

    Args:
        bounds: By model its least and its greatest share of right answers.
    """
    pairs = []
    for one, other in combinations(bounds, 2):
        worse, better = sorted((one, other), key=lambda role: (bounds[role][0], -bounds[role][1]))
        is_open = bounds[worse] != bounds[better] and bounds[worse][1] >= bounds[better][0] and bounds[worse][1] > bounds[worse][0]
        if is_open:
            pairs.append((worse, better))
    return pairs
