"""Whether a job goes on from one before it: `python -m distill.cluster.again RUN NAME [--task T]`; exit code 1 and a line say why not.

It does not where the one before has failed for good (an exit code that is neither 0 nor 75, and no signal's), or where several in a row
have come no further. How far a step is, is seen from its files, and noted before every attempt:

```
<run>/jobs/progress/<name>[_<task>].jsonl     {"job": 12, "attempt": 0, "progress": {"checkpoint": 40, ...}}
```
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.cluster.jobs import step_named
from distill.cluster.tasks import JOBS, Attempt, lines_of, tasks_of
from distill.errors import EARLY
from distill.run.manifest import JOURNAL, MANIFEST, SHARDS
from distill.run.parts import PARTS
from distill.stages import FOLDERS, ROUNDS

MOST_IDLE = 3
"""Attempts without progress after which a task is given up, where the site says no other number."""
_KILLED = 128  # from this exit code on by a signal
_CHUNK = 2**20

Progress = dict[str, int]
Begun = tuple[int, int]
"""A job's number, and which attempt of it."""


class Verdict(NamedTuple):
    """Whether to go on."""

    go_on: bool
    reason: str


class _Before(NamedTuple):
    begun: Begun
    task: int | None
    label: str
    attempt: Attempt
    log: Path


def verdict(
    run: Path, name: str, task: int | None = None, *, shard: int | None = None, now: Begun | None = None, most_idle: int = MOST_IDLE
) -> Verdict:
    """Whether another attempt at a task has sense; reads files alone.

    Args:
        run: The run's folder.
        name: Of the job, as its records have it.
        task: Within an array; null judges by all tasks of the name.
        shard: The part that the task does, counted from 1; null looks at the progress of the whole step.
        now: The attempt that asks, which does not count.
        most_idle: Attempts without progress after which there is none.
    """
    before = [each for each in _attempts(run, name, task) if now is None or each.begun < now]
    last = {each.task: each for each in before}
    failed = next((each for each in last.values() if _has_failed(each.attempt)), None)
    if failed is not None:
        return Verdict(
            False, f"{failed.label} failed with exit code {failed.attempt.code}, see {failed.log}: correct that, and submit again"
        )
    if not before:
        return Verdict(True, "nothing went before")
    if before[-1].attempt.code == 0:
        return Verdict(True, f"{before[-1].label} is done")
    idle = _idle(before, progress(run, name, shard), _notes(run, name, task))
    if idle >= most_idle:
        return Verdict(
            False, f"{idle} attempts in a row came no further (SITE_MAX_IDLE_RESTARTS={most_idle}); the last was {before[-1].label}"
        )
    return Verdict(True, f"goes on from {before[-1].label}")


def _attempts(run: Path, name: str, task: int | None) -> list[_Before]:
    found = []
    for each in tasks_of(run):
        if each.name == name and task in (None, each.task):
            label = f"{name}-{each.job}" + (f"_{each.task}" if each.task is not None else "")
            for attempt in each.attempts:
                again = f" (attempt {attempt.number})" if attempt.number else ""
                found.append(_Before((each.job, attempt.number), each.task, label + again, attempt, each.log))
    return sorted(found, key=lambda before: before.begun)


def _has_failed(attempt: Attempt) -> bool:
    return attempt.code is not None and attempt.code not in (0, EARLY) and 0 < attempt.code < _KILLED


def _idle(before: Sequence[_Before], found: Progress, notes: Mapping[Begun, Progress]) -> int:
    """How many attempts in a row have come no further, the last of them first.

    The first job of a chain asks nobody, so nothing is noted of what was there before it: it counts where nothing is there now.
    """
    if found.pop("batches"):  # that a host is at work on, for hours
        return 0
    idle = 0
    for each in reversed(before):
        noted = notes.get(each.begun)
        if noted is None:
            return idle + (not any(found.values()))
        if noted != found:
            return idle
        idle += 1
    return idle


def progress(run: Path, name: str, shard: int | None = None) -> Progress:
    """What a step has on disk, by numbers that change whenever more is.

    Args:
        run: The run's folder.
        name: Of the job; where it does no single step, all of the run counts.
        shard: A part of the step, counted from 1.
    """
    found = dict.fromkeys(("manifests", "lines", "tables", "targets", "checkpoint", "batches"), 0)
    for file in _files(run, name, shard):
        if file.name == MANIFEST:
            found["manifests"] += 1
        elif file.name == JOURNAL or file.name == SHARDS or file.name.startswith("journal-"):
            found["lines"] += _num_lines(file)
        elif file.suffix == ".parquet":
            found["tables"] += 1
        elif file.suffix == ".targets":
            found["targets"] += 1
        elif file.name == "whole" and file.parent.name.startswith("checkpoint-"):
            found["checkpoint"] = max(found["checkpoint"], int(file.parent.name.removeprefix("checkpoint-")))
        elif file.name.startswith("batches"):
            found["batches"] += 1
    return found


def _files(run: Path, name: str, shard: int | None) -> Iterator[Path]:
    step = step_named(name)
    if step is None:
        yield from run.rglob("*")
        return
    place = (run / ROUNDS / f"{step.number:02d}" if step.number else run) / FOLDERS[step.stage]
    if shard is None:
        yield from place.rglob("*")
        return
    yield from place.glob(f"*-{shard - 1:05d}-of-*")  # targets are counted from 0, parts from 1
    for part in (place / PARTS).glob(f"{shard:05d}-of-*"):
        yield from part.rglob("*")


def _num_lines(file: Path) -> int:
    try:
        with file.open("rb") as content:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: content.read(_CHUNK), b""))
    except FileNotFoundError:  # it became a table just now
        return 0


def _note_file(run: Path, name: str, task: int | None) -> Path:
    return run / JOBS / "progress" / f"{name}{'' if task is None else f'_{task}'}.jsonl"


def _notes(run: Path, name: str, task: int | None) -> dict[Begun, Progress]:
    file = _note_file(run, name, task)
    if not file.exists():
        return {}
    found = {}
    for line in lines_of(file):
        there: Progress = line["progress"]
        there.pop("batches", None)
        found[line["job"], line["attempt"]] = there
    return found


def note(run: Path, name: str, task: int | None, now: Begun, found: Progress) -> None:
    """Writes down how far a step was before an attempt."""
    file = _note_file(run, name, task)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as notes:
        notes.write(json.dumps({"job": now[0], "attempt": now[1], "progress": found}) + "\n")


def main(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Says why not, or notes how far it is and says that it goes on; returns the exit code.

    Args:
        words: RUN NAME [--task T].
        environment: As Slurm, the batch script and the site's file set it.
    """
    parser = argparse.ArgumentParser(prog="python -m distill.cluster.again", allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--task", type=int)
    asked = parser.parse_args(words)
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID") or "0"
    now = (int(job), int(environment.get("SLURM_RESTART_COUNT") or 0))
    shards = asked.task is not None and environment.get("DISTILL_SHARDS")
    shard = asked.task + int(environment.get("DISTILL_SHARD_OFFSET") or 0) if shards else None
    most_idle = int(environment.get("SITE_MAX_IDLE_RESTARTS") or MOST_IDLE)
    found = verdict(asked.run, asked.name, asked.task, shard=shard, now=now, most_idle=most_idle)
    print(f"again     {found.reason}" if found.go_on else f"given up: {found.reason}", flush=True)
    if found.go_on:
        note(asked.run, asked.name, asked.task, now, progress(asked.run, asked.name, shard))
    return 0 if found.go_on else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
