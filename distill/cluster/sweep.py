"""Several trainings of one run, on the same traces and targets, each with other values of some keys, each in a run folder of its own.

```
<run>/sweep/learning_rate=2e-4/     a run: links to prompts/, traces/, curated/, targets/ of the one above; student/ and eval/ of its own
<run>/sweep/comparison.md, .svg     all of them, in one table and one picture
```

Through the links a training reads the same files, under the same names and digests, as in a run that had made them itself.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.before.outlook import outlook
from distill.cluster.chain import Job, Wanted, launch_command
from distill.cluster.parts import files_of
from distill.cluster.site import Site
from distill.errors import RecipeError, StageConflictError, shown, visible
from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.stages import SWEEP, Step, call, folder, run_dir, steps_of

_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")
_LONGEST = 120  # characters of a folder's name
TRAIN, EVALUATE, COMPARE = "sweep-train", "sweep-evaluate", "sweep-compare"


class Variant(NamedTuple):
    """A training of a sweep."""

    name: str
    """Of its folder: the keys' last parts and their values."""
    recipe: Recipe
    """With its own run folder."""


def variants_of(asked: Sequence[str], base: Recipe, load: Callable[[Sequence[str]], Recipe]) -> list[Variant]:
    """The trainings that a sweep asks for: every combination of the values of its keys.

    Args:
        asked: `KEY=VALUE,VALUE,...`, a text a key.
        base: The recipe without them.
        load: Reads the recipe with further overrides.

    Raises:
        RecipeError: a key has no values, or changes what is made before the training, or two trainings would be one.
    """
    if base.rounds:
        raise RecipeError("--sweep: on-policy rounds write and score traces of their own in each training. Set rounds 0, or submit each.")
    if Step("train") not in steps_of(base):
        raise RecipeError("--sweep: this recipe trains nothing. Leave it out.")
    pairs = list(map(_key_and_values, asked))
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise RecipeError(f"--sweep: a key is there twice among {shown([key for key, _ in pairs], 300)}. Give all its values at once.")
    ends = [key.rsplit(".", 1)[-1] for key in keys]
    shorts = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    found = []
    for values in itertools.product(*keys.values()):
        name = "_".join(f"{short}={value}" for short, value in zip(shorts, values, strict=True))
        name = _UNSAFE.sub("-", name)[:_LONGEST]
        words = [word for key, value in zip(keys, values, strict=True) for word in (f"--{key}", value)]
        recipe = load(words).model_copy(update={"run_dir": str(run_dir(base) / SWEEP / name)})
        _refuse_other_traces(recipe, base, name)
        found.append(Variant(name, recipe))
    alike = {recipe_text(variant.recipe.model_copy(update={"run_dir": "", "name": ""})) for variant in found}
    if len({variant.name for variant in found}) < len(found) or len(alike) < len(found):
        raise RecipeError(f"--sweep: two trainings would be alike among {shown([each.name for each in found], 300)}. Give each value once.")
    return found


