"""Stage `benchmark`: public benchmarks through lm-eval, for base, student and teacher. Reads student/, writes benchmarks/.

A task with a model is the unit of work: one that is finished stays, in lm-eval's own files, whatever comes later; of one that was stopped
the answers are kept. What base and teacher had is taken over when there is a new student, or further tasks.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.checks.functions import digest_of
from distill.errors import DataError
from distill.recipe.benchmarks import Benchmarks
from distill.recipe.experiment import Recipe
from distill.reporting.public import public_name
from distill.run.clock import Clock
from distill.run.files import copy_file, digest_file, digest_json
from distill.run.folder import StageFolder
from distill.run.log import say
from distill.run.manifest import Manifest, check_files, read_manifest
from distill.run.parts import summed
from distill.run.plan import Growth, StagePlan
from distill.run.schema import BENCHMARK
from distill.stages import SCRATCH, Step, open_stage, plan_of, run_dir, student_folder

if TYPE_CHECKING:
    from distill.benchmarks.tasks import Tasks

Unit = dict[str, Any]
_FREE = ("tasks", "tasks_sha256", "forgetting", "models", "confidence", "second_tasks", "second_checks", "second_reference", "organization")
"""What only adds tasks and models, or makes the tables anew: each unit knows by itself what it was measured with."""


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make.

    Raises:
        DataError: the recipe leaves it out.
        RecipeError: its folder of tasks is not there.
    """
    from distill.benchmarks.tasks import own_digest

    section = _section(recipe)
    specs = {"student": recipe.student.identity_here()}
    if recipe.teacher is not None and "teacher" in section.models:
        specs["teacher"] = recipe.teacher.identity_here()
    inputs = [student_folder(recipe)] if "student" in section.models else []
    growth = Growth(free=frozenset({"teacher", "seed", "python_sha256", *(f"benchmarks.{key}" for key in _FREE)}), other_inputs=True)
    own, python = own_digest(section), digest_of(section.second_checks)
    asked = section.identity() | ({"tasks_sha256": own} if own else {})
    settings = {**specs, "benchmarks": asked, "seed": recipe.seed, **({"python_sha256": python} if python else {})}
    return plan_of(recipe, Step("benchmark"), settings, inputs, growth)


def run(recipe: Recipe) -> Manifest:
    """Writes lm-eval's files of each model and task, the table `scores` and a record of Every Eval Ever; resumes where it was stopped."""
    with open_stage(recipe, plan(recipe)) as out:
        return out.manifest or _Stage(recipe, out).measure()


def _section(recipe: Recipe) -> Benchmarks:
    if recipe.benchmarks is None:
        raise DataError("benchmarks: this recipe leaves the stage out (benchmarks: null). Give it a section benchmarks with tasks.")
    return recipe.benchmarks


