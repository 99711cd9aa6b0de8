"""From which checkpoint a training goes on, and in which launch it can. Imports no torch: a login node asks before a job is submitted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import IntegrityError, StageConflictError
from distill.recipe.learning import Train
from distill.recipe.steps import step_size
from distill.run.files import digest_file, read_json
from distill.run.log import say

MARK = "whole"
"""In a checkpoint's folder, the file that says it is whole."""


class Launch(NamedTuple):
    """What of a launch decides which rows a step takes, and who can read its checkpoints."""

    processes: int
    rows_a_step: int
    sharding: str
    """How accelerate names what deals weights out to processes, FSDP or DEEPSPEED; else empty."""


class Checkpoint(NamedTuple):
    """A whole one."""

    path: Path
    step: int
    launch: Launch
    sums: list[dict[str, Any]]
    """Of each process, what it had summed up since the last log, and before."""

    def check(self, launch: Launch) -> None:
        """Refuses a launch that would take other rows from here on, or can't read the weights.

        Raises:
            StageConflictError: it would.
        """
        there = self.launch
        if there.rows_a_step != launch.rows_a_step:
            raise StageConflictError(
                f"{self.path}: was written by {there.processes} processes with {there.rows_a_step:,} rows a step; this launch of "
                f"{launch.processes} takes {launch.rows_a_step:,}, so rows would be left out or trained on twice. Launch "
                f"{there.processes} processes, or set train.trainer_args.per_device_train_batch_size and gradient_accumulation_steps "
                f"so that they make {there.rows_a_step:,} rows on all processes together; or start anew with --redo."
            )
        if there.sharding != launch.sharding or (there.sharding and there.processes != launch.processes):
            raise StageConflictError(
                f"{self.path}: was written by {there.processes} processes{_with(there.sharding)}, this launch has {launch.processes}"
                f"{_with(launch.sharding)}. Weights that are dealt out are read by the launch that wrote them: repeat it, or start anew "
                "with --redo."
            )


def refuse_launch(folder: Path, train: Train, processes: int, *, on_cpu: bool = False, sharding: str | None = None) -> None:
    """Refuses a launch that could not go on from the checkpoints that are there, by their marks alone.

    Args:
        folder: With the checkpoints; it need not be there.
        train: How the student is trained; in a round as `Recipe.train_in_rounds`.
        processes: That would be launched, over all nodes.
        on_cpu: Whether they have no GPUs.
        sharding: As in `Launch`; null where it is not known.

    Raises:
        StageConflictError: it would take other rows, or could not read the weights.
        RecipeError: rows can't be dealt out to so many.
    """
    marks = (path / MARK for _, path in _by_step(folder))
    found = next((mark.parent for mark in marks if mark.is_file() and mark.stat().st_size), None)
    if found is None:
        return
    rows = step_size(train.global_batch_size, train.trainer_args, processes, on_cpu, whole=train.is_live).rows
    written = Launch(**read_json(found / MARK)["launch"])
    Checkpoint(found, 0, written, []).check(Launch(processes, rows, written.sharding if sharding is None else sharding))


def _by_step(folder: Path) -> Iterator[tuple[int, Path]]:
    """Steps and checkpoints, whole or not, the newest first; not a copy that somebody has set aside."""
    names = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    there = {int(step): path for step, path in names.items() if step.isdecimal()}
    for step in sorted(there, reverse=True):
        yield step, there[step]


def last_whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, byte for byte; None where there is none. Newer ones, which are not, are deleted.

    Args:
        folder: With the checkpoints.
    """
    for step, path in _by_step(folder):
        if (path / MARK).exists():
            try:
                return _read(path, step)
            except IntegrityError as error:
                say(f"train     {error} An older one is taken, or training begins anew.")
        shutil.rmtree(path)
    return None


def _read(path: Path, step: int) -> Checkpoint:
    """A checkpoint with a mark.

    Raises:
        IntegrityError: a file of it, or of the best one it remembers, is gone or altered.
    """
    if not (path / MARK).stat().st_size:
        raise IntegrityError(f"{path}: was marked by an earlier version of the kit, without digests.")
    try:
        mark = read_json(path / MARK)
    except IntegrityError:
        raise IntegrityError(f"{path / MARK}: was altered.") from None
    for name, digest in mark["files"].items():
        if not (path / name).is_file() or digest_file(path / name) != digest:
            raise IntegrityError(f"{path / name}: is gone or was altered.")
    best = json.loads((path / "trainer_state.json").read_text(encoding="utf-8")).get("best_model_checkpoint")
    if best is not None and Path(best).name != path.name:
        other = path.parent / Path(best).name
        _read(other, int(other.name.removeprefix("checkpoint-")))
    return Checkpoint(path, step, Launch(**mark["launch"]), mark["sums"])


def _with(sharding: str) -> str:
    return f" with {sharding}" if sharding else ""
