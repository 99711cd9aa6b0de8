"""What still fits into a card, and which overrides make a recipe fit: found by halving, on the high end of the range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

from distill.planning.memory import Planner
from distill.planning.sizes import StageMemory
from distill.recipe.experiment import Recipe
from distill.recipe.models import LoraAdapter
from distill.recipe.steps import AT_ONCE, DEFAULT_ROWS, PASSES

_LONGEST, _LARGEST, _HIGHEST = 2**20, 1024, 1024
_UNIT = 64  # tokens


class Most(NamedTuple):
    """The most that fits, each alone, all else as in the recipe; 0 where nothing does, null where it has no such setting."""

    tokens: int | None
    rows: int | None
    rank: int | None


class Change(NamedTuple):
    """Overrides with which a stage fits."""

    stage: str
    overrides: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"--{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in self.overrides.items())


def changed(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """A recipe with other values; not checked anew."""
    for key, value in overrides.items():
        recipe = _set(recipe, key.split("."), value)
    return recipe


def _set(section: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    name, *rest = path
    if isinstance(section, BaseModel):
        if path == ["adapter", "type"]:  # with the other kind's own keys
            return section.model_copy(update={"adapter": LoraAdapter()})
        return section.model_copy(update={name: _set(getattr(section, name), rest, value)})
    return {**section, name: _set(section.get(name), rest, value)}


def most(planner: Planner, recipe: Recipe, room: float) -> Most:
    """The longest row, the most rows at once, and the highest rank that still fit.

    Args:
        planner: That has planned the recipe.
        recipe: The recipe.
        room: Bytes of a card.
    """
    adapter = recipe.student.adapter
    length = "train.on_policy.max_new_tokens" if recipe.train.is_live else "train.max_length"

    def holds(key: str) -> Callable[[int], bool]:
        return lambda number: _fits(planner.training(changed(recipe, {key: number})), room)

    tokens = _UNIT * _largest(lambda units: holds(length)(_UNIT * units), _LONGEST // _UNIT)
    rows = _largest(lambda number: _fits(planner.training(recipe, number), room), _LARGEST)
    rank = _largest(holds("student.adapter.r"), _HIGHEST) if adapter.type == "lora" else None
    return Most(tokens, rows, rank)


def _fits(stage: StageMemory, room: float) -> bool:
    return stage.total.high <= room


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number for which something holds that holds for all below; 0 where for none."""
    low, high = 0, 1
    while high <= limit and holds(high):
        low, high = high, high * 2
    if high > limit:
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def remedies(planner: Planner, recipe: Recipe, stage: StageMemory, room: float) -> list[Change]:
    """What makes a stage fit: each change that does alone; where none does, the first that do together; empty where none is known.

    Args:
        planner: That has planned the recipe.
        recipe: The recipe.
        stage: That does not fit.
        room: Bytes of a card.
    """
    tried = _for_training(recipe, planner) if stage.stage == "train" else _for_others(recipe, stage)

    def fits(overrides: dict[str, Any]) -> bool:
        again = changed(recipe, overrides)
        found = [planner.training(again)] if stage.stage == "train" else planner.stages(again)
        return all(_fits(one, room) for one in found if (one.stage, one.what.split(",")[0]) == (stage.stage, stage.what.split(",")[0]))

    alone = [found for key, values in tried if (found := _first(key, values, fits)) is not None]
    if alone:
        return [Change(stage.stage, _of_one_size(recipe, found, planner.place.on_cpu)) for found in alone]
    together: dict[str, Any] = {}
    for key, values in tried:
        if (found := _first(key, values, lambda more: fits(together | more))) is not None:  # noqa: B023 (used at once)
            return [Change(stage.stage, _of_one_size(recipe, together | found, planner.place.on_cpu))]
        together = together | {key: values[-1]}
    return []


def _of_one_size(recipe: Recipe, overrides: dict[str, Any], on_cpu: bool) -> dict[str, Any]:
    """With what keeps the rows of an optimizer step, where fewer are taken at once and the recipe names no number of them."""
    given, key = recipe.train.trainer_args, f"train.trainer_args.{AT_ONCE}"
    if key not in overrides or recipe.train.global_batch_size is not None:
        return overrides
    rows = given.get(AT_ONCE, DEFAULT_ROWS) * given.get(PASSES, 1 if on_cpu else DEFAULT_ROWS)
    return overrides | {f"train.trainer_args.{PASSES}": rows // overrides[key]}


def _first(key: str, values: list[Any], fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    return next(({key: value} for value in values if fits({key: value})), None)


def _for_training(recipe: Recipe, planner: Planner) -> list[tuple[str, list[Any]]]:
    """Keys, from what costs least, with values from the mildest."""
    train, spec = recipe.train, recipe.student
    given = train.trainer_args
    rows = int(given.get(AT_ONCE, DEFAULT_ROWS if planner.place.on_cpu else 1))
    tried: list[tuple[str, list[Any]]] = []
    if not given.get("gradient_checkpointing", not planner.place.on_cpu):
        tried.append(("train.trainer_args.gradient_checkpointing", [True]))
    if rows > 1:
        tried.append((f"train.trainer_args.{AT_ONCE}", _halves(rows, 1)))
    if spec.adapter.type == "full":
        tried.append(("student.adapter.type", ["lora"]))
    elif spec.quantization == "none" and spec.model.partition(":")[0] != "embedded":
        tried.append(("student.quantization", ["nf4"]))
    length = "train.on_policy.max_new_tokens" if train.on_policy is not None else "train.max_length"
    tokens = train.on_policy.max_new_tokens if train.on_policy is not None else train.max_length
    if tokens > 256:
        tried.append((length, _halves(tokens, 256)))
    return tried


def _for_others(recipe: Recipe, stage: StageMemory) -> list[tuple[str, list[Any]]]:
    section = getattr(recipe, stage.stage)
    tried: list[tuple[str, list[Any]]] = []
    if section.batch_size > 1:
        tried.append((f"{stage.stage}.batch_size", _halves(section.batch_size, 1)))
    role = "student" if stage.what.startswith("student") else "teacher"
    spec = getattr(recipe, role)
    if spec.quantization == "none" and not (role == "student" and recipe.student.adapter.type == "full"):
        tried.append((f"{role}.quantization", ["nf4"]))
    return tried


def _halves(number: int, least: int) -> list[int]:
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found
