"""Answers marked right, wrong or not judged, as shares of right ones: once with every unjudged answer wrong, once with every one right.

A prompt of which some answers could not be judged stays: leaving it out would favour the model that is unjudged where it is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

OF_THE_PROMPT = frozenset(
    {
        "no_choices",
        "no_context",
        "no_reference",
        "no_schema",
        "no_tests",
        "prompt_unsure",
        "reference_is_no_call",
        "reference_is_no_choice",
        "reference_is_no_json",
        "reference_is_no_number",
        "schema_is_wrong",
        "schema_not_resolved",
        "tests_unreadable",
        "tools_not_readable",
    }
)
"""Reasons of checks by which a prompt can't be judged, whatever is answered. Any other leaves open what one answer is."""


class Marks(NamedTuple):
    """Right and unjudged answers of models to prompts, counted, int64 `(R, P)`: of prompts that can be judged, if any answer was."""

    prompts: list[str]
    right_RP: NDArray[np.int64]
    unjudged_RP: NDArray[np.int64]
    total_RP: NDArray[np.int64]
    """Answers."""

    @property
    def least_RP(self) -> NDArray[np.float64]:
        """Shares of right answers where unjudged ones are wrong."""
        return self.right_RP / self.total_RP

    @property
    def most_RP(self) -> NDArray[np.float64]:
        """The same where they are right; true values lie between the two."""
        return (self.right_RP + self.unjudged_RP) / self.total_RP


def marks_of(answers: Iterable[dict[str, Any]], roles: Sequence[str]) -> Marks:
    """The marks of answers by model and prompt.

    Args:
        answers: Rows of the table `answers`.
        roles: Models, in the order of the rows.
    """
    places = {role: place for place, role in enumerate(roles)}
    counts: dict[str, NDArray[np.int64]] = defaultdict(lambda: np.zeros((3, len(roles)), np.int64))
    open_prompts: set[str] = set()
    for answer in answers:
        here = counts[answer["prompt_id"]][:, places[answer["model_role"]]]
        here += (answer["correct"] is True, answer["correct"] is None, True)
        if answer["correct"] is not None or answer["reason"].rpartition(":")[2] not in OF_THE_PROMPT:
            open_prompts.add(answer["prompt_id"])
    is_any_judged = any(found[1].sum() < found[2].sum() for found in counts.values())
    judged = {prompt: found for prompt, found in counts.items() if is_any_judged and prompt in open_prompts}
    stacked = np.array(list(judged.values()), np.int64).reshape(len(judged), 3, len(roles)).transpose(1, 2, 0)
    return Marks(list(judged), *stacked)


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
