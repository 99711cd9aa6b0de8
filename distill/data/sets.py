"""Held-out sets beside the run's own, read as prompts. What is trained on, in whatever spelling, or there twice, is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.data.files import Row
from distill.data.identities import Identities, Ids, as_numbers, rank
from distill.data.mapping import PromptMapping
from distill.data.normal import normal_numbers
from distill.data.sources import heldout_set
from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.run.schema import Message
from distill.run.tables import iter_pieces

SEPARATOR = "/"
"""Between the name of a set and the id of a prompt; a prompt of the run's own has none."""


class ReadSet(NamedTuple):
    """The prompts of a set."""

    rows: list[Row]
    """PROMPT rows, with `fields` where checks look at some; ids begin with the set's name, so that a prompt may be in several sets."""
    drops: dict[str, int]
    """Reason and number of the rows that were left out."""
    sources: list[dict[str, Any]]
    """What a manifest says of its files."""


def in_set(name: str, identity: str) -> str:
    """The id of a prompt of a further set."""
    return f"{name}{SEPARATOR}{identity}"


def read_set(recipe: Recipe, name: str, trained: Identities) -> ReadSet:
    """The prompts of a further set, in the order of their rows.

    A prompt that the run trains on is known by the text of its row, whatever template the set is put to a model by.

    Args:
        recipe: The recipe.
        name: Of the set.
        trained: The run's training prompts, by their normal forms.

    Raises:
        DataError: the set can't be read, or none of its prompts is left; names the set.
    """
    assert recipe.evaluate is not None
    asked, source = recipe.asked_sets()[name], heldout_set(name, recipe.evaluate.sets[name])
    drops: Counter[str] = Counter()
    found: dict[str, Row] = {}
    try:
        for row, reason in _mapped(recipe, name, source.rows(description=f"read {name}")):
            if reason is None and row["prompt_id"] in found:
                reason = "duplicate"
            plain: list[Message] = row.pop("plain")
            if reason is None and trained.places(normal_numbers([plain]))[0] >= 0:
                reason = "in_training"
            if reason is None:
                found[row["prompt_id"]] = row
            else:
                drops[reason] += 1
    except DataError as error:
        raise DataError(f"evaluate.sets.{name}: {error}") from None
    if not found:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()))
        raise DataError(f"evaluate.sets.{name}: no prompt of {source.name} is left ({lost}). Correct its columns, or leave the set out.")
    chosen = _drawn(list(found), asked.max_prompts, f"{name}/{recipe.seed}")
    if len(chosen) < len(found):
        drops["not_drawn"] = len(found) - len(chosen)
    rows = [found[identity] | {"prompt_id": in_set(name, identity)} for identity in chosen]
    return ReadSet(rows, dict(drops), source.records())


def trained_on(prompts: Path) -> Identities:
    """The training prompts of a finished stage by their normal forms, as `read_set` compares with them.

    Args:
        prompts: Its folder.
    """
    found = [normal_numbers(piece["messages"].to_pylist()) for piece in iter_pieces(prompts, "train", ["messages"])]
    return in_normal_form(np.concatenate([*found, np.array([], np.uint64)]))


def in_normal_form(normals: Ids) -> Identities:
    """Training prompts by the numbers of their normal forms."""
    return Identities(np.unique(normals))


def _mapped(recipe: Recipe, name: str, placed: Iterator[tuple[str, Row]]) -> Iterator[tuple[Row, str | None]]:
    """Rows as prompts, each with the reason to leave it out or null, and as `plain` how the run's own prompts would put it."""
    prompts = recipe.asked_sets()[name].prompts
    mapping = PromptMapping(prompts, prompts.columns, prompts.source)
    plain = PromptMapping(prompts.model_copy(update={"template": recipe.prompts.template}), prompts.columns, prompts.source)
    same = prompts.template == recipe.prompts.template
    for where, raw in placed:
        for place, (row, reason) in enumerate(mapping.prompt_rows(raw, where)):
            try:
                messages = row["messages"] if same else plain.asked(raw, where)[place].messages
            except DataError:  # it lacks a column of the run's template, so that it is no prompt of the run
                messages = row["messages"]
            yield row | {"plain": messages}, reason


def _drawn(identities: list[str], most: int | None, salt: str) -> list[str]:
    """At most so many, in their order: those of the lowest hash, so that more of them hold the fewer."""
    if most is None or most >= len(identities):
        return identities
    ranks = [rank(salt, int(number)) for number in as_numbers(identities)]
    return [identities[place] for place in sorted(np.argsort(np.array(ranks, np.uint64), kind="stable")[:most].tolist())]
