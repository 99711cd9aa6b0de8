"""Callbacks of a run: metrics in a file, a bar of progress, and an end to a loss that is no number."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill.errors import ModelError
from distill.run.log import progress, say
from distill.trainers.arguments import precision_name


class MetricsFile(TrainerCallback):
    """Appends every logged dictionary to `metrics.jsonl`, with the optimizer step it belongs to.

    What was logged before a resume is written anew from the checkpoint, whose digests were compared.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begins the file."""
        if state.is_world_process_zero:
            lines = (json.dumps({"step": logs["step"], **logs}) + "\n" for logs in state.log_history)
            self._path.write_text("".join(lines), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes one line."""
        logs = kwargs.get("logs") or {}
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ProgressBar(TrainerCallback):
    """What is trained, in a line, then a bar over optimizer steps with the latest loss, in place of the trainer's line for every log.

    Args:
        rows: That are trained on, before they are packed.
        rows_a_step: Over all processes; with packing packs.
    """

    def __init__(self, rows: int, rows_a_step: int) -> None:
        self._rows, self._rows_a_step = rows, rows_a_step
        self._last: tuple[float, float] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Says what is trained, and opens the bar at the step the run starts from."""
        if state.is_world_process_zero:
            say(_first_line(args, state, kwargs["model"], self._rows, self._rows_a_step))
            self._bar = progress(state.max_steps, "steps", "train", done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar on."""
        if state.is_world_process_zero:
            self._bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the loss, and the tokens a second since the last log."""
        logs = kwargs.get("logs") or {}
        if not state.is_world_process_zero or "loss" not in logs:
            return
        now = (self._bar.elapsed_s, float(logs.get("num_tokens", 0)))
        before, self._last = self._last, now
        rate = (now[1] - before[1]) / max(now[0] - before[0], 1e-9) if before else 0
        self._bar.set_postfix_str(f"loss {logs['loss']:.4f}" + (f", {rate:,.0f} tokens/s" if rate > 0 else ""))

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


def _first_line(args: TrainingArguments, state: TrainerState, model: torch.nn.Module, rows: int, rows_a_step: int) -> str:
    unit = "packs" if getattr(args, "packing", False) else "rows"
    on_gpu = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if on_gpu else f"{args.device.type.upper()} ({torch.get_num_threads()} threads)"
    # Where DeepSpeed deals the weights out, a parameter's own size is that of this process's share.
    sizes = [(getattr(parameter, "ds_numel", parameter.numel()), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # launchers that accelerate has started, one a node
    where = f" on {nodes} nodes" if nodes > 1 else ""
    return (
        f"train     {rows:,} rows, {state.max_steps:,} steps of {rows_a_step:,} {unit}; {args.world_size} x {device}{where}, "
        f"{precision_name(args)}; {trained:,} of {total:,} parameters are trained"
    )
