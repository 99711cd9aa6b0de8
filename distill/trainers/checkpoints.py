"""Checkpoints: when one is whole, from which a run goes on, and what had been counted up to there.

A checkpoint is whole once every process has written its part, all of it is on disk, and its mark is there: a JSON file with a digest
of every file, the launch that wrote it, and sums that the trainer keeps only in memory. An older one goes only then.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from distill.errors import IntegrityError, StageConflictError
from distill.models.processes import Processes
from distill.run.files import digest_file, flush, read_json, write_json
from distill.run.log import say

_MARK = "whole"


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


class CheckpointMark(TrainerCallback):
    """Marks checkpoints as whole, deletes older ones, and gives a resumed trainer back what it had summed up; behind the last step it ends.

    Args:
        processes: That wait for each other.
        launch: This one.
        resumed: From which the run goes on.
    """

    trainer: Any
    """Set before training begins."""

    def __init__(self, processes: Processes, launch: Launch, resumed: Checkpoint | None) -> None:
        self._processes, self._launch, self._resumed = processes, launch, resumed
        self._limit: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the deletion of old checkpoints over, since the trainer's own comes before the mark, and restores the sums."""
        self._limit, args.save_total_limit = args.save_total_limit, None
        if self._resumed is None:
            return
        if state.global_step >= state.max_steps:
            # The trainer asks whether it is at its end only behind a step, so it would take another.
            self.trainer._run_epoch = lambda **_: setattr(self.trainer.control, "should_training_stop", True)
        if self._resumed.launch.processes == self._processes.count:
            _restore(self.trainer, self._resumed.sums[self._processes.rank])
        else:  # no state of a random generator is this process's own
            set_seed(args.seed + self._resumed.step, device_specific=True)
            _restore(self.trainer, _of_another_launch(self._resumed.sums, self._processes.rank))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Waits for all processes, flushes and digests what they wrote, then writes the mark."""
        folder, processes = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self._processes
        processes.wait()
        seen = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != _MARK}
        files = sorted(set().union(*processes.gather(seen)))  # a network file system may show others' files to some of them late
        own = {}
        for name in files[processes.rank :: processes.count]:
            flush(folder / name)
            own[name] = digest_file(folder / name)
        found = processes.gather((own, _sums(self.trainer)))
        if processes.rank:
            return
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            flush(place)
        digests = {name: digest for part, _ in found for name, digest in part.items()}
        write_json(folder / _MARK, {"files": digests, "launch": self._launch._asdict(), "sums": [sums for _, sums in found]})
        flush(folder)
        flush(folder.parent)
        rotate_checkpoints(str(args.output_dir), self._limit, state.best_model_checkpoint)


def last_whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, byte for byte; None where there is none. Newer ones, which are not, are deleted.

    Args:
        folder: With the checkpoints.
    """
    names = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    there = {int(step): path for step, path in names.items() if step.isdecimal()}  # not a copy that somebody has set aside
    for step in sorted(there, reverse=True):
        path = there[step]
        if (path / _MARK).exists():
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
    if not (path / _MARK).stat().st_size:
        raise IntegrityError(f"{path}: was marked by an earlier version of the kit, without digests.")
    try:
        mark = read_json(path / _MARK)
    except IntegrityError:
        raise IntegrityError(f"{path / _MARK}: was altered.") from None
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


def _sums(trainer: Any) -> dict[str, Any]:
    """What the trainer counts in memory alone: without it, what is logged after a resume would be of the last piece."""
    return {
        "loss_logged": trainer._total_loss_scalar,
        "loss_since": trainer._tr_loss.item(),
        "logged_step": trainer._globalstep_last_logged,
        "tokens": getattr(trainer, "_total_train_tokens", 0),
        "metrics": {name: [float(value) for value in values] for name, values in trainer._metrics["train"].items()},
        "batches": trainer.sums() if hasattr(trainer, "sums") else None,
    }


def _restore(trainer: Any, sums: dict[str, Any]) -> None:
    trainer._total_loss_scalar, trainer._globalstep_last_logged = sums["loss_logged"], sums["logged_step"]
    trainer._tr_loss = torch.full_like(trainer._tr_loss, sums["loss_since"])
    trainer._initial_global_step = 0  # by which the mean loss of a training is taken
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = sums["tokens"]
    for name, values in sums["metrics"].items():
        trainer._metrics["train"][name].extend(values)
    if sums["batches"] is not None:
        trainer.restore(sums["batches"])


def _of_another_launch(sums: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """What one of so many other processes goes on from: the loss is a mean over processes, sums of batches are all the first's."""
    loss = sum(each["loss_since"] for each in sums) / len(sums)
    batches = [each["batches"] for each in sums if each["batches"] is not None]
    together = None
    if batches and rank == 0:
        together = {"seen": sum(each["seen"] for each in batches), "names": batches[0]["names"]}
        together["values"] = [sum(values) for values in zip(*(each["values"] for each in batches), strict=True)]
    return sums[0] | {"loss_since": loss, "batches": together}
