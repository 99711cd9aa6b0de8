"""Jobs that end early on a real Slurm: signals, preemption, nodes that die, time limits, and what fails for good."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import commands
import pytest
import torch
from slurm_cluster import Cluster
from slurm_runs import (
    attempts,
    complete,
    distill,
    lines,
    losses,
    reached,
    recipe,
    said,
    same_tables,
    site,
    states,
    submit,
    submitted,
    weights,
)

from distill.run.manifest import MANIFEST
from distill.run.parts import Part

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its targets, made by one process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    distill("run", recipe(folder / "small.yaml", whole=False), "--run_dir", folder / "run", "--no-check", "--until", "score")
    return folder / "run"


def copied(run: Path, place: Path, *folders: str) -> Path:
    for folder in folders:
        shutil.copytree(run / folder, place / folder)
    return place


def test_an_array_goes_on_through_a_signal_a_dead_node_and_preemption(slurm: Cluster, alone: Path, tmp_path: Path) -> None:
    """Two tasks at once, each with a node of its own: one is sent the signal, the other's node dies, then the third is preempted."""
    run = copied(alone, tmp_path / "run", "prompts")
    path = recipe(tmp_path / "small.yaml", whole=False, batch_size=1)
    by_hand = Cluster(slurm.folder)
    by_hand.environment |= site(tmp_path, SITE_REQUEUE=1) | {"DISTILL_SLURM": str(ROOT / "slurm"), "DISTILL_PYTHON": sys.executable}
    words = (
        "--exclusive",
        "--requeue",
        "--array=1-3",
        "--output=/dev/null",
        ROOT / "slurm" / "array.sbatch",
        "generate",
        path,
        "--run_dir",
        run,
    )
    job = by_hand.submit(*words)

    def journal(task: int) -> Path:
        return Part(task - 1, 3).folder(run / "traces") / "journal.jsonl"

    def node_of(task: int) -> str:
        return next(each["NodeList"] for each in slurm.jobs() if each.get("ArrayJobId") == str(job) and each["ArrayTaskId"] == str(task))

    slurm.until(lambda: lines(journal(1)) >= 1 and lines(journal(2)) >= 1, "two tasks have written")
    slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_1")
    node = node_of(2)
    slurm.down(node)
    slurm.until(reached(journal(3), 1), "the third has written")
    slurm.preempt()
    slurm.up(node)
    complete(slurm.until_ended(job), run)
    same_tables(alone, run, ["prompts", "traces"])
    notes = attempts(run, "generate")
    assert [each.get("code") for each in notes[0] if each["event"] == "ended"] == [75, 0], said(run)
    assert len([each for each in notes[1] if each["event"] == "started"]) == 2 and notes[1][1]["event"] == "started", said(run)
    assert len([each for each in notes[2] if each["event"] == "started"]) == 2, said(run)


def test_training_goes_on_through_a_signal_preemption_and_a_dead_node(slurm: Cluster, alone: Path, tmp_path: Path) -> None:
    """On two nodes, the three after each other; the weights are those of two processes that nothing disturbed, to the bit."""
    path = recipe(tmp_path / "small.yaml", whole=False, steps=STEPS)
    plain, run = (copied(alone, tmp_path / name, "prompts", "traces", "curated", "targets") for name in ("plain", "run"))
    assert commands.launch(["-m", "distill.train", "--config", path, "--run_dir", plain], 2).returncode == 0
    numbers = submit(slurm, path, run, "--nodes", "2", SITE_FOLLOW_UPS=2)["train"]
    assert len(numbers) == 3
    metrics = run / "student" / "metrics.jsonl"
    slurm.until(reached(metrics, 4), "training has begun")
    slurm.run("scancel", "--signal=USR1", "--batch", str(numbers[0]))
    slurm.until(lambda: slurm.job(numbers[0])["JobState"] not in ("RUNNING", "COMPLETING"), "the first job has ended")
    assert slurm.job(numbers[0])["ExitCode"] == "75:0", said(run)
    so_far = lines(metrics)
    slurm.until(reached(metrics, so_far + 4), "the second job trains")
    slurm.preempt()
    slurm.until(lambda: slurm.job(numbers[1])["Restarts"] == "1", "it is preempted")
    so_far = lines(metrics)
    slurm.until(reached(metrics, so_far + 4), "it trains again")
    slurm.down("node2")
    slurm.up("node2")
    jobs = slurm.until_ended()
    assert lines(metrics) >= STEPS, said(run)
    assert states(jobs, numbers)[str(numbers[-1])] == "COMPLETED", said(run)
    assert slurm.job(numbers[1])["Restarts"] == "2"
    assert losses(run) == losses(plain)
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(run)[name]), name


