"""Stages read folders and write a folder. They talk through files and never import each other."""

from __future__ import annotations

from pathlib import Path

from distill.recipe import Recipe

FOLDERS = {
    "prompts": "prompts",
    "generate": "traces",
    "curate": "curated",
    "train": "student",
    "evaluate": "eval",
    "report": "report",
    "export": "export",
}
"""Stage name and the folder it writes inside the run, in the order of the pipeline."""


def run_dir(recipe: Recipe) -> Path:
    """The folder of a recipe's run."""
    return Path(recipe.run_dir or f"runs/{recipe.name}")


def folder(recipe: Recipe, stage: str) -> Path:
    """The folder that a stage writes."""
    return run_dir(recipe) / FOLDERS[stage]
