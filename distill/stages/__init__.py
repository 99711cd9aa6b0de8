"""Stages read folders and write a folder. They talk through files and never import each other.

A run's stages stand side by side in its folder. An on-policy round repeats some of them, in `rounds/01`, `rounds/02`, ...
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

from filelock import FileLock

from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.inputs import BeforeTraining
from distill.recipe.reading import recipe_text
from distill.reporting.made import MadeStep, made_recipe
from distill.run.files import read_json, write_record
from distill.run.folder import StageFolder
from distill.run.manifest import LOCK, MANIFEST, PARTS, PLAN, read_manifest
from distill.run.owned import RECIPE as RECIPE
from distill.run.owned import own_cache
from distill.run.plan import NO_GROWTH, Growth, StagePlan

FOLDERS = {
    "prompts": "prompts",
    "generate": "traces",
    "curate": "curated",
    "score": "targets",
    "train": "student",
    "rollouts": "rollouts",
    "evaluate": "eval",
    "benchmark": "benchmarks",
    "report": "report",
    "export": "export",
}
"""Stage name and the folder it writes inside the run or the round, in the order of the pipeline."""


def _tables(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}-[0-9][0-9][0-9][0-9][0-9].parquet" for name in names)


_JUDGED = ("judged_*-[0-9][0-9][0-9][0-9][0-9].parquet*", "journal-judge*.jsonl", "batches-judge*.json", "compared-[0-9]*.parquet*")
"""What judges have said: it stays where the tables that are made in one go begin anew."""
_WRITTEN = (f"{PARTS}/[0-9]*-of-[0-9]*/*", "batches*.json")

_PARTIAL = "partial"

WRITES = {
    "prompts": _tables("train", "heldout", "dropped", "matches"),
    "generate": (*_tables("traces", "dropped", "alternatives"), *_WRITTEN),
    "curate": (*_tables("curated", "dropped", "verdicts", "ranks", "unsolved"), *_JUDGED),
    "score": ("targets-*-of-*.targets", "targets-*-of-*.targets.part", "journal-*-of-*.jsonl"),
    "train": ("adapter/*", "model/*", "tokenizer/*", "checkpoints/*", "logs/*", "metrics.jsonl"),
    "rollouts": (*_tables("traces", "dropped"), *_WRITTEN),
    "evaluate": (
        *_tables("traces", "answers", "scores", "confusion", "thoughts", "likeness", "certainty", "preferences", "wins"),
        *_WRITTEN,
        *_JUDGED,
    ),
    "benchmark": (*_tables("scores"), *(f"{place}/*" for place in ("base", "student", "teacher", "every_eval_ever", _PARTIAL))),
    "report": ("report.html", "report.md", "summary.txt"),
    "export": ("model/*", "adapter/*", "README.md", "provenance.cdx.json"),
}
"""Stage name and the files that it may write in its folder: what is not among them is never deleted."""

SCRATCH = {"train": "checkpoints", "generate": PARTS, "rollouts": PARTS, "evaluate": PARTS, "benchmark": _PARTIAL}
"""Stage name and the folder in its folder that a restart needs, and nobody afterwards."""

CACHE = "cache"
"""In a run's folder, what can be made anew from its stages."""

SERVERS = "servers"
"""In a run's folder, where `distill serve` leaves the addresses of its servers, with their logs."""

SWEEP = "sweep"
"""In a run's folder, runs of their own that train on its traces and targets: its stages are links in them."""

MARKS = ("rows-*.json", "checkpoints/*/whole")
"""Files with the digests of others beside them, in the cache and in a folder under way."""

ROUND_STAGES = ("rollouts", "score", "train")
"""What an on-policy round consists of: the student writes, the teacher scores, the student trains."""

_MEASURING = ("evaluate", "benchmark", "report", "export")
"""Stages that stand behind the rounds."""

ROUNDS = "rounds"


def run_dir(recipe: Recipe) -> Path:
    """The folder of a recipe's run."""
    path = Path(recipe.run_dir or f"runs/{recipe.name}")
    return path.absolute() if ":" in "".join(path.parts[:1]) else path  # a relative `exp:1/` would be a URI to Arrow


