"""Paths in a recipe: `~`, the folder a command is run in, the folder of the recipe; and the resolved recipe read elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.recipe.reading import load_recipe, recipe_text

RECIPE = """\
name: paths
run_dir: ~/runs/paths
teacher: {model: Qwen/Qwen3-8B, tokenizer: tokenizer}
student: {model: ~/models/student}
prompts: {source: problems.jsonl, heldout_source: "test/*.jsonl"}
generate: {}
train:
  trainer_args: {deepspeed: zero.json, run_name: zero.json, accelerator_config: {non_blocking: false}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and files beside it; the command is run in another."""
    folder = tmp_path / "recipes"
    for name in ("problems.jsonl", "zero.json", "test/1.jsonl", "tokenizer/tokenizer.json", "runs/paths/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


def test_what_lies_only_beside_the_recipe_is_found_from_anywhere(place: Path) -> None:
    recipe = load_recipe("../recipes/recipe.yaml")
    assert recipe.teacher is not None
    assert recipe.prompts.source == str(place / "problems.jsonl") and recipe.prompts.heldout_source == str(place / "test/*.jsonl")
    assert recipe.teacher.tokenizer == str(place / "tokenizer") and recipe.teacher.model == "Qwen/Qwen3-8B"
    arguments = recipe.train.trainer_args
    assert arguments["deepspeed"] == str(place / "zero.json") and arguments["run_name"] == "zero.json"


def test_what_lies_where_the_command_is_run_comes_first_and_stays_relative(place: Path) -> None:
    Path("problems.jsonl").touch()
    assert load_recipe(place / "recipe.yaml").prompts.source == "problems.jsonl"
    assert load_recipe(place / "recipe.yaml", ["--prompts.source", "absent.jsonl"]).prompts.source == "absent.jsonl"


def test_the_home_is_put_in_everywhere(place: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe("~/recipe.yaml", ["--prompts.source", "~/mine.jsonl", "--train.trainer_args.deepspeed=~/ds.json"])
    home = tmp_path / "home"
    assert recipe.run_dir == str(home / "runs" / "paths") and recipe.student.model == str(home / "models" / "student")
    assert recipe.prompts.source == str(home / "mine.jsonl") and recipe.train.trainer_args["deepspeed"] == str(home / "ds.json")


def test_a_run_is_never_looked_for_beside_the_recipe(place: Path) -> None:
    assert load_recipe(place / "recipe.yaml", ["--run_dir", "runs/paths"]).run_dir == "runs/paths"


def test_the_resolved_recipe_says_the_same_from_any_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    run = tmp_path / "elsewhere" / "run"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe_text(recipe))
    monkeypatch.chdir(run.parent)
    assert load_recipe("run/recipe.yaml") == recipe
