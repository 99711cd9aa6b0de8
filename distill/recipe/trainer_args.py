"""The fields of TRL's config classes, read from their sources: a recipe is checked before torch is imported.

Importing `trl.SFTConfig` costs seconds and needs torch. Its fields, and those of its relatives, are plain annotated assignments
in a few files, so the names and the simple types are read from the syntax trees of the installed packages.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distill.recipe.trainer_values import check_trainer_values

ConfigName = Literal["SFTConfig", "DistillationConfig", "ServerDistillationConfig", "GOLDConfig"]

# Base class first: a later file overrides an earlier one, as inheritance does.
_BASE = (("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/base_config.py", "_BaseConfig"))
_SFT = (*_BASE, ("trl", "trainer/sft_config.py", "SFTConfig"))
_DISTILLATION = (*_BASE, ("trl", "trainer/distillation_config.py", "DistillationConfig"))
_SERVER = ("trl", "experimental/server_distillation/server_distillation_config.py", "ServerDistillationConfig")
_GOLD = ("trl", "experimental/gold/gold_config.py", "GOLDConfig")
_SOURCES: dict[ConfigName, tuple[tuple[str, str, str], ...]] = {
    "SFTConfig": _SFT,
    "DistillationConfig": _DISTILLATION,
    "ServerDistillationConfig": (*_DISTILLATION, _SERVER),
    "GOLDConfig": (*_SFT, _GOLD),
}

_RESERVED_BY_ALL: dict[str, str] = {
    "output_dir": "the run folder decides where files go",
    "seed": "set the recipe's seed",
    "data_seed": "set the recipe's seed",
    "model_init_kwargs": "set student.dtype, student.quantization, student.attn_implementation",
    "trust_remote_code": "set student.trust_remote_code",
    "remove_unused_columns": "the kit's rows have no unused columns",
    "resume_from_checkpoint": "training resumes by itself from the last complete checkpoint of its folder",
    "enable_jit_checkpoint": "at SIGUSR1 or SIGTERM training writes a checkpoint and ends by itself, on all processes behind the same step",
}
_RESERVED_BY_SFT: dict[str, str] = {
    "max_length": "set train.max_length",
    "truncation_mode": "set train.overlong",
    "completion_only_loss": "the kit builds the labels: the completion, its reasoning and its end of turn",
    "assistant_only_loss": "the kit builds the labels: the completion, its reasoning and its end of turn",
    "chat_template_path": "the template belongs to the student's tokenizer; see student.tokenizer",
    "eos_token": "the end of a turn is read from the chat template",
    "pad_token": "set student.pad_token",
    "dataset_text_field": "the rows are tokenised by the kit",
    "dataset_kwargs": "the rows are tokenised by the kit",
    "dataset_num_proc": "the rows are tokenised by the kit",
}
_RESERVED_BY_LIVE: dict[str, str] = {
    "beta": "set train.on_policy.divergence, and jsd_beta beside it",
    "temperature": "set train.on_policy.temperature",
    "label_smoothing_factor": "the loss is a divergence, set train.on_policy.divergence",
    "max_completion_length": "set train.on_policy.max_new_tokens",
    "chat_template_kwargs": "set student.chat_template_kwargs",
    "teacher_model_name_or_path": "set the section teacher",
    "teacher_model_revision": "set the section teacher",
    "teacher_model_init_kwargs": "set the section teacher",
    "teacher_model_server_url": "set train.on_policy.teacher_server",
}
_RESERVED_BY_GOLD: dict[str, str] = {
    "teacher_tokenizer_name_or_path": "set the section teacher",
    "lmbda": "the student writes every completion itself",
    "seq_kd": "the student writes every completion itself",
    "use_uld_loss": "method cross_tokenizer is this loss; with one tokenizer use method on_policy",
    "packing": "the loss aligns the two tokenisations row by row",
    "eval_packing": "the loss aligns the two tokenisations row by row",
    "loss_type": "the loss is GOLD's own",
    "callbacks": "the kit has its own",
}
RESERVED: dict[ConfigName, dict[str, str]] = {
    "SFTConfig": _RESERVED_BY_ALL | _RESERVED_BY_SFT,
    "DistillationConfig": _RESERVED_BY_ALL | _RESERVED_BY_LIVE,
    "ServerDistillationConfig": _RESERVED_BY_ALL | _RESERVED_BY_LIVE,
    "GOLDConfig": _RESERVED_BY_ALL | _RESERVED_BY_SFT | _RESERVED_BY_LIVE | _RESERVED_BY_GOLD,
}
"""Fields that the kit sets, and where a user sets what they stand for."""

KIT_DEFAULTS: dict[str, str] = {
    "learning_rate": "2e-4, for full fine-tuning 2e-5",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "0.03",
    "num_train_epochs": "2.0",
    "per_device_train_batch_size": "1, on a CPU up to 32",
    "gradient_accumulation_steps": "follows from train.global_batch_size",
    "gradient_checkpointing": "true, on a CPU false",
    "logging_steps": "1",
    "logging_nan_inf_filter": "false",
    "save_strategy": "steps",
    "save_steps": "by time: checkpoints cost 2 % of it, from 5 minutes to an hour apart, at most a tenth of a job's time",
    "save_total_limit": "2",
    "report_to": "none",
    "dataloader_pin_memory": "true, on a CPU false",
    "ddp_find_unused_parameters": "false",
    "bf16": "where the device computes in it",
    "fp16": "on a GPU that has no bf16",
}
"""Fields that have another default here, in words; `trainers/arguments` sets them, and says where they are from."""


class TrainerField(NamedTuple):
    """A field of a config class, as its source has it."""

    annotation: str
    default: str
    """As a recipe would have it, where it is a plain value."""
    help: str


@functools.cache
def trainer_fields(config: ConfigName = "SFTConfig") -> dict[str, TrainerField]:
    """All fields of a config class by name, without importing it."""
    fields: dict[str, TrainerField] = {}
    for package, relative, class_name in _SOURCES[config]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed; `pip install distill-kit` brings it")
        path = Path(spec.origin).parent / relative
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                fields |= {
                    item.target.id: _field(item, fields.get(item.target.id))
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
    return {name: field for name, field in fields.items() if not name.startswith("_")}


def _field(item: ast.AnnAssign, inherited: TrainerField | None) -> TrainerField:
    """A field from its line, `name: type = field(default=..., metadata={"help": ...})` or `name: type = value`."""
    value, text = item.value, ""
    if isinstance(value, ast.Call):
        words = {word.arg: word.value for word in value.keywords}
        value = words.get("default", words.get("default_factory"))
        metadata = words.get("metadata")
        pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
        texts = [node for key, node in pairs if isinstance(key, ast.Constant) and key.value == "help"]
        text = str(texts[0].value) if texts and isinstance(texts[0], ast.Constant) else ""
    # A percent sign is doubled for argparse.
    text = " ".join(text.split()).replace("%%", "%") or (inherited.help if inherited else "")
    return TrainerField(ast.unparse(item.annotation), _default(value), text)


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    try:
        plain = ast.literal_eval(value)
    except ValueError:  # a name, or something computed
        name = ast.unparse(value)
        return {"list": "[]", "dict": "{}"}.get(name, name)
    return plain if isinstance(plain, str) and plain else json.dumps(plain, ensure_ascii=False)


def annotation_of(text: str, unknown: Any = None) -> Any:
    """The type behind an annotation; where a name in it isn't built in, `unknown` stands for it, or all of it is null."""
    names: dict[str, Any] = {"Any": Any, "Optional": typing.Optional, "Union": typing.Union, "Literal": typing.Literal}
    while True:
        try:
            # The text comes from the installed library, never from the recipe.
            return eval(text, names)
        except NameError as error:
            if unknown is None:
                return None
            names[str(error.name)] = unknown


def _adapter(annotation: str) -> TypeAdapter[Any] | None:
    """A validator for an annotation made of built-in types, else None (the library's own check decides)."""
    kind = annotation_of(annotation)
    return None if kind is None else TypeAdapter(kind, config=ConfigDict(strict=True))


def check_trainer_args(given: dict[str, Any], config: ConfigName = "SFTConfig") -> dict[str, Any]:
    """Returns `given` unchanged; raises ValueError, its message starting with the field, for one unknown, reserved or mistyped."""
    fields, reserved = trainer_fields(config), RESERVED[config]
    name_in_trl = f"trl.{config}" if config in ("SFTConfig", "DistillationConfig") else f"trl.experimental's {config}"
    for name, value in given.items():
        if name in reserved:
            raise ValueError(f"{name} can't be set here: {reserved[name]}")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" See the documentation of {name_in_trl}."
            raise ValueError(f"{name} is no field of {name_in_trl}.{hint}")
        adapter = _adapter(fields[name].annotation)
        if adapter is None:
            continue
        try:
            adapter.validate_python(value)
        except ValidationError:
            raise ValueError(f"{name} must be {fields[name].annotation}, got {value!r}") from None
    check_trainer_values(given)
    return given
