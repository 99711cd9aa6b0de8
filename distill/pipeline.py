"""Runs one stage, or all of a recipe's stages in order. Knows which stages there are, and nothing of what they do."""

from __future__ import annotations

import importlib

from distill.recipe import Recipe
from distill.recipe_io import recipe_text
from distill.runlog import is_main_process, ledger, nothing_to_do, say
from distill.stages import FOLDERS, folder, run_dir
from distill.storage import MANIFEST, Manifest, delete_stage, write_text

_UNITS = {"prompts": "prompts", "generate": "traces", "curate": "traces", "train": "rows", "evaluate": "answers"}


def stages_of(recipe: Recipe) -> list[str]:
    """The stages a recipe asks for, in order."""
    left_out = {name for name, section in (("evaluate", recipe.evaluate), ("export", recipe.export)) if section is None}
    return [name for name in FOLDERS if name not in left_out]


def run_stage(name: str, recipe: Recipe, *, redo: bool = False) -> Manifest:
    """Runs a stage, or finds it done, and says so in one line.

    Args:
        name: A key of `FOLDERS`.
        recipe: The recipe.
        redo: Delete what an earlier run made of this stage.
    """
    target = folder(recipe, name)
    if is_main_process():
        if redo:
            delete_stage(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(run_dir(recipe) / "recipe.yaml", recipe_text(recipe))
    module = "import_traces" if name == "generate" and recipe.traces is not None else name
    done_before = (target / MANIFEST).exists()
    manifest: Manifest = importlib.import_module(f"distill.stages.{module}").run(recipe)
    say(nothing_to_do(manifest, target) if done_before else ledger(manifest, unit=_UNITS.get(name, "rows")))
    return manifest


def run_pipeline(recipe: Recipe) -> None:
    """Runs all stages and ends with the table of results and the path of the report."""
    for name in stages_of(recipe):
        run_stage(name, recipe)
    report = folder(recipe, "report")
    say("\n" + (report / "summary.txt").read_text(encoding="utf-8"))
    say(f"report: {report / 'report.html'}")
