"""Runs one stage, or all of a recipe's stages in order. Knows which stages there are, and nothing of what they do."""

from __future__ import annotations

import importlib

from distill.models.processes import Processes
from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.run.files import write_text
from distill.run.folder import delete_stage
from distill.run.log import is_main_process, ledger, nothing_to_do, say
from distill.run.manifest import MANIFEST, Manifest
from distill.stages import ROUND_STAGES, folder, run_dir, stages_of

_UNITS = {
    "prompts": "prompts",
    "generate": "traces",
    "curate": "traces",
    "score": "traces",
    "train": "rows",
    "rollouts": "traces",
    "evaluate": "answers",
}


def run_stage(name: str, recipe: Recipe, *, number: int = 0, redo: bool = False) -> Manifest:
    """Runs a stage, or finds it done, and says so in one line.

    Args:
        name: A key of `FOLDERS`.
        recipe: The recipe.
        number: Of the on-policy round, from 1; 0 for the stages outside the rounds.
        redo: Delete what an earlier run made of this stage.
    """
    target = folder(recipe, name, number)
    if is_main_process():
        if redo:
            delete_stage(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(run_dir(recipe) / "recipe.yaml", recipe_text(recipe))
    if redo:
        Processes().wait()  # else another process could find the old manifest, and take the stage for done
    module = importlib.import_module(f"distill.stages.{_module(name, recipe)}")
    done_before = (target / MANIFEST).exists()
    manifest: Manifest = module.run(recipe, number) if name in ROUND_STAGES else module.run(recipe)
    say(nothing_to_do(manifest, target) if done_before else ledger(manifest, unit=_UNITS.get(name, "rows")))
    return manifest


def _module(name: str, recipe: Recipe) -> str:
    return "import_traces" if name == "generate" and recipe.traces is not None else name


def run_score_shard(recipe: Recipe, shard: str, *, number: int = 0) -> None:
    """Scores one part of the traces, `i/n` counted from 1; whoever finds all parts there completes the stage."""
    importlib.import_module("distill.stages.score").run_shard(recipe, shard, number)


def run_rounds(recipe: Recipe) -> None:
    """Runs the on-policy rounds that are still to do, until the last one or a stop condition of `rollouts`."""
    for number in range(1, recipe.rounds + 1):
        say(f"\nround {number} of {recipe.rounds}")
        for name in ROUND_STAGES:
            stop = run_stage(name, recipe, number=number).facts.get("stop")
            if stop is not None:
                say(f"\nthe rounds end here: {stop}")
                if number < recipe.rounds and recipe.rollouts is not None and recipe.rollouts.schedule_over == "all_rounds":
                    say("the learning rate has not come to the end of its schedule; see rollouts.schedule_over")
                return


def run_pipeline(recipe: Recipe) -> None:
    """Runs all stages and ends with the table of results and the path of the report."""
    stages = stages_of(recipe)
    measured_from = next(place for place, name in enumerate(stages) if name in ("evaluate", "report"))
    for name in stages[:measured_from]:
        run_stage(name, recipe)
    run_rounds(recipe)
    for name in stages[measured_from:]:
        run_stage(name, recipe)
    report = folder(recipe, "report")
    say("\n" + (report / "summary.txt").read_text(encoding="utf-8"))
    say(f"report: {report / 'report.html'}")
