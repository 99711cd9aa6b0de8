"""The table `scores` of all models and tasks: lm-eval's numbers, the kit's beside them, and the student's differences from the base."""

from __future__ import annotations

from pathlib import Path

from distill.benchmarks.measuring import folder_name
from distill.benchmarks.scores import Found, Metric, Row, differences, rows_of
from distill.benchmarks.second import second_rows
from distill.recipe.experiment import Recipe


def table_of(recipe: Recipe, place: Path, version: str) -> list[Row]:
    """Rows of the table, from lm-eval's files alone.

    Args:
        recipe: The recipe.
        place: The stage's folder.
        version: Of lm-eval.
    """
    section = recipe.benchmarks
    assert section is not None
    folders: dict[tuple[str, str], Path] = {
        (role, asked): place / role / folder_name(asked) for role in section.models for asked in section.all_tasks
    }
    found: dict[str, dict[Metric, Found]] = {role: {} for role in section.models}
    for (name, asked), folder in folders.items():
        found[name].update(rows_of(name, asked, folder, version))
    for who, metric, each in second_rows(folders, section):
        found[who][metric] = each
    rows = [each.row for of_model in found.values() for each in of_model.values()]
    if {"base", "student"} <= found.keys():
        rows += differences(found["base"], found["student"], recipe.seed, section.confidence)
    return rows
