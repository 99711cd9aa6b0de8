"""What a run would do, and what `--redo` would delete: said before it is done."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.errors import DistillError, MissingStageError, StageConflictError, visible
from distill.pipeline import made_from, select
from distill.recipe.experiment import Recipe
from distill.run.manifest import MANIFEST, PLAN, read_manifest
from distill.run.owned import EARLIER, is_of_another_run
from distill.run.plan import StagePlan, refusal, relation
from distill.stages import Step, call, folder, made_steps, run_dir, steps_of, taken
from distill.stages.links import is_linked

_COSTLY = ("generate", "score", "train", "rollouts", "evaluate", "benchmark")
_STYLES = {"keep": "dim", "refuse": "bold red", "make anew": "yellow"}


class Outlook(NamedTuple):
    """What a run would do with a step."""

    step: Step
    action: str
    """`keep`, `take` (from another run), `make`, `go on`, `grow`, `make anew` or `refuse`."""
    why: str


def outlook(
    recipe: Recipe,
    steps: Sequence[Step],
    deleted: Collection[Step] = (),
    moving: Mapping[str, Outlook] | None = None,
    recipes: Mapping[Step, Recipe] | None = None,
) -> list[Outlook]:
    """What a run would do, without doing any of it.

    What a step does whose inputs are yet to be made can't be known but by its settings; then it says which of them it waits for.

    Args:
        recipe: The recipe.
        steps: Of the run.
        deleted: Steps whose folders are deleted first.
        moving: Folders of steps before these that change, and how.
        recipes: Of steps that have another one.
    """
    found: list[Outlook] = []
    pending = dict(moving or {})
    others = taken(recipe)
    there = {folder(recipe, stage): other for stage, other in others.items()}
    for step in steps:
        place = folder(recipe, *step)
        try:
            if step in deleted:
                found.append(Outlook(step, "make anew", f"--redo deletes it ({_cost(recipe, step)})"))
            elif step.stage in others and not step.number:
                found.append(_taken(recipe, step))
            else:
                asked = call(step, (recipes or {}).get(step, recipe), "plan")
                found.append(_look(step, asked._replace(inputs=[there.get(place, place) for place in asked.inputs]), pending))
        except MissingStageError:  # the rounds decide which student is measured
            state = "make anew" if (place / MANIFEST).exists() else "go on" if (place / PLAN).exists() else "make"
            found.append(Outlook(step, state, "follows from what comes before it"))
        except DistillError as error:
            found.append(Outlook(step, "refuse", str(error)))
        if found[-1].action not in ("keep", "take", "refuse"):
            pending[str(place)] = found[-1]
    return found


def _taken(recipe: Recipe, step: Step) -> Outlook:
    try:
        action = "keep" if is_linked(recipe, step.stage) else "take"
    except MissingStageError as error:
        return Outlook(step, "refuse", str(error))
    return Outlook(step, action, f"from {taken(recipe)[step.stage].parent}")


def _look(step: Step, plan: StagePlan, pending: dict[str, Outlook]) -> Outlook:
    waits = [pending[str(place)] for place in plan.inputs if str(place) in pending]
    if plan.growth.inputs == "ignore" and (plan.path / MANIFEST).exists():
        waits = [earlier for earlier in waits if earlier.action != "grow"]
    if not waits:
        kind, changes = relation(plan)
        if kind == "refused" or (kind != "complete" and is_of_another_run(plan.path)):
            return Outlook(step, "refuse", refusal(plan, changes))
        return {
            "complete": Outlook(step, "keep", "complete"),
            "new": Outlook(step, "make", "not there yet"),
            "begun": Outlook(step, "go on", "under way"),
            "grows": Outlook(step, _growing(plan), "; ".join(changes)),
        }[kind]
    known = relation(plan._replace(inputs=()), inputs=False)
    why = f"follows {', '.join(str(earlier.step) for earlier in waits)}"
    replaced = [str(earlier.step) for earlier in waits if earlier.action == "make anew"]
    if known.kind in ("complete", "grows") and replaced and not (plan.growth.other_inputs or plan.growth.anything):
        clauses = [*known.changes, f"{', '.join(replaced)} would be made anew, and this was made from what is there now"]
        return Outlook(step, "refuse", refusal(plan, clauses))
    if known.kind == "refused":
        return Outlook(step, "refuse", refusal(plan, known.changes))
    moving = [str(earlier.step) for earlier in waits if earlier.action in ("grow", "make anew")]
    if known.kind == "begun" and moving:
        return Outlook(step, "refuse", refusal(plan, [f"{', '.join(moving)} would change while this is under way; finish it first"]))
    return Outlook(step, {"new": "make", "begun": "go on"}.get(known.kind, _growing(plan)), "; ".join([*known.changes, why]))


def _growing(plan: StagePlan) -> str:
    return "grow" if plan.growth.adds and not plan.growth.anything else "make anew"


def dry_run(recipe: Recipe, first: str | None = None, last: str | None = None, redo: str = "") -> bool:
    """Prints what a run would do with each step, and why; true if nothing is refused."""
    found = outlook(recipe, select(steps_of(recipe), first, last), made_from(recipe, redo) if redo else ())
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "would be", "why"):
        table.add_column(name, overflow="fold")
    words = {"keep": "kept", "take": "taken", "make": "made", "go on": "gone on with", "grow": "grown", "refuse": "refused"}
    for step, action, why in found:
        table.add_row(str(step), Text(words.get(action, "made anew"), _STYLES.get(action, "")), Text(visible(why)))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(visible(f"run folder {run_dir(recipe)}; nothing was done"), soft_wrap=True, markup=False)
    console.print(table)
    return all(action != "refuse" for _, action, _ in found)


def refuse_what_cannot_end(recipe: Recipe, first: str | None = None, last: str | None = None, redo: str = "") -> list[Step]:
    """The steps that are still to do, unless a later one is known to be refused, before an earlier one has cost, or deleted, anything.

    Raises:
        StageConflictError: naming folder, keys and values.
        RecipeError: the recipe has no such stage.
    """
    found = outlook(recipe, select(steps_of(recipe), first, last), made_from(recipe, redo) if redo else ())
    for _, action, why in found:
        if action == "refuse":
            raise StageConflictError(why)
    return [step for step, action, _ in found if action not in ("keep", "take")]


def refuse_what_follows(recipe: Recipe, step: Step) -> None:
    """Refuses to let one stage grow, or be made anew, where what was made from it would be lost by that, or can't go on.

    Raises:
        StageConflictError: naming both.
    """
    try:
        asked = call(step, recipe, "plan")
        kind, changes = relation(asked)
    except MissingStageError:  # the stage says so itself
        return
    if kind != "grows":
        return
    # Each as it was made: what this command says of it is no matter here.
    place = {"run_dir": str(run_dir(recipe))}
    recipes = {Step(*made[:2]): Recipe.model_validate(made.made_with | place) for made in made_steps(recipe) if made.made_with}
    known = list(recipes)
    behind = known[known.index(step) + 1 :] if step in known else []
    moving = {str(asked.path): Outlook(step, _growing(asked), "; ".join(changes))}
    for later, action, why in outlook(recipe, behind, moving=moving, recipes=recipes):
        if action == "refuse":
            raise StageConflictError(f"{asked.path}: {'; '.join(changes)}, but {later} can't follow. {why}")


def agree_to_redo(recipe: Recipe, stage: str, *, yes: bool) -> bool:
    """Whether what `--redo` deletes may be deleted: asks where it cost something, unless `yes`.

    Raises:
        StageConflictError: there is nobody to ask.
    """
    steps = made_from(recipe, stage)
    if yes or not any(step.stage in _COSTLY for step in steps):
        return True
    listed = "\n".join(f"  {folder(recipe, *step)}  ({_cost(recipe, step)})" for step in steps)
    if not sys.stdin.isatty():
        raise StageConflictError(f"--redo would delete\n{listed}\nand there is nobody to ask. Add --yes if that is meant.")
    print(visible(f"--redo deletes\n{listed}"))
    return input("Delete all of it? [y/N] ").strip().lower() in ("y", "yes")


def _cost(recipe: Recipe, step: Step) -> str:
    """What was paid for a step: seconds and tokens, where its manifest knows them."""
    place = folder(recipe, *step)
    there = [each for each in (place, place / EARLIER) if (each / MANIFEST).exists()]
    if not there:
        return "unfinished"
    facts = read_manifest(there[0]).facts
    seconds = [f"{facts['wall_s']:,.0f} s"] if "wall_s" in facts else []
    tokens = [f"{facts['tokens']:,} tokens"] if facts.get("tokens") else []
    return ", ".join([*seconds, *tokens]) or "its cost was not recorded"
