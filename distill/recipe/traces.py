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
    answers, each is a trace. Null takes the last turn of `columns.messages` where it is an assistant's, else the column `completion`. Ends
    of turns of any family (`<|im_end|>`) are taken off; other marks of reasoning become `<think>` and `</think>`; where the latter stands
    alone, as R1 leaves it, it is given the first."""
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
    def column_of_answers(self) -> str:
        """Where they are, unless each is the last turn of its conversation."""
        return self.completion or "completion"

    @property
    def takes_last_turns(self) -> bool:
        """Whether the last turn of a conversation is the answer, where it is an assistant's."""
        return self.completion is None and self.columns.messages is not None


class Unsolved(Section):
    """More samples of prompts of which no trace passes yet."""

    max_samples: PositiveInt
    """Of a prompt at most. After each curation those of whose judged traces none passes get `samples_per_prompt` more, up to so many."""
    temperatures: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Of the further samples, one after the other (`[0.8, 1.0]`: the second `samples_per_prompt` at 0.8, all behind them at 1.0); null:
    all at `generate.temperature`. So what is easy is answered at a low temperature, and only what is not at a higher one."""


class Generate(Sampling):
    """The teacher writes traces: in this process, or where `teacher.server` says."""

    logprobs: Annotated[int, Field(ge=1, le=64)] | None = None
    """Keep the log-probabilities of so many most probable tokens with every token written (hosts give up to 20): targets without a second
    reading (`score.source: generation`). Needs a server that tells them."""
    unsolved: Unsolved | None = None
    """More samples of prompts without a right answer yet; null writes `samples_per_prompt` of each alone. `distill run` goes from curate
    back to generate until none is left, or all have their most; by hand, `distill generate` and `distill curate` in turn."""

    @model_validator(mode="after")
    def _further_samples_differ(self) -> Generate:
        if self.unsolved is None:
            return self
        if self.unsolved.max_samples <= self.samples_per_prompt:
            raise ValueError(
                f"unsolved.max_samples ({self.unsolved.max_samples}) would be ignored: it is not above samples_per_prompt "
                f"({self.samples_per_prompt})"
            )
        passes = -(-self.unsolved.max_samples // self.samples_per_prompt) - 1
        if len(self.unsolved.temperatures or []) > passes:
            raise ValueError(
                f"unsolved.temperatures has {len(self.unsolved.temperatures or [])}, and up to max_samples ({self.unsolved.max_samples}) "
                f"there are {passes} times samples_per_prompt more: the others would be ignored"
            )
        if self.temperature == 0 and self.unsolved.temperatures is None:
            raise ValueError("temperature 0 writes the same answer every time: give unsolved.temperatures of further samples")
        return self

    @property
    def most_samples(self) -> int:
        """Of a prompt at most."""
        return self.samples_per_prompt if self.unsolved is None else self.unsolved.max_samples

    def further(self, samples: int) -> Generate:
        """How more is written of prompts that have so many samples."""
        temperatures = self.unsolved.temperatures if self.unsolved is not None else None
        if temperatures is None or samples < self.samples_per_prompt:
            return self
        place = -(-samples // self.samples_per_prompt) - 1
        return self.model_copy(update={"temperature": temperatures[min(place, len(temperatures) - 1)]})

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows; of those that an earlier kit did not know only what is asked for.

        How more is written of unsolved prompts says nothing of the rows of all.
        """
        plain = super().identity()
        return {name: value for name, value in plain.items() if name != "unsolved" and (name != "logprobs" or value is not None)}


_LATER = ("min_pass_rate", "max_pass_rate", "long_share")


