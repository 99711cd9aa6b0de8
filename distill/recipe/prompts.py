"""The problems: where they come from, and how they are put to a model."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from distill.recipe.alike import Decontaminate, NearDuplicates
from distill.recipe.base import PathOrName, PositiveInt, Section


class Columns(Section):
    """Which columns of a source hold what."""

    prompt: str | None = None
    """Column with the user's text."""
    messages: str | None = None
    """Column with a conversation, instead of `prompt`: a list of turns as OpenAI (`role`, `content`; tools, calls, parts of text) or
    ShareGPT has them (`from`, `value`), or that as JSON. An assistant's last turn is no part of the prompt."""
    system: str | None = None
    """Column with the system turn. Null takes `system` beside `messages`, where rows have it and no system turn of their own, and
    prompts.system_prompt is not set."""
    tools: str | None = None
    """Column with the tools that the model may call, as a list or as JSON. Null takes `tools` or `functions` beside `messages`, where rows
    have them."""
    reference: str | None = None
    """Column with the reference answer; null where there is none."""
    tags: str | None = None
    """Column with a string or a list of strings carried along."""

    @model_validator(mode="after")
    def _one_prompt_column(self) -> Columns:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("name exactly one of prompt and messages")
        return self

    def identity(self) -> dict[str, Any]:
        """The names; of those that an earlier kit did not know only what is asked for."""
        plain = super().identity()
        return {name: value for name, value in plain.items() if name not in ("system", "tools") or value is not None}


def check_pattern(value: str | None) -> str | None:
    """A regular expression with exactly one group, or null."""
    if value is not None:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"must have exactly one group, has {groups}")
    return value


_LETTER = r"(?:\w|[^\x00-\x7f])"  # marks of Arabic and Hindi are letters, too
_NAME = rf"(?:[^\W\d]|[^\x00-\x7f])(?:[\w.-]|[^\x00-\x7f])*{_LETTER}"
_ARGUMENT = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_ESCAPED = re.compile(rf"\{{\{{({_NAME})\}}\}}")
_PLACES = re.compile(rf"\\[A-Za-z]+\*?(?:\[[^\]{{}}]*\]|{_ARGUMENT})+|{_ESCAPED.pattern}|(?<![_^\\\]])\{{(?P<name>{_NAME})\}}")
_PROMPT = re.compile(r"(?<!\{)\{prompt\}|\{prompt\}(?!\})")
_JINJA = re.compile(rf"\{{\{{(?:\s+{_NAME}\s*|{_NAME}\s+)\}}\}}")


class Piece(NamedTuple):
    """A part of a template: text, or the place of a value."""

    text: str
    name: str | None = None
    """Of the column, or `prompt`; null where the text stands for itself."""


def pieces_of(template: str) -> list[Piece]:
    r"""A template in parts. `{name}` is the place of a column, unless it is the argument of a LaTeX command, as in `\boxed{answer}`, or has
    one letter, as a set of numbers has; `{{name}}` is `{name}` as text. `{prompt}` is a place wherever it stands.
    """
    pieces, place = [], 0
    for found in _PLACES.finditer(template):
        if found["name"] is not None:
            pieces += [*_with_prompt(template[place : found.start()]), Piece(found[0], found["name"])]
            place = found.end()
    return [*pieces, *_with_prompt(template[place:])]


def _with_prompt(text: str) -> list[Piece]:
    first, *rest = (Piece(_ESCAPED.sub(r"{\1}", part)) for part in _PROMPT.split(text))
    return [first, *(piece for part in rest for piece in (Piece("{prompt}", "prompt"), part))]


def check_template(value: str | None) -> str | None:
    """A user's turn with a place for the text of the source, or null."""
    if value is None:
        return None
    jinja = _JINJA.search(value)
    if jinja is not None:
        raise ValueError(f"{jinja[0]} would stay as it is: columns are named in single braces, without blanks. Take it out")
    if not any(piece.name == "prompt" for piece in pieces_of(value)):
        raise ValueError("must contain {prompt}")
    return value


