"""Stage `train`: the student learns from traces. Reads curated/ (in a round rollouts/) and targets/, writes student/.

Runs in any number of processes under accelerate; the main one alone writes. A killed run goes on from its last whole
checkpoint, and ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.errors import RecipeError
from distill.models.processes import Processes
from distill.recipe.experiment import Recipe
from distill.recipe.learning import DEFAULT_EPOCHS, SchedulePart, Train
from distill.run.clock import Clock, is_main_process
from distill.run.early import held
from distill.run.files import write_text
from distill.run.folder import StageFolder
from distill.run.log import say
from distill.run.manifest import MANIFEST, Manifest, check_files, read_manifest
from distill.run.owned import own_cache
from distill.run.plan import NO_LIMIT, Growth, StagePlan
from distill.stages import CACHE, Step, folder, open_stage, plan_of, previous_student, run_dir

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from distill.models.chat import ChatFormat
    from distill.trainers.launches import Checkpoint, Launch
    from distill.trainers.rows import TrainingRows
    from distill.trainers.targets import StoredTargets


_NO_LOGS = ("README.md", "training_args.bin")  # the trainer's own, of no use without results


class _Material(NamedTuple):
    """What one training is made of."""

    train: Train
    tables: list[tuple[Path, str]]
    """Folders with traces and the name of the table there."""
    targets: list[Path]
    """Folders with the targets of each table; none where sft doesn't follow the divergence from the teacher."""
    start: Path | None
    """Folder of the student that goes on learning; null starts from the base."""
    part: SchedulePart = SchedulePart()
    """What this training takes of the learning rate's schedule."""

    @property
    def inputs(self) -> list[Path]:
        """All folders that are read."""
        return [*(place for place, _ in self.tables), *self.targets, *([] if self.start is None else [self.start])]


def plan(recipe: Recipe, number: int = 0) -> StagePlan:
    """What the stage is asked to make.

    Args:
        recipe: The recipe.
        number: Of the on-policy round, from 1; 0 is the training on traces before them.
    """
    material = _material(recipe, number)
    settings: dict[str, Any] = {"student": recipe.student.identity_here(), "train": material.train.identity(), "seed": recipe.seed}
    if material.train.is_live:
        assert recipe.teacher is not None  # the recipe was validated
        settings["teacher"] = recipe.teacher.identity_here()
    if number:
        assert recipe.rollouts is not None
        settings["rollouts"] = {name: getattr(recipe.rollouts, name) for name in ("teacher_share", "stop_kl")}
        settings["rollouts"]["schedule_over"] = _name_of(material.part)
    return plan_of(recipe, Step("train", number), settings, material.inputs, _growth(material.train, number))


def _growth(train: Train, number: int) -> Growth:
    """More epochs, or more traces, make the student anew, and the one before is kept; a round that is over stays as it is."""
    rising = {"train.trainer_args.num_train_epochs": DEFAULT_EPOCHS, "train.trainer_args.max_steps": NO_LIMIT}
    rising |= {"train.max_length": 0} if train.overlong == "drop" else {}
    return Growth(rising, inputs="ignore" if number else "follow", adds=False)


def run(recipe: Recipe, number: int = 0, watchers: Sequence[TrainerCallback] = ()) -> Manifest:
    """Trains and writes `adapter/` (or `model/`), `tokenizer/` and `metrics.jsonl`.

    Args:
        recipe: The recipe.
        number: As in `plan`.
        watchers: Callbacks of the trainer besides the kit's own, called behind them.
    """
    # Only the main process takes the lock; the others wait until it has looked at the folder, and find the same files.
    with held(), open_stage(recipe, plan(recipe, number), hold=is_main_process()) as out:
        processes = Processes()
        processes.wait()
        if (out.path / MANIFEST).exists():
            return out.manifest or read_manifest(out.path)
        return _train(recipe, _material(recipe, number), number, out, processes, watchers)


def _material(recipe: Recipe, number: int) -> _Material:
    curated, targets = (folder(recipe, "curate"), "curated"), folder(recipe, "score")
    if recipe.train.is_live:
        return _Material(recipe.train, [(folder(recipe, "prompts"), "train")], [], None)
    if not number:
        scored = recipe.train.method == "kd" or recipe.follows_teacher
        return _Material(recipe.train, [curated], [targets] if scored else [], None)
    rollouts = recipe.rollouts
    if rollouts is None or number > recipe.rounds:
        raise RecipeError(f"round {number}: the recipe has {recipe.rounds} rounds. Give --round up to that.")
    shared = rollouts.teacher_share > 0
    own = (folder(recipe, "rollouts", number), "traces")
    part = SchedulePart(number, recipe.rounds) if rollouts.schedule_over == "all_rounds" else SchedulePart()
    if number > 1:
        _check_part_before(folder(recipe, "train", number - 1), part)
    return _Material(
        recipe.train_in_rounds,
        [own, curated] if shared else [own],
        [folder(recipe, "score", number), *([targets] if shared else [])],
        previous_student(recipe, number),
        part,
    )


