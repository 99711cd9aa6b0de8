"""What several processes can't share of a recipe, and which GPUs one process leaves idle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from distill.errors import RecipeError
from distill.models.processes import world_size
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run.clock import is_main_process
from distill.run.log import say


def refuse_own_servers(recipe: Recipe, stage: str) -> None:
    """Refuses several processes of which each would start a server, on the same GPUs.

    Raises:
        RecipeError: they would.
    """
    if world_size() == 1:
        return
    for name, spec in _models_of(recipe, stage):
        if spec.server is not None and spec.server.is_started:
            raise RecipeError(
                f"{name}.server: each of {world_size()} processes would start one, on the same GPUs. Run `distill {stage}` without "
                "accelerate: the server uses as many GPUs as its arguments say (server.args)."
            )


def say_idle(recipe: Recipe, stage: str) -> None:
    """Says once which GPUs this process leaves idle, where it is about to work alone with a model of its own."""
    works_here = stage == "train" or any(spec.server is None for _, spec in _models_of(recipe, stage))
    if works_here and is_main_process():
        _say_idle(stage)


@cache
def _say_idle(stage: str) -> None:
    import torch

    from distill.models.loading import pick_device

    on_gpu = pick_device().type not in ("cpu", "mps")
    if on_gpu and (note := idle_note(torch.accelerator.device_count(), world_size(), stage)):
        say(f"{stage:<9} {note}")


def idle_note(gpus: int, processes: int, stage: str) -> str:
    """What a process says of the GPUs it leaves idle; empty where it leaves none.

    Args:
        gpus: That it can see.
        processes: Of its launch.
        stage: That it works on.
    """
    if processes > 1 or gpus < 2:
        return ""
    others = "the other is" if gpus == 2 else f"the other {gpus - 1} are"
    launch = "distill.train --config RECIPE" if stage == "train" else f"distill {stage} RECIPE"
    return f"one of {gpus} GPUs works, {others} idle. To use them all: accelerate launch --num_processes {gpus} -m {launch}"


def _models_of(recipe: Recipe, stage: str) -> list[tuple[str, ModelSpec]]:
    """Those that write or read in a stage, each with its section."""
    roles: dict[str, Sequence[str]] = {
        "generate": [] if recipe.traces is not None else ["teacher"],
        "rollouts": ["student"],
        "evaluate": [] if recipe.evaluate is None else recipe.evaluate.models,
        "benchmark": [] if recipe.benchmarks is None else recipe.benchmarks.models,
        "score": [] if recipe.score is None or recipe.score.resolved(recipe.teacher) == "generation" else ["teacher"],
    }
    sections = {"teacher": recipe.teacher, "student": recipe.student}
    names = dict.fromkeys("teacher" if role == "teacher" else "student" for role in roles.get(stage, []))
    return [(name, spec) for name in names if (spec := sections[name]) is not None]
