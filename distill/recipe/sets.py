"""Held-out sets beside the run's own: from where, in which columns, what a right answer is there, how often each prompt is answered.

Whatever a set does not say is as `evaluate` and `prompts` say it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field, field_validator

from distill.recipe.base import PathOrName, PositiveInt, Sampling, Section
from distill.recipe.checks import Check, Checks
from distill.recipe.prompts import Columns, Prompts, check_pattern, check_template

MAIN = "heldout"
"""The set that every run has: the held-out prompts of `prompts`."""

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Letters, digits, `_` and `-`."""


class AskedSet(NamedTuple):
    """A set as it is asked, with nothing left open."""

    prompts: Prompts
    """The section by which its rows are read."""
    sampling: Sampling
    checks: list[Check]
    """What a right answer passes."""
    max_prompts: int | None
    """Prompts at most; null means all."""


def judge_an_answer(value: list[Check] | None) -> list[Check] | None:
    """Checks of answers: there are some, and each says something of a single answer."""
    if value is not None and not value:
        raise ValueError("names no check, so every answer would be right. Leave it out to have those of curate.checks")
    if any(check.agreement is not None for check in value or ()):
        raise ValueError("agreement says nothing of a single answer. Leave it out here")
    return value


class HeldOutSet(Section):
    """Prompts from elsewhere that base, student and teacher answer, too."""

    source: PathOrName
    """As `prompts.source`. Prompts that the run trains on are left out, and counted."""
    subset: str | None = None
    """Configuration of a Hub data set; not for files."""
    split: str = "test"
    """Split of a Hub data set; not for files."""
    columns: Columns | None = None
    """Column names; null takes those of `prompts`, with its answer_pattern and json_reference. By `tags`, scores are given for each tag."""
    answer_pattern: str | None = None
    """As in `prompts`."""
    json_reference: bool = False
    """As in `prompts`."""
    fields: list[str] | None = None
    """Further columns that checks look at; null takes those that the checks name."""
    template: str | None = None
    """The user's turn, as in `prompts`; null takes that of `prompts`, whose system prompt always stands before it."""
    max_prompts: PositiveInt | None = None
    """Use only so many of its prompts, drawn by the seed; null means all."""
    checks: Checks | None = None
    """What a right answer passes; null takes the checks of `evaluate`."""
    samples_per_prompt: PositiveInt | None = None
    """Answers to each prompt; this and how they are drawn are as in `evaluate` where they are null."""
    max_new_tokens: PositiveInt | None = None
    """Longest answer, in tokens of its author."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 takes the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus: the smallest set of tokens whose probability reaches this."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Only the k most probable tokens; 0 means all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Only tokens at least this probable relative to the most probable one."""

    _pattern = field_validator("answer_pattern")(check_pattern)

    _checks = field_validator("checks")(judge_an_answer)
    _template = field_validator("template")(check_template)

    def sampling(self, main: Sampling) -> Sampling:
        """How its answers are drawn.

        Args:
            main: The section `evaluate`.

        Raises:
            ValueError: what it says does not go with what it leaves to `evaluate`.
        """
        given = {name: value for name in Sampling.model_fields if (value := getattr(self, name, None)) is not None}
        plain = main.plain().model_dump()
        if given.get("temperature", main.temperature) == 0 != main.temperature:  # what only drawing has is left out, not an error
            plain = {name: plain[name] for name in ("max_new_tokens", "batch_size")}
        found = Sampling.model_validate(plain | given)
        # What the user has set, here or there, is refused where a server can't honour it.
        return Sampling.model_construct(_fields_set={*given, *main.model_fields_set} & {*Sampling.model_fields}, **found.model_dump())

    def as_prompts(self, main: Prompts, checks: list[Check]) -> Prompts:
        """The section by which its rows are read as prompts.

        Args:
            main: The section `prompts`.
            checks: Of its answers.
        """
        inherits = self.columns is None
        looked_at = list(dict.fromkeys(column for check in checks for column in check.settings.columns))
        fields = self.fields if self.fields is not None else looked_at
        return main.model_copy(
            update={
                "source": self.source,
                "subset": self.subset,
                "split": self.split,
                "columns": main.columns if self.columns is None else self.columns,
                "answer_pattern": main.answer_pattern if inherits and self.answer_pattern is None else self.answer_pattern,
                "json_reference": self.json_reference or (inherits and main.json_reference),
                "answer_as_reference": inherits and main.answer_as_reference,
                "turns": main.turns if inherits else "last",
                "fields": fields or None,
                "template": main.template if self.template is None else self.template,
                "max_prompts": self.max_prompts,
                "heldout_size": 0,
                "heldout_source": None,
                "near_duplicates": None,
                "decontaminate": None,
            }
        )
