"""How long a server will write for a whole run, and what that costs: a range, from the lengths of a few answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.servers import Price
from distill.run.log import duration_text

_MILLION = 1e6


class Job(NamedTuple):
    """What a stage asks of a server."""

    stage: str
    sampling: Sampling
    answers: int
    at_most: bool = False
    """Whether it may be fewer, or none."""


class Lengths(NamedTuple):
    """Tokens of an answer: as short as those that were seen, cut ones as they came; as long, cut ones at the recipe's limit."""

    low: float
    high: float


def jobs_of(recipe: Recipe, role: str, train: int, heldout: int, further: Mapping[str, int] | None = None) -> list[Job]:
    """What stages ask of the server of a role, which for the base is the student's.

    Args:
        recipe: The recipe.
        role: `teacher` or `student`.
        train: Prompts to train on.
        heldout: Held-out ones.
        further: Those of further held-out sets, by the set's name.
    """
    jobs = []
    if role == "teacher" and recipe.generate is not None:
        asked = recipe.generate
        jobs.append(Job("generate", asked, train * asked.samples_per_prompt))
        if asked.unsolved is not None:
            jobs.append(Job("generate.unsolved", asked, train * (asked.most_samples - asked.samples_per_prompt), at_most=True))
    if role == "student" and recipe.rollouts is not None:
        prompts = min(train, recipe.rollouts.prompts_per_round or train)
        share = 1 - recipe.rollouts.teacher_share
        jobs.append(Job("rollouts", recipe.rollouts, round(prompts * recipe.rollouts.samples_per_prompt * recipe.rounds * share)))
    if recipe.evaluate is not None:
        models = {"teacher": {"teacher"}, "student": {"student", "base"}}[role] & set(recipe.evaluate.models)
        prompts = min(heldout, recipe.evaluate.max_prompts or heldout)
        if models:
            jobs.append(Job("evaluate", recipe.evaluate, prompts * recipe.evaluate.samples_per_prompt * len(models)))
        sets = recipe.asked_sets()
        for name, count in (further or {}).items() if models else ():
            sampling = sets[name].sampling
            jobs.append(Job(f"evaluate.sets.{name}", sampling, count * sampling.samples_per_prompt * len(models)))
    return jobs


def lengths(seen: Sequence[tuple[int, bool]], longest: int) -> Lengths:
    """The range of an answer's mean length.

    Args:
        seen: Tokens of some answers, and whether each was cut.
        longest: Tokens that the recipe allows.
    """
    low = sum(tokens for tokens, _ in seen) / len(seen)
    high = sum(max(longest, tokens) if cut else tokens for tokens, cut in seen) / len(seen)
    return Lengths(low, high)


def expected(job: Job, prompt_tokens: float, answer: Lengths, tokens_per_s: float, price: Price | None) -> tuple[str, float]:
    """A stage's hours and money in words, and the least money in US dollars (0 without a price).

    Args:
        job: Of the stage.
        prompt_tokens: Mean length of a prompt.
        answer: Of an answer.
        tokens_per_s: Written by the server, of all requests together.
        price: Of tokens.
    """
    low, high = (job.answers * min(mean, job.sampling.max_new_tokens) for mean in answer)
    hours = _range(*(duration_text(tokens / max(tokens_per_s, 1e-9)) for tokens in (low, high)))
    number = f"up to {job.answers:,}" if job.at_most else f"{job.answers:,}"
    text = f"{job.stage}: {number} answers of {_range(f'{answer.low:,.0f}', f'{answer.high:,.0f}')} tokens, {hours}"
    if price is None:
        return text, 0.0
    read = job.answers * prompt_tokens * price.input
    costs = [(read + tokens * price.output) / _MILLION for tokens in (low, high)]
    return f"{text}, {_range(*(f'${cost:,.2f}' for cost in costs))}", 0.0 if job.at_most else costs[0]


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