def _name_of(part: SchedulePart) -> str:
    return f"part {part.number} of {part.of}"


def _check_part_before(student: Path, part: SchedulePart) -> None:
    """Refuses to go on from a round of another schedule, whose learning rate has come to its end, say."""
    before = read_manifest(student).settings.get("rollouts", {}).get("schedule_over")
    expected = _name_of(part._replace(number=max(part.number - 1, 1)))
    if before != expected:
        raise RecipeError(
            f"{student}: its learning rate ran over {before} of a schedule, but this round goes on from {expected}. Keep rounds and "
            "rollouts.schedule_over as they were, or give another run_dir."
        )


def _train(
    recipe: Recipe, material: _Material, number: int, out: StageFolder, processes: Processes, watchers: Sequence[TrainerCallback]
) -> Manifest:
    # Imported here, so that a finished stage answers without loading torch.
    from distill.models.loading import free_memory, load_chat_format, pick_device
    from distill.trainers.building import build_trainer, launch_of, trainer_arguments
    from distill.trainers.callbacks import MetricsFile, ProgressBar, StopOnNonFinite
    from distill.trainers.checkpoints import CheckpointMark
    from distill.trainers.early import Endings, Interval, by_time

    clock, device = Clock(out.path), pick_device()
    arguments = trainer_arguments(recipe, material.train, out.path / "checkpoints", device)
    launch = launch_of(material.train, arguments, processes)
    checkpoint = _checkpoint(out.path / "checkpoints", launch, processes)
    chat = load_chat_format(recipe.student)
    stored = _stored_targets(recipe, material, chat)
    with processes.first_alone():  # it reads and tokenises for longer than the others would wait for it in the trainer's group
        rows = _rows(recipe, material, number, chat, stored)
    metrics, mark = out.path / "metrics.jsonl", CheckpointMark(processes, launch, checkpoint)
    bar = ProgressBar(len(rows.dataset), launch.rows_a_step)
    endings = Endings(processes, Interval() if by_time(material.train.trainer_args) else None)
    callbacks = [MetricsFile(metrics), bar, StopOnNonFinite(), mark, *watchers, endings]
    student = _student_to_train(recipe, material)
    trainer = build_trainer(recipe, material.train, student, arguments, rows, chat, stored, part=material.part, callbacks=callbacks)
    mark.trainer = trainer
    del student
    result = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    endings.leave(trainer.state.max_steps)
    files = _save(recipe, out.path, trainer, processes)
    facts = clock.facts(
        method=material.train.method,
        world_size=processes.count,
        rows_a_step=launch.rows_a_step,
        train_loss=result.training_loss,
        tokens=trainer.state.num_input_tokens_seen if material.train.is_live else trainer._total_train_tokens,
        tokenizer_digest=chat.tokenizer_digest,
        template_digest=chat.template_digest,
        **endings.facts(),
        **_measured(trainer, device),
    )
    del trainer, mark, callbacks
    if processes.rank:
        processes.wait()  # for the manifest, which a next stage of this process may read
        return read_manifest(out.path)
    free_memory()
    facts |= _stop(recipe, number, metrics)
    kept = rows.rows_in - sum(rows.drops.values())
    records = [metrics, *_keep_logs(out.path)]
    manifest = out.finish(rows_in=rows.rows_in, rows_kept=kept, drops=rows.drops, files=files, records=records, facts=facts)
    for leftover in _cache(recipe, make=False).glob("cache-*"):  # packs and orders that the trainer made of the rows
        leftover.unlink()
    processes.wait()
    return manifest


def _checkpoint(folder: Path, launch: Launch, processes: Processes) -> Checkpoint | None:
    """From which training goes on; the first process looks for all."""
    from distill.trainers.launches import last_whole_checkpoint

    found: Checkpoint | None = processes.gather(None if processes.rank else last_whole_checkpoint(folder))[0]
    if found is not None:
        found.check(launch)
        others = found.launch.processes
        drawn = f", which {others} processes reached: the same rows follow, but what is drawn at random (dropout, answers) is another draw"
        say(f"train     going on from step {found.step}" + (drawn if others != launch.processes else ""))
    return found


def _measured(trainer: Any, device: torch.device) -> dict[str, Any]:
    """What the trainer itself can tell."""
    from distill.models.adapters import coverage
    from distill.models.loading import num_parameters
    from distill.trainers.arguments import precision_name

    adapter = {"adapter": asdict(coverage(trainer.model))} if hasattr(trainer.model, "peft_config") else {}
    return adapter | {
        "device": str(device),
        "precision": precision_name(trainer.args),
        "steps": trainer.state.global_step,
        "parameters": num_parameters(trainer.model),
        "trainable_parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "peak_memory_gib": _peak_memory_gib(device.type),
    }


