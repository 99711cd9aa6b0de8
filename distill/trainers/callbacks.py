"""Callbacks of a run: metrics in a file, checkpoints that say they are whole, and an end to a loss that is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill.errors import ModelError
from distill.models.processes import Processes
from distill.run.log import progress

_WHOLE = "whole"  # written into a checkpoint after every process has saved its part


class MetricsFile(TrainerCallback):
    """Appends every logged dictionary to `metrics.jsonl`, with the optimizer step it belongs to."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        if PartialState().is_main_process:
            _keep_until(path, start_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes one line."""
        logs = kwargs.get("logs") or {}
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ProgressBar(TrainerCallback):
    """A bar over optimizer steps with the latest loss, in place of the trainer's line for every log."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Opens the bar at the step the run starts from."""
        if state.is_world_process_zero:
            self._bar = progress(state.max_steps, "steps", "train", done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar on."""
        if state.is_world_process_zero:
            self._bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the loss."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if state.is_world_process_zero and loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Closes the bar."""
        if state.is_world_process_zero:
            self._bar.close()


class StopOnNonFinite(TrainerCallback):
    """Ends training when the loss or the gradient is no number: what follows would be wasted."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises ModelError at the first logged loss that is not finite."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise ModelError(
                f"step {state.global_step}: the loss is {loss}. Lower train.trainer_args.learning_rate, or compute in more "
                "precise numbers (train.trainer_args.bf16 instead of fp16); the last checkpoint is kept."
            )


class CheckpointMark(TrainerCallback):
    """Marks a checkpoint as whole once every process has written its part of it.

    Args:
        processes: That wait for each other.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Waits for all processes, then writes the mark."""
        self._processes.wait()
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def last_whole_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that was written to its end, and its step; null where there is none."""
    steps = [int(path.parent.name.removeprefix("checkpoint-")) for path in folder.glob(f"checkpoint-*/{_WHOLE}")]
    return (folder / f"checkpoint-{max(steps)}", max(steps)) if steps else None


def _keep_until(path: Path, step: int) -> None:
    """Cuts lines behind a step off: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if entry["step"] <= step and step > 0:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
