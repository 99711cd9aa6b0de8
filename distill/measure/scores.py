"""What the answers to a held-out set come to, as rows of the table `scores`: of the whole set, and of its tags.

Everything with an interval is resampled together, so that all models and measures of a set have the same draws of its prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.measure.intervals import Estimate, gap_recovered, interval_of, mean_interval, resampled_means, sign_flip_p
from distill.measure.labels import macro_f1
from distill.measure.marks import Marks, marks_of
from distill.measure.repeated import pass_at, useful_k, votes_of

Row = dict[str, Any]
PAIRS = (("student", "base"), ("teacher", "student"), ("teacher", "base"))
"""Of which the difference is told, the first less the second."""
DIFFERENCE = "accuracy_difference"
P_VALUE = "accuracy_difference_p"
"""Of a difference: how often chance alone gives one as large, where both were alike."""
MOST_TAGS = 100
"""Tags that have scores of their own: the commonest."""


class Measured(NamedTuple):
    """What answers to a set are measured by."""

    name: str
    """Of the set."""
    models: Sequence[str]
    samples_per_prompt: int
    confidence: float
    seed: int
    """Of the resampling."""
    labels: Sequence[str] = ()
    """The closed set that all prompts have; none where there is none."""
    right: Mapping[str, str] = {}
    """Prompt and its right label."""


def scores_of(answers: Sequence[Row], asked: Measured) -> list[Row]:
    """Rows of the table `scores`; none where no answer could be judged.

    Args:
        answers: Rows of the table `answers`, of this set.
        asked: What they are measured by.
    """
    marks = marks_of(answers, asked.models)
    if not marks.prompts:
        return []
    rows = [*_with_intervals(answers, marks, asked), *_plain(answers, marks, asked), *_by_tag(answers, marks, asked)]
    same = {"set": asked.name, "samples_per_prompt": asked.samples_per_prompt}
    return [same | row for row in rows]


def _with_intervals(answers: Sequence[Row], marks: Marks, asked: Measured) -> Iterator[Row]:
    """Accuracy, what several samples say, differences, and the gap recovered."""
    num_prompts, samples = len(marks.prompts), asked.samples_per_prompt
    measures = {"accuracy": marks.least_RP}
    if samples > 1:
        measures |= {f"pass@{k}": pass_at(k, marks.right_RP, samples) for k in useful_k(samples)}
        votes = votes_of(answers, asked.models, marks.prompts)
        measures |= {} if votes is None else {f"maj@{samples}": votes}
    draws_MRB = resampled_means(np.concatenate(list(measures.values())), asked.seed).reshape(len(measures), len(asked.models), -1)
    for (metric, values_RP), draws_RB in zip(measures.items(), draws_MRB, strict=True):
        for role, values_P, draws_B in zip(asked.models, values_RP, draws_RB, strict=True):
            yield _row(role, metric, mean_interval(values_P, draws_B, asked.confidence), num_prompts)
    means, draws_RB = dict(zip(asked.models, marks.least_RP.mean(axis=1).tolist(), strict=True)), draws_MRB[0]
    place = {role: number for number, role in enumerate(asked.models)}
    by_chance: dict[tuple[str, str], float] = {}
    for one, other in PAIRS:
        if one in place and other in place:
            draws_B = draws_RB[place[one]] - draws_RB[place[other]]
            yield _row(f"{one}-{other}", DIFFERENCE, interval_of(means[one] - means[other], draws_B, asked.confidence), num_prompts)
            by_chance[one, other] = sign_flip_p(marks.least_RP[place[one]] - marks.least_RP[place[other]], asked.seed)
            yield _row(f"{one}-{other}", P_VALUE, Estimate(by_chance[one, other], None, None), num_prompts)
    if len(place) == 3:
        in_order = draws_RB[[place[role] for role in ("base", "student", "teacher")]]
        gap = gap_recovered((means["base"], means["student"], means["teacher"]), in_order, asked.confidence)
        if by_chance["teacher", "base"] > 1 - asked.confidence:
            gap = Estimate(None, None, None)
        yield _row("gap", "gap_recovered", gap, num_prompts)


def _plain(answers: Sequence[Row], marks: Marks, asked: Measured) -> Iterator[Row]:
    """What has no interval, of all answers; and macro-F1."""
    for role, most_P in zip(asked.models, marks.most_RP, strict=True):
        mine = [answer for answer in answers if answer["model_role"] == role]
        known = [answer["num_tokens"] for answer in mine if answer["num_tokens"] is not None]
        formed = [answer["in_form"] for answer in mine if answer["in_form"] is not None]
        num_prompts = len({answer["prompt_id"] for answer in mine})
        rates = {
            "accuracy_if_unjudged_right": most_P.mean(),
            "mean_tokens": np.mean(known) if known else None,
            "truncation_rate": np.mean([answer["truncated"] for answer in mine]),
            "unjudged_rate": np.mean([answer["correct"] is None for answer in mine]),
        }
        rates |= {"format_rate": np.mean(formed)} if formed else {}
        for metric, value in rates.items():
            yield _row(role, metric, Estimate(None if value is None else float(value), None, None), num_prompts)
        if asked.right:
            found = macro_f1(mine, asked.right, asked.labels, list(asked.right), asked.seed, asked.confidence)
            yield _row(role, "macro_f1", found, len(asked.right))


def _by_tag(answers: Sequence[Row], marks: Marks, asked: Measured) -> Iterator[Row]:
    """The accuracy on the prompts of each tag."""
    tags = {answer["prompt_id"]: answer["tags"] or [] for answer in answers}
    counted = Counter(tag for prompt in marks.prompts for tag in dict.fromkeys(tags[prompt]))
    for tag, count in counted.most_common(MOST_TAGS):
        values_RP = marks.least_RP[:, [tag in tags[prompt] for prompt in marks.prompts]]
        draws_RB = resampled_means(values_RP, asked.seed)
        for role, values_P, draws_B in zip(asked.models, values_RP, draws_RB, strict=True):
            yield _row(role, "accuracy", mean_interval(values_P, draws_B, asked.confidence), count) | {"tag": tag}


def _row(role: str, metric: str, found: Estimate, num_prompts: int) -> Row:
    return {"model_role": role, "metric": metric, **found._asdict(), "num_prompts": num_prompts}
