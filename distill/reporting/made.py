"""The recipe as a run was made: each section as the stage was made with that it belongs to, whatever the last command line said."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from distill.recipe.experiment import Recipe
from distill.recipe.takes import takes_of_recipe

# What each stage is made with. Of a key that several name, the first of them that was made decides what the recipe of the run says.
_USES = {
    "prompts": ("prompts", "seed"),
    "generate": ("teacher", "generate", "traces", "seed"),
    "curate": ("curate",),
    "score": ("teacher", "score"),
    "train": ("student", "train", "seed", "teacher"),
    "rollouts": ("student", "rounds", "rollouts", "seed"),
    "evaluate": ("evaluate", "seed", "teacher"),
    "benchmark": ("benchmarks", "student", "seed", "teacher"),
    "report": ("report",),
    "export": ("export",),
}


_WHOLE = ("trainer_args", "chat_template_kwargs")
"""Mappings whose keys are not the recipe's own: where one of them is absent, it can't be set to null."""


class MadeStep(NamedTuple):
    """A stage that was made, or is under way."""

    stage: str
    number: int
    """Of the on-policy round, from 1; 0 outside the rounds."""
    made_with: dict[str, Any]
    """The recipe then; empty where it was not recorded."""


def made_recipe(recipe: Recipe, steps: Sequence[MadeStep]) -> Recipe:
    """A recipe with every section as the steps were made with it; what none was made with is as this command has it.

    Args:
        recipe: Of this command.
        steps: In the order of the pipeline. Of several rounds the last one counts.
    """
    made = _made(steps)
    for base in (recipe.model_dump(mode="json"), *(step.made_with for step in reversed(steps) if step.made_with)):
        try:
            return Recipe.model_validate(base | made)
        except ValidationError:  # what this command says of stages that were not made does not go with those that were
            continue
    return recipe


def _made(steps: Sequence[MadeStep]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for step in steps:
        for key in _used(step):
            if key in step.made_with and owners.setdefault(key, step.stage) == step.stage:
                found[key] = step.made_with[key]
    return found


def repeat_commands(recipe: Recipe, steps: Sequence[MadeStep], file: str = "recipe.yaml") -> list[str]:
    """The commands that make the same run again from its recipe: one, unless stages were made with different values of a key.

    Args:
        recipe: As `made_recipe` gives it.
        steps: As there.
        file: Where the recipe is.
    """
    whole = recipe.model_dump(mode="json")
    # More rounds can be added only where their number decides nothing of those before.
    used = [[key for key in _used(step) if key != "rounds"] if step.made_with else [] for step in steps]
    other = [list(_overrides({key: whole[key] for key in keys}, step.made_with)) for keys, step in zip(used, steps, strict=True)]
    if not any(other):
        return [f"distill run {file}"]
    return [
        " ".join(["distill", step.stage, file, *(["--round", str(step.number)] if step.number else []), *overrides])
        for step, overrides in zip(steps, other, strict=True)
    ]


def _used(step: MadeStep) -> list[str]:
    """The keys that a step is made with: a teacher only where it had a part in it."""
    made_with = step.made_with
    writes = made_with.get("traces") is None
    judges = (made_with.get("train") or {}).get("on_policy") is not None
    answers = "teacher" in ((made_with.get("evaluate") or {}).get("models") or [])
    takes_tests = "teacher" in ((made_with.get("benchmarks") or {}).get("models") or [])
    has_teacher = {"generate": writes, "train": judges, "evaluate": answers, "benchmark": takes_tests}.get(step.stage, True)
    return [key for key in _USES[step.stage] if key != "teacher" or has_teacher]


def _overrides(whole: dict[str, Any], made_with: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Words of a command line that make the values of `made_with` of those in `whole`.

    Where a key takes text the text as it stands, as it is read there; all else as JSON, which is YAML.
    """
    for key, value in whole.items():
        made = made_with.get(key)
        if isinstance(value, dict) and isinstance(made, dict) and set(value) == set(made) and key not in _WHOLE:
            yield from _overrides(value, made, f"{prefix}{key}.")
        elif made != value:
            if not isinstance(made, str) or not takes_of_recipe((*prefix.split(".")[:-1], key)).text:
                made = json.dumps(made, ensure_ascii=False)
            yield from (f"--{prefix}{key}", shlex.quote(made))
