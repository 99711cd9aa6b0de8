"""Whose outputs a student learns from, under which terms, and what these demand. Not legal advice: a record.

Everything that is known of models and terms is in `catalogue.yaml`. A recipe's `licence` key says what is recorded; it adds demands
where it names terms of the catalogue, and removes none.

The gate holds whatever is named: the model, what a server calls it, the host that serves it. Three things decide:

- A closed model whose terms forbid it teaches nobody, in any spelling, behind any gateway. A name that also states an open family and a
  size in its last part (`Mistral-7B-Claude-chat`), and a folder that is here, are open weights which learned from it: they are noted.
- A host that serves closed models is taken for what it serves, unless the name there is one of open weights.
- Behind a server that was there before, `model` must say which model answers. An endpoint's own name tells nothing, and a licence beside
  it no more: it takes a name of the catalogue, an id on the Hub, a folder, or `terms`, which say where the terms can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from distill.data.catalogue import UNKNOWN, Found, Terms, catalogue, families, spelled, states_size, terms_named
from distill.errors import LicenceError
from distill.recipe.models import ModelSpec

# Licences that the Hub knows by name, of those that this kit meets; others are `license: other` with a name there.
_HUB = {"apache-2.0", "mit", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", UNKNOWN}
_ASKS_NOTHING_OF_STUDENTS = {"apache-2.0", "mit"}


class _Held(NamedTuple):
    """Terms that hold for what was learned from, and why."""

    source: str
    licence: str
    terms: Terms


def licence_of(model: str | None, stated: str | None) -> str:
    """The licence a recipe states, else the one known for the model, else `unknown`."""
    return stated or next((found.family.terms for found in families(model)), UNKNOWN)


def check_terms(
    author: str | None, student_name: str, *, licence: str | None = None, student: str | None = None, spec: ModelSpec | None = None
) -> list[str]:
    """What must be noted of a student trained on a model's outputs.

    Args:
        author: Model that wrote the traces, or null where that is not known.
        student_name: Name under which the student goes out.
        licence: Terms of the traces, as recorded.
        student: Model that the student started from.
        spec: How a recipe has the author, where it is one of its models: behind which server, under which terms.

    Raises:
        LicenceError: the terms exclude it, ask for another name, or can't be known.
    """
    _refuse_what_tells_nothing(spec)
    notes: list[str] = []
    held = list(_terms_of_traces(author, licence, spec, notes))
    for one in held:
        if not _may_train(one.terms, student):
            raise LicenceError(
                f"{one.source}: its terms ({one.licence}) do not allow training {student or 'other models'} on its outputs. "
                "Use another teacher, or other traces."
            )
    for one in [*held, *_terms_of(student)]:
        _check_name(one, student_name)
        notes += one.terms.asks
    if spec is not None and spec.terms:
        notes.append(f"The terms of {author}: {spec.terms}")
    elif licence in (None, UNKNOWN) and (not held or any(one.terms.trains == UNKNOWN for one in held)):
        notes.append(f"The terms of {author or 'the traces'} are not known to the kit: check them before you publish.")
    return list(dict.fromkeys(notes))


def hub_licence(student: str, traces: str) -> dict[str, str]:
    """A model card's `license` keys, as the Hub wants them, from the licences of the student before training and of the traces."""
    names = [student] if traces.lower() in {*_ASKS_NOTHING_OF_STUDENTS, student.lower()} else [student, traces]
    if len(names) == 1 and student.lower() in _HUB:
        return {"license": student.lower()}
    return {"license": "other", "license_name": "-and-".join(re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in names)}


def _terms_of_traces(author: str | None, licence: str | None, spec: ModelSpec | None, notes: list[str]) -> Iterator[_Held]:
    """What holds for the traces: by who wrote them, what a server calls it, who serves it, and what the recipe states."""
    names = [author] if spec is None or spec.server is None or spec.server.model is None else [author, spec.server.model]
    for name in filter(None, names):
        for found in families(name):
            if _forbids(found) and _learned_from_it(name, found, spec):
                notes.append(_trained_on(name, found))
            else:
                yield from _held(name, found)
    yield from _terms_of_hosts(spec)
    stated = terms_named(licence)
    if stated is not None:
        yield _Held(str(author or licence), *stated)
    else:
        yield from _terms_of(licence)


