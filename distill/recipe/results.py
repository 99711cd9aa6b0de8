"""What a run is measured by, and what it leaves behind: evaluation, report, export."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from distill.recipe.base import PositiveInt, Sampling, Section
from distill.recipe.checks import Check, Checks
from distill.recipe.judge import Preferences

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
    checks: Checks | None = None
    """What a right answer passes, every one. Null takes those of `curate.checks` that say that an answer is right (math, label, text,
    number, json, tool_calls, code, judge, python), or math where there are none."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one answer check, in seconds."""
    preferences: Preferences | None = None
    """Ask a model, in both orders, which answer is better: the student's or the teacher's, the base's or the teacher's, the student's or
    the base's. Null asks nobody."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the printed intervals."""

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name each of base, student, teacher at most once, and at least one")
        return value

    @model_validator(mode="after")
    def _two_are_compared(self) -> Evaluate:
        if self.preferences is not None and len(self.models) < 2:
            raise ValueError("preferences compares the answers of two models: name two or more in models, or leave it out")
        return self

    @field_validator("checks")
    @classmethod
    def _judge_an_answer(cls, value: list[Check] | None) -> list[Check] | None:
        if value is not None and not value:
            raise ValueError("names no check, so every answer would be right. Leave it out to have those of curate.checks")
        if any(check.agreement is not None for check in value or ()):
            raise ValueError("agreement says nothing of a single answer. Leave it out here")
        return value

    def identity(self) -> dict[str, Any]:
        """The settings that decide the answers; how these are judged is said by `Recipe.checks_of_answers`."""
        plain = super().identity()
        plain = {name: value for name, value in plain.items() if name not in ("checks", "preferences")}
        return plain | ({} if self.preferences is None else {"preferences": self.preferences.identity()})


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