class Curate(Section):
    """Which traces are good enough to learn from."""

    decides_no_row = frozenset({"workers", "check_timeout_s"})

    checks: Checks = Field(default_factory=lambda: checks_of("finish", "think", "math"))
    """Every one must pass; the first that does not is the reason a trace goes. A name alone (`finish`), or with settings
    (`label: {choices: [yes, no]}`)."""
    keep_unjudged: bool = False
    """Keep traces that a check could not judge (no reference, or the checker ran out of time)."""
    min_pass_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop the traces of prompts that are too hard: of whose judged traces a smaller share passes every check. One that a check could not
    judge, and none failed, is not counted; a prompt that is left with none has no rate, and stays. Text that was cut counts as failed."""
    max_pass_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Drop the traces of prompts that are too easy: of whose judged traces a larger share passes every check."""
    max_per_prompt: PositiveInt = 4
    """Traces kept for each prompt."""
    prefer: Literal["first", "shortest", "longest", "mixed", "varied", "likeliest", "rank_surprisal"] = "first"
    """Which of a prompt's passing traces are kept, where there are more than `max_per_prompt`. mixed: the longest of a share of the prompts
    (`long_share`), the shortest of the others. varied: the first, then always the one whose text is least like those taken (Jaccard
    distance of pieces of eight characters). likeliest: those whose tokens the teacher found most probable on average; needs
    generate.logprobs. rank_surprisal: those with the lowest Rank-Surprisal Ratio, which the student reads for in this process: what
    surprises it, by tokens that it ranks high all the same (arXiv 2601.14249)."""
    long_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the prompts that keep their longest traces, drawn by prompt and seed; for prefer mixed."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one check of one trace, in seconds; the checking process is killed at it, and nothing is judged."""
    workers: PositiveInt | None = None
    """Processes that check answers; null means one a core."""

    @property
    def reasoning(self) -> Literal["always", "optional", "none"]:
        """What the checks say of reasoning."""
        return next((check.think.reasoning for check in self.checks if check.think is not None), "optional")

    @property
    def bounds_difficulty(self) -> bool:
        """Whether prompts can be too hard or too easy."""
        return self.min_pass_rate is not None or self.max_pass_rate is not None

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Curate:
        if (self.prefer == "mixed") != (self.long_share is not None):
            raise ValueError("prefer mixed and long_share go together: give both or neither")
        if self.bounds_difficulty and not self.checks:
            raise ValueError("min_pass_rate and max_pass_rate would be ignored: without checks every trace passes")
        if self.min_pass_rate is not None and self.max_pass_rate is not None and self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate ({self.min_pass_rate:g}) is above max_pass_rate ({self.max_pass_rate:g}): no prompt is between"
            )
        return self

    def check_traces(self, generate: Generate | None) -> None:
        """Refuses what can't be chosen by among the traces that there will be.

        Args:
            generate: How they are written; null where they are brought.

        Raises:
            ValueError: naming the keys.
        """
        if self.prefer == "likeliest" and (generate is None or generate.logprobs is None):
            advice = "set generate.logprobs: 1" if generate is not None else "take rank_surprisal, for which the student reads them"
            raise ValueError(f"curate.prefer likeliest needs the log-probabilities of the tokens that the teacher wrote: {advice}")
        if generate is None:
            return
        if generate.unsolved is not None and not self.checks:
            raise ValueError("generate.unsolved would be ignored: without curate.checks every trace passes")
        if generate.unsolved is not None and (self.min_pass_rate or 0) > 0.5:
            raise ValueError(
                f"curate.min_pass_rate ({self.min_pass_rate:g}) would drop all that generate.unsolved writes: behind wrong samples "
                "as many right ones are half. Set it to 0.5 or below, or leave one of them out"
            )
        if generate.samples_per_prompt == 1 and self.bounds_difficulty:
            raise ValueError(
                "curate.min_pass_rate and max_pass_rate look at how many of a prompt's traces pass, and there is one: raise "
                "generate.samples_per_prompt"
            )
        if generate.most_samples <= self.max_per_prompt and self.prefer in ("mixed", "varied", "likeliest", "rank_surprisal"):
            raise ValueError(
                f"curate.prefer {self.prefer} would be ignored: of a prompt at most {generate.most_samples} are written "
                f"(generate.samples_per_prompt), not more than curate.max_per_prompt ({self.max_per_prompt}), so all that pass are kept"
            )

    def identity(self) -> dict[str, Any]:
        """The settings that decide which rows are kept; of those that an earlier kit did not know only what is asked for."""
        plain = super().identity() | {"checks": [check.identity() for check in self.checks]}
        return {name: value for name, value in plain.items() if name not in _LATER or value is not None}
