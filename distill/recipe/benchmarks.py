"""Public benchmarks: which tasks of lm-eval are run with whom, and how their answers are taken."""

from __future__ import annotations

import re
from typing import Annotated, get_args

from pydantic import Field, field_validator, model_validator

from distill.recipe.base import PathOrName, PositiveInt, Section
from distill.recipe.checks import Check, Checks, checks_of
from distill.recipe.results import ModelRole

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._:,+-]*$")]


class Benchmarks(Section):
    """Base, student and teacher on tasks of lm-eval (the optional extra `benchmarks`)."""

    decides_no_row = frozenset({"batch_size", "check_timeout_s", "include_path"})

    tasks: list[TaskName] = Field(default_factory=list)
    """Tasks, groups and tags by lm-eval's names (`lm-eval ls tasks` lists them), e.g. `[gsm8k, arc_challenge]`."""
    forgetting: list[TaskName] = Field(default_factory=list)
    """Further tasks, which the student should do as well as the base: on which it does worse beyond the noise is said in words."""
    models: list[ModelRole] = Field(default_factory=lambda: list(get_args(ModelRole)))
    """Who is measured; base is the student before training. Behind a server only tasks that are answered in text can be run."""
    include_path: PathOrName | None = None
    """Folder with task files of your own in lm-eval's form, which go before lm-eval's of the same name.
    What they hold counts, not where they are."""
    limit: PositiveInt | None = None
    """Only the first documents of each task, for a try; null means all, as numbers that are published have it."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null means as each task says."""
    apply_chat_template: bool = False
    """Put each question as a user's turn. Models behind a server take it in no other way."""
    think_end: str | None = "</think>"
    """With the chat template: an answer is what follows this; null takes all that was written."""
    max_gen_toks: PositiveInt | None = None
    """Longest answer, in tokens; null means as each task says. Needed for models behind a server."""
    batch_size: PositiveInt = 16
    """Sequences at once; halved by itself when memory runs out."""
    second_tasks: list[str] = Field(default_factory=lambda: ["aime*", "gsm8k*", "hendrycks_math*", "minerva_math*"])
    """Tasks, by patterns of their names, whose answers the kit's own checks judge as well, beside lm-eval's number."""
    second_checks: Checks = Field(default_factory=lambda: checks_of("math"))
    """What a right answer passes there, every one."""
    second_reference: str = r"####\s*(.+)"
    """Regular expression whose group is the right answer inside of lm-eval's target, where it matches; else the target is it."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one such check, in seconds."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the intervals."""

    organization: str | None = None
    """Who has measured, for the record of Every Eval Ever; null says that it is not known."""

    @property
    def all_tasks(self) -> list[str]:
        """Those of both lists, each once."""
        return list(dict.fromkeys([*self.tasks, *self.forgetting]))

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name each of base, student, teacher at most once, and at least one")
        return value

    @field_validator("second_reference")
    @classmethod
    def _one_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"needs exactly one group, in parentheses, and has {groups}")
        return value

    @field_validator("second_checks")
    @classmethod
    def _judge_an_answer(cls, value: list[Check]) -> list[Check]:
        if not value:
            raise ValueError("names no check, so every answer would be right. Leave it out to have math")
        for check in value:
            asks_prompt = check.language is not None and check.language.language == "prompt"
            missing = "further columns" if check.settings.columns or check.kind == "code" else "prompt" if asks_prompt else None
            missing = {"judge": "model that grades them", "agreement": "other samples", "length": "tokens"}.get(check.kind, missing)
            if missing is not None:
                raise ValueError(f"{check.called} can't judge here: lm-eval's answers come with no {missing}. Take another check")
        return value

    @model_validator(mode="after")
    def _has_tasks(self) -> Benchmarks:
        if not self.all_tasks:
            raise ValueError("names no task: give tasks, or forgetting")
        if self.forgetting and not {"base", "student"} <= set(self.models):
            raise ValueError("forgetting compares the student with the base: name both in models")
        if not self.apply_chat_template and self.think_end != type(self).model_fields["think_end"].default:
            raise ValueError("think_end would be ignored without apply_chat_template. Set that, or leave it out")
        return self