@pytest.mark.nightly
def test_training_goes_on_behind_its_time_limit(slurm: Cluster, alone: Path, tmp_path: Path) -> None:
    """The limit is a minute, Slurm's least, and the signal comes half a minute before it."""
    path = recipe(tmp_path / "small.yaml", whole=False, steps=400)
    plain, run = (copied(alone, tmp_path / name, "prompts", "traces", "curated", "targets") for name in ("plain", "run"))
    assert commands.launch(["-m", "distill.train", "--config", path, "--run_dir", plain], 2).returncode == 0
    numbers = submit(slurm, path, run, "--nodes", "2", SITE_FOLLOW_UPS=9, SITE_SIGNAL_S=30, SBATCH_TIMELIMIT="1")["train"]
    jobs = slurm.until_ended()
    assert slurm.job(numbers[0])["ExitCode"] == "75:0" and states(jobs, numbers)[str(numbers[-1])] == "COMPLETED", said(run)
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(run)[name]), name


def test_what_fails_for_good_ends_its_dependents_and_is_gone_on_from(slurm: Cluster, alone: Path, tmp_path: Path) -> None:
    """The teacher is not there; when it is, a task of the array is cancelled; then that one alone is submitted."""
    teacher, away = tmp_path / "teacher", tmp_path / "away"
    shutil.copytree(ROOT / "distill" / "embedded" / "teacher", teacher)
    run = tmp_path / "run"
    path = recipe(tmp_path / "small.yaml", whole=False, steps=2, teacher=str(teacher))

    def give(*cancelled: int) -> dict[str, list[int]]:
        slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
        given = submit(slurm, path, run, "--shards", "3", SITE_FOLLOW_UPS=1)
        for task in cancelled:
            slurm.run("scancel", *(f"{number}_{task}" for number in given["generate"]))
        return given

    def go_on() -> list[dict[str, str]]:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
        return slurm.until_ended()

    given = give()
    teacher.rename(away)
    jobs = go_on()
    assert set(states(jobs, given["prompts"]).values()) == {"COMPLETED"}
    assert set(states(jobs, given["generate"]).values()) == {"FAILED"}
    for name in ("curate", "score", "train"):
        assert set(states(jobs, given[name]).values()) == {"CANCELLED"}, name
    told = distill("status", run, environment=slurm.environment, code=1)
    assert f"generate-{given['generate'][0]}_1: exit code 1" in told and str(teacher) in told and "curate-" not in told, told
    away.rename(teacher)
    given = give(2)
    assert "prompts" not in given
    jobs = go_on()
    first = given["generate"][0]  # Slurm keeps no record of a task that was cancelled before it began
    assert [task for task in (1, 2, 3) if (run / "logs" / f"generate-{first}_{task}.log").exists()] == [1, 3], said(run)
    assert set(states(jobs, given["curate"]).values()) == {"CANCELLED"}, said(run)
    given = give()
    assert next(line["tasks"] for line in submitted(run) if line["job"] == given["generate"][0]) == "2"
    go_on()
    complete(slurm.until_ended(given["generate"][0]), run)
    assert (run / "student" / MANIFEST).exists()
    same_tables(alone, run, ["prompts"])


def test_a_large_run_is_checked_before_it_is_submitted(tmp_path: Path) -> None:
    """64 nodes of 8 GPUs; what does not divide is said on the login node, without torch and without Slurm."""
    path = recipe(tmp_path / "large.yaml")
    large = ["--run_dir", str(tmp_path / "run"), "--dry-run", "--nodes", "64", "--gpus-per-node", "8", "--prompts.max_prompts", "1000"]
    told = distill("submit", path, *large, environment={**os.environ, **site(tmp_path)}, code=1)
    assert "16 rows a step" in told and "512 processes" in told
    told = distill("submit", path, *large, "--train.global_batch_size", "512", environment={**os.environ, **site(tmp_path)})
    assert "512 on 64 nodes" in told and "--shard 512/512" in told and "nothing was submitted" in told
    assert not (tmp_path / "run").exists()
