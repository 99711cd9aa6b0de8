"""A run on a real Slurm is that of one process: the quickstart, shrunk, by `distill submit`, with arrays and training over two nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from slurm_cluster import Cluster
from slurm_runs import complete, distill, losses, recipe, said, same_tables, same_targets, site, submit, weights

from distill.run.manifest import read_manifest
from distill.run.tables import read_rows

pytestmark = pytest.mark.slow


def test_a_run_by_submit_is_that_of_one_process(slurm: Cluster, tmp_path: Path) -> None:
    path, alone, run = recipe(tmp_path / "small.yaml"), tmp_path / "alone", tmp_path / "jobs"
    distill("run", path, "--run_dir", alone, "--no-check")
    given = submit(slurm, path, run, "--nodes", "2", "--shards", "3", SITE_FOLLOW_UPS=0)
    assert list(given) == ["prompts", "generate", "curate", "score", "train", "evaluate", "report", "export"]
    jobs = slurm.until_ended(given["prompts"][0])
    complete(jobs, run)
    assert len(jobs) == 8 + 2 * 3  # three of them are arrays of three
    same_tables(alone, run, ["prompts", "traces", "curated"])
    same_targets(alone, run)
    facts = read_manifest(run / "student").facts
    assert facts["world_size"] == 2, said(run)
    torch.testing.assert_close(losses(run), losses(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights(run), weights(alone), rtol=1e-3, atol=1e-3)
    _measured_alike(alone, run)
    _logs_say_what_ran(run)
    told = distill("submit", path, "--run_dir", run, environment={**slurm.environment, **site(tmp_path)})
    assert "nothing to do" in told


def _measured_alike(alone: Path, run: Path) -> None:
    """Base and teacher to the byte; of the student's answers, whose weights differ in the last digits, a few may."""
    correct = {}
    for place in (alone, run):
        rows = read_rows(place / "eval", "answers")
        correct[place] = {(row["model_role"], row["prompt_id"], row["sample_index"]): row for row in rows}
    assert correct[alone].keys() == correct[run].keys() and len(correct[run]) == 3 * 24
    differ = [key for key, row in correct[alone].items() if row != correct[run][key]]
    assert {role for role, *_ in differ} <= {"student"} and len(differ) <= 3, differ


def _logs_say_what_ran(run: Path) -> None:
    logs = {log.stem: log.read_text() for log in (run / "logs").glob("*.log")}
    assert len(logs) == 8 + 2 * 3
    for name, text in logs.items():
        assert "\r" not in text, name
        assert all(word in text[:600] for word in ("host ", "revision ", "command ")), f"{name}: {text[:600]}"
    train = next(text for name, text in logs.items() if name.startswith("train-"))
    assert "2 processes on 2 nodes" in train and "rows" in train


def test_the_scripts_work_by_hand(slurm: Cluster, tmp_path: Path) -> None:
    """As slurm/README.md has it: one stage, a stage in parts, training over two nodes; behind each other by hand."""
    path = recipe(tmp_path / "small.yaml", whole=False, steps=2)
    place = ["--chdir", str(Path(__file__).resolve().parent.parent), "--output", f"{tmp_path}/%x-%j.log"]
    by_hand = Cluster(slurm.folder)
    slurm_scripts = Path(__file__).resolve().parent.parent / "slurm"
    by_hand.environment |= site(tmp_path) | {"DISTILL_SLURM": str(slurm_scripts), "DISTILL_PYTHON": sys.executable}
    here = (str(path), "--run_dir", str(tmp_path / "run"))
    first = last = by_hand.submit(*place, slurm_scripts / "stage.sbatch", "prompts", *here)
    for words in (
        ("--array=1-3", slurm_scripts / "array.sbatch", "generate", *here),
        (slurm_scripts / "stage.sbatch", "curate", *here),
        ("--array=1-2", slurm_scripts / "array.sbatch", "score", *here),
        ("--nodes=2", slurm_scripts / "train.sbatch", *here),
    ):
        last = by_hand.submit(f"--dependency=afterok:{last}", "--kill-on-invalid-dep=yes", *place, *words)
    complete(slurm.until_ended(first), tmp_path / "run")
    assert read_manifest(tmp_path / "run" / "student").facts["world_size"] == 2
    log = next((tmp_path / "run" / "logs").glob("train-*.log")).read_text()
    assert "command " in log and json.dumps(str(path))[1:-1] in log
