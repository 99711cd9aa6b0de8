"""How each job of a run, and each task of an array, stands: what it wrote itself, joined with what Slurm still knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from distill.cluster.queue import NEVER, Queue, ask
from distill.cluster.tasks import LOGS, Submitted, Task, submitted_in, tasks_of
from distill.errors import EARLY
from distill.stages import FOLDERS, Step

State = Literal["waits", "runs", "done", "early", "failed", "gone", "cancelled", "barred", "unknown"]
LOST = ("failed", "gone", "cancelled", "barred")
"""States of what has ended without having done its work or kept more to do."""
_ROUND = re.compile(r"round-(?P<number>\d+)-(?P<stage>[a-z]+)")
_KILLED = 128  # from this exit code on by a signal
_SLURM_SAYS = {
    "TIMEOUT": "its time was out",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "it was preempted",
    "OUT_OF_MEMORY": "the memory was not enough",
    "CANCELLED": "it was cancelled",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline has passed",
}


class JobStatus(NamedTuple):
    """How a job, or a task of an array, stands."""

    name: str
    job: int
    task: int | None
    step: Step | None
    """What it does; null where its name is no step's."""
    follow_up: int
    submission: str
    """What was given to Slurm at once has one name; a task that was submitted by hand has its own."""
    state: State
    """`early`: ended on a signal, with more to do. `gone`: it began, and neither it nor Slurm says how it ended. `barred`: a
    job that it waited for has failed. `unknown`: Slurm can't be asked, and it wrote nothing of its end."""
    why: str
    code: int | None
    """Its exit code."""
    attempts: int
    host: str
    log: Path

    @property
    def id(self) -> str:
        """As Slurm and its log name it."""
        return f"{self.name}-{self.job}" + (f"_{self.task}" if self.task is not None else "")


class Jobs(NamedTuple):
    """All jobs of a run."""

    found: list[JobStatus]
    """In the order of their numbers."""
    no_queue: str
    """Why Slurm could not be asked; empty where it was, or there are no jobs."""


def jobs_of(run: Path) -> Jobs:
    """How the jobs of a run stand.

    Args:
        run: Its folder.
    """
    submitted, tasks = {each.job: each for each in submitted_in(run)}, {(each.job, each.task): each for each in tasks_of(run)}
    plain: list[int | None] = [None]
    places = {(each.job, task) for each in submitted.values() for task in each.tasks or plain} | set(tasks)
    if not places:
        return Jobs([], "")
    queue, no_queue = ask({job for job, _ in places})
    found: dict[int, list[JobStatus]] = {}
    for job, task in sorted(places, key=lambda place: (place[0], place[1] or 0)):
        given, record = submitted.get(job), tasks.get((job, task))
        found.setdefault(job, []).append(_status(run, (job, task), given, record, queue, found))
    return Jobs([each for job in found.values() for each in job], no_queue)


def step_named(name: str) -> Step | None:
    """The step that a job of this name does: `generate`, `generate-2`, `round-01-train`; null for none."""
    plain = re.sub(r"-(\d+|serve|end)$", "", name)
    match = _ROUND.fullmatch(plain)
    step = Step(match["stage"], int(match["number"])) if match else Step(plain)
    return step if step.stage in FOLDERS else None


def _status(
    run: Path,
    place: tuple[int, int | None],
    given: Submitted | None,
    record: Task | None,
    queue: Queue | None,
    before: dict[int, list[JobStatus]],
) -> JobStatus:
    name = given.name if given is not None else record.name if record is not None else ""
    job, task = place
    log = run / LOGS / (f"{name}-{job}" + (f"_{task}" if task is not None else "") + ".log")
    attempts = record.attempts if record is not None else []
    last = attempts[-1] if attempts else None
    step = Step(*given.steps[0]) if given is not None and given.steps else step_named(name)
    state, why = _state(place, given, record, queue, log, before)
    code = last.code if last is not None else None
    host = last.host if last is not None else ""
    follow_up, submission = (given.follow_up, given.submission) if given is not None else (0, f"job {job}")
    return JobStatus(name, job, task, step, follow_up, submission, state, why, code, len(attempts), host, log)


def _state(
    place: tuple[int, int | None],
    given: Submitted | None,
    record: Task | None,
    queue: Queue | None,
    log: Path,
    before: dict[int, list[JobStatus]],
) -> tuple[State, str]:
    known = queue.get(place) if queue is not None else None
    last = record.attempts[-1] if record is not None and record.attempts else None
    if known is not None and not known.has_ended:
        if known.reason == NEVER:
            return "barred", _never(given, before)
        return ("waits", known.reason) if known.waits else ("runs", known.nodes)
    if last is not None and last.ended_at is not None:
        return _ended(last.code, last.signal)
    if known is not None and known.state == "COMPLETED":  # what it wrote may be on its way here
        return "done", ""
    says = _SLURM_SAYS.get(known.state, f"Slurm says {known.state}") if known is not None else ""
    if last is not None:
        return ("unknown", "it wrote no end") if queue is None else ("gone", says or "it wrote no end, and Slurm knows it no more")
    if given is not None and given.ends:  # it writes nothing, and nothing is lost with it
        return "done" if queue is not None else "unknown", ""
    if log.is_file() and queue is not None:
        return "failed", says or "it ended before it began its work"
    if given is not None and any(_is_lost(before.get(job, [])) for job in given.after):
        return "barred", _never(given, before)
    if queue is None:
        return "unknown", "it was submitted, and has written nothing"
    return "cancelled", says or "it never began, and Slurm knows it no more"


def _ended(code: int | None, signal: str | None) -> tuple[State, str]:
    after = f" after SIG{signal}" if signal else ""
    if code == 0:
        return "done", ""
    if code == EARLY:
        return "early", f"it ended early{after}; more is to do"
    if code is not None and code >= _KILLED:
        return "gone", f"it was killed by signal {code - _KILLED}{after}"
    return "failed", f"exit code {code}{after}"


def _is_lost(tasks: list[JobStatus]) -> bool:
    return any(each.state in LOST for each in tasks)


def _never(given: Submitted | None, before: dict[int, list[JobStatus]]) -> str:
    """Why a job can never begin: the jobs that it waited for and that have failed."""
    lost = [before[job][0] for job in given.after if _is_lost(before.get(job, []))] if given is not None else []
    named = ", ".join(f"{each.name}-{each.job}" for each in lost) or "a job that it waited for"
    return f"it can never begin, because {named} has failed"