def _key_and_values(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = [value for value in _split(values) if value]
    if not equals or not found or not key:
        raise RecipeError(f"--sweep: expected KEY=VALUE,VALUE, got {shown(text)}. E.g. train.trainer_args.learning_rate=1e-4,2e-4")
    return key.removeprefix("--"), found


def _split(values: str) -> list[str]:
    """At the commas outside brackets and quotes."""
    found, depth, quote = [""], 0, ""
    for sign in values:
        if quote or sign in "'\"":
            quote = "" if sign == quote else quote or sign
        else:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += sign
    return found


def before_training(recipe: Recipe) -> list[Step]:
    """The steps that all trainings of a sweep share."""
    steps = steps_of(recipe)
    return steps[: steps.index(Step("train"))]


def _refuse_other_traces(recipe: Recipe, base: Recipe, name: str) -> None:
    """Refuses a training for which something else would have to be made first.

    Raises:
        RecipeError: naming the step.
    """
    here = recipe.model_copy(update={"run_dir": str(run_dir(base))})
    steps = steps_of(recipe)
    shared = before_training(base)
    for step in steps[: steps.index(Step("train"))] if Step("train") in steps else []:
        if step not in shared or call(step, here, "plan").settings != call(step, base, "plan").settings:
            raise RecipeError(
                f"--sweep: {visible(name, 200)} needs another {step} than the recipe has, and a sweep trains on the same. "
                "Sweep keys that only the training and what follows it read, or submit it as a run of its own (--run_dir)."
            )


def links_of(variant: Variant, base: Recipe) -> Iterator[tuple[Path, str]]:
    """The links in a training's folder that are not there yet, to the stages that it shares, and where each leads.

    Raises:
        StageConflictError: something else is in the place of one.
    """
    place = run_dir(variant.recipe)
    for step in before_training(variant.recipe):
        own, shared = folder(variant.recipe, *step), folder(base, *step)
        target = os.path.relpath(shared, place)
        if own.is_symlink() and os.readlink(own) == target:  # noqa: PTH115 (the text, wherever it leads)
            continue
        if own.is_symlink() or own.exists():
            raise StageConflictError(f"{own}: is in the place of a link to {shared}. Move it away.")
        yield own, target


def is_done(variant: Variant) -> bool:
    """Whether a training and its evaluation are there, as its recipe has them."""
    steps = [step for step in steps_of(variant.recipe) if step.stage in ("train", "evaluate")]
    seen = outlook(variant.recipe, steps)
    for each in seen:
        if each.action == "refuse":
            raise StageConflictError(each.why)
    return all(each.action == "keep" for each in seen)


def jobs_of_sweep(
    base: Recipe, variants: Sequence[Variant], files: Mapping[str, Path], listing: Path, before: Sequence[Job], wanted: Wanted, site: Site
) -> list[Job]:
    """An array of trainings, one of their evaluations, each task behind its training, and the comparison.

    Args:
        base: The recipe without what is swept.
        variants: All trainings.
        files: Their recipes as the jobs read them.
        listing: A file with those, a line a training: a task reads the line of its number.
        before: The jobs that make what all share.
        wanted: On which nodes.
        site: Its limits.

    Raises:
        RecipeError: there are more trainings than an array can have.
    """
    if len(variants) > site.max_array:
        raise RecipeError(
            f"--sweep: {len(variants):,} trainings are more than an array may have (SITE_MAX_ARRAY, {site.max_array:,}). Give fewer."
        )
    left = [number for number, variant in enumerate(variants, start=1) if not is_done(variant)]
    names = [variants[number - 1].name for number in left]
    last = tuple(job.name for job in before if job.steps == before[-1].steps and not job.ends and not job.serves)
    options = [*(["--launch", str(wanted.launch)] if wanted.launch else [])]
    options += ["--processes", str(wanted.processes)] if wanted.processes else []
    shared = {"tasks": tuple(left), "at_once": site.max_at_once, "follow_ups": wanted.follow_ups}

    def job(name: str, script: str, words: Sequence[str], stage: str, command: str, **more: object) -> Job:
        commands = tuple(f"{command} {shlex.quote(str(files[each]))}" for each in names)
        writes = tuple(f"{SWEEP}/{each}/{files_of(base, Step(stage))}" for each in names)
        return Job(name, script, tuple(words), commands=commands, writes=writes, **{**shared, **more})  # type: ignore[arg-type]

    found = []
    if left:
        launch = f"{launch_command(wanted)} --config"
        words = [*options, f"@{listing}"]
        found.append(job(TRAIN, "train.sbatch", words, "train", launch, nodes=wanted.nodes, gpus=wanted.gpus, after=last))
        if base.evaluate is not None:
            words, gpus = ["evaluate", f"@{listing}"], min(wanted.gpus, wanted.gpus_per_task)
            found.append(job(EVALUATE, "stage.sbatch", words, "evaluate", "distill evaluate", gpus=gpus, task_by_task=(TRAIN,)))
    place = run_dir(base) / SWEEP
    if left or not (place / "comparison.md").exists():
        command = shlex.join(["distill", "compare", str(place)])
        writes = f"{SWEEP}/comparison.md, {SWEEP}/comparison.svg"
        behind = (found[-1].name,) if found else ()
        found.append(Job(COMPARE, "stage.sbatch", ("compare", str(place)), behind=behind, commands=(command,), writes=(writes,)))
    return found
