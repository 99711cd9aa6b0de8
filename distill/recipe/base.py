"""What every section of a recipe is, and how tokens are drawn. Knows nothing of torch."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator


def expanded(value: str) -> str:
    """A path with `~` and `~user` at its beginning put in full; any other text as it is."""
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError:  # nobody is called so
        return value


def located(value: str, info: ValidationInfo) -> str:
    """A path or a name as the stages take it: found from any folder that the resolved recipe is read in, where that is possible.

    A relative path means the folder the command is run in. Where nothing is there, but beside the recipe something is, that is
    meant, and the path becomes absolute. What is at neither place stays as it is: a name on the Hub, or a path whose reader knows
    better what is missing.
    """
    value = expanded(value)
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None or not value or Path(value).is_absolute() or _is_in(Path(), value):
        return value
    return os.path.normpath(folder / value) if _is_in(folder, value) else value


def located_in(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """The fields of a trainer with those that name a file located like `located`."""
    return {name: located(item, info) if name in _FILES_OF_TRAINERS and isinstance(item, str) else item for name, item in value.items()}


def _is_in(folder: Path, value: str) -> bool:
    """Whether a relative path, or a pattern of paths, is found from a folder; what can't be looked for is not."""
    try:
        return (folder / value).exists() or (glob.has_magic(value) and any(folder.glob(value)))
    except (OSError, ValueError, NotImplementedError):  # too long, a link to itself, no pattern: whoever reads it says so
        return False


_FILES_OF_TRAINERS = frozenset({"accelerator_config", "deepspeed", "fsdp_config"})

PathOrName = Annotated[str, AfterValidator(located)]
"""A file or folder, or a name on the Hub or of what is shipped with the kit."""
OutputPath = Annotated[str, AfterValidator(expanded)]
"""A path that is written to: relative to the folder the command is run in, and to no other."""
TrainerArgs = Annotated[dict[str, Any], AfterValidator(located_in)]
"""Fields of a trainer's config class."""
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, types are not coerced, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    decides_no_row: ClassVar[frozenset[str]] = frozenset()
    """Fields that say how fast rows are made, how long is waited, what is shown; never which rows. They lock no folder."""

    shown: ClassVar[bool] = False
    """Whether the section has a line of its own among the keys: its name alone says something."""
    words: ClassVar[str] = "section"
    """What it is, in plain words."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide which rows a stage makes, as plain JSON values."""
        return self.model_dump(mode="json", exclude=set(self.decides_no_row))


class Sampling(Section):
    """How tokens are drawn."""

    decides_no_row = frozenset({"batch_size"})

    samples_per_prompt: PositiveInt = 1
    """Traces for each prompt."""
    max_new_tokens: PositiveInt = 4096
    """Longest answer, in tokens of its author."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """0 takes the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus: the smallest set of tokens whose probability reaches this."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k most probable tokens; 0 means all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Only tokens at least this probable relative to the most probable one."""
    batch_size: PositiveInt = 16
    """Sequences at once; halved by itself when memory runs out."""

    @model_validator(mode="after")
    def _greedy_has_one_sample(self) -> Sampling:
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("temperature 0 writes the same answer every time; use samples_per_prompt: 1")
        fields = type(self).model_fields
        if self.temperature == 0 and any(getattr(self, name) != fields[name].default for name in ("top_p", "top_k", "min_p")):
            raise ValueError("temperature 0 ignores top_p, top_k and min_p; leave them out")
        return self

    def plain(self, **changed: Any) -> Sampling:
        """These settings without those that a section adds to them, and some of them changed; not validated anew."""
        return Sampling.model_construct(**{name: getattr(self, name) for name in Sampling.model_fields} | changed)
