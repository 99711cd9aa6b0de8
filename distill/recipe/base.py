"""What every section of a recipe is, and how tokens are drawn. Knows nothing of torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, types are not coerced, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    speed_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that change how fast rows are made, not which."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide which rows a stage makes, as plain JSON values."""
        return self.model_dump(mode="json", exclude=set(self.speed_only))


class Sampling(Section):
    """How tokens are drawn."""

    speed_only = frozenset({"batch_size"})

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
