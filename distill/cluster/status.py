"""`distill status`: how far a run is, what its jobs do, and why what has failed did; from the run's folder and, where it is there, squeue.

It locks nothing and writes nothing, and reads no more of a run than it needs: a second for one of thousands of parts.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.cluster.failed import Failure, failures_of, last_of, last_submission, left_alone
from distill.cluster.jobs import JobStatus, jobs_of
from distill.cluster.progress import StepProgress, progress_of
from distill.cluster.underway import UnderWay
from distill.errors import visible
from distill.run.log import duration_text, spent_text
from distill.run.owned import is_of_another_run
from distill.stages import FOLDERS

_EVERY_S = 5.0  # that a watched status is made anew
_STYLES = {"done": "dim", "at work": "green", "failed": "bold red", "damaged": "bold red", "outdated": "yellow", "stopped": "yellow"}
_FROM_FILES = "* over the time since the step began, pauses included"


class Status(NamedTuple):
    """How a run stands."""

    run: Path
    at: float
    """Unix time."""
    steps: list[StepProgress]
    jobs: list[JobStatus]
    failures: list[Failure]
    notes: list[str]
    """What else is to be known: why rounds have ended, why Slurm could not be asked, where no job is left."""

    def state(self, each: StepProgress) -> str:
        """A step's state, with what its jobs say."""
        return "failed" if any(failure.step == each.step for failure in self.failures) and each.state != "damaged" else each.state


def status_of(run: Path) -> Status:
    """How a run stands.

    Args:
        run: Its folder.

    Raises:
        MissingStageError: it holds neither a stage nor a recipe.
    """
    at = time.time()
    found, (jobs, no_queue) = progress_of(run, at), jobs_of(run)
    runs = {job.step for job in jobs if job.state == "runs"}
    steps = [each._replace(state="at work") if each.step in runs and not each.is_finished else each for each in found.steps]
    notes = [f"the rounds have ended: {found.ended_because}"] if found.ended_because else []
    notes += [f"jobs as they said it themselves: {no_queue}"] if no_queue else []
    others = [str(each.step) for each in steps if not each.step.number and is_of_another_run(run / FOLDERS[each.step.stage])]
    notes += [f"made in another run, and linked here: {', '.join(others)}"] if others else []
    names = dict.fromkeys(job.name for job in jobs if job.step is None)
    notes += [f"{name}: {_jobs(last_of([job for job in jobs if job.name == name]))}" for name in names]
    alone = [each.step for each in steps if not each.is_finished and left_alone(jobs, each.step)]
    notes += [f"{step}: there is more to do, and no job is left to do it; submit it again" for step in alone]
    return Status(run, at, steps, jobs, failures_of(run, steps, jobs), notes)


def show(run: Path, *, as_json: bool = False, watch: bool = False) -> bool:
    """Prints how a run stands; true if nothing has failed for good.

    Args:
        run: Its folder.
        as_json: One object, for machines.
        watch: Make it anew every few seconds until Ctrl-C or until all is done; on a terminal, elsewhere it is printed once.

    Raises:
        MissingStageError: as `status_of`.
    """
    found = status_of(run)
    if watch and (as_json or not sys.stdout.isatty()):
        print("--watch: only a terminal is refreshed, so this is printed once", file=sys.stderr)
    if as_json:
        print(json.dumps(as_object(found), indent=2))
    elif watch and sys.stdout.isatty():
        found = _watch(found)
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(as_table(found))
    return not found.failures


def _watch(found: Status) -> Status:
    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(as_table(found), console=Console(highlight=False), auto_refresh=False) as live:
        while not all(each.is_finished for each in found.steps):
            time.sleep(_EVERY_S)
            found = status_of(found.run)
            live.update(as_table(found), refresh=True)
    return found


