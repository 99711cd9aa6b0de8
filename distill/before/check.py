"""`distill check`: proves a recipe before anything is spent, by doing what it asks for in miniature. Loads no weights but random ones.

Each line is one claim: proved, refuted, or not to be checked here (offline, say), which is not the same as proved. `distill run` begins
with it, unless it was proved before and nothing has changed since; see `before.record`.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from distill.before import machine, quick, record
from distill.before.brought import SAMPLE
from distill.before.findings import Findings
from distill.before.judges import check_judges
from distill.before.judging import check_judging, check_sets
from distill.before.packages import check_packages
from distill.before.servers import check_servers
from distill.before.tokens import check_pair, check_rows, load_chats, made_up
from distill.errors import DataError, RecipeError
from distill.recipe.experiment import Recipe
from distill.recipe.learning import DEFAULT_EPOCHS, Train
from distill.recipe.steps import StepSize, step_size
from distill.run.log import duration_text, say
from distill.stages import Step, run_dir, steps_of
from distill.stages.links import take

if TYPE_CHECKING:
    from distill.stages.prompts import Survey

_ARRAY = "SLURM_ARRAY_TASK_ID"
_WORTH_PLANNING = 10**8  # weights: a model with fewer fits anywhere


def run(recipe: Recipe, processes: int = 1, launch: Path | None = None) -> bool:
    """Prints every finding; true if none refutes the recipe.

    Args:
        recipe: The recipe.
        processes: That train.
        launch: The launch file by which they do; null for none.
    """
    found = Findings()
    whole = _examine(recipe, steps_of(recipe), found, here=False, processes=processes, launch=launch)
    if not found.refuted:
        _check_plan(recipe, processes, launch, found)
    proved = found.end("nothing speaks against running this recipe")
    if proved and whole and processes == 1:
        record.note(recipe)
    return proved


def before_run(recipe: Recipe, steps: Sequence[Step]) -> None:
    """The same before a run begins, in one line, where something that costs is still to do and the recipe was not proved before.

    Tasks of an array leave it to whoever started them.

    Args:
        recipe: The recipe.
        steps: Those of the run that are still to do.

    Raises:
        RecipeError: naming every claim that was refuted.
    """
    take(recipe)  # so that its rows can be looked at
    costs = {"score", "train", "rollouts", *(["generate"] if recipe.generate is not None else [])}
    if _ARRAY in os.environ or not costs & {step.stage for step in steps}:
        return
    quickly = Findings(Console(file=io.StringIO()))
    quick.claims(recipe, quickly)  # in a second, and without torch
    _refuse(recipe, quickly)
    if record.is_noted(recipe):
        return
    say("check     the recipe is tried in small before anything is spent; once, and --no-check leaves it out")
    found, start = Findings(Console(file=io.StringIO())), time.perf_counter()
    _examine(recipe, steps, found, here=True, processes=1)
    for line in found.warnings:
        say(f"check     {line}")
    _refuse(recipe, found)
    record.note(recipe)
    say(f"check     nothing speaks against this recipe · {duration_text(time.perf_counter() - start)}")


def _check_plan(recipe: Recipe, processes: int, launch: Path | None, found: Findings) -> None:
    """What `distill plan` says, in one line; it refutes nothing, because it is not measured. Nothing of models that fit anywhere."""
    from distill.planning import shown

    specs = [recipe.student, *([recipe.teacher] if recipe.teacher is not None else [])]
    known = [size for spec in specs if (size := machine.parameters(spec)) is not None]
    if max(known, default=0) < _WORTH_PLANNING:
        return
    place = shown.place_of(recipe, machine.gpu_memory(), processes, 1, launch, shown.PROMPT_TOKENS)
    made = shown.make(recipe, place, whole=False)
    (found.warn if made.is_impossible else found.good)("plan", f"{shown.one_line(made)}. `distill plan` has the parts")


def _refuse(recipe: Recipe, found: Findings) -> None:
    if found.refuted:
        claims = "a claim" if found.failed == 1 else f"{found.failed} of the claims"
        listed = "\n  ".join(found.refuted)
        raise RecipeError(
            f"{recipe.name}: nothing was begun, because {claims} of `distill check` failed:\n  {listed}\n"
            "`distill run --no-check` begins all the same."
        )


def _examine(recipe: Recipe, steps: Sequence[Step], found: Findings, *, here: bool, processes: int, launch: Path | None = None) -> bool:
    """Every claim; returns whether none was left open that another device would decide."""
    quick.common(recipe, found, launch)
    survey = _check_prompts(recipe, found)
    further = {} if survey is None else check_sets(recipe, survey, found)
    check_packages(recipe, found, importing=True)
    _check_benchmarks(recipe, found)
    whole = machine.check_device(recipe, found, here=here, processes=processes)
    machine.check_memory(recipe, steps, found, here=here, processes=processes)
    possible = machine.possible(recipe)
    arguments_hold = found.prove("trainer arguments", lambda: _trainer_arguments(possible, processes))
    chats = load_chats(recipe, found)
    check_pair(recipe, chats, survey, found)
    check_servers(recipe, chats, survey, found, here=here, further=further)
    if survey is not None:
        check_judges(recipe, survey, found, here=here)
    if "student" not in chats or survey is None:
        return whole
    rows, number = check_rows(recipe, chats, survey, found)
    if arguments_hold:
        found.prove("rows and steps", lambda: _numbers(possible, survey, number, processes))
    if not found.refuted:  # else it would be refuted for the same reason, in more words
        from distill.before.rehearsal import rehearse

        rehearse(possible, rows or [made_up(prompt, recipe, chats["student"]) for prompt in survey.sample], found)
    return whole


def _check_benchmarks(recipe: Recipe, found: Findings) -> None:
    """Whether lm-eval knows the tasks, and their data can be had here."""
    if recipe.benchmarks is None:
        return

    def attempt() -> str:
        from distill.benchmarks.tasks import find_tasks, version

        leaves = find_tasks(recipe).leaves
        listed = ", ".join(f"{name} ({sum(leaf.documents for leaf in found):,})" for name, found in leaves.items())
        return f"lm-eval {version()}: {listed} documents"

    found.prove("benchmarks", attempt)


def _trainer_arguments(recipe: Recipe, processes: int) -> str:
    from distill.models.loading import pick_device
    from distill.trainers.arguments import precision_name
    from distill.trainers.building import trainer_arguments

    device, folder = pick_device(), run_dir(recipe) / "checkpoints"
    arguments = trainer_arguments(recipe, recipe.train, folder, device)
    if recipe.rounds:
        trainer_arguments(recipe, recipe.train_in_rounds, folder, device)
    rows = _step(recipe.train, processes).rows
    return f"{precision_name(arguments)}, {rows:,} rows an optimizer step, learning rate {arguments.learning_rate:g}"


def _step(train: Train, processes: int) -> StepSize:
    from distill.models.loading import pick_device

    return step_size(train.global_batch_size, train.trainer_args, processes, pick_device().type == "cpu", whole=train.is_live)


def _numbers(recipe: Recipe, survey: Survey, number: int, processes: int) -> str:
    """Whether there is something left to train on: beside the validation prompts, and for a whole step where one is needed."""
    train, at_most = recipe.train, survey.train
    if not train.is_live and number:
        at_most = number
    elif not train.is_live and recipe.generate is not None:
        at_most *= min(recipe.generate.most_samples, recipe.curate.max_per_prompt)
    prompts = min(survey.train, at_most)
    if train.validation_prompts >= prompts:
        raise DataError(
            f"train.validation_prompts: {train.validation_prompts:,} are asked for, but there are {prompts:,} training prompts with "
            "traces. Lower it."
        )
    size, given = _step(train, processes), train.trainer_args
    if train.is_live and at_most < size.rows // given.get("num_generations", 1):
        raise DataError(
            f"train: an optimizer step takes {size.rows:,} completions, but there are {at_most:,} prompts. Lower train.global_batch_size, "
            "or give more prompts."
        )
    steps = given.get("max_steps", -1)
    if steps <= 0:
        steps = math.ceil(at_most / size.rows * given.get("num_train_epochs", DEFAULT_EPOCHS))
    return f"at most {at_most:,} rows and {steps:,} optimizer steps"


def _check_prompts(recipe: Recipe, found: Findings) -> Survey | None:
    from distill.stages.prompts import survey

    surveys: list[Survey] = []

    def attempt() -> str:
        surveys.append(survey(recipe.prompts, recipe.seed, SAMPLE, spread=True))
        seen = surveys[0]
        return f"{seen.train:,} to train on, {seen.heldout:,} held out, {sum(seen.drops.values()):,} dropped"

    if not found.prove("prompts", attempt):
        return None
    check_judging(recipe, surveys[0], found)
    return surveys[0]
