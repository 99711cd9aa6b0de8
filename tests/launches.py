"""Launches of several processes on CPUs, by the kit's own launch files."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commands

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "slurm" / "launch"
_KINDS = {"ddp": "DDP", "fsdp2": "FSDP"}
_CPU = {"DEEPSPEED": {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}}


def launch(
    file: str, words: Sequence[str | Path], *, processes: int = 2, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` does with one of the launch files and these words.

    Args:
        file: Its name, without `.yaml`.
        words: A program or `-m` and a module, and arguments.
        processes: How many.
        environment: Besides this process's.
    """
    options = ("--config_file", FILES / f"{file}.yaml", "--machine_rank", "0")  # as slurm/train.sbatch gives them
    return commands.launch(words, processes, *options, environment={**os.environ, **(environment or {})})


def trained(file: str, recipes: Sequence[str | Path], *, kind: str = "", processes: int = 2) -> subprocess.CompletedProcess[str]:
    """What training these recipes says, one after another (see `ranks.py`); `kind` where the recipe decides it, not the file."""
    kind = kind or _KINDS.get(file, "DEEPSPEED")
    return launch(file, [ROOT / "tests" / "ranks.py", kind, *recipes], processes=processes, environment=_CPU.get(kind))


def in_two_processes(file: str, *recipes: str | Path, kind: str = "") -> None:
    """Trains one after another in two processes; a recipe that ends in ! is interrupted behind its first checkpoint and resumed."""
    result = trained(file, recipes, kind=kind)
    assert result.returncode == 0, result.stderr.partition("ChildFailedError")[0][-9000:]
    assert all("going on from step 5" in result.stdout for recipe in recipes if str(recipe).endswith("!"))


def held(run: Path, rank: int = 0) -> dict[str, Any]:
    """What a rank held of a training."""
    found: dict[str, Any] = json.loads((run / f"held{rank}.json").read_text())
    return found


def dealt_out(run: Path, *, weights: bool = True) -> None:
    """Asserts that no rank of two held much more than half of a training's weights, or of the optimizer's averages alone."""
    for rank in (0, 1):
        found = held(run, rank)
        here, there = found["averages"]
        assert found["type"] != "MULTI_CPU" and 0 < here <= 0.6 * there, found
        if weights:
            here, there = found["weights"]
            assert 0 < here <= 0.6 * there and not found["not_dealt_out"], found
