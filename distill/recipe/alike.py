"""Prompts that are too much like others to be trained on: like one another, like held-out ones, like those of benchmarks."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from distill.recipe.base import PathOrName, Section, Share

Similarity = Annotated[float, Field(ge=0.5, le=1)]
"""Share of the runs of five characters that two texts have in common, of those that either has."""


class NearDuplicates(Section):
    """Of prompts that are nearly the same one is trained on, and none that is nearly a held-out one."""

    similarity: Similarity = 0.8
    """From which two prompts are nearly the same: the share of runs of five characters that both have, of those that either has, in the
    normal form of the texts without system turns and before the template, with what further columns put into it. So one question to
    characters of different system turns is nearly the same prompt, and so are questions about one long passage: leave the section out
    there. Of such training prompts the first stays."""


class Benchmark(Section):
    """A benchmark, by its questions."""

    words = "benchmarks, each by its source alone or as a section"

    source: PathOrName
    """As `prompts.source`."""
    subset: str | None = None
    """Configuration of a Hub data set; not for files."""
    split: str = "test"
    """Split of a Hub data set; not for files."""
    column: str | None = None
    """Column of the questions' text; null takes `prompt` or `messages` of `prompts.columns`."""

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @property
    def called(self) -> str:
        """Its name in tables and errors."""
        return "/".join(part for part in (self.source, self.subset) if part)


class Decontaminate(Section):
    """Prompts in which questions of benchmarks or held-out prompts are found are not trained on."""

    benchmarks: list[Benchmark] = Field(default=[])
    """What is compared with beside the held-out prompts: files or Hub data sets, `source` alone or with `column`. A set of
    `evaluate.sets` is named here too, where its prompts are to be kept out of training; else they are left out of the set."""
    heldout: bool = True
    """Compare with the run's held-out prompts, too."""
    exact: bool = True
    """Drop what is a question in another spelling, whatever further columns the template puts beside it."""
    ngrams: list[Annotated[int, Field(ge=3)]] = Field(default=[13, 8])
    """Drop what shares a run of so many words with a question; the largest that fits is what is written down. In scripts without
    spaces a character counts as half a word, in texts that are mostly of them: such a question inside a longer text of words is not
    found. A question of fewer words is found by the other ways alone."""
    similarity: Similarity | None = None
    """Drop what is this similar to a question, as `near_duplicates.similarity` says it; null does not compare so."""
    boilerplate: Share = 0.01
    """A run of words in more than this share of the training prompts, and in more than ten, is no sign of a question."""

    @field_validator("ngrams")
    @classmethod
    def _from_the_largest(cls, value: list[int]) -> list[int]:
        if value != sorted(set(value), reverse=True):
            raise ValueError("name each length once, the largest first")
        return value

    @model_validator(mode="after")
    def _compares(self) -> Decontaminate:
        if not self.benchmarks and not self.heldout:
            raise ValueError("there is nothing to compare with: name benchmarks, or set heldout: true")
        if not self.exact and not self.ngrams and self.similarity is None:
            raise ValueError("nothing is looked for: set exact, ngrams or similarity, or leave the section out")
        if self.boilerplate != type(self).model_fields["boilerplate"].default and not self.ngrams:
            raise ValueError("boilerplate is for ngrams, and would be ignored. Leave it out")
        return self
