"""Which steps of a run ask a server that a job of its own can hold."""

from __future__ import annotations

from collections.abc import Sequence

from distill.recipe.experiment import Recipe
from distill.stages import Step


def serving_jobs(recipe: Recipe, steps: Sequence[Step]) -> dict[Step, str]:
    """The role that a step needs from a job that serves it: `teacher` or `student`; steps that need none are not in it.

    Not those whose server is there already, a host, or that the recipe has in this process. Nor evaluate: it asks several models one
    after the other, and starts and ends its own server of each, so that a device holds one at a time. The student that writes rollouts
    is another in each round (`distill serve --role student --round N`), so its job begins behind the training before.

    Args:
        recipe: The recipe.
        steps: That are to be done.
    """
    roles = {step: _role(recipe, step) for step in steps}
    return {step: role for step, role in roles.items() if role is not None}


def _role(recipe: Recipe, step: Step) -> str | None:
    teacher, student = recipe.teacher, recipe.student
    if step.stage == "rollouts" and student.server is not None and student.server.is_started:
        return "student"
    if teacher is None or teacher.server is None or not teacher.server.is_started:
        return None
    writes = step.stage == "generate" and recipe.generate is not None
    reads = step.stage == "score" and recipe.score is not None and recipe.score.resolved(teacher) == "server"
    return "teacher" if writes or reads else None
