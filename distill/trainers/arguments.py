"""The arguments of TRL's trainer: the kit's defaults, what the device decides, and what the recipe says.

| default | value | where it is from |
| --- | --- | --- |
| learning_rate | 2e-4 LoRA, 2e-5 full | TRL's LoRA guide: ten times the rate of full fine-tuning (2e-5 is SFTConfig's) |
| lr_scheduler_type, warmup_steps | cosine, 0.03 of the steps | common to open-r1's and TRL's recipes |
| rows of a step | 16, on a GPU one at once | below 32, where LoRA keeps up with full fine-tuning (same guide) |
| num_train_epochs | 2 | a start; set it by the evaluation |
| save_steps | by time, see `trainers.early` | what a killed job loses, and what checkpoints cost, is time |
| eval_steps | a tenth of the run | enough to see a curve; where the best checkpoint is kept, save_steps too |
| save_total_limit | 2 | so that a kill while saving leaves one |
| router_aux_loss_coef | 0 LoRA, the model's own full | an adapter leaves routers alone, so that none is to be balanced |
| logging_nan_inf_filter | false | a hidden NaN looks like a good loss |
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from distill.errors import RecipeError
from distill.models.loading import pick_dtype
from distill.models.processes import world_size
from distill.recipe.experiment import Recipe
from distill.recipe.learning import DEFAULT_EPOCHS, Train
from distill.recipe.steps import AT_ONCE, DEFAULT_ROWS, PASSES, step_size
from distill.run.log import say
from distill.trainers.early import by_time

Arguments = TypeVar("Arguments", bound=TrainingArguments)


_A_TENTH = 0.1  # of the run
_ONLY_THE_LAST = 10**9  # steps; the trainer writes one at its end in any case
_ON_GPUS_ALONE = {"fp16": "a CPU computes in fp32 here", "activation_offloading": "on a CPU activations are in its memory already"}


def training_arguments(recipe: Recipe, train: Train, output_dir: Path, device: torch.device) -> SFTConfig:
    """The trainer's arguments.

    Args:
        recipe: Whose student and seed.
        train: How it is trained; in an on-policy round not quite as the recipe says.
        output_dir: For checkpoints.
        device: Where.

    Raises:
        RecipeError: TRL or transformers refuses a value of `train.trainer_args`.
    """
    given = {**default_arguments(recipe, device), **save_steps(train), **train.trainer_args, **step_arguments(train, device)}
    packing = bool(given.get("packing", False))
    if not {"bf16", "fp16"} & set(train.trainer_args):
        given |= precision_flags(device, recipe.student.dtype)
    given |= {
        "output_dir": str(output_dir),
        "seed": recipe.seed,
        # Rows are cut or dropped before: TRL's limit only says how long a pack is.
        "max_length": train.max_length if packing else None,
        "use_cpu": device.type == "cpu",
    }
    if train.method == "kd":
        given["router_aux_loss_coef"] = 0.0  # the loss on targets is the whole loss
        given.setdefault("logging_first_step", True)  # how far from the teacher the student was before it learned
    elif recipe.student.adapter.type == "lora":
        given.setdefault("router_aux_loss_coef", 0.0)  # the routers are left as they are
    if train.validation_prompts and "eval_strategy" not in train.trainer_args:
        steps = train.trainer_args.get("save_steps", _A_TENTH)
        given |= {"eval_strategy": "steps", "eval_steps": train.trainer_args.get("eval_steps", steps)}
    section = "train.trainer_args" if train is recipe.train else "rollouts.trainer_args over train.trainer_args"
    return build_arguments(SFTConfig, given, section)


def build_arguments(config: type[Arguments], given: dict[str, Any], section: str = "train.trainer_args") -> Arguments:
    """An instance of one of TRL's config classes; `section` is where the recipe has its values.

    Raises:
        RecipeError: TRL or transformers refuses a value.
    """
    # transformers renames the field that TRL 1.16 still defines, and warns of it at every start.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    for name, why in _ON_GPUS_ALONE.items():
        if given["use_cpu"] and given.get(name):
            say(f"train     {name} is left out: {why}")
            given = given | {name: False}
    if given.get("fsdp") and world_size() == 1:
        raise RecipeError(
            f"{section}.fsdp: deals weights out to several processes, and this is one. Train with `accelerate launch -m distill.train`, or "
            "leave it out."
        )
    try:
        arguments = config(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{section}: {str(error).splitlines()[0].rstrip('.')}. Correct it in the recipe.") from None
    # A process works on one device, like every other stage; else transformers would copy the model to all it can see.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def step_arguments(train: Train, device: torch.device) -> dict[str, int]:
    """Rows at once and passes of a step, for the processes of this launch.

    Raises:
        RecipeError: TRL deals the rows out itself, and they don't come out even.
    """
    size = step_size(train.global_batch_size, train.trainer_args, world_size(), device.type == "cpu", whole=train.is_live)
    return {AT_ONCE: size.at_once, PASSES: size.passes}


def rows_a_step(train: Train, arguments: TrainingArguments) -> int:
    """Rows of an optimizer step over all processes, at most what the arguments have room for."""
    room: int = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if train.global_batch_size is None and {AT_ONCE, PASSES} & set(train.trainer_args):
        return room
    return min(train.global_batch_size or DEFAULT_ROWS, room)


def training_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Type of the student's weights in training.

    Frozen weights take the device's own type. Weights that are trained stay in fp32 (computed in bf16 or fp16 by
    autocast), because AdamW's small updates vanish in 8 or 11 bits of mantissa.
    """
    if recipe.student.dtype == "auto" and recipe.student.adapter.type == "full":
        return torch.float32
    return pick_dtype(device, recipe.student.dtype)


def default_arguments(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The kit's own defaults, on this device."""
    on_cpu = device.type == "cpu"
    return {
        "learning_rate": 2e-5 if recipe.student.adapter.type == "full" else 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "num_train_epochs": DEFAULT_EPOCHS,
        "gradient_checkpointing": not on_cpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": not on_cpu,
        "ddp_find_unused_parameters": False,
    }


def save_steps(train: Train) -> dict[str, float]:
    """Steps from one checkpoint to the next, unless the recipe says it; where they come by time none is written by steps, but the last."""
    return {"save_steps": _ONLY_THE_LAST if by_time(train.trainer_args) else _A_TENTH}


def precision_flags(device: torch.device, setting: str) -> dict[str, bool]:
    """Autocast to what the device computes in; both false is fp32. SFTConfig would take bf16 even where it is slow.

    Args:
        device: Where.
        setting: The student's `dtype`, which on a CPU also says what is computed in: there fp32 is no hardship.
    """
    dtype = pick_dtype(device, setting if device.type == "cpu" else "auto")
    return {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16 and device.type == "cuda"}


def precision_name(arguments: TrainingArguments) -> str:
    """`bf16`, `fp16` or `fp32`: what the matrix products are computed in."""
    return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
