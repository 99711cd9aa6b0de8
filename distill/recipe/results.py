"""What a run is measured by, and what it leaves behind: evaluation, report, export."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from distill.recipe.base import PositiveInt, Sampling, Section
from distill.recipe.checks import Checks
from distill.recipe.judge import Preferences
from distill.recipe.likeness import Likeness
from distill.recipe.sets import MAIN, HeldOutSet, SetName, judge_an_answer

ModelRole = Literal["base", "student", "teacher"]


class Evaluate(Sampling):
    """Base, student and teacher answer the held-out prompts, and those of further sets."""

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
    sets: dict[SetName, HeldOutSet] = Field(default_factory=dict)
    """Further held-out sets by their names, each with a source, columns, checks and sampling of its own."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one answer check, in seconds."""
    preferences: Preferences | None = None
    """Ask a model, in both orders, which answer is better: the student's or the teacher's, the base's or the teacher's, the student's or
    the base's. Null asks nobody."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the printed intervals."""
    likeness: Likeness | None = None
    """How alike base and student are to the teacher, on the answers that it writes to the held-out prompts. Null measures that where no
    answer can be judged (no `prompts.columns.reference`, and a check that asks for one), and else not."""
    calibration: bool = False
    """Whether each model reads its own answers to the held-out prompts, to compare how sure it is with how often it is right."""

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

    _checks = field_validator("checks")(judge_an_answer)

    @field_validator("sets")
    @classmethod
    def _have_names_of_their_own(cls, value: dict[str, HeldOutSet]) -> dict[str, HeldOutSet]:
        if MAIN in value:
            raise ValueError(f"{MAIN} is what the held-out prompts of the section prompts are called. Give this set another name")
        return value

    @model_validator(mode="after")
    def _sets_can_be_drawn(self) -> Evaluate:
        for name, each in self.sets.items():
            try:
                each.sampling(self)
            except ValidationError as error:
                message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"evaluate.sets.{name}: with what it takes from evaluate, {message}") from None
        return self

    @property
    def compares_with_teacher(self) -> bool:
        """Whether the teacher answers, and another model beside it."""
        return "teacher" in self.models and len(self.models) > 1

    def identity(self) -> dict[str, Any]:
        """The settings that decide the answers to the run's own held-out prompts; how these are judged is said by
        `Recipe.checks_of_answers`, the other sets by `Recipe.asked_sets`, and what is compared with the teacher by `Recipe.likeness`.
        """
        plain = super().identity()
        apart = ("checks", "sets", "likeness", "preferences")
        plain = {name: value for name, value in plain.items() if name not in apart and (name != "calibration" or value)}
        # In a list, so that another judge is one change, which may come as a whole.
        return plain | ({} if self.preferences is None else {"preferences": [self.preferences.identity()]})


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
