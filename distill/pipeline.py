"""Runs one stage, or all of a recipe's stages in order. Knows which stages there are, and nothing of what they do."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from distill.errors import MissingStageError, RecipeError, ServerDiedError, visible
from distill.models.launched import refuse_own_servers, say_idle
from distill.models.processes import SEVERAL, WRITTEN, Processes, refuse_several
from distill.recipe.experiment import Recipe
from distill.recipe.results import ModelRole
from distill.reporting.prices import Rates
from distill.run import early
from distill.run.clock import is_main_process
from distill.run.folder import delete_stage, refuse_to_delete
from distill.run.log import ledger, nothing_to_do, say
from distill.run.manifest import MANIFEST, Manifest, check_files, read_manifest
from distill.run.owned import EARLIER, JOBS, LOGS
from distill.run.parts import Part, begun, part_of
from distill.run.plan import relation
from distill.run.verify import Layout, refuse_damaged_inputs, verify
from distill.stages import (
    CACHE,
    MARKS,
    RECIPE,
    ROUND_STAGES,
    SERVERS,
    SWEEP,
    WRITES,
    Step,
    call,
    folder,
    folders_in,
    previous_student,
    run_dir,
    steps_of,
    stop_before,
    student_folder,
    taken,
)
from distill.stages.links import take

_RESTARTS = 2  # of a server that dies while a stage is at work
_UNITS = {
    "prompts": "prompts",
    "generate": "traces",
    "curate": "traces",
    "score": "traces",
    "train": "rows",
    "rollouts": "traces",
    "evaluate": "answers",
    "benchmark": "tasks",
}


def run_stage(name: str, recipe: Recipe, *, number: int = 0, redo: bool = False) -> Manifest:
    """Runs a stage, or finds it done, and says so in one line.

    Args:
        name: A key of `FOLDERS`.
        recipe: The recipe.
        number: Of the on-policy round, from 1; 0 for the stages outside the rounds.
        redo: Delete what an earlier run made of this stage.
    """
    take(recipe)
    target = folder(recipe, name, number)
    if redo:
        if is_main_process():
            delete_stage(target, WRITES[name])
        Processes().wait()  # else another process could find the old manifest, and take the stage for done
    # In `earlier` stands what comes back if it is asked for.
    there = [place for place in (target, target / EARLIER) if (place / MANIFEST).exists()] if is_main_process() else []
    done_before = read_manifest(there[0]).digest if there else None
    refuse_several(name)
    if name in SEVERAL and not (target / MANIFEST).exists():
        refuse_own_servers(recipe, name)
        say_idle(recipe, name)
    processes = Processes()
    with processes.ending_together():
        manifest: Manifest = _with_server(lambda: _run_stage(Step(name, number), recipe, processes))
    nothing_done = manifest.digest == done_before
    say(nothing_to_do(manifest, target) if nothing_done else ledger(manifest, unit=_UNITS.get(name, "rows")), result=True)
    return manifest


def _with_server(work: Callable[[], Any]) -> Any:
    """Does a stage's work, and goes on with it a few times where the server that it had started died: what came is on disk."""
    for left in reversed(range(_RESTARTS + 1)):
        try:
            return work()
        except ServerDiedError as error:
            early.check()  # a signal to all processes of a job ended the server, too
            if not left:
                raise
            say(f"{visible(str(error), 1000)}\nthe stage goes on with the server started again")
    raise AssertionError("the last one raises")


def _run_stage(step: Step, recipe: Recipe, processes: Processes) -> Manifest:
    """A stage in this process, or its share of it; stages `score` and `train` deal out their work themselves."""
    together = processes.count > 1 and step.stage in WRITTEN
    place = folder(recipe, *step)
    if together and (step.stage != "generate" or recipe.traces is None):
        parts = processes.gather(None if processes.rank else begun(place))[0] or processes.count
        for index in range(processes.rank, parts, processes.count):
            _write_part(step, recipe, Part(index, parts))
        processes.wait()
    found: Manifest | None = None if together and processes.rank else call(step, recipe, "run")  # which puts the parts together
    if together:
        processes.wait()
    return found or read_manifest(place)


def _write_part(step: Step, recipe: Recipe, part: Part, *, completes: bool = False) -> Manifest | None:
    module = importlib.import_module(f"distill.stages.{step.stage}")
    rounds = [step.number] if step.stage in ROUND_STAGES else []
    found: Manifest | None = module.run_shard(recipe, part, *rounds, completes=completes)
    return found