def _stored_targets(recipe: Recipe, material: _Material, chat: ChatFormat) -> StoredTargets | None:
    """The targets of a material, after their digests and those of the student's tokenizer were compared."""
    if not material.targets:
        return None
    assert recipe.score is not None  # the recipe was validated
    from distill.trainers.targets import StoredTargets, TargetSource

    sources = []
    for place, (traces, table) in zip(material.targets, material.tables, strict=True):
        shards = [place / name for name in sorted(check_files(place).files)]
        sources.append(TargetSource(shards, read_manifest(traces).digest, teacher_wrote=table == "curated"))
    stored = StoredTargets(sources)
    stored.check(recipe.score.target, chat.tokenizer_digest, chat.template_digest)
    return stored


def _cache(recipe: Recipe, *, make: bool = True) -> Path:
    """Where the rows of the last training of a run are kept, so that the next one on the same traces need not make them again."""
    return own_cache(run_dir(recipe) / CACHE, make=make)


def _rows(recipe: Recipe, material: _Material, number: int, chat: ChatFormat, stored: StoredTargets | None) -> TrainingRows:
    from distill.trainers.rows import TraceTable, training_rows

    if material.train.is_live:
        from distill.trainers.live import live_rows

        return live_rows(recipe, folder(recipe, "prompts"), chat)
    share = recipe.rollouts.teacher_share if recipe.rollouts is not None else 0.0
    tables = [
        TraceTable(place, table, share / (1 - share) if index else None, recipe.seed + number)
        for index, (place, table) in enumerate(material.tables)
    ]
    return training_rows(tables, chat, material.train, _cache(recipe), recipe.seed, stored)


def _student_to_train(recipe: Recipe, material: _Material) -> Any:
    """The base student, or the one that goes on learning."""
    import torch

    from distill.models.loading import load_model, load_trained, pick_device
    from distill.trainers.arguments import training_dtype

    device = pick_device()
    dtype = training_dtype(recipe, device)
    # The trainer moves plain weights to the device itself (or shards them); 4-bit ones must be loaded there.
    place = device if recipe.student.quantization == "nf4" else torch.device("cpu")
    if material.start is None:
        return load_model(recipe.student, place, dtype)
    check_files(material.start)
    return load_trained(recipe.student, recipe.student.adapter, material.start, place, merge=False, dtype=dtype, trainable=True)


def _stop(recipe: Recipe, number: int, metrics: Path) -> dict[str, str]:
    """The fact `stop` where a round has brought the student close enough to the teacher."""
    limit = recipe.rollouts.stop_kl if number and recipe.rollouts is not None else None
    if limit is None:
        return {}
    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = [entry.get("kl_lower_bound", entry.get("log_ratio")) for entry in entries if "kl_lower_bound" in entry or "log_ratio" in entry]
    if not found or found[0] >= limit:
        return {}
    return {
        "stop": f"in round {number} the student was {found[0]:.4f} nats a token from its teacher, under rollouts.stop_kl ({limit:g}): "
        "there is little left to learn on these prompts"
    }


def _save(recipe: Recipe, target: Path, trainer: Any, processes: Processes) -> list[Path]:
    """Writes the trained weights and the tokenizer; returns their files."""
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # sharded, save_model writes no weights
    weights, tokenizer = target / ("adapter" if recipe.student.adapter.type == "lora" else "model"), target / "tokenizer"
    if not processes.rank:
        for place in (weights, tokenizer):  # a kill leaves what safetensors was writing, under a name of its own
            shutil.rmtree(place, ignore_errors=True)
    processes.wait()
    trainer.save_model(str(weights))
    processes.wait()
    if processes.rank:
        return []
    processing_class: Any = trainer.processing_class
    processing_class.save_pretrained(str(tokenizer))
    for file in weights.iterdir():
        # Left by the trainer: a model card without results, its arguments as a pickle, a second copy of the tokenizer.
        if file.name in ("README.md", "training_args.bin") or (tokenizer / file.name).exists():
            file.unlink()
    if recipe.train.is_live and recipe.student.adapter.type == "full":
        from distill.trainers.live import restore_head

        restore_head(recipe, weights)
    if recipe.student.adapter.type == "lora":
        _order_modules(weights / "adapter_config.json")
    return [*weights.iterdir(), *tokenizer.iterdir()]


def _keep_logs(student: Path) -> list[Path]:
    """Moves what a reporter (TensorBoard, CodeCarbon, ...) wrote beside the checkpoints, which go, into `logs/`; returns all there."""
    written = student / "checkpoints"
    files = [path for path in written.rglob("*") if path.is_file()] if written.is_dir() else []
    for file in files:
        place = file.relative_to(written)
        if not place.parts[0].startswith("checkpoint-") and place.name not in _NO_LOGS:
            kept = student / "logs" / Path(*place.parts[place.parts[0] == "runs" :])
            kept.parent.mkdir(parents=True, exist_ok=True)
            file.replace(kept)
    return [path for path in (student / "logs").rglob("*") if path.is_file()]


def _order_modules(config: Path) -> None:
    """Sorts the names in an adapter's config: peft writes a set, in another order each time."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()
    write_text(config, json.dumps(settings, indent=2))


def _peak_memory_gib(device_type: str) -> float:
    """Most memory held at once: on the GPU as the allocator counts, else resident in this process."""
    import resource

    import torch

    if device_type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
