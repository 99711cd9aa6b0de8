"""What jobs of a cluster leave in a run: how each task began and ended, written by the task itself, since a scheduler forgets.

```
<run>/jobs/submitted.jsonl                     a line a job, as it was given to the scheduler
<run>/jobs/tasks/<name>-<job>[_<task>].jsonl   a line when it begins, and one when it ends, of every attempt
<run>/logs/<name>-<job>[_<task>].log           what it said
```

The lines of a task are written by `slurm/common.sh`: `{"event": "started", "at": "2026-11-27T04:30:00Z", "attempt": 0, "host": "n1"}` and
`{"event": "ended", "at": ..., "attempt": 0, "host": "n1", "code": 75, "signal": "USR1"}`. A task that a node took with it has no second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

JOBS = "jobs"
"""In a run's folder, what was submitted and how it went."""
LOGS = "logs"
"""In a run's folder, what its jobs said."""
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
    for line in _lines(file):
        number = int(line.get("attempt", 0))
        if line.get("event") == "started":
            found[number] = Attempt(number, line.get("host", ""), line.get("at", ""), None, None, None)
        elif line.get("event") == "ended" and number in found:
            found[number] = found[number]._replace(ended_at=line.get("at"), code=line.get("code"), signal=line.get("signal"))
    return [found[number] for number in sorted(found)]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are whole: a node that died may have left a half."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
