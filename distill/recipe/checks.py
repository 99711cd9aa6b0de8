"""What a good trace and a right answer are: the checks of a recipe, each by its name or as a small section.

One list says it for `curate.checks` and `evaluate.checks`: `[finish, think, {label: {choices: [yes, no]}}]`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_serializer, model_validator

from distill.recipe.base import Section
from distill.recipe.kinds import (
    Agreement,
    CheckSection,
    Code,
    Degenerate,
    Finish,
    Json,
    Judge,
    Label,
    Language,
    Length,
    Math,
    Number,
    Python,
    Text,
    Think,
    ToolCalls,
)

_MEANT = {"answer": "math"}
"""Further names of checks. Runs are made, and verdicts told, under the first, so that both are one run."""


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "json"')  # pydantic's method of that name is long deprecated

    class Check(Section):
        """One check: its name alone, or with settings."""

        words = "checks, each by its name or as a section"

        finish: Finish | None = None
        """It ended by itself."""
        think: Think | None = None
        """Reasoning, then an answer; `think: none` asks that there is no reasoning."""
        math: Math | None = None
        """The final answer is right: a number with or without a unit, an expression, a set, a date, a text. May be written `answer`; in
        verdicts it is `math` all the same."""
        label: Label | None = None
        """The answer is the right one of a closed set."""
        text: Text | None = None
        """The answer is the right text, has it, or fits a pattern."""
        number: Number | None = None
        """The answer is the right number."""
        json: Json | None = None  # type: ignore[assignment]
        """The answer is the right JSON, or satisfies a schema."""
        tool_calls: ToolCalls | None = None
        """The answer calls tools as they want it."""
        code: Code | None = None
        """The answer's code passes its row's tests."""
        language: Language | None = None
        """It is written in a language."""
        length: Length | None = None
        """It is neither too short nor too long."""
        degenerate: Degenerate | None = None
        """It does not go round in circles."""
        agreement: Agreement | None = None
        """Most of a prompt's samples give the same answer."""
        judge: Judge | None = None
        """A model says so, by a rubric; it is asked only of what passes all other checks."""
        python: Python | None = None
        """A function of one's own says so."""
        name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
        """What it is called in verdicts, where a check is listed twice; null means as itself."""

        @model_validator(mode="before")
        @classmethod
        def _from_name(cls, value: Any) -> Any:
            """A name alone has settings of its own, all of them defaults."""
            given = {value: {}} if isinstance(value, str) else value
            if not isinstance(given, dict):
                return given
            names = [_MEANT.get(key, key) for key in given]
            unknown = next((key for key in names if key not in cls.model_fields), None)
            if unknown is not None:
                close = difflib.get_close_matches(unknown, KINDS, n=1)
                hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(KINDS)}"
                raise ValueError(f"there is no check {unknown!r}. {hint}")
            if sum(name in KINDS for name in names) != 1:
                raise ValueError("an entry of the list is one check, with a name beside it if it is listed twice. Begin each with a dash")
            given = dict(zip(names, given.values(), strict=True))
            if isinstance(given.get("think"), str):
                given = {**given, "think": {"reasoning": given["think"]}}
            return {key: {} if settings is None and key in KINDS else settings for key, settings in given.items()}

        @model_serializer(mode="plain")
        def _as_written(self) -> Any:
            """As a recipe has it: the name alone where nothing else is said."""
            settings = self.settings.model_dump(mode="json", exclude_defaults=True)
            if not settings and self.name is None:
                return self.kind
            return {self.kind: settings} | ({"name": self.name} if self.name is not None else {})

        @property
        def kind(self) -> str:
            """Which check it is."""
            return next(kind for kind in KINDS if getattr(self, kind) is not None)

        @property
        def settings(self) -> CheckSection:
            """Of the one that it is."""
            settings: CheckSection = getattr(self, self.kind)
            return settings

        @property
        def called(self) -> str:
            """Its name in verdicts."""
            return self.name or self.kind

        def identity(self) -> dict[str, Any]:
            """What decides its verdicts; of a file its name, since its digest stands beside, as of an interpreter."""
            plain: dict[str, Any] = self.model_dump(mode="json")
            if self.python is not None:
                plain[self.kind]["file"] = Path(self.python.file).name
            if self.judge is not None:
                plain[self.kind] = self.judge.identity()
            if self.code is not None and self.code.python is not None:
                plain[self.kind]["python"] = Path(self.code.python).name
            return plain


KINDS: tuple[str, ...] = tuple(name for name in Check.model_fields if name != "name")


def checks_of(*names: str) -> list[Check]:
    """Checks by their names alone."""
    return [Check.model_validate(name) for name in names]


def _told_apart(checks: list[Check]) -> list[Check]:
    """A list in which no two checks have one name."""
    names = [check.called for check in checks]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice, and its verdicts could not be told apart. Take one out, or give one a name beside it")
    return checks


Checks = Annotated[list[Check], AfterValidator(_told_apart)]
"""Every one must pass."""


def answer_checks(checks: Sequence[Check]) -> list[Check]:
    """Those that say that an answer is right; the one of mathematics where there are none."""
    return [check for check in checks if check.settings.of_answers] or checks_of("math")
