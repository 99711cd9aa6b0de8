"""What jobs of a cluster leave in a run: how each task began and ended, written by the task itself, since a scheduler forgets.

```
<run>/jobs/submitted.jsonl                     a line a job, as it was given to the scheduler
<run>/jobs/tasks/<name>-<job>[_<task>].jsonl   a line when it begins, and one when it ends, of every attempt
<run>/logs/<name>-<job>[_<task>].log           what it said
```

The lines of a task are written by `slurm/common.sh`: `{"event": "started", "at": "2026-11-27T04:30:00Z", "attempt": 0, "host": "n1"}` and
`{"event": "ended", "at": ..., "attempt": 0, "host": "n1", "code": 75, "signal": "USR1"}`. A task that a node took with it has no second;
one that was seen to be of no use before it began (`cluster/again`) has a log and no record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from distill.run.owned import JOBS, LOGS

__all__ = ["JOBS", "LOGS", "SUBMITTED", "Attempt", "Submitted", "Task", "lines_of", "submitted_in", "tasks_of"]

SUBMITTED = "submitted.jsonl"
"""In `jobs/`, a line a job."""
_NAME = re.compile(r"(?P<name>.+)-(?P<job>\d+)(_(?P<task>\d+))?")


class Attempt(NamedTuple):
    """One time that a task ran; again after a requeue."""

    number: int
    host: str
    started_at: str
    """ISO 8601, UTC."""
    ended_at: str | None
    """Null while it runs, and where nobody could write it down."""
    code: int | None
    """Its exit code; 75 where it ended early and more is to do."""
    signal: str | None
    """That it was sent before, e.g. USR1; null for none."""


class Task(NamedTuple):
    """A job, or a task of an array."""

    name: str
    """Of the step, as `round-01-train`; `generate-2` where an array was split."""
    job: int
    task: int | None
    """Within the array."""
    attempts: list[Attempt]
    log: Path


class Submitted(NamedTuple):
    """A job, or an array of them, as `distill submit` gave it to the scheduler."""

    name: str
    """As its tasks have it."""
    job: int
    steps: list[tuple[str, int]]
    """Stage and round of what it does or serves."""
    tasks: list[int]
    """Of an array; none of a plain job."""
    follow_up: int
    """The how-manieth that goes on from the first of its name; 0 for that."""
    after: list[int]
    """Jobs that must have ended well before it begins."""
    serves: str | None
    """The role whose model it holds."""
    ends: str | None
    """The serving job that it ends; it does nothing else."""
    submission: str
    """The same for all jobs that were given at once: the recipe that was kept for them."""


def submitted_in(run: Path) -> list[Submitted]:
    """What was given to the scheduler of a run, in that order; lines that can't be read are passed over.

    Args:
        run: Its folder.
    """
    file = run / JOBS / SUBMITTED
    found = []
    for line in lines_of(file) if file.is_file() else ():
        with suppress(KeyError, TypeError, ValueError):
            found.append(_submitted(line))
    return found


def _submitted(line: dict[str, Any]) -> Submitted:
    job = int(line["job"])
    return Submitted(
        name=str(line["name"]),
        job=job,
        steps=[(str(stage), int(number)) for stage, number in line.get("steps") or ()],
        tasks=ids_in(line.get("tasks") or ""),
        follow_up=int(line.get("follow_up") or 0),
        after=[int(needed) for word in line.get("sbatch") or () for needed in _needed(word)],
        serves=line.get("serves"),
        ends=line.get("ends"),
        submission=str(line.get("recipe") or f"job {job}"),
    )


def _needed(word: str) -> list[str]:
    """The jobs that a word of sbatch says must have ended well."""
    kinds = word.removeprefix("--dependency=").split(",") if word.startswith("--dependency=") else []
    return [job for kind in kinds if kind.startswith("afterok:") for job in re.findall(r"\d+", kind)]


def ids_in(ranges: str) -> list[int]:
    """Task ids from what Slurm writes, `1-3,5%2`."""
    found: list[int] = []
    for low, high in re.findall(r"(\d+)(?:-(\d+))?", ranges.partition("%")[0]):
        found += range(int(low), int(high or low) + 1)
    return found


def tasks_of(run: Path) -> Iterator[Task]:
    """All tasks that have begun, in the order of their jobs.

    Args:
        run: Its folder.
    """
    found = []
    for file in (run / JOBS / "tasks").glob("*.jsonl"):
        match = _NAME.fullmatch(file.stem)
        if match:
            task = int(match["task"]) if match["task"] else None
            found.append(Task(match["name"], int(match["job"]), task, _attempts(file), run / LOGS / f"{file.stem}.log"))
    return iter(sorted(found, key=lambda each: (each.job, each.task or 0)))


def _attempts(file: Path) -> list[Attempt]:
    found: dict[int, Attempt] = {}
    for line in lines_of(file):
        number = int(line.get("attempt", 0))
        if line.get("event") == "started":
            found[number] = Attempt(number, line.get("host", ""), line.get("at", ""), None, None, None)
        elif line.get("event") == "ended" and number in found:
            found[number] = found[number]._replace(ended_at=line.get("at"), code=line.get("code"), signal=line.get("signal"))
    return [found[number] for number in sorted(found)]


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole: a node that died may have left a half."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
