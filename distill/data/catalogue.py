"""The catalogue of teachers, `catalogue.yaml`: what its fields mean, and which family a name belongs to, however it is spelled.

It knows nothing of recipes: `licences` makes the gate on terms from it, `before.advice` the warnings of `distill check`.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ruamel.yaml import YAML

UNKNOWN = "unknown"
_FILE = Path(__file__).with_name("catalogue.yaml")
_SIZE = r"\d*(?:\.\d+)?[bmt](?![a-z])"
"""What is left of a size (`8b`, `0.6b`) behind its first digit."""
_ENDS = rf"(?![bmt](?![a-z]))(?![.-]?\d(?!{_SIZE}))"
"""Where a name that ends in a digit ends: `llama-3` in `llama-3-8b`, and neither in `llama-3.1` nor in `open-llama-3b`."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Terms(_Entry):
    """A licence, or terms of service, and what they say of models that are trained on outputs."""

    also: list[str] = []
    """Other names of them, which a recipe or the Hub may have."""
    source: str
    """Where they can be read."""
    date: datetime.date | Literal["unknown"]
    """Of the text that was read."""
    read: datetime.date
    """When somebody last looked."""
    first_hand: bool = True
    """Whether the text itself was read; else it is as others quote it."""
    trains: Literal["any", "none", "unknown"] | list[str]
    """Models that may be trained on the outputs: any, none, or those of these names alone."""
    says: str
    """What they say of outputs, in other words, with the clause."""
    asks: list[str] = []
    """What must be noted of a student, beside its name."""
    name_prefix: str | None = None
    """How the name of a model that is made with it must begin; spaces, `-`, `_` and `.` in it don't count."""
    monthly_users: int | Literal["none", "unknown"]
    """Above so many users a month the terms ask for more; none: they set no such limit."""

    @model_validator(mode="after")
    def _unknown_asks_nothing(self) -> Terms:
        if self.trains == "none" and (self.asks or self.name_prefix):
            raise ValueError("terms under which nothing is trained ask nothing of a student")
        return self


class Recommended(_Entry):
    """How tokens are best drawn from a family, by its makers; null where they say nothing."""

    mode: Literal["thinking", "plain", "any"]
    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    source: str

    @property
    def values(self) -> dict[str, float]:
        """What is recommended, by the keys of a recipe."""
        return self.model_dump(include={"temperature", "top_p", "top_k", "min_p"}, exclude_none=True)


class Template(_Entry):
    """What is odd about a family's chat template."""

    think: str
    """Where the reasoning is."""
    switch: str | None = None
    """The argument (`chat_template_kwargs`) that turns thinking on and off."""
    default: Literal["thinking", "plain"] | None = None
    """What the template does without it."""
    system: Literal["avoid"] | None = None
    """What its makers say of a system turn."""
    source: str

    @model_validator(mode="after")
    def _a_switch_has_a_default(self) -> Template:
        if (self.switch is None) != (self.default is None):
            raise ValueError("switch and default belong together")
        return self


class Retired(_Entry):
    """Names under which a host answers no more."""

    names: list[str]
    date: datetime.date
    now: str
    """What it has in their place."""
    source: str


class Family(_Entry):
    """Models that share terms, template and advice."""

    maker: str
    names: list[str]
    """By which they are found, anywhere in a name."""
    alone: list[str] = []
    """Names so short that they count only where nothing else is written to them (`o3`)."""
    makers: list[str] = []
    """Words that name the maker: they count where a name tells nothing else."""
    excepted: list[str] = Field(default=[], alias="except")
    """Names of others, in which one of these lies."""
    hosts: list[str] = []
    """Addresses at which the maker serves them."""
    weights: Literal["open", "closed"] = "open"
    terms: str
    """A key of `terms`."""
    terms_source: str
    """Where it says that they hold for these models."""
    sizes: list[str] | Literal["unknown"]
    sampling: list[Recommended] | Literal["unknown"]
    template: Template | Literal["unknown"]
    students: list[str] | Literal["unknown"]
    """Names of families with the same vocabulary."""
    retired: Retired | None = None

    def mode(self, template_kwargs: dict[str, Any]) -> Literal["thinking", "plain"] | None:
        """Whether it thinks, asked with these arguments of its template; null where it has no switch."""
        if isinstance(self.template, str) or self.template.switch is None:
            return None
        asked = template_kwargs.get(self.template.switch)
        return self.template.default if asked is None else "thinking" if asked else "plain"

    def recommended(self, mode: str | None) -> Recommended | None:
        """How its makers draw tokens in a mode, where that is known."""
        if isinstance(self.sampling, str):
            return None
        return next((one for one in self.sampling if one.mode in ("any", mode)), None)


