"""The settings of each check that a recipe can name."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill.recipe.base import PathOrName, PositiveInt, Section, Share
from distill.recipe.code import CodeSettings
from distill.recipe.judge import OF_ONE, Rubric, places_in

Column = str
"""A name in `prompts.fields`."""


class CheckSection(Section):
    """The settings of a check."""

    shown = True
    words = "name alone, or section"
    compares: ClassVar[bool] = False
    """Whether there is nothing to judge without the right answer, whatever the settings."""
    of_answers: ClassVar[bool] = False
    """Whether it says that an answer is right, not only how a trace looks."""

    @property
    def asks_reference(self) -> bool:
        """Whether these settings need the right answer."""
        return self.compares

    @property
    def columns(self) -> list[Column]:
        """Those of the source that are looked at beside prompt and reference."""
        return []


class Finish(CheckSection):
    """The trace ended by itself."""


class Think(CheckSection):
    """Reasoning between think tags, then an answer."""

    reasoning: Literal["always", "optional", "none"] = "always"
    """Whether there is always some; optional takes an answer alone, too, and none takes nothing else."""


class Math(CheckSection):
    """The last box, or else the last expression, equals the reference: as what it is, a number, a set, a date, an expression, a text."""

    compares = of_answers = True


class Label(CheckSection):
    """The answer names one of a closed set, and it is the reference's: alone, in a box, bold or in a sentence; two of them are wrong."""

    compares = of_answers = True

    choices: list[str] | None = None
    """The labels. Case, `_` and `-`, and forms of Unicode make no difference."""
    column: Column | None = None
    """Column of `prompts.fields` with each prompt's own list of choices, instead: they are named by their text, their letter (A for the
    first) or both."""
    numbered_from: Literal[0, 1] | None = None
    """What the first choice is called where the references are numbers, as in many data sets; null where they are texts or letters."""

    @model_validator(mode="after")
    def _one_set(self) -> Label:
        if (self.choices is None) == (self.column is None):
            raise ValueError("give exactly one of choices (a list of labels) and column (where each prompt's own choices are)")
        if self.choices is not None and (len(self.choices) < 2 or not all(choice.strip() for choice in self.choices)):
            raise ValueError("choices needs two labels or more, none of them empty")
        return self

    @property
    def columns(self) -> list[Column]:
        """Where the choices are."""
        return [self.column] if self.column is not None else []


class Text(CheckSection):
    """The answer as text: case, white space, forms of Unicode and punctuation around it make no difference."""

    of_answers = True

    reference: Literal["equal", "contains", "ignore"] = "equal"
    """How the answer stands to the reference, or to one of them where it is a list: it is equal, has it inside as whole words, or is not
    compared."""
    pattern: str | None = None
    """Regular expression that must be found in the answer as it stands; `{reference}` in it stands for the reference, as in
    `^Total: {reference}$`."""
    context: Column | None = None
    """Column of `prompts.fields` with a text that the answer must be a piece of, word for word."""
    exact: bool = False
    """Compare as it stands, but for white space around it."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value.replace("{reference}", "x"))
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _asks_something(self) -> Text:
        if self.reference == "ignore" and self.pattern is None and self.context is None:
            raise ValueError("nothing is asked: compare with the reference, or give a pattern or a context")
        return self

    @property
    def asks_reference(self) -> bool:
        """Where it is compared, or stands in the pattern."""
        return self.reference != "ignore" or "{reference}" in (self.pattern or "")

    @property
    def columns(self) -> list[Column]:
        """Where the context is."""
        return [self.context] if self.context is not None else []


class Number(CheckSection):
    """One number, with a unit or a percent sign where there is one, equals the reference."""

    compares = of_answers = True

    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest difference, as a share of the reference; 0 compares every digit."""
    absolute_tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Largest difference, in the reference's unit; the larger of the two tolerances counts."""
    units: list[str] | None = None
    """Names that all mean the unit (`[km, kilometre, kilometres]`): an answer has one of them, or none. Null takes that of the reference,
    or none."""
    decimal: Literal[".", ","] = "."
    """What stands before the decimals; the other one parts thousands."""


