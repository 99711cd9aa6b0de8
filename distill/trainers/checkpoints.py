"""Checkpoints: when one is whole, and what had been counted up to there; `launches` says from which a run goes on.

A checkpoint is whole once every process has written its part, all of it is on disk, and its mark is there: a JSON file with a digest
of every file, the launch that wrote it, and sums that the trainer keeps only in memory. An older one goes only then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from distill.models.processes import Processes
from distill.run.files import digest_file, flush, write_json
from distill.trainers.launches import MARK, Checkpoint, Launch


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
        seen = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MARK}
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
        write_json(folder / MARK, {"files": digests, "launch": self._launch._asdict(), "sums": [sums for _, sums in found]})
        flush(folder)
        flush(folder.parent)
        rotate_checkpoints(str(args.output_dir), self._limit, state.best_model_checkpoint)


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
