"""What of a run has failed for good, and what was said of it last: by a job, by a command on this machine, or by a damaged folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.cluster.jobs import JobStatus
from distill.cluster.progress import StepProgress
from distill.cluster.underway import tail
from distill.errors import visible
from distill.stages import Step

_LINES, _LONGEST = 8, 300  # of a log, and characters of one
_MOST = 3  # tasks of a step whose lines are shown


class Failure(NamedTuple):
    """Something that won't go on by itself."""

    step: Step | None
    where: str
    """A task as its log is called, or a folder."""
    why: str
    lines: list[str]
    """The last of its log."""
    more: int = 0
    """Further tasks of the same step that have failed."""


def failures_of(run: Path, steps: Sequence[StepProgress], jobs: Sequence[JobStatus]) -> list[Failure]:
    """What has failed for good of steps that are not done.

    Args:
        run: Its folder.
        steps: As far as they are.
        jobs: All of the run.
    """
    found: list[Failure] = []
    for each in steps:
        if each.state == "damaged":
            found.append(Failure(each.step, "", each.why, []))
        elif each.state not in ("done", "outdated"):
            lost = _lost(each.step, last_submission(jobs, each.step))
            found += lost
            if not lost and each.state != "at work":
                found += _crashed(run, each)
    return [*found, *_of_no_step(jobs)]


def _of_no_step(jobs: Sequence[JobStatus]) -> list[Failure]:
    """What has failed of jobs that do no step of the run, as those of a sweep; that one was ended says nothing of it."""
    found = []
    for name in dict.fromkeys(job.name for job in jobs if job.step is None):
        ended = [job for job in jobs if job.name == name and job.state not in ("gone", "cancelled", "barred")]
        found += _lost(None, last_of(ended))
    return found


def _lost(step: Step | None, jobs: Sequence[JobStatus]) -> list[Failure]:
    """Those of some jobs that have failed for good: the first few, the last of which counts the others."""
    lost = [failure for tasks in _tasks(jobs) if (failure := _failed(step, tasks))]
    return [failure._replace(more=len(lost) - _MOST if place == _MOST - 1 else 0) for place, failure in enumerate(lost[:_MOST])]


def last_submission(jobs: Iterable[JobStatus], step: Step) -> list[JobStatus]:
    """The jobs of a step that were submitted last: what failed before them is theirs to do."""
    return last_of([job for job in jobs if job.step == step])


def last_of(jobs: Sequence[JobStatus]) -> list[JobStatus]:
    """Those of some jobs that were submitted last."""
    return [job for job in jobs if job.submission == jobs[-1].submission]


def left_alone(jobs: Iterable[JobStatus], step: Step) -> bool:
    """Whether a task of a step that is not done has ended early, and none is left to go on from it."""
    ends = [[task.state for task in tasks] for tasks in _tasks(last_submission(jobs, step))]
    return any(states[-1] == "early" and not {"done", "runs"} & set(states) for states in ends)


def last_lines(log: Path) -> list[str]:
    """The last lines of a log, safe to be shown, without those that a batch script frames a task with."""
    lines = (line.rsplit("\r", 1)[-1].rstrip() for line in tail(log))
    return [visible(line, _LONGEST) for line in lines if line and not line.startswith("--- ")][-_LINES:]


def _tasks(jobs: Sequence[JobStatus]) -> list[list[JobStatus]]:
    """A job, or a task of an array, with those that go on from it, in order."""
    found: dict[tuple[str, int | None], list[JobStatus]] = {}
    for job in sorted(jobs, key=lambda job: job.follow_up):
        found.setdefault((job.name, job.task), []).append(job)
    return list(found.values())


def _failed(step: Step | None, tasks: Sequence[JobStatus]) -> Failure | None:
    """Why a task has failed for good; null where it is done, at work, or another goes on from it."""
    begun = [task for task in tasks if task.state != "waits"]
    if not begun or any(task.state in ("done", "runs") for task in tasks) or all(task.state == "barred" for task in begun):
        return None  # what bars it is said of the job that has failed
    last, waits = begun[-1], len(begun) < len(tasks)
    ran = next((task for task in reversed(begun) if task.attempts), last)
    if last.state in ("early", "unknown") or (last.state == "gone" and waits):
        return None
    said = last_lines(last.log)[-1:] if last is not ran else []  # of a follow-up that saw no sense in going on
    return Failure(step, ran.id, "; ".join([ran.why, *(said or ([last.why] if last is not ran else []))]), last_lines(ran.log))


def _crashed(run: Path, each: StepProgress) -> list[Failure]:
    """The record of an error that nobody foresaw, where the step has written nothing since."""
    written_at = each.work.written_at
    logs = [] if written_at is None else [log for log in run.glob("failed-*.log") if log.stat().st_mtime >= written_at]
    return [Failure(each.step, log.name, "an error that was not foreseen", last_lines(log)) for log in sorted(logs)[-1:]]
