"""Stages that a run takes from another one: in the place of its own a link, made once the other's is whole and as the recipe asks for it.

Through the link every stage reads the other run's files under the names and digests that its own would have: what was made from them knows
them again wherever both runs are moved to, and sees that they have grown or changed. Nothing is written through it (`StageFolder`), and
nothing deleted (`refuse_to_delete`). The recipe keeps the sections that the stages were made with: evaluate, the report and the card read
them, and without `inputs` the recipe makes the same by itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from distill.errors import IntegrityError, MissingStageError, RecipeError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.run.log import say
from distill.run.manifest import MANIFEST, read_manifest
from distill.run.plan import relation
from distill.run.verify import first_damage
from distill.stages import RECIPE, Step, call, folder, made_there, run_dir, taken


def is_linked(recipe: Recipe, stage: str) -> bool:
    """Whether a stage that is taken stands in its place already, as the recipe asks for it; false where a link is to be made.

    Raises:
        RecipeError: the other run is this one.
        MissingStageError: the stage is not finished there, or its folder is in no run.
        StageConflictError: it was made there with other settings or inputs, or something else stands in its place here.
    """
    there, own = taken(recipe)[stage], folder(recipe, stage)
    if run_dir(recipe).resolve() == there.parent.resolve():
        raise RecipeError(f"inputs.run: {there.parent} is this run itself. Give the folder of another one, or leave inputs out.")
    if not (there / MANIFEST).exists():
        read_manifest(there)  # which says how it stands
    if not (there.resolve().parent / RECIPE).exists():  # by which a link is known to lead into another run
        raise MissingStageError(f"{there.parent}: has no {RECIPE}, so it is no run. Copy it there, too, or let `distill run` write it.")
    kind, changes = relation(call(Step(stage), made_there(recipe), "plan"))
    if kind != "complete":
        why = "; ".join(changes[:5]) or "it is under way"
        raise StageConflictError(
            f"{there}: is not what inputs would take, but {'would grow' if kind == 'grows' else 'is another'} by this recipe: {why}. Give "
            "the recipe the values that it was made with there, let that run make what is asked for, or end inputs.until before it."
        )
    if own.is_symlink() and own.resolve() == there.resolve():
        return True
    if own.exists():
        what = f"is a link to {own.resolve()}" if own.is_symlink() else "is there"
        raise StageConflictError(f"{own}: {what}, and inputs takes {there}. Move it away, correct inputs, or give another run_dir.")
    return False


def take(recipe: Recipe) -> None:
    """Links what a recipe takes from another run into its own, after a comparison of all its files with their digests; once.

    Raises:
        DistillError: as `is_linked`, before any link is made.
        IntegrityError: a file there is gone or altered.
    """
    others = taken(recipe)
    missing = [stage for stage in others if not _leads_to(folder(recipe, stage), others[stage]) and not is_linked(recipe, stage)]
    for stage in missing:
        damage = first_damage(others[stage])
        if damage is not None:
            raise IntegrityError(
                f"{damage.path}: is {'gone' if damage.kind == 'missing' else 'altered'}, so nothing is taken from {others[stage].parent}. "
                f"Restore it, or make it anew there: `distill run` with --redo {stage}."
            )
    for stage in missing:
        own = folder(recipe, stage)
        own.parent.mkdir(parents=True, exist_ok=True)
        if own.is_symlink() and not own.exists():  # the other run was moved
            own.unlink(missing_ok=True)
        try:
            own.symlink_to(os.path.relpath(others[stage].resolve(), own.parent.resolve()))
        except FileExistsError:  # another process of a launch has made it
            is_linked(recipe, stage)
    if missing:
        say(f"inputs    taken from {others[missing[0]].parent}: {', '.join(missing)}; all files are as they were written")


def _leads_to(own: Path, there: Path) -> bool:
    return own.is_symlink() and own.exists() and own.resolve() == there.resolve()
