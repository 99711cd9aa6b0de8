"""TRL's trainer as a recipe asks for it, on whatever model, rows and folder it is given."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback

from distill.losses.settings import likelihood
from distill.models.adapters import freeze_unread, lora_config
from distill.models.chat import ChatFormat
from distill.models.processes import Processes
from distill.recipe.experiment import Recipe
from distill.recipe.learning import SchedulePart, Train
from distill.trainers.arguments import rows_a_step, training_arguments
from distill.trainers.launches import Launch
from distill.trainers.rows import TrainingRows
from distill.trainers.traces import TraceTrainer

if TYPE_CHECKING:
    from distill.trainers.targets import StoredTargets


def trainer_arguments(recipe: Recipe, train: Train, output_dir: Path, device: torch.device) -> Any:
    """The trainer's arguments, whatever the method.

    Args:
        recipe: Whose student and seed.
        train: How it is trained; in an on-policy round not quite as the recipe says.
        output_dir: For checkpoints.
        device: Where.

    Raises:
        RecipeError: TRL or transformers refuses a value of `train.trainer_args`.
    """
    if train.is_live:
        from distill.trainers.live import live_arguments

        return live_arguments(recipe, output_dir, device)
    return training_arguments(recipe, train, output_dir, device)


def launch_of(train: Train, arguments: Any, processes: Processes) -> Launch:
    """What of this launch decides which rows a step takes."""
    sharding = "DEEPSPEED" if arguments.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else ""
    if processes.count > 1 and (arguments.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        sharding = "FSDP"
    return Launch(processes.count, rows_a_step(train, arguments), sharding)


def build_trainer(
    recipe: Recipe,
    train: Train,
    model: PreTrainedModel,
    arguments: Any,
    rows: TrainingRows,
    chat: ChatFormat,
    stored: StoredTargets | None = None,
    *,
    part: SchedulePart = SchedulePart(),  # noqa: B008 (immutable)
    callbacks: Sequence[TrainerCallback] = (),
    teacher: PreTrainedModel | None = None,
) -> Any:
    """TRL's trainer on rows that are already token ids and labels.

    Args:
        recipe: Whose student it is, or stands for it.
        train: How it is trained.
        model: The student; where it has an adapter already, that one goes on learning, else it is given the recipe's.
        arguments: From `trainer_arguments`.
        rows: What is trained on.
        chat: The student's tokenizer and template.
        stored: Targets of the rows; None learns from the traces alone.
        part: What this training takes of the learning rate's schedule.
        callbacks: Besides those of the trainer itself.
        teacher: That judges in a live method; None loads the recipe's.
    """
    adapter = recipe.student.adapter
    freeze_unread(model)
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": rows.dataset,
        "eval_dataset": rows.validation,
        "processing_class": chat.tokenizer,
        "peft_config": lora_config(adapter, model) if adapter.type == "lora" and not hasattr(model, "peft_config") else None,
        "callbacks": list(callbacks),
    }
    if train.is_live:
        from distill.trainers.live import live_trainer

        trainer: Any = live_trainer(recipe, chat, common, teacher)
    elif stored is None:
        trainer = TraceTrainer(step_rows=rows_a_step(train, arguments), **common)
    else:
        settings, follows = train.kd, train.method == "sft"
        objective = likelihood(stored.target.kind) if follows else settings.objective(stored.target)
        half_life = None if follows else settings.early_half_life
        common["step_rows"] = rows_a_step(train, arguments)
        trainer = TraceTrainer(stored=stored, objective=objective, half_life=half_life, part=part, **common)
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    trained: Any = trainer.model
    if adapter.type == "lora":
        # The name others load it by, not the path it was found at. peft would look for the embedded one on the Hub.
        warnings.filterwarnings("ignore", message="Could not find a config file in embedded:")
        trained.peft_config["default"].base_model_name_or_path = recipe.student.model
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        # Without it a folder of shards would be saved in place of a model.
        plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if arguments.fp16:
        # TRL puts a quantised model's adapter into bf16, which the gradient scaler of fp16 training can't handle.
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer
