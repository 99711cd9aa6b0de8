"""The fields of TRL's SFTConfig, read from its source: a recipe is checked before torch is imported.

Importing `trl.SFTConfig` costs seconds and needs torch. Its fields are plain annotated assignments in three files,
so the names and the simple types are read from the syntax trees of the installed packages.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import typing
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

# Base class first: a later file overrides an earlier one, as inheritance does.
_SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)

RESERVED: dict[str, str] = {
    "output_dir": "the run folder decides where files go",
    "max_length": "set train.max_length",
    "truncation_mode": "set train.overlong",
    "seed": "set the recipe's seed",
    "data_seed": "set the recipe's seed",
    "completion_only_loss": "the kit builds the labels: the completion, its reasoning and its end of turn",
    "assistant_only_loss": "the kit builds the labels: the completion, its reasoning and its end of turn",
    "chat_template_path": "the template belongs to the student's tokenizer; see student.tokenizer",
    "eos_token": "the end of a turn is read from the chat template",
    "pad_token": "set student.pad_token",
    "dataset_text_field": "the rows are tokenised by the kit",
    "dataset_kwargs": "the rows are tokenised by the kit",
    "dataset_num_proc": "the rows are tokenised by the kit",
    "model_init_kwargs": "set student.dtype, student.quantization, student.attn_implementation",
    "trust_remote_code": "set student.trust_remote_code",
    "remove_unused_columns": "the kit's rows have no unused columns",
    "resume_from_checkpoint": "training resumes by itself from the last complete checkpoint of its folder",
}


@functools.cache
def trainer_fields() -> dict[str, str]:
    """Names of all SFTConfig fields, each with its annotation as source text."""
    fields: dict[str, str] = {}
    for package, relative, class_name in _SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed; `pip install distill-kit` brings it")
        path = Path(spec.origin).parent / relative
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                fields |= {
                    item.target.id: ast.unparse(item.annotation)
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
    return {name: annotation for name, annotation in fields.items() if not name.startswith("_")}


def _adapter(annotation: str) -> TypeAdapter[Any] | None:
    """A validator for an annotation made of built-in types, else None (the library's own check decides)."""
    try:
        # The text comes from the installed library, never from the recipe.
        kind = eval(annotation, {"Any": Any, "Optional": typing.Optional, "Union": typing.Union, "Literal": typing.Literal})
    except NameError:
        return None
    return TypeAdapter(kind, config=ConfigDict(strict=True))


def check_trainer_args(given: dict[str, Any]) -> dict[str, Any]:
    """Returns `given` unchanged; raises ValueError for an unknown, reserved or mistyped field."""
    fields = trainer_fields()
    for name, value in given.items():
        if name in RESERVED:
            raise ValueError(f"{name} can't be set here: {RESERVED[name]}")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {close[0]}?" if close else " See the documentation of trl.SFTConfig."
            raise ValueError(f"{name} is no field of trl.SFTConfig.{hint}")
        adapter = _adapter(fields[name])
        if adapter is None:
            continue
        try:
            adapter.validate_python(value)
        except ValidationError:
            raise ValueError(f"{name} must be {fields[name]}, got {value!r}") from None
    return given
