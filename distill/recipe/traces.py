"""The traces: written by a teacher or brought from elsewhere, and which of them are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.recipe.base import PathOrName, PositiveInt, Sampling, Section
from distill.recipe.checks import Checks, checks_of
from distill.recipe.prompts import Columns


class Traces(Section):
    """Finished traces from elsewhere, instead of generating them."""

    source: PathOrName
    """File (jsonl, json, csv, parquet; the first three also as .gz or .zst), folder or glob of such files, or Hub data set id."""
    subset: str | None = None
    """Configuration of a Hub data set; not for files."""
    split: str = "train"
    """Split of a Hub data set; not for files."""
    columns: Columns = Columns(prompt="question")
    """Column names of the prompt; a trace belongs to the prompt whose text is the same."""
    completion: str | None = None
    """Column with the answer (the reasoning inside it, or in a column of its own), by a name as in `prompts.columns`; with a list of
    answers, each is a trace. Null takes the last turn of `columns.messages`, or the column `completion` where there are none. Ends of turns
    of any family (`<|im_end|>`) are taken off; other marks of reasoning become `<think>` and `</think>`, which where it stands alone, as
    R1 leaves it, is given the first."""
    reasoning: str | None = None
    """Column with the reasoning, where it is apart; it is put between `<think>` and `</think>`. This, `finish_reason` and `verdict` have an
    entry for each answer where `completion` has a list, or say the same of all."""
    answer_separator: str | None = None
    """Text inside the completion before which stands the reasoning and after which the answer (`####` in GSM8K)."""
    finish_reason: str | None = None
    """Column that says how a trace ended (`stop`, `length`, and what servers write for them); one that was cut is dropped by curate.checks
    finish. Null where none does: then only a text that is plainly cut is found."""
    verdict: str | None = None
    """Column that says whether the answer is right (true, false, 1, 0, or a word such as `correct`, `failed`; null: not known). It stands
    in place of every check in `curate.checks` that says so (math, label, text, number, json, tool_calls, code, python, judge), which then
    look at no trace; base, student and teacher are measured by these checks all the same."""
    author_model: str | None = None
    """Who wrote them, for the record."""
    licence: str | None = None
    """Terms of the traces, for the record."""

    @model_validator(mode="after")
    def _one_way_to_find_reasoning(self) -> Traces:
        if self.reasoning is not None and self.answer_separator is not None:
            raise ValueError("reasoning and answer_separator exclude each other: the reasoning is in one place")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows; of those that an earlier kit did not know only what is asked for."""
        plain = super().identity() | {"columns": self.columns.identity(), "completion": self.column_of_answers}
        return {name: value for name, value in plain.items() if name != "verdict" or value is not None}

    @property
    def column_of_answers(self) -> str | None:
        """Where they are; null where each is the last turn of its conversation."""
        return self.completion or ("completion" if self.columns.messages is None else None)


class Generate(Sampling):
    """The teacher writes traces: in this process, or where `teacher.server` says."""

    logprobs: Annotated[int, Field(ge=1, le=64)] | None = None
    """Keep the log-probabilities of so many most probable tokens with every token written (hosts give up to 20): targets without a second
    reading (`score.source: generation`). Needs a server that tells them."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows; of those that an earlier kit did not know only what is asked for."""
        plain = super().identity()
        return {name: value for name, value in plain.items() if name != "logprobs" or value is not None}


class Curate(Section):
    """Which traces are good enough to learn from."""

    decides_no_row = frozenset({"workers", "check_timeout_s"})

    checks: Checks = Field(default_factory=lambda: checks_of("finish", "think", "math"))
    """Every one must pass; the first that does not is the reason a trace goes. A name alone (`finish`), or with settings
    (`label: {choices: [yes, no]}`)."""
    keep_unjudged: bool = False
    """Keep traces that a check could not judge (no reference, or the checker ran out of time)."""
    max_per_prompt: PositiveInt = 4
    """Traces kept for each prompt."""
    prefer: Literal["first", "shortest", "longest"] = "first"
    """Which of a prompt's passing traces are kept."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one check of one trace, in seconds; the checking process is killed at it, and nothing is judged."""
    workers: PositiveInt | None = None
    """Processes that check answers; null means one a core."""

    @property
    def reasoning(self) -> Literal["always", "optional", "none"]:
        """What the checks say of reasoning."""
        return next((check.think.reasoning for check in self.checks if check.think is not None), "optional")

    def identity(self) -> dict[str, Any]:
        """The settings that decide which rows are kept."""
        return super().identity() | {"checks": [check.identity() for check in self.checks]}
