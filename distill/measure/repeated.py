"""What several answers to one prompt say: whether one of k is right, and whether the commonest is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray


def useful_k(samples: int) -> list[int]:
    """The k of which pass@k is told for so many samples: powers of two, and all. pass@1 is the accuracy."""
    powers = [2**power for power in range(1, samples.bit_length()) if 2**power < samples]
    return [*powers, samples] if samples > 1 else []


def pass_at(k: int, right_RP: NDArray[np.int64], samples: int) -> NDArray[np.float64]:
    """For each prompt the share of draws of k among its samples that hold a right one: 1 - C(n - c, k) / C(n, k), unbiased for pass@k.

    Args:
        k: At most `samples`.
        right_RP: Right answers of each prompt, c.
        samples: Answers of each prompt, n.

    Source: Chen et al., Evaluating Large Language Models Trained on Code, 2021, equation 1.
    """
    of_count = np.array([1 - comb(samples - right, k) / comb(samples, k) for right in range(samples + 1)])
    return np.asarray(of_count[right_RP], np.float64)


def vote(answers: Sequence[tuple[str | None, bool]]) -> float:
    """How far the commonest final answer of a prompt is right, 0 to 1; of equally common ones the mean, as if one were drawn.

    Args:
        answers: The final answer of each sample, null where there is none, and whether the sample is right. One without a final
            answer has no vote; without any vote nothing is right. A final answer is as right as its samples are on average.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for final, right in answers:
        if final is not None:
            groups[final].append(right)
    most = max(map(len, groups.values()), default=0)
    return float(np.mean([np.mean(rights) for rights in groups.values() if len(rights) == most])) if groups else 0.0


def votes_of(answers: Iterable[dict[str, Any]], roles: Sequence[str], prompts: Sequence[str]) -> NDArray[np.float64] | None:
    """What `vote` says of each model and prompt, `(R, P)`; null where no answer has a final part to vote with.

    Args:
        answers: Rows of the table `answers`.
        roles: Models, in the order of the rows.
        prompts: In the order of the columns; others are passed over.
    """
    by_prompt: dict[tuple[str, str], list[tuple[str | None, bool]]] = defaultdict(list)
    for answer in answers:
        by_prompt[answer["model_role"], answer["prompt_id"]].append((answer["final"], answer["correct"] is True))
    if all(final is None for given in by_prompt.values() for final, _ in given):
        return None
    return np.array([[vote(by_prompt[role, prompt]) for prompt in prompts] for role in roles])