def run_score_shard(recipe: Recipe, shard: str, *, number: int = 0) -> None:
    """Scores one part of the traces, `i/n` counted from 1; whoever finds all parts there completes the stage."""
    take(recipe)
    module = importlib.import_module("distill.stages.score")
    with Processes().ending_together():
        _with_server(lambda: module.run_shard(recipe, shard, number))


def run_shard(name: str, recipe: Recipe, shard: str, *, number: int = 0) -> None:
    """Lets one part of a stage's traces be written, and says so in one line; whoever finds all parts there completes the stage.

    Args:
        name: `generate`, `rollouts` or `evaluate`.
        recipe: The recipe.
        shard: `i/n`, counted from 1; every process of a launch takes a part of it.
        number: Of the on-policy round.

    Raises:
        RecipeError: there is no such part, or the traces are brought and not written.
    """
    if name == "generate" and recipe.traces is not None:
        raise RecipeError("--shard: the recipe brings its traces (section traces), and none are written. Leave it out.")
    asked, target, step = part_of(shard), folder(recipe, name, number), Step(name, number)
    take(recipe)
    done_before = (target / MANIFEST).exists() and read_manifest(target).digest
    refuse_own_servers(recipe, name)
    processes = Processes()
    part = Part(asked.index * processes.count + processes.rank, asked.count * processes.count)
    with processes.ending_together():
        if processes.count > 1:
            _write_part(step, recipe, part)
            processes.wait()
        manifest = None
        if is_main_process():  # it looks whether all parts are there
            manifest = _with_server(lambda: _write_part(step, recipe, part, completes=True))
        processes.wait()
    if manifest is not None:
        nothing_done = manifest.digest == done_before
        say(nothing_to_do(manifest, target) if nothing_done else ledger(manifest, unit=_UNITS[name]), result=True)


def rounds_are_over(recipe: Recipe, step: Step) -> bool:
    """Whether an earlier step of the rounds has ended them, so that this one has nothing to do; then it says so."""
    why = stop_before(recipe, step)
    if why is not None:
        say(f"{step.stage:<9} nothing to do in round {step.number}: {why}", result=True)
    return why is not None


def run_rounds(recipe: Recipe) -> None:
    """Runs the on-policy rounds that are still to do, until the last one or a stop condition of `rollouts`."""
    _run([step for step in steps_of(recipe) if step.number], recipe)


def run_pipeline(recipe: Recipe, first: str | None = None, last: str | None = None) -> None:
    """Runs all stages and ends with the table of results and the path of the report.

    Args:
        recipe: The recipe.
        first: Start with this stage; what it reads must be there.
        last: Stop after this stage.
    """
    steps = select(steps_of(recipe), first, last)
    _run(steps, recipe)
    if any(step.stage == "report" for step in steps):
        show_report(recipe)


def show_report(recipe: Recipe) -> None:
    """Says the table of results and where the page is.

    Raises:
        IntegrityError: one of them is gone or was altered.
    """
    report = folder(recipe, "report")
    check_files(report)
    say("\n" + (report / "summary.txt").read_text(encoding="utf-8"), result=True)
    say(f"report: {report / 'report.html'}", result=True)


def select(steps: Sequence[Step], first: str | None, last: str | None, option: str = "--from") -> list[Step]:
    """The steps from the first of one stage to the last of another.

    Raises:
        RecipeError: the recipe has no such stage, or they are in the other order.
    """
    names = [step.stage for step in steps]
    for given, name in ((option, first), ("--until", last)):
        if name is not None and name not in names:
            raise RecipeError(f"{given}: this recipe has no stage {name!r}, only {', '.join(dict.fromkeys(names))}.")
    start = names.index(first) if first is not None else 0
    end = len(names) - names[::-1].index(last) if last is not None else len(names)
    if start >= end:
        raise RecipeError(f"--from {first} comes after --until {last}. The order is {', '.join(dict.fromkeys(names))}.")
    return list(steps[start:end])


def _run(steps: Sequence[Step], recipe: Recipe) -> None:
    stopped = False
    for place, step in enumerate(steps):
        early.check()
        if step.number and stopped:
            continue
        if step.number and (place == 0 or steps[place - 1].number != step.number):
            say(f"\nround {step.number} of {recipe.rounds}")
        stop = run_stage(step.stage, recipe, number=step.number).facts.get("stop")
        if step.stage == "curate" and Step("generate") in steps:
            _solve(recipe)
        if step.number and stop is not None:
            stopped = True
            say(f"\nthe rounds end here: {stop}")
            if step.number < recipe.rounds and recipe.rollouts is not None and recipe.rollouts.schedule_over == "all_rounds":
                say("the learning rate has not come to the end of its schedule; see rollouts.schedule_over")


