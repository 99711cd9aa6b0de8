"""Which steps of a run need a server that is a job of its own."""

from __future__ import annotations

from collections.abc import Sequence

from distill.recipe.experiment import Recipe
from distill.stages import Step


def serving_jobs(recipe: Recipe, steps: Sequence[Step]) -> dict[Step, str]:
    """The role that a step needs from a job that serves it: `teacher`, `student` or `base`; steps that need none are not in it."""
    return {}
