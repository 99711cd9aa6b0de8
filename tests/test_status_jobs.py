"""What the status of a run says of its jobs: by what they wrote themselves, and by what a squeue on the path knows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_status import started

from distill.cluster.status import show, status_of
from distill.cluster.tasks import submitted_in
from distill.recipe.reading import recipe_text
from distill.run.folder import StageFolder

Queue = Callable[..., None]


@pytest.fixture
def queue(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Puts a squeue on the path that knows so many jobs and no others; called with null, one that does not answer."""
    place = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{place}")

    def know(*lines: str | None) -> None:
        said = "".join(f"echo '{line}'\n" for line in lines if line is not None)
        ends = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1" if None in lines else ""
        empty = "" if said or ends else "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
        (place / "squeue").write_text(f"#!/bin/sh\n{said}{ends}{empty}\n")
        (place / "squeue").chmod(0o755)

    return know


def submit(run: Path, job: int, name: str, after: int | None = None, follow_up: int = 0, tasks: str | None = None, at: str = "1") -> None:
    stage, number = (name.split("-")[2], int(name.split("-")[1])) if name.startswith("round") else (name.split("-")[0], 0)
    words = ["sbatch", f"--dependency=afterok:{after}" if after and not follow_up else f"--dependency=afterany:{after}"]
    line = {"job": job, "name": name, "steps": [[stage, number]], "follow_up": follow_up, "tasks": tasks, "sbatch": words, "recipe": at}
    (run / "jobs").mkdir(exist_ok=True)
    with (run / "jobs" / "submitted.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def task(run: Path, name: str, *attempts: int | str | None, log: str = "some work\n", signal: str | None = None) -> None:
    """The record of a task: of each attempt its exit code, or null for none."""
    for folder in ("jobs/tasks", "logs"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    with (run / "jobs" / "tasks" / f"{name}.jsonl").open("w") as file:
        for number, code in enumerate(attempts):
            common = {"at": "2026-11-27T04:30:00Z", "attempt": number, "host": "n1"}
            file.write(json.dumps({"event": "started", **common}) + "\n")
            if code is not None:
                file.write(json.dumps({"event": "ended", **common, "code": code, "signal": signal}) + "\n")
        file.write('{"event": "sta')  # a node died
    (run / "logs" / f"{name}.log").write_text(log)


def states(run: Path) -> dict[str, str]:
    found = status_of(run)
    return {job.id: job.state for job in found.jobs} | {str(each.step): found.state(each) for each in found.steps}


def test_a_job_that_fails_for_good_is_said_with_its_last_lines(tmp_path: Path, queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path)
    submit(tmp_path, 7, "generate")
    submit(tmp_path, 8, "curate", after=7)
    submit(tmp_path, 9, "train", after=8)
    lines = "".join(f"line {number}\r\x1b[2Jrow {number}\n" for number in range(12))
    task(tmp_path, "generate-7", 1, log=f"{lines}error: no more\n\n--- 2026  ended with exit code 1\n")
    queue()
    assert not show(tmp_path)
    said = capsys.readouterr().out
    assert "generate generate-7: exit code 1" in said and "row 5" in said and "row 4" not in said and "error: no more" in said
    assert "line 11" not in said and "\x1b[2J" not in said and "--- 2026" not in said
    assert "8 barred" in said, said
    assert "curate-8" not in said  # the cause alone
    found = states(tmp_path)
    assert found["generate"] == "failed" and found["train"] == found["export"] == "not begun"
    assert {job.id: job.why for job in status_of(tmp_path).jobs}["train-9"] == "it can never begin, because curate-8 has failed"
    queue("8|N/A|PENDING|DependencyNeverSatisfied|")  # where Slurm leaves them in the queue
    assert states(tmp_path)["curate-8"] == "barred"


def test_what_slurm_knows_better_is_no_failure(tmp_path: Path, queue: Queue) -> None:
    started(tmp_path)
    submit(tmp_path, 7, "generate")
    task(tmp_path, "generate-7", None)
    queue("7|N/A|COMPLETED|None|n1")  # its last line is on its way here
    assert states(tmp_path)["generate-7"] == "done" and not status_of(tmp_path).failures
    with (tmp_path / "jobs" / "submitted.jsonl").open("a") as file:
        line = {"job": 8, "name": "generate-end", "steps": [["generate", 0]], "ends": "generate-serve", "sbatch": []}
        file.write(json.dumps(line) + "\n")
    (tmp_path / "logs" / "generate-end-8.log").touch()
    task(tmp_path, "generate-7", 0)
    queue()
    assert states(tmp_path)["generate-end-8"] == "done" and not status_of(tmp_path).failures


def test_what_ended_early_or_was_killed_goes_on_where_a_job_is_left(tmp_path: Path, queue: Queue) -> None:
    started(tmp_path)
    for number, job in enumerate((7, 8, 9)):
        submit(tmp_path, job, "generate", after=job - 1, follow_up=number)
    task(tmp_path, "generate-7", 75, signal="USR1")
    task(tmp_path, "generate-8", None)
    queue("8|N/A|NODE_FAIL|NodeDown|n1", "9|N/A|PENDING|Dependency|")
    found = status_of(tmp_path)
    assert [job.state for job in found.jobs] == ["early", "gone", "waits"] and not found.failures
    assert found.jobs[1].why == "its node failed" and found.jobs[2].why == "Dependency"
    queue("9|N/A|RUNNING|None|n2")
    assert states(tmp_path)["generate"] == "at work"
    task(tmp_path, "generate-9", 137)
    queue()
    [failure] = status_of(tmp_path).failures
    assert failure.why == "it was killed by signal 9"
    task(tmp_path, "generate-9", 75)
    found = status_of(tmp_path)
    assert not found.failures and "no job is left" in found.notes[-1]


def test_a_follow_up_that_sees_no_sense_says_why(tmp_path: Path, queue: Queue) -> None:
    started(tmp_path)
    submit(tmp_path, 7, "generate")
    submit(tmp_path, 8, "generate", after=7, follow_up=1)
    task(tmp_path, "generate-7", 75, 75, 75, log="three times\n")
    (tmp_path / "logs" / "generate-8.log").write_text("error: no progress over 3 attempts\n")
    queue()
    [failure] = status_of(tmp_path).failures
    assert "it ended early" in failure.why and "no progress over 3 attempts" in failure.why and failure.lines == ["three times"]


def test_tasks_of_arrays_are_counted_apart(tmp_path: Path, queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path, count=400)
    submit(tmp_path, 7, "generate-1", tasks="1-3,5")
    submit(tmp_path, 8, "generate-2", tasks="1-90%4")
    assert submitted_in(tmp_path)[0].tasks == [1, 2, 3, 5]
    task(tmp_path, "generate-1-7_1", 0)
    for number in (2, 3, 5):
        task(tmp_path, f"generate-1-7_{number}", 2)
    for number in (1, 2):
        task(tmp_path, f"generate-2-8_{number}", 0)
    task(tmp_path, "generate-2-8_3", 1)
    queue("8|4|RUNNING|None|n1", *(f"8|{number}|PENDING|JobArrayTaskLimit|" for number in range(5, 91)))
    assert not show(tmp_path)
    said = capsys.readouterr().out
    assert "3 done, 4 failed, 1 runs, 86 waits" in " ".join(said.split()) and "and 1 more tasks of this step" in said
    submit(tmp_path, 20, "generate", tasks="2,3,5,93", at="2")  # what failed is submitted again
    queue("20|2|PENDING|Resources|")
    assert not any(failure.where.startswith("generate-1-7") for failure in status_of(tmp_path).failures)


def test_without_slurm_the_records_count(tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    started(tmp_path)
    submit(tmp_path, 7, "generate")
    submit(tmp_path, 8, "curate", after=7)
    task(tmp_path, "generate-7", None)
    queue(None)
    for path in (os.environ["PATH"], "/nowhere"):
        monkeypatch.setenv("PATH", path)
        found = status_of(tmp_path)
        assert [job.state for job in found.jobs] == ["unknown", "unknown"] and not found.failures
        assert found.notes[0].startswith("jobs as they said it themselves: ")
    task(tmp_path, "generate-7", 1)
    assert [failure.where for failure in status_of(tmp_path).failures] == ["generate-7"]


def test_jobs_that_were_submitted_by_hand_and_runs_that_none_has_begun(tmp_path: Path, queue: Queue) -> None:
    recipe = started(tmp_path / "a")
    for name in ("generate-5", "generate-6", "sweep-lr-7"):
        task(tmp_path / "a", name, 1)
    queue("6|N/A|RUNNING|None|n1")
    found = states(tmp_path / "a")
    assert (
        found["generate-5"] == "failed"
        and found["generate"] == "at work"
        and [each.where for each in status_of(tmp_path / "a").failures] == ["sweep-lr-7"]
    )
    submit_to = tmp_path / "b"
    submit_to.mkdir()
    submit(submit_to, 9, "prompts")
    (submit_to / "jobs" / "recipe-1.yaml").write_text(recipe_text(recipe))
    queue("9|N/A|PENDING|Priority|")
    assert states(submit_to) | {"prompts-9": "waits", "prompts": "not begun"} == states(submit_to)
    with StageFolder(submit_to / "prompts", "prompts", {}):
        assert states(submit_to)["prompts"] == "at work"


def test_names_from_a_record_can_do_no_harm(tmp_path: Path, queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path)
    record: Any = {"job": 7, "name": "generate", "steps": "nonsense", "tasks": 5, "sbatch": None}
    submit(tmp_path, 7, "generate")
    with (tmp_path / "jobs" / "submitted.jsonl").open("a") as file:
        file.write(f'{json.dumps(record)}\n[1]\n{{"name": 3}}\nhalf')
    queue("7|N/A|PENDING|\x1b[31mred|", "nonsense", "|||")
    assert show(tmp_path)
    said = capsys.readouterr().out
    assert "7 waits" in said and "\x1b[31m" not in said