def folder(recipe: Recipe, stage: str, number: int = 0) -> Path:
    """The folder that a stage writes, in an on-policy round if a number from 1 is given."""
    place = run_dir(recipe) / ROUNDS / f"{number:02d}" if number else run_dir(recipe)
    return place / FOLDERS[stage]


def stages_of(recipe: Recipe) -> list[str]:
    """The stages a recipe asks for, in order, without those inside the rounds."""
    learns = recipe.learns_from_traces
    wanted = {
        "prompts": True,
        "generate": learns,
        "curate": learns,
        "score": recipe.scores_traces,
        "train": recipe.trains_on_traces or recipe.train.is_live,
        "rollouts": False,
        "evaluate": recipe.evaluate is not None,
        "benchmark": recipe.benchmarks is not None,
        "report": True,
        "export": recipe.export is not None,
    }
    return [name for name in FOLDERS if wanted[name]]


def taken(recipe: Recipe) -> dict[str, Path]:
    """The stages that a recipe takes from another run, in order, and their folders there."""
    if recipe.inputs is None:
        return {}
    stages = [stage for stage in stages_of(recipe) if stage in get_args(BeforeTraining)]
    last = recipe.inputs.until or stages[-1]
    return {stage: folder(made_there(recipe), stage) for stage in stages[: stages.index(last) + 1]}


def made_there(recipe: Recipe) -> Recipe:
    """A recipe that takes stages from another run, as if that were its own."""
    assert recipe.inputs is not None  # whoever calls looks
    return recipe.model_copy(update={"run_dir": recipe.inputs.run, "inputs": None})


class Step(NamedTuple):
    """A stage of a run, or of one of its on-policy rounds."""

    stage: str
    number: int = 0
    """Of the round, from 1; 0 outside the rounds."""

    def __str__(self) -> str:
        return f"round {self.number} {self.stage}" if self.number else self.stage


def steps_of(recipe: Recipe) -> list[Step]:
    """All that a recipe asks for, in order; the rounds stand before what measures their student."""
    stages = stages_of(recipe)
    rounds = [Step(name, number) for number in range(1, recipe.rounds + 1) for name in ROUND_STAGES]
    before, behind = ([Step(name) for name in stages if (name in _MEASURING) == measures] for measures in (False, True))
    return [*before, *rounds, *behind]


def call(step: Step, recipe: Recipe, what: str) -> Any:
    """Calls `run` or `plan` of a step's stage."""
    name = "import_traces" if step.stage == "generate" and recipe.traces is not None else step.stage
    function = getattr(importlib.import_module(f"distill.stages.{name}"), what)
    return function(recipe, step.number) if step.stage in ROUND_STAGES else function(recipe)


def plan_of(recipe: Recipe, step: Step, settings: dict[str, Any], inputs: Sequence[Path] = (), growth: Growth = NO_GROWTH) -> StagePlan:
    """What a step is asked to make, in its folder, with the recipe for the record."""
    made_with = recipe.model_dump(mode="json")
    return StagePlan(folder(recipe, *step), step.stage, settings, inputs, growth, made_with, WRITES[step.stage], SCRATCH.get(step.stage))


@contextmanager
def open_stage(recipe: Recipe, plan: StagePlan, part: str | None = None, hold: bool = True) -> Iterator[StageFolder]:
    """A stage's folder, held by this process; once it is granted, the run's `recipe.yaml` says what its stages are made with.

    Args:
        recipe: The recipe.
        plan: What the stage is asked to make.
        part: Hold this part alone.
        hold: False for the processes of a launch that work beside the one that holds it.

    Raises:
        StageConflictError: what is there was made with other settings, or another process holds it.
        MissingStageError: an input is absent or unfinished.
    """
    out = StageFolder(*plan, part=part)
    if not hold:
        yield out
        return
    own_cache(run_dir(recipe) / CACHE, make=False)
    with out:
        with FileLock(run_dir(recipe) / LOCK):
            write_record(run_dir(recipe) / RECIPE, recipe_text(as_made(recipe)))
        yield out


def as_made(recipe: Recipe) -> Recipe:
    """The recipe as its run was made: where stages were given other settings than this command's, those."""
    return made_recipe(recipe, made_steps(recipe))


