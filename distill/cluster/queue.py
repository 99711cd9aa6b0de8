"""What Slurm still knows of some jobs. It forgets an ended one after minutes (MinJobAge), so what it doesn't know is no answer."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from typing import NamedTuple

_LONGEST_S = 15.0  # that a scheduler under load may take to answer
_FORMAT = "%F|%K|%T|%r|%N"
_ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"})
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
NEVER = "DependencyNeverSatisfied"
"""Slurm's reason of a job that waits for one that has failed."""


class Queued(NamedTuple):
    """What Slurm says of a job, or of a task of an array."""

    state: str
    """Slurm's word: PENDING, RUNNING, TIMEOUT, ..."""
    reason: str
    """Why it waits or has ended; empty for none."""
    nodes: str

    @property
    def has_ended(self) -> bool:
        """Whether it won't run any more."""
        return self.state in _ENDED

    @property
    def waits(self) -> bool:
        """Whether it is yet to run, or to run again."""
        return self.state in _WAITING


Queue = dict[tuple[int, int | None], Queued]


def ask(jobs: Collection[int]) -> tuple[Queue | None, str]:
    """What squeue says of jobs, by job and task; null with the reason where it can't be asked.

    Args:
        jobs: Their numbers, of arrays that of the array.
    """
    words = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}", f"--jobs={','.join(map(str, sorted(jobs)))}"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_LONGEST_S)
    except OSError:
        return None, "there is no squeue here"
    except subprocess.TimeoutExpired:
        return None, f"squeue gave no answer within {_LONGEST_S:.0f} s"
    if answer.returncode and "invalid job id" not in answer.stderr.lower():  # which it says where it has forgotten all of them
        return None, f"squeue failed: {' '.join(answer.stderr.split())[:200]}"
    found: Queue = {}
    for line in answer.stdout.splitlines():
        job, task, state, reason, nodes = [*line.split("|"), "", "", "", ""][:5]
        if job.isdecimal():
            found[int(job), int(task) if task.isdecimal() else None] = Queued(state, "" if reason == "None" else reason, nodes)
    return found, ""