def _solve(recipe: Recipe) -> None:
    """Goes from curate back to generate as long as there are prompts that more samples are asked of; see `generate.unsolved`."""
    while recipe.generate is not None and relation(call(Step("generate"), recipe, "plan")).kind == "grows":
        for stage in ("generate", "curate"):
            early.check()
            run_stage(stage, recipe)


def serve(recipe: Recipe, role: str, number: int = 0) -> None:
    """Starts the server of a role by hand, and ends it when it is interrupted.

    Args:
        recipe: The recipe.
        role: `teacher`, `student` or `base`.
        number: The student that writes in this round; 0: the last one trained.

    Raises:
        RecipeError: there is no such role, or round.
        MissingStageError: no student was trained yet.
    """
    if role not in get_args(ModelRole):
        raise RecipeError(f"--role: got {role!r}. Give one of {', '.join(get_args(ModelRole))}.")
    if number and (role != "student" or number > recipe.rounds):
        raise RecipeError(f"--round {number}: is for role student, in a round from 1 to {recipe.rounds}. Leave it out, or correct it.")
    trained = None
    if role == "student":
        trained = previous_student(recipe, number) if number else student_folder(recipe)
    if trained is not None:
        check_files(trained)
    importlib.import_module("distill.servers.hand").serve(recipe, role, run_dir(recipe), trained)


def verify_run(run: Path) -> bool:
    """Says what of a run is missing, altered, extra or outdated; true if nothing is but the last.

    Args:
        run: Its folder.

    Raises:
        MissingStageError: it holds no stage.
    """
    kept = ("failed-*.log", *(f"{place}/*" for place in (SERVERS, SWEEP, JOBS, LOGS)))
    found = verify(run, Layout(RECIPE, CACHE, kept, MARKS, WRITES))
    for kind, path, why in found.faults:
        say(f"{kind:<8}  {visible(str(path))}" + (f"  ({why})" if why else ""), result=True)
    under_way = f"; {found.unknown:,} of stages under way have no digest yet" if found.unknown else ""
    faults = Counter(fault.kind for fault in found.faults)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in sorted(faults.items())) or "all as they were written"
    say(f"verify    {found.files:,} files: {summary}{under_way}", result=True)
    return set(faults) <= {"outdated"}


def costs_of(run: Path, rates: Rates, hosts: Sequence[str] = (), *, width: int = 140, as_json: bool = False) -> str:
    """What a run cost and what that bought, by its manifests alone.

    Args:
        run: Its folder.
        rates: What is counted with.
        hosts: Models of hosts to compare the student with.
        width: Columns of the terminal.
        as_json: One JSON object instead.

    Raises:
        MissingStageError: it holds no finished stage.
    """
    from distill.reporting import costs
    from distill.reporting.ledger import ledger_of
    from distill.reporting.summary import summarise
    from distill.reporting.worth import worth_of

    summary = summarise(*folders_in(run), {})
    if not summary.stages:
        raise MissingStageError(f"{run}: holds no finished stage. Give the folder of a run, e.g. runs/quickstart, or its recipe.")
    ledger = ledger_of(summary.stages, rates)
    worth = worth_of(summary, ledger, rates, hosts)
    if as_json:
        return json.dumps(costs.as_object(run.name, ledger, worth), indent=2)
    return costs.as_text(run.name, ledger, worth, width)


def delete_from(recipe: Recipe, stage: str) -> None:
    """Deletes a stage and all that follows from it, the last first; `all` deletes every stage.

    Raises:
        StageConflictError: one of them holds what no stage wrote; then none is deleted.
        IntegrityError: what the first would be made from again is damaged; then none is deleted either.
    """
    steps = made_from(recipe, stage)
    refuse_damaged_inputs(run_dir(recipe), [folder(recipe, *step) for step in steps])
    for step in steps:
        refuse_to_delete(folder(recipe, *step), WRITES[step.stage])
    for step in reversed(steps):
        delete_stage(folder(recipe, *step), WRITES[step.stage])


def made_from(recipe: Recipe, stage: str) -> list[Step]:
    """The steps of this run of which something is there, from a stage on; `all` takes every stage, those of another run excepted.

    Raises:
        RecipeError: the recipe has no such stage, or takes it from another run.
    """
    others = taken(recipe)
    if stage in others:
        raise RecipeError(
            f"--redo {stage}: is taken from another run, {others[stage]}. Make it anew there, or leave the section inputs out."
        )
    steps = steps_of(recipe) if stage == "all" else select(steps_of(recipe), stage, None, option="--redo")
    return [step for step in steps if (step.number or step.stage not in others) and folder(recipe, *step).exists()]