def made_steps(recipe: Recipe) -> list[MadeStep]:
    """The steps of a run that are finished or under way, with the recipes they were made with; whatever this recipe asks for."""
    numbers = sorted(int(place.name) for place in (run_dir(recipe) / ROUNDS).glob("*") if place.name.isdigit())
    steps = [Step(name) for name in FOLDERS if name not in ("rollouts", *_MEASURING)]
    steps += [Step(name, number) for number in numbers for name in ROUND_STAGES]
    found = []
    for step in [*steps, *map(Step, _MEASURING)]:
        place = folder(recipe, *step)
        # Another process may be finishing a part of it just now.
        with contextlib.suppress(FileNotFoundError):
            if (place / PLAN).exists():
                found.append(MadeStep(*step, read_json(place / PLAN).get("made_with", {})))
            elif (place / MANIFEST).exists():
                found.append(MadeStep(*step, read_manifest(place).made_with))
    return found


def last_round(recipe: Recipe) -> int:
    """The round that trained the last student; 0 where there are no rounds, or the first was stopped before it trained.

    Raises:
        MissingStageError: the rounds are not finished.
    """
    for number in range(1, recipe.rounds + 1):
        if "stop" in read_manifest(folder(recipe, "rollouts", number)).facts:
            return number - 1
        if "stop" in read_manifest(folder(recipe, "train", number)).facts:
            return number
    return recipe.rounds


def stop_before(recipe: Recipe, step: Step) -> str | None:
    """Why the rounds were ended before a step of theirs, by what an earlier one found; null where they were not, or are not so far."""
    for number in range(1, step.number + 1):
        for stage in ("rollouts", "train"):
            place = folder(recipe, stage, number)
            is_earlier = number < step.number or (stage == "rollouts" and step.stage != stage)
            if is_earlier and (place / MANIFEST).exists() and "stop" in read_manifest(place).facts:
                return str(read_manifest(place).facts["stop"])
    return None


def student_folder(recipe: Recipe) -> Path:
    """The folder of the student that is measured and exported: the last one trained.

    Raises:
        MissingStageError: the rounds are not finished.
        DataError: the rounds ended before any student was trained.
    """
    number = last_round(recipe)
    if number == 0 and "train" not in stages_of(recipe):
        raise DataError(
            f"{folder(recipe, 'rollouts', 1)}: the rounds were stopped before any training, so there is no student. "
            "Raise the limit that stopped them (rollouts.stop_...), and run with another run_dir."
        )
    return folder(recipe, "train", number)


def previous_student(recipe: Recipe, number: int) -> Path | None:
    """The folder of the student that writes in a round; null for the one before any training."""
    assert recipe.rollouts is not None  # the recipe was validated
    if number == 1 and recipe.rollouts.start == "base":
        return None
    return folder(recipe, "train", number - 1)


def folders_to_show(recipe: Recipe) -> tuple[dict[str, Path], list[dict[str, Path]]]:
    """The folders of a finished run that a report or a card speaks of: of the stages, and of each on-policy round.

    Raises:
        MissingStageError: the rounds are not finished.
    """
    stages = {stage: folder(recipe, stage) for stage in stages_of(recipe) if stage not in ("report", "export")}
    trained = last_round(recipe)
    rounds = [{stage: folder(recipe, stage, number) for stage in ROUND_STAGES} for number in range(1, trained + 1)]
    # The rollouts that stopped the rounds were neither scored nor trained on.
    stopped = trained < recipe.rounds and (folder(recipe, "rollouts", trained + 1) / MANIFEST).exists()
    return stages, [*rounds, {"rollouts": folder(recipe, "rollouts", trained + 1)}] if stopped else rounds


def folders_in(run: Path) -> tuple[dict[str, Path], list[dict[str, Path]]]:
    """The folders that a run's stages and rounds would have, from its own folder alone; which of them are there is another question."""
    rounds = sorted(place for place in (run / ROUNDS).glob("*") if place.name.isdigit())
    return {stage: run / name for stage, name in FOLDERS.items() if stage != "rollouts"}, [
        {stage: place / FOLDERS[stage] for stage in ROUND_STAGES} for place in rounds
    ]
