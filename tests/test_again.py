"""Whether a job goes on from those before it, by their records and by what the step has on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.cluster.again import main, progress, verdict

ENDED = {"early": 75, "killed": 137, "failed": 1, "done": 0, "taken by its node": None}


def record(run: Path, name: str, *ends: str, attempt: int = 0) -> None:
    """An attempt of a job, or of a task of an array, for each way to end."""
    place = run / "jobs" / "tasks"
    place.mkdir(parents=True, exist_ok=True)
    with (place / f"{name}.jsonl").open("a") as file:
        for number, end in enumerate(ends, attempt):
            file.write(json.dumps({"event": "started", "at": "2026-11-27T04:30:00Z", "attempt": number, "host": "n1"}) + "\n")
            if ENDED[end] is not None:
                file.write(json.dumps({"event": "ended", "at": "...", "attempt": number, "host": "n1", "code": ENDED[end]}) + "\n")


def checkpoint(run: Path, step: int) -> None:
    place = run / "student" / "checkpoints" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "whole").touch()


def asks(run: Path, job: int, *words: str, name: str = "train", attempt: int = 0, **site: str) -> int:
    environment = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(attempt), **site}
    return main([str(run), name, *words], environment)


@pytest.mark.parametrize("end", ENDED)
def test_what_failed_for_good_is_not_gone_on_from(end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goes_on = end != "failed"
    checkpoint(tmp_path, 1)
    record(tmp_path, "train-7", "failed")  # and was submitted again
    record(tmp_path, "train-8", end)
    assert verdict(tmp_path, "train").go_on == goes_on
    assert asks(tmp_path, 9, DISTILL_FORERUNNER="8") == (0 if goes_on else 1)
    assert goes_on or capsys.readouterr().out.startswith("given up: train-8 failed with exit code 1, see")
    assert "train-7" in verdict(tmp_path, "train", now=(8, 0)).reason  # the attempt that asks is none of those before it
    assert asks(tmp_path, 9) == 0  # submitted again, after a correction


def test_a_task_goes_on_from_its_own_forerunner(tmp_path: Path) -> None:
    record(tmp_path, "generate-6_2", "failed")
    record(tmp_path, "generate-7_1", "failed")
    record(tmp_path, "generate-7_2", "early")
    record(tmp_path, "generate-2-7_2", "failed")  # of another name
    chain = {"DISTILL_FORERUNNER": "7", "DISTILL_FIRST": "7"}
    assert asks(tmp_path, 8, "--task", "2", name="generate", **chain) == 0
    assert asks(tmp_path, 8, "--task", "1", name="generate", **chain) == 1
    record(tmp_path, "generate-9", "early")  # in one part: what failed in an array before is none of it
    assert asks(tmp_path, 10, name="generate", DISTILL_FIRST="9") == 0


def test_an_end_without_progress_is_given_up_after_some_attempts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path, 40)
    record(tmp_path, "train-1", "early")  # the first of a chain, which asks nobody
    for job, end in ((2, "early"), (3, "killed"), (4, "taken by its node")):
        assert asks(tmp_path, job, DISTILL_FIRST="1") == 0
        record(tmp_path, f"train-{job}", end)
    assert asks(tmp_path, 5, DISTILL_FIRST="1") == 1
    assert "3 attempts in a row came no further (SITE_MAX_IDLE_RESTARTS=3); the last was train-4" in capsys.readouterr().out
    assert asks(tmp_path, 5, DISTILL_FIRST="1", SITE_MAX_IDLE_RESTARTS="4") == 0
    record(tmp_path, "train-5", "early")
    checkpoint(tmp_path, 41)
    assert asks(tmp_path, 6, DISTILL_FIRST="1") == 0
    record(tmp_path, "train-9", "early")  # submitted again, by hand: a new chain
    assert verdict(tmp_path, "train").go_on


def test_requeued_attempts_count_and_a_first_one_that_made_nothing(tmp_path: Path) -> None:
    record(tmp_path, "train-1", "early")
    for attempt in (1, 2):
        assert asks(tmp_path, 1, attempt=attempt) == 0
        record(tmp_path, "train-1", "early", attempt=attempt)
    assert asks(tmp_path, 1, attempt=3) == 1


def test_a_training_of_a_sweep_is_judged_by_its_own_progress(tmp_path: Path) -> None:
    own = tmp_path / "sweep" / "r=8"
    checkpoint(tmp_path / "sweep" / "r=16", 900)  # of another
    record(tmp_path, "sweep-train-1_2", "early")
    for attempt in range(1, 6):
        checkpoint(own, 100 * attempt)
        assert asks(tmp_path, 1, "--task", "2", "--of", str(own), name="sweep-train", attempt=attempt) == 0
        record(tmp_path, "sweep-train-1_2", "early", attempt=attempt)


def test_progress_is_what_is_on_disk(tmp_path: Path) -> None:
    part = tmp_path / "traces" / "parts" / "00002-of-00004"
    other = tmp_path / "traces" / "parts" / "00003-of-00004"
    for place in (part, other):
        place.mkdir(parents=True)
    states = [progress(tmp_path, "generate-2", 2)]
    for change in ("journal.jsonl", "traces-00000.parquet", "manifest.json"):
        (part / change).write_text("a line\n")
        (other / change).write_text("a line\nanother\n")
        states.append(progress(tmp_path, "generate-2", 2))
    assert len({json.dumps(state) for state in states}) == 4 and progress(tmp_path, "generate") != states[-1]
    targets = tmp_path / "rounds" / "02" / "targets"
    targets.mkdir(parents=True)
    (targets / "journal-00000-of-00002.jsonl").write_text("a line\nhalf of o")
    assert progress(tmp_path, "round-02-score", 1)["lines"] == 1 and progress(tmp_path, "round-02-score", 2)["lines"] == 0
    assert progress(tmp_path, "rounds")["lines"] == 1 + 2 + 1  # a command of several steps