class Catalogue(_Entry):
    """All of the file."""

    routes: list[str]
    """What stands before a model's name and is no owner on the Hub."""
    terms: dict[str, Terms]
    families: dict[str, Family]

    @model_validator(mode="after")
    def _terms_are_there(self) -> Catalogue:
        for name, family in self.families.items():
            if family.terms not in self.terms and family.terms != UNKNOWN:
                raise ValueError(f"{name}: there are no terms {family.terms!r}")
        return self


class Found(NamedTuple):
    """A family whose name lies in another."""

    name: str
    family: Family
    is_maker: bool = False
    """Whether only its maker is named."""


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """The file that ships with the kit, validated."""
    return Catalogue.model_validate(YAML(typ="safe").load(_FILE.read_text(encoding="utf-8")))


def spelled(name: str) -> str:
    """A name in small ASCII letters and digits with `-` between them, and `.` inside numbers: all that a spelling can't change."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    plain = "".join(letter for letter in plain if unicodedata.category(letter) not in ("Mn", "Cf"))
    plain = re.sub(r"(?<=\d)p(?=\d)", ".", plain)  # as Fireworks writes it: v3p1
    return re.sub(r"-+", "-", re.sub(r"[^a-z0-9.]|(?<!\d)\.|\.(?!\d)", "-", plain)).strip("-")


def families(name: str | None) -> list[Found]:
    """The families that a name belongs to, the longest match first; makers alone only where nothing else is found."""
    text = spelled(name or "")
    spans: list[tuple[int, int, Found]] = []
    makers = []
    for key, family in catalogue().families.items():
        named, alone, maker, excepted = _patterns(key)
        left = excepted.sub(lambda found: "|" * len(found[0]), text) if excepted else text
        spans += [(*found.span(), Found(key, family)) for pattern in (named, alone) if pattern for found in pattern.finditer(left)]
        makers += [Found(key, family, is_maker=True)] if maker and maker.search(left) else []
    whole = [span for span in spans if not any(a <= span[0] and span[1] <= b and b - a > span[1] - span[0] for a, b, _ in spans)]
    ordered = sorted(whole, key=lambda span: span[0] - span[1])
    return list({found.name: found for *_, found in ordered}.values()) or makers


def terms_named(licence: str | None) -> tuple[str, Terms] | None:
    """Terms of the catalogue by the name of a licence, in any spelling."""
    wanted = spelled(licence or "").replace("-", "")
    for key, terms in catalogue().terms.items():
        if wanted in {spelled(name).replace("-", "") for name in (key, *terms.also)}:
            return key, terms
    return None


def states_size(name: str) -> bool:
    """Whether the last part of a name says how many billions of parameters it has, as names of open weights do."""
    return re.search(r"(?<![a-z0-9.])\d+(?:\.\d+)?-?b(?![a-z0-9])", spelled(name.rsplit("/", 1)[-1])) is not None


@cache
def _patterns(key: str) -> tuple[re.Pattern[str], re.Pattern[str] | None, re.Pattern[str] | None, re.Pattern[str] | None]:
    """What finds a family: its names, those that stand alone, its makers, and the names of others, in a name as `spelled` has it."""
    family = catalogue().families[key]
    ends = "" if family.weights == "closed" else _ENDS  # of what is closed, every version
    words = r"(?:-?(?:mini|pro|preview|deep-?research))?(?![a-z0-9.])"
    alone = re.compile(rf"(?<![a-z0-9.])(?:{'|'.join(map(_letters, family.alone))}){words}") if family.alone else None
    makers = re.compile(rf"(?<![a-z0-9])(?:{'|'.join(map(_letters, family.makers))})(?![a-z0-9])") if family.makers else None
    return _any(family.names, ends), alone, makers, _any(family.excepted) if family.excepted else None


def _any(names: list[str], ends: str = "") -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(_letters(name) + (ends if name[-1].isdigit() else "") for name in longest_first))


def _letters(name: str) -> str:
    """A name's letters and digits with room for a separator between any two."""
    letters = [re.escape(letter) if letter != "." else "" for letter in spelled(name).replace("-", "")]
    return "[.-]?".join(letter for letter in letters if letter)
