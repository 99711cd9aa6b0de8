"""Whether the answers that are to be judged can be: the checks' own settings, and the references they compare with."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from distill.before.findings import Findings
from distill.errors import DataError
from distill.recipe.checks import Check
from distill.recipe.experiment import Recipe
from distill.recipe.sets import AskedSet

if TYPE_CHECKING:
    from distill.stages.prompts import Survey

_LOOKED_AT = 200  # prompts


def check_judging(recipe: Recipe, survey: Survey, found: Findings) -> None:
    """A claim on the settings of checks, where there are any, one on the references, and a warning for each check that some lack."""
    from distill.checks.beforehand import refuse_settings
    from distill.checks.code import refuse_no_place

    curate, evaluate = _asked(recipe)
    settings = {check.called: check for check in [*curate, *evaluate] if check.kind in ("python", "json", "language", "code")}
    if settings and found.prove("checks", lambda: refuse_settings(list(settings.values()), recipe.curate.check_timeout_s)):
        for check in settings.values():
            if check.code is not None and not refuse_no_place(check.called, check.code).protected:
                found.warn("checks", f"{check.called}: there is no sandbox here, so code is run as you, with your files and the network")
    notes: list[str] = []
    found.prove("references", lambda: _references(recipe, survey, notes))
    for note in dict.fromkeys(notes):
        found.warn("references", f"{note}. Such traces are dropped, such answers counted as not judged.")


def check_sets(recipe: Recipe, survey: Survey, found: Findings) -> dict[str, int]:
    """A claim for each further held-out set: it can be read, its references can be compared with. Returns their prompts, by name."""
    from distill.checks.beforehand import refuse_settings, unfit
    from distill.data.sets import in_normal_form, read_set

    trained, sizes = in_normal_form(survey.normals), {}
    timeout_s = recipe.evaluate.check_timeout_s if recipe.evaluate is not None else 0.0
    for name, asked in list(recipe.asked_sets().items())[1:]:

        def attempt(name: str = name, asked: AskedSet = asked) -> str:
            refuse_settings(asked.checks, timeout_s)
            read = read_set(recipe, name, trained)
            sizes[name] = len(read.rows)
            try:
                notes = unfit(asked.checks, read.rows[:_LOOKED_AT], timeout_s)
            except DataError as error:
                raise DataError(f"evaluate.sets.{name}: {error}. Correct its columns or checks, or leave the set out.") from None
            for note in notes:
                found.warn(f"set {name}", f"{note}. Such answers are counted as not judged.")
            lost = ", ".join(f"{count:,} {reason}" for reason, count in sorted(read.drops.items()))
            return f"{len(read.rows):,} prompts, {asked.sampling.samples_per_prompt:,} answers each" + (
                f"; left out: {lost}" if lost else ""
            )

        found.prove(f"set {name}", attempt)
    return sizes


def _asked(recipe: Recipe) -> tuple[list[Check], list[Check]]:
    """The checks that look at traces, and those of answers."""
    told = recipe.traces is not None and recipe.traces.verdict is not None
    curate = [check for check in recipe.curate.checks if recipe.learns_from_traces and not (told and check.settings.of_answers)]
    judges = recipe.evaluate is not None and recipe.judges_answers
    return curate, (recipe.checks_of_answers if judges else [])


def _references(recipe: Recipe, survey: Survey, notes: list[str]) -> str:
    from distill.checks.beforehand import unfit

    curate, evaluate = _asked(recipe)
    train, timeout_s = survey.sample[:_LOOKED_AT], recipe.curate.check_timeout_s
    asked = []
    for check in curate if not recipe.curate.keep_unjudged else ():
        if not (check.settings.asks_reference or check.settings.columns):
            continue
        asked.append("curate.checks")
        try:
            notes += unfit([check], train, timeout_s)
        except DataError as error:
            name = check.called
            raise DataError(f"{error}, but curate.checks has {name}. Set prompts.columns.reference, or leave {name} out.") from None
    if any(check.settings.asks_reference or check.settings.columns for check in evaluate):
        asked.append("evaluate")
        try:
            notes += unfit(evaluate, _heldout(recipe) if recipe.prompts.heldout_source is not None else train, timeout_s)
        except DataError as error:
            raise DataError(f"{error}. Set prompts.columns.reference, or leave the measuring out with evaluate: null.") from None
    return f"there for {' and '.join(dict.fromkeys(asked))}" if asked else "not needed"


def _heldout(recipe: Recipe) -> list[dict[str, Any]]:
    """Some prompts of a source of their own."""
    from distill.data.mapping import PromptMapping
    from distill.data.sources import heldout_problems

    source = heldout_problems(recipe.prompts)
    assert source is not None
    mapping = PromptMapping(recipe.prompts, recipe.prompts.columns, source.name)
    placed = islice(source.rows(mapping.columns), _LOOKED_AT)
    return [prompt for where, row in placed for prompt, _ in mapping.prompt_rows(row, where)]