def as_table(found: Status) -> RenderableType:
    """The status for people: a line a step, then notes, then what has failed."""
    rows = [_row(found, each) for each in found.steps]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(("step", "state", "done", "parts", "rate", "left", "jobs", "")):
        if any(row[place].plain for row in rows):
            table.add_column(name, overflow="fold", no_wrap=place < 2)
    for row in rows:
        table.add_row(*(cell for place, cell in enumerate(row) if any(each[place].plain for each in rows)))
    done = sum(each.is_finished for each in found.steps)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.at))
    lines = [Text(visible(f"{found.run}: {done} of {len(found.steps)} steps are done, {when}"))]
    by_files = any(each.work.reckoned == "files" and each.left_s is not None for each in found.steps)
    notes = [Text(visible(note)) for note in (*found.notes, *([_FROM_FILES] if by_files else []))]
    return Group(*lines, table, *notes, *_failed(found))


def _failed(found: Status) -> Iterator[Text]:
    for failure in found.failures:
        where = " ".join(filter(None, (str(failure.step or ""), failure.where)))
        yield Text(visible(f"\n{where}: {failure.why}"), "bold red")
        yield from (Text(f"  {line}") for line in failure.lines)
        if failure.more:
            yield Text(f"  and {failure.more:,} more tasks of this step")


def _row(found: Status, each: StepProgress) -> list[Text]:
    state, work = found.state(each), each.work
    left = "" if each.left_s is None else duration_text(each.left_s) + ("*" if work.reckoned == "files" else "")
    if each.is_finished and work.seconds is not None:
        left = f"took {duration_text(work.seconds)}"
    parts = "" if work.parts is None else f"{work.parts.done:,} of {work.parts.of:,}, {work.parts.at_work:,} begun"
    rate = "" if each.left_s is None or not work.rate else _rate(work.rate, work.unit)
    jobs = _jobs(last_submission(found.jobs, each.step)) if not each.is_finished else ""
    besides = ", ".join(_besides(found, each))
    cells = (str(each.step), state, _done(each), parts, rate, left, jobs, besides)
    return [Text(visible(cell, 300), _STYLES.get(state, "") if place == 1 else "") for place, cell in enumerate(cells)]


def _done(each: StepProgress) -> str:
    work = each.work
    if each.is_finished or work.rows is None:
        return "" if work.rows is None else f"{work.rows:,} {work.unit}"
    about = "" if work.exact else "about "
    of = "" if work.total is None else f" of {work.total:,}"
    share = f" ({work.rows / work.total:.0%})" if work.total else ""
    return f"{about}{work.rows:,}{of} {work.unit}{share}"


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"


def _besides(found: Status, each: StepProgress) -> Iterator[str]:
    work = each.work
    if each.state in ("damaged", "outdated"):
        yield each.why
    if work.doing and not each.is_finished:
        yield work.doing
    if work.kept is not None and each.state != "at work":
        yield f"a restart goes on from step {work.kept:,}"
    if work.written_at is not None and each.state in ("begun", "stopped"):
        yield f"last written {duration_text(max(found.at - work.written_at, 0.0))} ago"
    if work.spent is not None:
        yield spent_text(work.spent)


def _jobs(jobs: Sequence[JobStatus]) -> str:
    if len(jobs) == 1:
        return f"{jobs[0].job} {jobs[0].state}" + (f" ({jobs[0].why})" if jobs[0].state == "waits" and jobs[0].why else "")
    states = Counter(job.state for job in jobs)
    return ", ".join(f"{count:,} {state}" for state, count in states.items())


def as_object(found: Status) -> dict[str, Any]:
    """The status for machines; seconds, Unix times in ISO 8601, UTC."""
    return {
        "run": str(found.run),
        "at": _time(found.at),
        "steps": [
            {"stage": each.step.stage, "round": each.step.number, "state": found.state(each), "why": each.why}
            | {"left_s": each.left_s, **_object(each.work)}
            for each in found.steps
        ],
        "jobs": [
            job._asdict() | {"step": None if job.step is None else {"stage": job.step.stage, "round": job.step.number}, "log": str(job.log)}
            for job in found.jobs
        ],
        "failed": [failure._asdict() | {"step": None if failure.step is None else str(failure.step)} for failure in found.failures],
        "notes": found.notes,
    }


def _object(work: UnderWay) -> dict[str, Any]:
    plain = work._asdict() | {"parts": None if work.parts is None else work.parts._asdict(), "written_at": _time(work.written_at)}
    return {name: value for name, value in plain.items() if name != "held"}


def _time(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
