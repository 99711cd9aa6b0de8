"""`distill submit`: gives what is not done of a run to Slurm, as a chain of jobs, and keeps in the run what was given."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from distill.before import quick
from distill.before.findings import Findings
from distill.before.outlook import refuse_what_cannot_end
from distill.cluster import sbatch
from distill.cluster.chain import Job, Wanted, as_ranges, jobs_of, processes_of
from distill.cluster.parts import most_parts
from distill.cluster.place import scripts
from distill.cluster.served import serving_jobs
from distill.cluster.site import Site, read_site, site_file
from distill.cluster.tasks import JOBS, LOGS
from distill.errors import ClusterError
from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.recipe.steps import step_size
from distill.run.files import write_text
from distill.run.log import say
from distill.stages import Step, run_dir, stop_before

SUBMITTED = "submitted.jsonl"


class Submission(NamedTuple):
    """What is to be given to the scheduler."""

    run: Path
    """The run's folder, absolute."""
    file: Path
    """The recipe as the jobs read it, whatever becomes of the one that was named."""
    recipe: Recipe
    """What stands in it."""
    jobs: list[Job]


def submit(recipe: Recipe, wanted: Wanted, site: Site, *, dry_run: bool = False, beside: bool = False) -> bool:
    """Submits what is not done of a run; true if nothing spoke against it.

    Args:
        recipe: The recipe.
        wanted: On which nodes, in how many parts.
        site: The cluster.
        dry_run: Only check, and say what would be submitted.
        beside: Submit although jobs of this run are queued or running.

    Raises:
        ClusterError: the scheduler refuses, or jobs of the run are under way.
        StageConflictError: what is there was made with other settings, or in another number of parts.
    """
    if dry_run and not quick.run(recipe):
        return False
    asked = prepare(recipe, wanted, site)
    if dry_run and not check(asked, wanted, site):
        return False
    if not asked.jobs:
        say(f"submit    nothing to do: all of {asked.run} is done", result=True)
    elif dry_run:
        show(asked, site)
    else:
        hand_over(asked, site, beside=beside)
    return True


def prepare(recipe: Recipe, wanted: Wanted, site: Site) -> Submission:
    """The jobs of all that is not done of a run.

    Raises:
        StageConflictError: a step would be refused, or was begun in another number of parts.
    """
    run = run_dir(recipe).absolute()
    recipe = recipe.model_copy(update={"run_dir": str(run)})
    file = run / JOBS / f"recipe-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.yaml"
    steps = [step for step in refuse_what_cannot_end(recipe) if not step.number or stop_before(recipe, step) is None]
    return Submission(run, file, recipe, jobs_of(recipe, file, steps, wanted, site, serving_jobs(recipe, steps)))


def check(asked: Submission, wanted: Wanted, site: Site) -> bool:
    """Says whether processes, rows of a step, parts and arrays go together; true if they do."""
    found, recipe = Findings(), asked.recipe
    file = site_file()
    found.good("site", str(file) if file.is_file() else f"no file {file}: Slurm's defaults")
    if any(step.stage == "train" for job in asked.jobs for step in job.steps):
        found.prove("processes that train", lambda: _step(recipe, wanted, site))
    if wanted.shards is not None:
        found.prove("parts", lambda: _parts(asked, wanted.shards or 1))
    arrays = [job for job in asked.jobs if job.tasks]
    if arrays:
        limit = f"at most {site.max_at_once:,} of a step at once" if site.max_at_once else "as many at once as there is room for"
        found.good("arrays", f"{len(arrays):,} of {sum(len(job.tasks) for job in arrays):,} tasks, {limit}, ids up to {site.max_array:,}")
    return found.end("these jobs would be submitted:")


def _step(recipe: Recipe, wanted: Wanted, site: Site) -> str:
    processes, on_cpu = processes_of(wanted, site), not wanted.gpus
    trains = [recipe.train] if recipe.trains_on_traces or recipe.train.is_live else []
    trains += [recipe.train_in_rounds] if recipe.rounds else []
    size = [step_size(train.global_batch_size, train.trainer_args, processes, on_cpu, whole=train.is_live) for train in trains][-1]
    told = f"{processes:,} on {wanted.nodes:,} nodes; {size.rows:,} rows a step, {size.at_once:,} at once in {size.passes:,} passes"
    if size.rows < processes:
        raise ClusterError(
            f"train.global_batch_size: {size.rows:,} rows a step leave {processes - size.rows:,} of {processes:,} processes without any. "
            f"Set it to {processes:,} or more, or take fewer nodes."
        )
    return told


def _parts(asked: Submission, shards: int) -> str:
    most = most_parts(asked.recipe, Step("generate"))
    to_do = {step for job in asked.jobs for step in job.steps}
    if Step("generate") in to_do and most is not None and shards > most:
        raise ClusterError(f"--shards: {shards:,} parts of {most:,} prompts would leave some without any. Give at most {most:,}.")
    fewer = [f"{step} {most:,}" for step in sorted(to_do) if (most := most_parts(asked.recipe, step)) is not None and most < shards]
    return f"{shards:,}" + (f"; of fewer prompts fewer: {', '.join(fewer)}" if fewer else "")


def show(asked: Submission, site: Site) -> None:
    """Says every job: how it would be submitted, and for each task its command and what that writes."""
    for job in asked.jobs:
        waits = dependency(job, {other.name: [f"<{other.name}>"] for other in asked.jobs})
        more = f", and {job.follow_ups} more behind it that go on" if job.follow_ups and not site.requeue else ""
        say(f"\n{job.name}{f', {len(job.tasks):,} tasks' if job.tasks else ''}{more}", result=True)
        words = sbatch.words_of(job, asked.run, site, waits)
        say(f"  {shlex.join(words if not job.ends else [*words, '--wrap', f'scancel <{job.ends}>'])}", result=True)
        for place, (command, files) in enumerate(zip(job.commands, job.writes, strict=True)):
            task = f"{job.tasks[place]:>6}  " if job.tasks else "  "
            say(f"{task}{command}  ->  {files}", result=True)
    say(f"\n{len(asked.jobs):,} jobs; nothing was submitted", result=True)


