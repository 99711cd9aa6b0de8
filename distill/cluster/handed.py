"""What `distill submit` gives to Slurm, and how: all jobs of a submission or none, each written down in the run as it was given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from distill.cluster import sbatch
from distill.cluster.chain import Job, as_ranges
from distill.cluster.site import Site
from distill.cluster.tasks import JOBS, LOGS
from distill.errors import ClusterError
from distill.run.files import write_text
from distill.run.log import say

SUBMITTED = "submitted.jsonl"


class Submission(NamedTuple):
    """What is to be given to the scheduler."""

    run: Path
    """The run's folder, absolute."""
    jobs: list[Job]
    files: Mapping[Path, str]
    """What the jobs read, by its path: recipes as they are now, whatever becomes of the file that was named."""
    links: Mapping[Path, str] = {}
    """Links that are made for them, and where each leads."""


def hand_over(asked: Submission, site: Site, *, beside: bool = False) -> list[int]:
    """Submits the jobs, and returns their numbers; if one of them is refused, none stays.

    Raises:
        ClusterError: the scheduler refuses, or jobs of the run are under way.
    """
    for name in (JOBS, LOGS):
        (asked.run / name).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(asked.run / JOBS / ".lock", timeout=0):
            refuse_beside(asked.run, beside)
            return _hand_over(asked, site)
    except Timeout:
        raise ClusterError(f"{asked.run}: another `distill submit` gives jobs of this run to Slurm. Wait for it.") from None


def _hand_over(asked: Submission, site: Site) -> list[int]:
    for path, text in asked.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    for path, target in asked.links.items():
        path.symlink_to(target)
    given: dict[str, list[str]] = {}
    numbers: list[int] = []
    try:
        for job in asked.jobs:
            given[job.name] = []
            for follow_up in range(1 + (0 if site.requeue else job.follow_ups)):
                _give(asked, job, site, given, follow_up, numbers)
            array = f"[{as_ranges(job.tasks)}]" if job.tasks else ""
            behind = f", and to go on {', '.join(given[job.name][1:])}" if given[job.name][1:] else ""
            say(f"submit    {given[job.name][0]}  {job.name}{array}{behind}", result=True)
    except BaseException as error:
        try:
            sbatch.cancel(numbers)
        except ClusterError as other:
            raise ClusterError(f"{error} And {', '.join(map(str, numbers))}, submitted before, are not ended: {other}") from error
        raise
    say(f"submit    {len(numbers)} jobs for {asked.run}; to end all of them: scancel {' '.join(map(str, reversed(numbers)))}", result=True)
    return numbers


def _give(asked: Submission, job: Job, site: Site, given: Mapping[str, list[str]], follow_up: int, numbers: list[int]) -> None:
    """Submits a job, or one that goes on from it, adds its number, and writes it down."""
    waits = dependency(job, given)
    if follow_up:  # and what the first one waits for: where that fails, none of them may begin
        waits = ",".join(filter(None, [waits, f"afterany:{given[job.name][-1]}"]))
    words = sbatch.words_of(job, asked.run, site, waits)
    if job.ends:
        words += ["--wrap", f"scancel {' '.join(reversed(given[job.ends]))}"]
    more = {"DISTILL_FORERUNNER": given[job.name][-1], "DISTILL_FIRST": given[job.name][0]} if follow_up else {}
    if job.beside:
        more |= {"DISTILL_SERVING_JOBS": ",".join(given[job.beside])}
    number = sbatch.submit(words, sbatch.environment_of(job, asked.run, site, more))
    numbers.append(number)
    given[job.name].append(str(number))
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
        "recipe": str(next(iter(asked.files))),
        "sbatch": words,
    }
    with (asked.run / JOBS / SUBMITTED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def dependency(job: Job, given: Mapping[str, Sequence[str]]) -> str:
    """What a job waits for, as Slurm writes it: of those it needs the last that goes on, of a server the first.

    Args:
        job: Which.
        given: The numbers of each job before it, its follow-ups last.
    """
    kinds = {
        "afterok": [given[name][-1] for name in job.after],
        "aftercorr": [given[name][-1] for name in job.task_by_task],
        "after": [given[job.beside][0] + ("_1" if job.servers > 1 else "")] if job.beside else [],  # one server is enough to begin
        "afterany": [given[name][-1] for name in job.behind],
    }
    return ",".join(f"{kind}:{':'.join(numbers)}" for kind, numbers in kinds.items() if numbers)


def refuse_beside(run: Path, beside: bool) -> None:
    """Refuses to submit a run of which jobs are queued or running.

    Raises:
        ClusterError: naming them.
    """
    there = [] if beside else sbatch.under_way(run)
    if there:
        named = ", ".join(map(str, there[:8])) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        raise ClusterError(
            f"{run}: jobs of this run are queued or running ({named}). Wait for them (`distill status {os.path.relpath(run)}`), end them "
            f"(scancel {' '.join(map(str, there))}), or add --beside if these jobs have nothing to do with them."
        )
