"""What a run is measured by, and what it leaves behind: evaluation, report, export."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from distill.recipe.base import PositiveInt, Sampling, Section

ModelRole = Literal["base", "student", "teacher"]


class Evaluate(Sampling):
    """Base, student and teacher answer the held-out prompts."""

    decides_no_row = frozenset({"batch_size", "check_timeout_s"})

    models: list[ModelRole] = Field(default_factory=lambda: list(get_args(ModelRole)))
    """Who is measured; base is the student before training."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token."""
    max_prompts: PositiveInt | None = None
    """Use only so many held-out prompts; null means all."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one answer check, in seconds."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the printed intervals."""

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name each of base, student, teacher at most once, and at least one")
        return value


class Report(Section):
    """A page about the run, made from its files alone."""

    examples: Annotated[int, Field(ge=0)] = 12
    """Example traces shown."""


class Export(Section):
    """The student as others will load it."""

    model_name: str | None = None
    """Name on the model card; null means the recipe's name."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Stored weights; auto keeps the type of the student's own checkpoint."""
    parity_prompts: Annotated[int, Field(ge=1)] = 20
    """Held-out prompts on which the merged model is compared with base + adapter."""
    min_token_agreement: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Least share of equal next tokens between the two; less refuses the export."""