class Json(CheckSection):
    """The answer, or a fenced block or object in it, is JSON."""

    of_answers = True

    reference: Literal["equal", "ignore"] = "equal"
    """Whether it must equal the reference as data, or is not compared."""
    fields: list[str] | None = None
    """Compare these only, by dotted names (`customer.id`, `lines.0.sku`); null compares all."""
    json_schema: dict[str, Any] | None = None
    """JSON schema that it must satisfy."""
    schema_column: Column | None = None
    """Column of `prompts.fields` with each prompt's own schema."""

    @model_validator(mode="after")
    def _fits(self) -> Json:
        if self.fields is not None and self.reference == "ignore":
            raise ValueError("fields would be ignored: nothing is compared with reference: ignore")
        if self.json_schema is not None and self.schema_column is not None:
            raise ValueError("json_schema and schema_column exclude each other")
        return self

    @property
    def asks_reference(self) -> bool:
        """Where it is compared."""
        return self.reference == "equal"

    @property
    def columns(self) -> list[Column]:
        """Where the schema is."""
        return [self.schema_column] if self.schema_column is not None else []


class ToolCalls(CheckSection):
    """The answer calls tools, well-formed, of names and with arguments that the row's tools take."""

    of_answers = True

    form: Literal["any", "hermes", "deepseek", "llama", "mistral", "structured"] = "any"
    """How calls are written: hermes (all between `<tool_call>` tags: Qwen's, GLM's), deepseek, llama, mistral, or structured (a JSON list
    of calls). A student writes them as its chat template does, whoever wrote what it learned from; any reads all of these."""
    tools: Column = "tools"
    """Column of `prompts.fields` with the tools that there are, as the OpenAI protocol has them."""
    reference: Literal["equal", "ignore"] = "ignore"
    """Whether the calls must be those of the reference (a list; an empty one means none), or are not compared."""
    in_words: Literal["unjudged", "no_call"] = "unjudged"
    """What a reference in words means, as that of a turn that calls nothing: nothing is compared, or no tool is to be called."""
    ordered: bool = False
    """Whether their order counts."""
    required: bool = True
    """Whether an answer without any call fails; where calls are compared, the reference says it."""

    @property
    def asks_reference(self) -> bool:
        """Where they are compared."""
        return self.reference == "equal"

    @property
    def columns(self) -> list[Column]:
        """Where the tools are."""
        return [self.tools]


class Code(CodeSettings, CheckSection):
    """The code of the answer passes the tests of its row, run in a sandbox."""

    of_answers = True

    tests: Column = "tests"
    """Column of `prompts.fields` with each prompt's own tests: Python (asserts, functions `test_*`, unittest, `check(candidate)`), or a
    list of `{input, output}` for a program that reads and prints."""

    @property
    def columns(self) -> list[Column]:
        """Where the tests are."""
        return [self.tests]


class Language(CheckSection):
    """The answer is in a language, as far as a small classifier is sure of it; code, formulas and numbers are left out."""

    language: Annotated[str, Field(pattern=r"^(?:prompt|[a-z]{2,3})$")] = "prompt"
    """ISO 639 code (`de`, `zh`), or `prompt` for that of the prompt."""
    reasoning: bool = False
    """Whether the reasoning must be in it, too."""
    min_share: Share = 0.8
    """Least share of the text, by letters, that is in it."""


class Length(CheckSection):
    """Tokens of the whole trace: its author's, or the student's where those are not known."""

    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Shorter ones fail."""
    max_tokens: PositiveInt | None = None
    """Longer ones fail; null means no limit."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Length:
        if not self.min_tokens and self.max_tokens is None:
            raise ValueError("nothing is asked: give min_tokens, max_tokens or both")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is above max_tokens, so every trace would fail")
        return self


class Degenerate(CheckSection):
    """The trace does not go round in circles: no loop at an end, no endless row of one character, few phrases again and again."""

    max_run: PositiveInt = 200
    """One character at most so often in a row, white space aside."""
    max_repeated: Share = 0.3
    """Largest share of phrases that were there before."""
    phrase_words: Annotated[int, Field(ge=2)] = 20
    """Words of a phrase."""


class Agreement(CheckSection):
    """The answer is the commonest among its prompt's samples: for prompts without a reference."""

    min_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of all its samples that give it; with less none of them is judged."""


class Judge(Rubric, CheckSection):
    """A model grades the answer by a rubric; refusals, and replies that say no verdict, judge nothing."""

    of_answers = True

    @property
    def asks_reference(self) -> bool:
        """Where the rubric names it."""
        return "reference" in places_in(self.rubric, ())

    @property
    def columns(self) -> list[Column]:
        """Those that the rubric names."""
        return places_in(self.rubric, OF_ONE)


class Python(CheckSection):
    """A function of the user's own, called in a process that is killed at `check_timeout_s`."""

    of_answers = True

    file: PathOrName
    """Python file; its digest is part of what the traces were checked with."""
    function: str = "check"
    """Its function: given answer, reference and row (a dictionary), it returns true, false or null, or one of these and a reason."""