class _Stage:
    """The stage at work.

    Args:
        recipe: The recipe.
        out: Its folder.
    """

    def __init__(self, recipe: Recipe, out: StageFolder) -> None:
        from distill.benchmarks.tasks import find_tasks, version

        self._recipe, self._out, self._section = recipe, out, _section(recipe)
        self._clock, self._version = Clock(out.path), version()
        self._tasks: Tasks = find_tasks(recipe)
        self._journal = out.journal()
        self._units: dict[tuple[str, str], Unit] = {(row["model"], row["task"]): row for row in self._journal.rows() if self._holds(row)}
        self._models: dict[str, dict[str, Any]] = {row["model"]: row["record"] for row in self._units.values()}
        self._devices: list[str] = []
        self._spent: list[dict[str, Any] | None] = []
        self._warnings: list[str] = []

    def measure(self) -> Manifest:
        """What is missing, and then the tables."""
        before = self._take_over()
        for role in self._section.models:
            missing = [task for task in self._section.all_tasks if (role, task) not in self._units]
            if missing:
                self._measure(role, missing)
        return self._finish(before)

    def _identity(self, role: str, task: str) -> dict[str, Any]:
        """What decides a number beside the settings that are fixed for the whole folder."""
        return {**self._who(role), "tasks": {leaf.name: leaf.digest for leaf in self._tasks.leaves[task]}}

    def _who(self, role: str) -> dict[str, Any]:
        """The same for an answer, whatever the task."""
        spec = self._recipe.teacher if role == "teacher" else self._recipe.student
        assert spec is not None
        return {
            "model": spec.identity_here(),
            "student": read_manifest(student_folder(self._recipe)).digest if role == "student" else None,
            "server": spec.server.kind if spec.server is not None else None,
            "lm_eval": self._version,
        }

    def _holds(self, unit: Unit) -> bool:
        """Whether what a unit says is asked for, and was measured with what is here now: this lm-eval, these documents, this student."""
        role, task = unit["model"], unit["task"]
        is_asked = role in self._section.models and task in self._section.all_tasks
        return is_asked and bool(unit["identity"] == self._identity(role, task))

    def _take_over(self) -> list[Unit]:
        """Copies what the finished stage that this one grows from holds of what is asked; returns all that it holds."""
        earlier = self._out.earlier
        if earlier is None:
            return []
        check_files(earlier)
        units: list[Unit] = read_manifest(earlier).facts["units"]
        for unit in units:
            if (unit["model"], unit["task"]) in self._units or not self._holds(unit):
                continue
            for name in unit["files"]:
                copy_file(earlier / name, self._out.path / name)
            self._keep(unit)
        return units

    def _keep(self, unit: Unit) -> None:
        self._journal.append([unit])
        self._units[unit["model"], unit["task"]] = unit
        self._models[unit["model"]] = unit["record"]

    def _measure(self, role: str, tasks: Sequence[str]) -> None:
        """Has one model do what is missing."""
        from distill.benchmarks.kept import Kept
        from distill.benchmarks.measuring import folder_name, measure
        from distill.benchmarks.models import open_model

        trained = student_folder(self._recipe) if role == "student" else None
        if trained is not None:
            check_files(trained)
        scratch = self._out.path / SCRATCH["benchmark"]
        scratch.mkdir(exist_ok=True)
        kept = Kept(self._out.journal(f"{scratch.name}/{role}-{digest_json(self._who(role))[:8]}.jsonl"))
        with open_model(self._recipe, role, self._out.path, run_dir(self._recipe), trained, kept) as ready:
            self._devices.append(ready.device)
            for task in tasks:
                place = self._out.path / role / folder_name(task)
                place.parent.mkdir(exist_ok=True)
                kept.label = f"benchmark {role} {task}"
                measure(ready.lm, self._called(role), task, self._tasks.manager, self._section, place)
                files = {str(file.relative_to(self._out.path)): digest_file(file) for file in sorted(place.iterdir())}
                self._keep({"model": role, "task": task, "identity": self._identity(role, task), "record": ready.record, "files": files})
                of = len(self._section.models) * len(self._section.all_tasks)
                say(f"benchmark {role} {task}: done ({len(self._units):,} of {of:,})")
        if ready.spent:
            self._spent.append(ready.spent.get("server"))
            self._warnings += [warning for warning in ready.spent.get("warnings", []) if warning not in self._warnings]

    def _finish(self, before: Sequence[Unit]) -> Manifest:
        from distill.benchmarks.every_eval import write_records
        from distill.benchmarks.scores import forgetting
        from distill.benchmarks.table import table_of

        rows = table_of(self._recipe, self._out.path, self._version)
        self._out.write_table("scores", rows, BENCHMARK)
        units = [self._units[role, task] for role in self._section.models for task in self._section.all_tasks]
        self._drop_others(units)
        called: dict[str, str] = {role: self._called(role) for role in self._section.models}
        records = write_records(self._recipe, self._out.path, rows, self._models, called)
        served = summed(self._spent)
        facts: dict[str, Any] = {
            "device": ", ".join(dict.fromkeys(self._devices)) or "cpu",
            "models": {role: self._models[role] for role in self._section.models},
            "lm_eval": self._version,
            "confidence": self._section.confidence,
            "forgetting": forgetting(rows, self._section.forgetting),
            "units": units,
        }
        facts |= {"server": served} if served else {}
        facts |= {"warnings": self._warnings} if self._warnings else {}
        there = {(unit["model"], unit["task"]) for unit in units}
        return self._out.finish(
            rows_in=len(units),
            rows_kept=len(units),
            files=[*(self._out.path / name for unit in units for name in unit["files"]), *records],
            facts=self._clock.facts(**facts),
            keep_earlier=any((unit["model"], unit["task"]) not in there for unit in before),  # what is asked for no more has been paid for
        )

    def _called(self, role: str) -> str:
        """How a model is called in what others read; a student has a name of its own."""
        recipe, spec = self._recipe, self._recipe.teacher if role == "teacher" else self._recipe.student
        assert spec is not None
        export = recipe.export.model_name if recipe.export is not None else None
        return (export or recipe.name) if role == "student" else public_name(spec)

    def _drop_others(self, units: Sequence[Unit]) -> None:
        """Removes what a stop left between lm-eval's files and the line that names them."""
        named = {self._out.path / Path(name).parent for unit in units for name in unit["files"]}
        for role in self._section.models:
            for place in (self._out.path / role).iterdir():
                if place not in named:
                    shutil.rmtree(place)
