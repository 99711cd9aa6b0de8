"""Runs that are given to the tests' Slurm by the user's own commands, and what must be equal of two runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import torch
from safetensors.torch import load_file
from slurm_cluster import Cluster

from distill.run.manifest import MANIFEST, read_manifest
from distill.run.tables import read_rows
from distill.targets.files import TargetReader

# Scored one at a time: the same bytes, whichever traces a part of them holds.
RECIPE = """\
name: small
seed: 0
teacher: {{model: {teacher}, dtype: float32}}
student: {{model: embedded:student, dtype: float32, adapter: {{type: lora, r: 16}}}}
prompts: {{source: embedded:arithmetic, max_prompts: 48, heldout_size: 24}}
generate: {{max_new_tokens: 192, temperature: 1.0, top_p: 1.0, batch_size: {batch_size}}}
curate: {{checks: [finish, think, math]}}
score: {{target: {{kind: top_k, k: 8}}, batch_size: 1}}
train:
  method: kd
  max_length: 256
  global_batch_size: 16
  trainer_args: {trainer_args}
evaluate: {evaluate}
export: {export}
"""


def recipe(path: Path, *, whole: bool = True, steps: int = 6, batch_size: int = 32, teacher: str = "embedded:teacher") -> Path:
    """The quickstart, with stored targets and few of everything.

    Args:
        path: Its file.
        whole: With evaluation and export.
        steps: Of training.
        batch_size: Traces that are written at once; few take longer.
        teacher: Its model.
    """
    arguments = {"learning_rate": 6e-3, "max_steps": steps, "save_steps": 2}
    more = {"evaluate": "{max_new_tokens: 192, batch_size: 32}", "export": "{parity_prompts: 4}"} if whole else {}
    values = {"evaluate": "null", "export": "null", **more}
    path.write_text(RECIPE.format(teacher=teacher, batch_size=batch_size, trainer_args=json.dumps(arguments), **values))
    return path


def site(folder: Path, **values: str | int) -> dict[str, str]:
    """Variables for the kit's commands, which name a site's file with some values."""
    file = folder / "site.env"
    file.write_text("".join(f"{key}='{value}'\n" for key, value in values.items()))
    return {"DISTILL_SITE": str(file)}


def distill(*words: str | Path, environment: dict[str, str] | None = None, code: int = 0) -> str:
    """What a command of the kit prints that must end with an exit code."""
    result = commands.run(["-m", "distill", *words], environment=environment)
    assert result.returncode == code, f"{result.returncode}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout + result.stderr


def submit(slurm: Cluster, recipe: Path, run: Path, *words: str, **values: str | int) -> dict[str, list[int]]:
    """Gives a run to Slurm by `distill submit`, and returns the numbers of the jobs of each step, those that go on behind the first."""
    before = len(submitted(run))
    distill("submit", recipe, "--run_dir", run, *words, environment={**slurm.environment, **site(recipe.parent, **values)})
    found: dict[str, list[int]] = {}
    for line in submitted(run)[before:]:
        found.setdefault(line["name"], []).append(line["job"])
    return found


def submitted(run: Path) -> list[dict[str, Any]]:
    file = run / "jobs" / "submitted.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def attempts(run: Path, name: str) -> list[list[dict[str, Any]]]:
    """What the tasks of a step wrote down, in the order of their files."""
    files = sorted((run / "jobs" / "tasks").glob(f"{name}-*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def said(run: Path) -> str:
    """The ends of all logs, for a test that failed."""
    logs = sorted((run / "logs").glob("*.log"), key=lambda file: file.stat().st_mtime)
    return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]) for log in logs)


def states(jobs: list[dict[str, str]], numbers: list[int]) -> dict[str, str]:
    """State and exit code of jobs, by their number and the task's."""
    wanted = {str(number) for number in numbers}
    return {
        f"{job.get('ArrayJobId', job['JobId'])}_{job.get('ArrayTaskId', '')}".rstrip("_"): job["JobState"]
        for job in jobs
        if wanted & {job["JobId"], job.get("ArrayJobId", "")}
    }


def complete(jobs: list[dict[str, str]], run: Path) -> None:
    """All have ended well; else the logs are shown."""
    assert jobs
    bad = [(job["JobId"], job["JobName"], job["JobState"], job["ExitCode"]) for job in jobs if job["JobState"] != "COMPLETED"]
    assert not bad, f"{bad}\n{said(run)}"


def lines(file: Path) -> int:
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def reached(file: Path, count: int) -> Callable[[], bool]:
    """Whether a file has so many lines."""
    return lambda: lines(file) >= count


def same_tables(left: Path, right: Path, folders: list[str]) -> None:
    """Tables of two runs are equal to the byte."""
    for name in folders:
        one, other = read_manifest(left / name), read_manifest(right / name)
        assert set(one.tables) == set(other.tables) and (one.rows_kept, one.drops) == (other.rows_kept, other.drops), name
        for table in one.tables:
            assert read_rows(left / name, table) == read_rows(right / name, table), f"{name} {table}"
        assert not [part for part in (right / name).iterdir() if part.name == "parts"], f"{name} still has parts"


def same_targets(left: Path, right: Path) -> None:
    """Targets of two runs are equal to the bit, whatever shards they lie in."""
    one, other = (_targets(run / "targets") for run in (left, right))
    assert one.keys() == other.keys()
    for key, value in one.items():
        for field, array in value.items():
            np.testing.assert_array_equal(array, other[key][field], err_msg=f"{key} {field}")


def _targets(folder: Path) -> dict[str, dict[str, Any]]:
    reader = TargetReader([folder / name for name in read_manifest(folder).files])
    return {reader.key(row): vars(reader[row]) for row in range(len(reader))}


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def weights(run: Path) -> dict[str, torch.Tensor]:
    assert (run / "student" / MANIFEST).exists()
    return load_file(run / "student" / "adapter" / "adapter_model.safetensors")
