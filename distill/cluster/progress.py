"""How far each step of a run is, from its folder alone, on any machine that sees it: nothing is locked, changed, or read in full."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from distill.cluster.underway import LATELY_S, Held, UnderWay, finished, total_of, under_way
from distill.errors import DistillError, IntegrityError, MissingStageError, RecipeError
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe
from distill.run.counted import Files, files_in, held_here
from distill.run.files import read_json
from distill.run.manifest import MANIFEST, PLAN, Manifest, check_sizes, read_manifest
from distill.run.owned import EARLIER, JOBS
from distill.stages import RECIPE, Step, folder, steps_of

State = Literal["done", "at work", "begun", "stopped", "not begun", "outdated", "damaged"]


class StepProgress(NamedTuple):
    """How far a step is."""

    step: Step
    state: State
    """`begun`: a file was written within the last ten minutes, and nobody is seen at work: it may be another machine. `stopped`: none
    was. `outdated`: done, from what was made anew or has grown since."""
    why: str
    """Of `outdated` and `damaged`."""
    work: UnderWay

    @property
    def is_finished(self) -> bool:
        """Whether it is done, even if from what has changed since."""
        return self.state in ("done", "outdated")

    @property
    def left_s(self) -> float | None:
        """Seconds that are left at its rate; null where that is not known, or nobody may be at work."""
        rows, total, rate = self.work.rows, self.work.total, self.work.rate
        if self.state not in ("at work", "begun") or rows is None or total is None or not rate:
            return None
        return (total - rows) / rate


class Run(NamedTuple):
    """How far a run is."""

    steps: list[StepProgress]
    ended_because: str
    """Why its rounds have ended before the last one; empty where they have not."""


def progress_of(run: Path, at: float | None = None) -> Run:
    """How far a run is.

    Args:
        run: Its folder.
        at: Unix time, now.

    Raises:
        MissingStageError: it holds no stage of a run, and no recipe of one.
    """
    recipe, held, at = recipe_of(run), held_here(), time.time() if at is None else at
    found: list[StepProgress] = []
    stop = ""
    for step in steps_of(recipe):
        if not (step.number and stop):
            each, manifest = _look(recipe, step, held, at)
            found.append(each)
            stop = stop or str((manifest.facts.get("stop") if manifest is not None and step.number else "") or "")
    return Run(found, stop)


def recipe_of(run: Path) -> Recipe:
    """The recipe that a run is made with, as it stands in its folder; where that can't be read, as one of its stages was made.

    Raises:
        MissingStageError: there is neither.
    """
    place = {"run_dir": str(run)}
    submitted = sorted((run / JOBS).glob("recipe-*.yaml"))  # of a run none of whose jobs has begun
    try:
        return load_recipe(run / RECIPE if (run / RECIPE).exists() or not submitted else submitted[-1]).model_copy(update=place)
    except RecipeError as error:
        for folder_there in sorted(run.glob("*")) if run.is_dir() else ():
            for name in (PLAN, MANIFEST):
                try:
                    return Recipe.model_validate(read_json(folder_there / name)["made_with"] | place)
                except (OSError, IntegrityError, ValidationError, KeyError, TypeError):
                    continue
        if (run / RECIPE).exists():
            raise
        raise MissingStageError(f"{run}: holds no stage of a run. Give the folder of one, e.g. runs/quickstart.") from error


def _look(recipe: Recipe, step: Step, held: Held, at: float, tries: int = 5) -> tuple[StepProgress, Manifest | None]:
    files = files_in(folder(recipe, *step))
    try:
        manifest = read_manifest(files.path) if files.is_done else None
        plan = read_json(files.path / PLAN) if files.has(PLAN) else None
        if plan is not None and (manifest is None or plan.get("grows_from") == manifest.digest):  # else a kill has left the plan
            return _begun(recipe, step, files, held, at), None
        if manifest is None:
            there = (files.path / EARLIER / MANIFEST).exists()  # a kill came while it was put back
            return StepProgress(step, "stopped" if there else "not begun", "", UnderWay(total=total_of(recipe, step))), None
        check_sizes(files.path, manifest)
    except FileNotFoundError as error:  # finished just now; or a listing that is old, as file systems of clusters have them
        if not tries:
            return StepProgress(step, "damaged", f"{error.filename}: is not there", UnderWay(written_at=files.written_at)), None
        return _look(recipe, step, held, at, tries - 1)
    except DistillError as error:
        return StepProgress(step, "damaged", str(error), UnderWay(written_at=files.written_at)), None
    why = _outdated(recipe, step, manifest)
    return StepProgress(step, "outdated" if why else "done", why, finished(manifest)), manifest


def _begun(recipe: Recipe, step: Step, files: Files, held: Held, at: float) -> StepProgress:
    work = under_way(recipe, step, files, held, at)
    recently = work.written_at is not None and at - work.written_at < LATELY_S
    return StepProgress(step, "at work" if work.held else "begun" if recently else "stopped", "", work)


def _outdated(recipe: Recipe, step: Step, manifest: Manifest) -> str:
    """What a finished step was made from that is no more as it was then; empty for nothing."""
    run = folder(recipe, "prompts").parent
    for name, digest in manifest.inputs.items():
        try:
            found = read_manifest(run / name)
        except MissingStageError:
            return f"{name} is {'made anew' if (run / name / PLAN).exists() else 'gone'}"
        except IntegrityError:  # which is said of itself
            continue
        if digest != found.digest and not (digest in found.grew_from and step.stage == "train" and step.number):  # a round stays as it is
            return f"{name} {'has grown' if digest in found.grew_from else 'was made anew'} since"
    return ""
