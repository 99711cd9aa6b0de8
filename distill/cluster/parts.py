"""In which parts a step is done by an array, which of them are missing, and what each writes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distill.errors import StageConflictError
from distill.recipe.experiment import Recipe
from distill.run.manifest import MANIFEST, PARTS, PLAN, read_manifest
from distill.run.parts import Part, begun, missing, refuse_other_number
from distill.stages import WRITES, Step, folder, run_dir
from distill.stages.score import parts_begun, parts_missing

_DIGITS = "[0-9]" * 5


class Parts(NamedTuple):
    """Of a step."""

    number: int
    """Of all."""
    missing: list[int]
    """Those that are not done, counted from 1."""


def parts_of(recipe: Recipe, step: Step, usual: int, *, asked: int | None = None) -> Parts | None:
    """The parts of a step; null where it is done as a whole: there are none, or nothing is left but to put them together.

    Args:
        recipe: The recipe.
        step: Which.
        usual: Parts of one that was not begun.
        asked: Parts that were asked for by number, which one that was begun must have.

    Raises:
        StageConflictError: it was begun in another number of parts, or as a whole.
    """
    if step.stage not in ("generate", "score", "rollouts", "evaluate") or (step.stage == "generate" and recipe.traces is not None):
        return None
    place = folder(recipe, *step)
    finished = (place / MANIFEST).exists() and not (place / PLAN).exists()  # and is to grow
    there = None if finished else parts_begun(place) if step.stage == "score" else begun(place)
    if asked is not None and not finished:
        _refuse_other(place, step, there, asked)
    if there is None and not finished and _is_begun_as_a_whole(place, step):
        return None
    count = there or min(usual, most_parts(recipe, step) or usual)
    left = (
        range(count)
        if finished
        else parts_missing(place, count)
        if step.stage == "score"
        else (part.index for part in missing(place, count))
    )
    shards = [index + 1 for index in left]
    return Parts(count, shards) if shards and count > 1 else None


def _refuse_other(place: Path, step: Step, there: int | None, asked: int) -> None:
    if step.stage != "score":
        refuse_other_number(place, Part(0, asked))
    elif there not in (None, asked):
        raise StageConflictError(f"{place}: was begun in {there} parts, asked for {asked}. Leave --shards out, or give {there}.")


def _is_begun_as_a_whole(place: Path, step: Step) -> bool:
    if step.stage == "score":
        return False
    try:
        refuse_other_number(place, Part(0, 2))
    except StageConflictError:
        return True
    return False


def most_parts(recipe: Recipe, step: Step) -> int | None:
    """The rows that are dealt out to the parts of a step, as far as they are known: more parts would have nothing to do."""
    prompts = folder(recipe, "prompts")
    done = read_manifest(prompts) if (prompts / MANIFEST).exists() and not (prompts / PLAN).exists() else None
    training = done.rows("train") if done else recipe.prompts.max_prompts
    if step.stage == "generate":
        return training
    if step.stage == "rollouts" and recipe.rollouts is not None:
        return _least(training, recipe.rollouts.prompts_per_round)
    if step.stage == "evaluate" and recipe.evaluate is not None:
        if recipe.evaluate.sets:  # of which the larger may have room for more parts
            return None
        return _least(done.rows("heldout") if done else recipe.prompts.heldout_size, recipe.evaluate.max_prompts)
    return None


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def files_of(recipe: Recipe, step: Step, shard: int = 0, count: int = 0) -> str:
    """What a step, or a part of it counted from 1, writes: paths within the run.

    Args:
        recipe: The recipe.
        step: Which.
        shard: The part; 0 for all.
        count: Of all parts.
    """
    place = folder(recipe, *step).relative_to(run_dir(recipe))
    if shard and step.stage == "score":
        name = f"{shard - 1:05d}-of-{count:05d}"
        return f"{place}/targets-{name}.targets, {place}/journal-{name}.jsonl"
    if shard:
        return f"{place}/{PARTS}/{Part(shard - 1, count)}/"
    names = [pattern.replace(_DIGITS, "*") for pattern in WRITES[step.stage] if PARTS not in pattern]
    return f"{place}/: {', '.join([*names, MANIFEST])}"
