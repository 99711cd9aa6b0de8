"""The catalogue as `distill models` prints it: all of it as a table, or what is known of one model."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.data.catalogue import UNKNOWN, Family, Recommended, Template, Terms, catalogue, families, spelled
from distill.errors import DataError, shown, visible


def as_text(name: str, width: int, *, as_json: bool = False) -> str:
    """What is known of a model, or of all of them.

    Args:
        name: Of a family or a model, in any spelling; empty for all.
        width: Columns of the terminal.
        as_json: As one JSON object instead.

    Raises:
        DataError: the catalogue has no such model.
    """
    found = _found(name) if name else catalogue().families
    if as_json:
        known = catalogue().terms
        terms = {family.terms: known[family.terms].model_dump(mode="json") for family in found.values() if family.terms in known}
        entries = {key: family.model_dump(mode="json", by_alias=True) for key, family in found.items()}
        return json.dumps({"families": entries, "terms": terms}, indent=1, ensure_ascii=False)
    if not name:
        return (
            _printed(_table(found), width) + "\n\nOne with its sources: distill models NAME. Not legal advice: read the terms themselves."
        )
    return "\n\n".join(_printed(_one(name, key, family), width) for key, family in found.items())


def _found(name: str) -> dict[str, Family]:
    everything = catalogue().families
    exactly = [key for key in everything if spelled(key) == spelled(name)]
    keys = exactly or [found.name for found in families(name)] or [key for key in everything if spelled(name) in spelled(key)]
    if not keys or not spelled(name):
        close = difflib.get_close_matches(name.lower(), [key.lower() for key in everything], n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "`distill models` lists all."
        raise DataError(f"models: the catalogue has no {shown(name)}, so its terms are unknown here. {hint}")
    return {key: everything[key] for key in keys}


def _table(found: dict[str, Family]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "terms", "its outputs may train", "drawn with", "thinking", "sizes"):
        table.add_column(column, overflow="fold", no_wrap=column == "model")
    for key, family in found.items():
        terms = catalogue().terms.get(family.terms)
        drawn = UNKNOWN if isinstance(family.sampling, str) else "; ".join(map(_draws, family.sampling))
        table.add_row(key, family.terms, _trains(terms), drawn, _thinking(family.template), _listed(family.sizes))
    return table


def _one(name: str, key: str, family: Family) -> Table:
    terms = catalogue().terms.get(family.terms)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows: list[tuple[str, str]] = [
        ("model", key if spelled(key) == spelled(name) else f"{key} (for {visible(name, 100)})"),
        ("maker", f"{family.maker}, {family.weights} weights"),
        ("found as", ", ".join([*family.names, *family.alone, *(f"{maker}/..." for maker in family.makers)])),
        ("terms", f"{family.terms}, by {family.terms_source}"),
        *(_of_terms(terms) if terms is not None else [("its outputs may train", UNKNOWN)]),
        *_of_sampling(family.sampling),
        *_of_template(family.template),
        ("sizes", _listed(family.sizes)),
        ("same vocabulary", _listed(family.students)),
    ]
    if family.retired is not None:
        gone = family.retired
        rows.append(("retired", f"{', '.join(gone.names)} since {gone.date}, now {gone.now}; {gone.source}"))
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _of_terms(terms: Terms) -> Iterable[tuple[str, str]]:
    hand = "" if terms.first_hand else "; as others quote it, the text itself was not read"
    yield "", f"{terms.source}; its date {terms.date}, looked up {terms.read}{hand}"
    yield "its outputs may train", _trains(terms)
    yield "", terms.says
    if terms.name_prefix:
        yield "asks", f"The name of the student begins with {terms.name_prefix!r}."
    yield from (("asks", one) for one in terms.asks)
    users = terms.monthly_users
    yield "monthly users", f"above {users:,} they ask for more" if isinstance(users, int) else "no limit" if users == "none" else users


def _of_sampling(sampling: list[Recommended] | str) -> Iterable[tuple[str, str]]:
    if isinstance(sampling, str):
        yield "drawn with", sampling
    else:
        yield from (("drawn with", f"{_draws(one)}; {one.source}") for one in sampling)


def _of_template(template: Template | str) -> Iterable[tuple[str, str]]:
    if isinstance(template, str):
        yield "thinking", template
        return
    yield "thinking", f"{template.think}; {template.source}"
    if template.switch is not None:
        yield "", f"chat_template_kwargs: {{{template.switch}: true or false}}; left out: {template.default}"
    if template.system == "avoid":
        yield "", "its makers advise against a system turn"


def _trains(terms: Terms | None) -> str:
    if terms is None:
        return UNKNOWN
    if isinstance(terms.trains, str):
        return {"any": "any model", "none": "none", UNKNOWN: UNKNOWN}[terms.trains]
    return f"{', '.join(terms.trains)} alone"


def _draws(one: Recommended) -> str:
    mode = "" if one.mode == "any" else f"{one.mode}: "
    return mode + " ".join(f"{name} {value:g}" for name, value in one.values.items())


def _thinking(template: Template | str) -> str:
    if isinstance(template, str):
        return template
    if template.switch:
        return f"{template.switch}, else {template.default}"
    return "no" if template.think.startswith("it does not") else "yes"


def _listed(values: list[str] | str) -> str:
    return values if isinstance(values, str) else ", ".join(values) or "none"


def _printed(table: Any, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
