"""Whether a job goes on from those before it: `python -m distill.cluster.again RUN NAME [--task T]`; exit code 1 and a line say why not.

It does not where the one before has failed for good (an exit code that is neither 0 nor 75, and no signal's), or where several in a row
have come no further. Those before it are its own attempts and the jobs of the same chain (`DISTILL_FIRST` names the first of them): what
failed in an earlier submission has been corrected since. How far a step is, is seen from its files, and noted before every attempt:

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
from distill.run.manifest import JOURNAL, MANIFEST, PARTS, SHARDS
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
    label: str
    attempt: Attempt
    log: Path


def verdict(
    run: Path,
    name: str,
    task: int | None = None,
    *,
    shard: int | None = None,
    since: int = 0,
    now: Begun | None = None,
    most_idle: int = MOST_IDLE,
    of: Path | None = None,
) -> Verdict:
    """Whether another attempt at a task has sense; reads files alone.

    Args:
        run: The run's folder.
        name: Of the job, as its records have it.
        task: Within an array; null for a plain job.
        shard: The part that the task does, counted from 1; null looks at the progress of the whole step.
        since: The first job that counts.
        now: The attempt that asks, which does not count.
        most_idle: Attempts without progress after which there is none.
        of: The run whose progress counts, where it is another: the training of a sweep; null for none.
    """
    before = [each for each in _attempts(run, name, task) if each.begun[0] >= since and (now is None or each.begun < now)]
    if not before:
        return Verdict(True, "nothing went before")
    last = before[-1]
    if _has_failed(last.attempt):
        return Verdict(False, f"{last.label} failed with exit code {last.attempt.code}, see {last.log}: correct that, and submit again")
    if last.attempt.code == 0:
        return Verdict(True, f"{last.label} is done")
    idle = _idle(before, progress(of or run, name, shard), _notes(run, name, task))
    if idle >= most_idle:
        return Verdict(False, f"{idle} attempts in a row came no further (SITE_MAX_IDLE_RESTARTS={most_idle}); the last was {last.label}")
    return Verdict(True, f"goes on from {last.label}")


def _attempts(run: Path, name: str, task: int | None) -> list[_Before]:
    found = []
    for each in tasks_of(run):
        if each.name == name and task == each.task:
            label = f"{name}-{each.job}" + (f"_{each.task}" if each.task is not None else "")
            for attempt in each.attempts:
                again = f" (attempt {attempt.number})" if attempt.number else ""
                found.append(_Before((each.job, attempt.number), label + again, attempt, each.log))
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
        words: RUN NAME [--task T] [--of RUN].
        environment: As Slurm, the batch script and the site's file set it.
    """
    parser = argparse.ArgumentParser(prog="python -m distill.cluster.again", allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--task", type=int)
    parser.add_argument("--of", type=Path)
    asked = parser.parse_args(words)
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID") or "0"
    now = (int(job), int(environment.get("SLURM_RESTART_COUNT") or 0))
    first = int(environment.get("DISTILL_FIRST") or environment.get("DISTILL_FORERUNNER") or job)
    shards = asked.task is not None and environment.get("DISTILL_SHARDS")
    shard = asked.task + int(environment.get("DISTILL_SHARD_OFFSET") or 0) if shards else None
    most_idle = int(environment.get("SITE_MAX_IDLE_RESTARTS") or MOST_IDLE)
    found = verdict(asked.run, asked.name, asked.task, shard=shard, since=first, now=now, most_idle=most_idle, of=asked.of)
    print(f"again     {found.reason}" if found.go_on else f"given up: {found.reason}", flush=True)
    if found.go_on:
        note(asked.run, asked.name, asked.task, now, progress(asked.of or asked.run, asked.name, shard))
    return 0 if found.go_on else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