def hand_over(asked: Submission, site: Site, *, beside: bool = False) -> list[int]:
    """Submits the jobs, and returns their numbers; if one of them is refused, none stays.

    Raises:
        ClusterError: the scheduler refuses, or jobs of the run are under way.
    """
    refuse_beside(asked.run, beside)
    for name in (JOBS, LOGS):
        (asked.run / name).mkdir(parents=True, exist_ok=True)
    write_text(asked.file, recipe_text(asked.recipe))
    given: dict[str, list[str]] = {}
    numbers: list[int] = []
    try:
        for job in asked.jobs:
            given[job.name] = []
            for follow_up in range(1 + (0 if site.requeue else job.follow_ups)):
                number = _give(asked, job, site, given, follow_up)
                given[job.name].append(str(number))
                numbers.append(number)
            array = f"[{as_ranges(job.tasks)}]" if job.tasks else ""
            behind = f", and to go on {', '.join(given[job.name][1:])}" if given[job.name][1:] else ""
            say(f"submit    {given[job.name][0]}  {job.name}{array}{behind}", result=True)
    except BaseException:
        sbatch.cancel(numbers)
        raise
    say(f"submit    {len(numbers)} jobs for {asked.run}; to end all of them: scancel {' '.join(map(str, reversed(numbers)))}", result=True)
    return numbers


def _give(asked: Submission, job: Job, site: Site, given: Mapping[str, Sequence[str]], follow_up: int) -> int:
    """Submits a job, or one that goes on from it, and writes it down."""
    waits = dependency(job, given) if not follow_up else f"afterany:{given[job.name][-1]}"
    words = sbatch.words_of(job, asked.run, site, waits)
    if job.ends:
        words += ["--wrap", f"scancel {' '.join(reversed(given[job.ends]))}"]
    more = {"DISTILL_FORERUNNER": given[job.name][-1]} if follow_up else {}
    number = sbatch.submit(words, sbatch.environment_of(job, asked.run, site, more))
    line = {
        "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "job": number,
        "name": job.name,
        "steps": [[step.stage, step.number] for step in job.steps],
        "follow_up": follow_up,
        "tasks": as_ranges(job.tasks) if job.tasks else None,
        "shards": int(job.environment["DISTILL_SHARDS"]) if job.tasks and "DISTILL_SHARDS" in job.environment else None,
        "offset": int(job.environment.get("DISTILL_SHARD_OFFSET", "0")),
        "serves": job.serves,
        "ends": job.ends,
        "recipe": str(asked.file),
        "sbatch": words,
    }
    with (asked.run / JOBS / SUBMITTED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return number


def dependency(job: Job, given: Mapping[str, Sequence[str]]) -> str:
    """What a job waits for, as Slurm writes it: of those it needs the last that goes on, of a server the first.

    Args:
        job: Which.
        given: The numbers of each job before it, its follow-ups last.
    """
    kinds = {
        "afterok": [given[name][-1] for name in job.after],
        "after": [given[job.beside][0]] if job.beside else [],
        "afterany": [given[name][-1] for name in job.behind],
    }
    return ",".join(f"{kind}:{':'.join(numbers)}" for kind, numbers in kinds.items() if numbers)


def refuse_beside(run: Path, beside: bool) -> None:
    """Refuses to submit a run of which jobs are queued or running.

    Raises:
        ClusterError: naming them.
    """
    there = [] if beside else sbatch.under_way([line["job"] for line in submitted(run)])
    if there:
        named = ", ".join(map(str, there[:8])) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        raise ClusterError(
            f"{run}: jobs of this run are queued or running ({named}). Wait for them (`distill status {os.path.relpath(run)}`), end them "
            f"(scancel {' '.join(map(str, there))}), or add --beside if these jobs have nothing to do with them."
        )


def submitted(run: Path) -> list[dict[str, Any]]:
    """What was given to the scheduler of a run, a mapping a job.

    Raises:
        ClusterError: a line can't be read.
    """
    file = run / JOBS / SUBMITTED
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    except ValueError:
        raise ClusterError(f"{file}: holds a line that is no JSON. Delete that line.") from None


def wanted_from(site: Site, **asked: Any) -> Wanted:
    """What the command line asks for, and where it says nothing what the site has."""
    given = {name: value for name, value in asked.items() if value is not None}
    return Wanted(**{"gpus": site.gpus_per_node, "follow_ups": site.follow_ups} | given)


def run(recipe: Recipe, *, dry_run: bool, beside: bool, **asked: Any) -> bool:
    """What the command does; true if nothing spoke against it.

    Raises:
        DistillError: as `submit`, and where the site's file can't be used.
    """
    site = read_site()
    asked["launch"] = _launch_file(asked["launch"]) if asked["launch"] else None
    return submit(recipe, wanted_from(site, **asked), site, dry_run=dry_run, beside=beside)


def _launch_file(given: Path) -> Path:
    """A file for accelerate, or one of `slurm/launch/` by its name.

    Raises:
        ClusterError: there is none.
    """
    kept = scripts() / "launch" / f"{given}.yaml"
    found = next((path for path in (given, kept) if path.is_file()), None)
    if found is None:
        names = ", ".join(sorted(path.stem for path in kept.parent.glob("*.yaml")))
        raise ClusterError(f"--launch: there is no file {given}. Give the path of one, or a name of slurm/launch/: {names}.")
    return found.absolute()