class Prompts(Section):
    """Where the problems come from, and how they are put to a model."""

    source: PathOrName
    """File (jsonl, json, csv, parquet; the first three also as .gz or .zst), folder or glob of such files, Hub data set id, or
    `embedded:arithmetic`. A file or folder of that very name comes before a glob."""
    subset: str | None = None
    """Configuration of a Hub data set, e.g. `main`; not for files."""
    split: str = "train"
    """Split of a Hub data set; not for files."""
    columns: Columns = Columns(prompt="question", reference="answer")
    """Column names of the source; dots go inside (`reward_model.ground_truth`), integers count (`messages.-1.content`)."""
    fields: list[str] | None = None
    """Further columns that checks look at, by names as in `columns`: choices, a context, tools. Kept with each prompt as they are."""
    json_reference: bool = False
    """The references may be lists or objects, which are kept as JSON: for the checks json, tool_calls, text (several right answers) and
    python."""
    answer_pattern: str | None = None
    """Regular expression whose one group is the final answer inside the reference; its last match counts."""
    turns: Literal["last", "all", "teacher"] = "last"
    """Which answers of an assistant in a conversation are asked for, and learned if traces are brought with it: the last one; all, each
    behind what stands before it; or those that the source marks (`weight` 1, `train` or `supervised` true)."""
    answer_as_reference: bool = False
    """The answer that stands in a conversation is the reference: its calls as JSON, for the check tool_calls, else its text without
    reasoning."""
    system_prompt: str | None = None
    """Put before every prompt."""
    template: str = "{prompt}"
    """The user's turn. `{prompt}` stands for the text of the source; `{context}`, `{example.choices}` and the like for columns of the same
    row, by names as in `columns`: a list as lines, an object as JSON. What no column is called is refused; `{{name}}` writes `{name}`.
    Brought traces need the same columns."""
    max_prompts: PositiveInt | None = None
    """Use only so many training prompts, drawn by the seed; null means all."""
    heldout_size: Annotated[int, Field(ge=0)] = 200
    """Prompts kept out of training for `evaluate`. With `turns` all or teacher whole conversations are, with all that begin alike: as
    many as make up this number, or the shortest more."""
    heldout_source: PathOrName | None = None
    """Take the held-out prompts from this source instead of splitting them off; prompts in both are not trained on."""
    heldout_split: str = "test"
    """Split of `heldout_source` on the Hub; not for files."""
    near_duplicates: NearDuplicates | None = None
    """Of prompts that are nearly the same only the first is trained on; null drops those alone that are the same."""
    decontaminate: Decontaminate | None = None
    """What else is kept out of training: prompts in which questions of benchmarks, or held-out ones, are found. What was found stands in
    the table prompts/matches."""

    _pattern = field_validator("answer_pattern")(check_pattern)

    _has_prompt = field_validator("template")(check_template)

    @field_validator("system_prompt")
    @classmethod
    def _is_no_template(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" in value:
            raise ValueError("{prompt} would stay as it is: the text of the source goes into prompts.template")
        return value

    @field_validator("fields")
    @classmethod
    def _names_some(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            raise ValueError("name each column once, and at least one; null carries none")
        return value

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows; of those that an earlier kit did not know only what is asked for."""
        plain = super().identity() | {"columns": self.columns.identity()}
        plain |= {"turns": None if self.turns == "last" else self.turns}
        later = ("fields", "json_reference", "turns", "answer_as_reference", "near_duplicates", "decontaminate")
        return {name: value for name, value in plain.items() if name not in later or value}

    @property
    def has_references(self) -> bool:
        """Whether prompts have right answers beside them: a column, or the answers of their conversations."""
        return self.columns.reference is not None or self.answer_as_reference

    @model_validator(mode="after")
    def _one_system_turn(self) -> Prompts:
        if self.columns.system is not None and self.system_prompt is not None:
            raise ValueError("columns.system and system_prompt exclude each other: a conversation has one system turn")
        return self

    @model_validator(mode="after")
    def _pattern_has_its_column(self) -> Prompts:
        if self.json_reference and self.columns.reference is None:
            raise ValueError("json_reference would be ignored: name the column of the references in columns.reference")
        if self.answer_as_reference and (self.columns.reference is not None or self.columns.messages is None):
            raise ValueError("answer_as_reference takes the references out of columns.messages: name that, and leave columns.reference out")
        if self.turns != "last" and self.columns.messages is None:
            raise ValueError(f"turns: {self.turns} asks for several answers of a conversation: name its column in columns.messages")
        if self.answer_pattern is not None and self.columns.reference is None and not self.answer_as_reference:
            raise ValueError("answer_pattern looks inside the reference: name its column in columns.reference, or leave answer_pattern out")
        return self