def _terms_of(name: str | None) -> Iterator[_Held]:
    for found in families(name):
        yield from _held(str(name), found)


def _held(name: str, found: Found) -> Iterator[_Held]:
    key = found.family.terms
    if key in catalogue().terms:
        yield _Held(name, key, catalogue().terms[key])


def _forbids(found: Found) -> bool:
    terms = catalogue().terms.get(found.family.terms)
    return found.family.weights == "closed" and terms is not None and terms.trains == "none"


def _learned_from_it(name: str, closed: Found, spec: ModelSpec | None) -> bool:
    """Whether a name in which a closed model is named is that of open weights, by what else it says, or because they are here."""
    if (spec is None or spec.server is None or spec.server.is_started) and Path(name).exists():
        return True
    last = name.rstrip("/").rsplit("/", 1)[-1]
    return states_size(last) and any(found.family.weights == "open" for found in families(last)) and not closed.is_maker


def _trained_on(name: str, found: Found) -> str:
    return (
        f"{name} is by its name a model that learned from {found.name}, whose terms ({found.family.terms}) forbid that: "
        "its own licence can't give what these took. Look how it was made before you publish."
    )


def _terms_of_hosts(spec: ModelSpec | None) -> Iterator[_Held]:
    """What whoever serves closed models asks for, of whatever is behind a name that is not one of open weights."""
    if spec is None or spec.server is None:
        return
    hosts = {urlsplit(url).hostname or "" for url in spec.server.urls}
    known = {found.family.weights for found in families(spec.server.model or spec.model)}
    for key, family in catalogue().families.items():
        serves = [
            host for host in hosts if any(host == one or host.endswith(f".{one}") or host.endswith(f"-{one}") for one in family.hosts)
        ]
        terms = catalogue().terms.get(family.terms)
        if serves and terms is not None and (terms.trains != "none" or "open" not in known):
            yield _Held(f"{spec.server.model or spec.model} at {serves[0]} ({key})", family.terms, terms)


def _refuse_what_tells_nothing(spec: ModelSpec | None) -> None:
    """Whether a served model says which it is.

    Raises:
        LicenceError: nothing that can be looked up is named.
    """
    if spec is None or spec.server is None or spec.server.is_started or spec.terms:
        return
    if families(spec.model) or families(spec.server.model) or _can_be_looked_up(spec.model):
        return
    raise LicenceError(
        f"teacher.model: {spec.model!r} is an endpoint's name and does not say which model answers there, so nobody can know its terms"
        f"{f' (licence {spec.licence} alone says nothing of whose)' if spec.licence else ''}. Put that name into teacher.server.model, and "
        "into teacher.model what answers: a name of `distill models`, an id on the Hub, or a folder. If it can be read about nowhere, "
        "say in teacher.terms where its terms are."
    )


def _can_be_looked_up(model: str) -> bool:
    """Whether a name is a folder or file here, or an id on the Hub, whose page has the terms; a gateway is no owner there."""
    routes = {spelled(route) for route in catalogue().routes}
    owner, _, own = model.partition("/")
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII) is not None and spelled(owner) not in routes and bool(own)
    return hub or Path(model).exists()


def _may_train(terms: Terms, student: str | None) -> bool:
    """Whether a model may be trained on outputs under these terms; what is unknown is noted, not refused."""
    if isinstance(terms.trains, str):
        return terms.trains != "none"
    wanted = {spelled(name) for name in terms.trains}
    return any(wanted & {spelled(name) for name in found.family.names} for found in families(student))


def _check_name(held: _Held, student_name: str) -> None:
    prefix = held.terms.name_prefix
    if prefix and not _plain(student_name.rpartition("/")[2]).startswith(_plain(prefix)):
        raise LicenceError(
            f"{held.source}: its licence ({held.licence}) asks that the name of a model made with it begins with {prefix!r}, "
            f"got {student_name!r}. Set export.model_name."
        )


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name)
