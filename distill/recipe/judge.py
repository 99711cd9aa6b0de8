"""A model that grades: which one, how it draws its tokens, how often it is asked, and by which rubric."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from distill.recipe.base import PositiveInt, Sampling, Section
from distill.recipe.models import ModelSpec

_NAMED = re.compile(r"\{([A-Za-z_][\w.]*)\}")
# Not the argument of a LaTeX command, as in \boxed{answer}, nor what looks like Jinja's. Letters of other scripts may stand before it.
_PLACES = re.compile(rf"(?<![A-Za-z0-9_\\^{{}}])(?:{_NAMED.pattern})+")
_SHARED = ("prompt", "reference")
OF_ONE = (*_SHARED, "answer", "reasoning")
"""What a rubric for single answers may name besides columns."""


class Grader(Section):
    """A model that grades, in this process or behind a server."""

    decides_no_row = frozenset({"batch_size"})

    model: ModelSpec
    """The model, as in `teacher`: `{model: ..., server: {...}}`."""
    repeats: PositiveInt = 1
    """How often each question is put, an odd number: what more than half of the replies say counts, and else nothing is judged."""
    max_new_tokens: PositiveInt = 2048
    """Longest reply, in tokens, reasoning included; what is cut before its verdict is not judged."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token; more than 0 is needed for repeats."""
    batch_size: PositiveInt = 16
    """Questions at once, in this process; halved by itself when memory runs out."""

    @model_validator(mode="after")
    def _repeats_differ(self) -> Grader:
        if self.repeats % 2 == 0:
            raise ValueError(f"repeats: got {self.repeats}, of which half may say one thing and half the other. Give an odd number")
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError("repeats at temperature 0 say the same thing every time: raise temperature, or leave repeats out")
        return self

    @property
    def sampling(self) -> Sampling:
        """How a reply is drawn."""
        return Sampling(
            samples_per_prompt=self.repeats,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
        )

    def identity(self) -> dict[str, Any]:
        """What decides a reply, besides the words that frame the rubric."""
        plain = self.model_dump(mode="json", exclude_defaults=True, exclude={"model", *self.decides_no_row})
        return plain | {"model": self.model.identity()}


def places_in(rubric: str, known: tuple[str, ...]) -> list[str]:
    """Columns of `prompts.fields` that a rubric names: what stands in braces and is none of the known words."""
    found = (name for places in _PLACES.finditer(rubric) for name in _NAMED.findall(places[0]))
    return [name for name in dict.fromkeys(found) if name not in known]


def filled(rubric: str, values: dict[str, str]) -> str:
    """A rubric with values in the places of their names, all at once: what stands in a value is no place."""
    return _PLACES.sub(lambda places: _NAMED.sub(lambda found: values.get(found[1], found[0]), places[0]), rubric)


def _with_places(value: str, known: tuple[str, ...]) -> str:
    """A rubric that says something, and in which each known name that stands in braces stands for its text."""
    if not value.strip():
        raise ValueError("is empty, so there is nothing to grade by. Say what a good answer is")
    filled_in = places_in(value, ())
    left = next((name for name in _NAMED.findall(value) if name in known and name not in filled_in), None)
    if left is not None:
        raise ValueError(
            f"{{{left}}} stands behind a letter, a digit, a backslash or a brace, where it is no place for the {left}: the judge would see "
            f"the braces. Write a blank before it, or another word in it"
        )
    return value


class Rubric(Grader):
    """A model that grades single answers by a rubric."""

    rubric: str
    """What a good answer is, in plain words. `{prompt}`, `{answer}`, `{reasoning}`, `{reference}` and columns of `prompts.fields` in braces
    stand for these of each row; prompt and answer are put below it where it does not name them."""

    @field_validator("rubric")
    @classmethod
    def _says_something(cls, value: str) -> str:
        return _with_places(value, OF_ONE)


class Preferences(Grader):
    """A model that says which of two answers is better."""

    rubric: str = "Which answer serves the user better: right, complete, to the point, in the form that was asked for?"
    """What makes an answer the better one, in plain words. `{prompt}`, `{reference}` and columns of `prompts.fields` in braces stand for
    these of each row; the prompt is put below it where it does not name it, and the two answers always."""

    @field_validator("rubric")
    @classmethod
    def _says_something(cls, value: str) -> str:
        return _with_places(value, _SHARED)

    @property
    def columns(self) -> list[str]:
        """Columns of `prompts.fields` that the rubric names."""
        return places_in(self.rubric, _SHARED)

    @property
    def asks_reference(self) -> bool:
        """Whether the rubric names it."""
        return "reference" in places_in(self.rubric, ())
