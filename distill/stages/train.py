"""Stage `train`: the student learns from the curated traces. Reads curated/, writes student/.

Runs in any number of processes under accelerate; the main one alone writes. A killed run goes on from its last whole
checkpoint, and ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import ModelError
from distill.recipe import Recipe
from distill.runlog import Clock, is_main_process, say
from distill.stages import folder
from distill.storage import MANIFEST, Manifest, StageFolder, read_manifest, table_files, write_text

if TYPE_CHECKING:
    from trl import SFTTrainer


def run(recipe: Recipe) -> Manifest:
    """Trains and writes `adapter/` (or `model/`), `tokenizer/` and `metrics.jsonl`."""
    settings = {"student": recipe.student.identity(), "train": recipe.train.identity(), "seed": recipe.seed}
    target, curated = folder(recipe, "train"), folder(recipe, "curate")
    out = StageFolder(target, "train", settings, [curated])
    # Only the main process takes the lock; the others find the same files.
    with out if is_main_process() else contextlib.nullcontext():
        if (target / MANIFEST).exists():
            return out.manifest or read_manifest(target)
        return _train(recipe, out)


def _train(recipe: Recipe, out: StageFolder) -> Manifest:
    # Imported here, so that a finished stage answers without loading torch.
    from accelerate import PartialState

    from distill.models import free_memory, load_chat_format, num_parameters, pick_device
    from distill.trainers.arguments import precision_name, training_arguments
    from distill.trainers.callbacks import last_whole_checkpoint
    from distill.trainers.rows import training_rows

    clock, device = Clock(), pick_device()
    curated = folder(recipe, "curate")
    arguments = training_arguments(recipe, out.path / "checkpoints", device)
    _check_world_size()
    chat = load_chat_format(recipe.student)
    with PartialState().main_process_first():
        rows = training_rows(table_files(curated, "curated"), chat, recipe.train, out.path / "cache", read_manifest(curated).digest)
    checkpoint = last_whole_checkpoint(out.path / "checkpoints")
    if checkpoint:
        say(f"train     going on from step {checkpoint[1]}")
    trainer = _make_trainer(recipe, out.path, arguments, rows.dataset, chat.tokenizer, checkpoint[1] if checkpoint else 0)
    result = trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    files = _save(recipe, out.path, trainer)
    model: Any = trainer.model
    facts = clock.facts(
        device=str(device),
        precision=precision_name(arguments),
        world_size=PartialState().num_processes,
        steps=trainer.state.global_step,
        train_loss=result.training_loss,
        tokens=round(rows.num_tokens * (trainer.state.epoch or 0)),
        parameters=num_parameters(model),
        trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        peak_memory_gib=_peak_memory_gib(device.type),
        tokenizer_digest=chat.tokenizer_digest,
        template_digest=chat.template_digest,
    )
    total = read_manifest(curated).rows("curated")
    PartialState().wait_for_everyone()
    if not PartialState().is_main_process:
        return Manifest(stage="train", settings=out.settings, inputs=out.inputs, facts=facts)
    del trainer, model
    free_memory()
    manifest = out.finish(rows_in=total, rows_kept=total - sum(rows.drops.values()), drops=rows.drops, files=files, facts=facts)
    for leftover in ("cache", "checkpoints"):
        shutil.rmtree(out.path / leftover, ignore_errors=True)
    return manifest


def _make_trainer(recipe: Recipe, target: Path, arguments: Any, rows: Any, tokenizer: Any, start_step: int) -> SFTTrainer:
    """TRL's trainer on rows that are already token ids and labels."""
    import torch
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    from distill.models import load_model, lora_config, pick_device
    from distill.trainers.arguments import training_dtype
    from distill.trainers.callbacks import CheckpointMark, MetricsFile, ProgressBar, StopOnNonFinite

    student, device = recipe.student, pick_device()
    # The trainer moves plain weights to the device itself (or shards them); 4-bit ones must be loaded there.
    place = device if student.quantization == "nf4" else torch.device("cpu")
    model = load_model(student, place, training_dtype(recipe, device))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(student.adapter) if student.adapter.type == "lora" else None,
        callbacks=[MetricsFile(target / "metrics.jsonl", start_step), ProgressBar(), StopOnNonFinite(), CheckpointMark()],
    )
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    trained: Any = trainer.model
    if student.adapter.type == "lora":
        # The name others load it by, not the path it was found at.
        trained.peft_config["default"].base_model_name_or_path = student.model
    if arguments.fp16:
        # TRL puts a quantised model's adapter into bf16, which the gradient scaler of fp16 training can't handle.
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def _save(recipe: Recipe, target: Path, trainer: SFTTrainer) -> list[Path]:
    """Writes the trained weights and the tokenizer; returns their files."""
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # sharded, save_model writes no weights
    weights = target / ("adapter" if recipe.student.adapter.type == "lora" else "model")
    trainer.save_model(str(weights))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return []
    tokenizer = target / "tokenizer"
    processing_class: Any = trainer.processing_class
    processing_class.save_pretrained(str(tokenizer))
    for file in weights.iterdir():
        # Left by the trainer: a model card without results, its arguments as a pickle, a second copy of the tokenizer.
        if file.name in ("README.md", "training_args.bin") or (tokenizer / file.name).exists():
            file.unlink()
    if recipe.student.adapter.type == "lora":
        _order_modules(weights / "adapter_config.json")
    return [*weights.iterdir(), *tokenizer.iterdir()]


def _order_modules(config: Path) -> None:
    """Sorts the names in an adapter's config: peft writes a set, in another order each time."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()
    write_text(config, json.dumps(settings, indent=2))


def _check_world_size() -> None:
    """Refuses to let every process of a launch train alone, which happens silently when the backend is not set up."""
    from accelerate import PartialState

    launched, found = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if launched != found:
        raise ModelError(
            f"{launched} processes were launched, but this one sees {found}: each would train alone. "
            "On CPUs set ACCELERATE_USE_CPU=true; on GPUs check `accelerate env`."
        )


def _peak_memory_gib(device_type: str) -> float:
    """Most memory held at once: on the GPU as the allocator counts, else resident in this process."""
    import resource

    import torch

    if device_type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
