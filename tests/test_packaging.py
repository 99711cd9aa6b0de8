"""What is installed: every folder and file of the kit is in the wheel, which works anywhere; the recipes that ship with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distill.errors import RecipeError
from distill.recipe.reading import load_recipe
from distill.recipe.shelf import copy_recipe, find_recipe, shipped, table

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "distill"
PARTS = ("pyproject.toml", "README.md", "LICENSE", "distill", "recipes", "slurm")


def test_every_folder_with_modules_is_packaged_and_every_file_beside_them() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("*.py")}
    assert set(setuptools["packages"]) == folders | {"distill.shelf", "distill.slurm"}
    covered = {path for pattern in setuptools["package-data"]["distill"] for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files <= covered, files - covered
    covered = {path for pattern in setuptools["package-data"]["distill.slurm"] for path in (ROOT / "slurm").glob(pattern)}
    assert {path for path in (ROOT / "slurm").rglob("*") if path.is_file()} == covered
    covered = {path for pattern in setuptools["package-data"]["distill.shelf"] for path in (ROOT / "recipes").glob(pattern)}
    assert {path for path in (ROOT / "recipes").rglob("*") if path.is_file()} == covered


def test_the_recipes_of_the_kit_say_what_they_are() -> None:
    recipes = shipped()
    assert {recipe.path for recipe in recipes} == set((ROOT / "recipes").glob("*.yaml"))
    for recipe in recipes:
        assert recipe.name == load_recipe(recipe.path).name and len(recipe.about) > 40
        assert {"source", "hardware", "memory", "time", "result", "command"} <= set(recipe.facts)
    text = table(recipes, 140)
    assert "embedded:teacher → embedded:student" in text and "0.66 [0.61, 0.70]" in text and "not measured yet" in text
    assert max(map(len, text.splitlines())) <= 140


def test_a_recipe_goes_by_its_name_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe("quickstart").name == "quickstart"
    for name in ("quickstrat", "recipes/quickstart.yml"):
        with pytest.raises(RecipeError, match="Did you mean quickstart"):
            load_recipe(name)
    with pytest.raises(RecipeError, match="distill recipes"):
        load_recipe("zzz")
    with pytest.raises(RecipeError, match="it is a folder"):
        load_recipe(tmp_path)
    copy_recipe("quickstart", Path("quickstart"))
    assert find_recipe("quickstart") == Path("quickstart")
    assert find_recipe("~/quickstart") == tmp_path / "quickstart"


def test_a_copy_never_takes_the_place_of_a_file_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert copy_recipe("quickstart") == Path("quickstart.yaml")
    Path("quickstart.yaml").write_text("mine")
    with pytest.raises(RecipeError, match="is there already"):
        copy_recipe("quickstart", tmp_path)
    assert Path("quickstart.yaml").read_text() == "mine"
    copy_recipe("quickstart", force=True)
    assert load_recipe("quickstart.yaml").name == "quickstart"
    assert copy_recipe("quickstart", Path("new/own.yaml")).read_text() == (ROOT / "recipes" / "quickstart.yaml").read_text()
    with pytest.raises(RecipeError, match="Did you mean quickstart"):
        copy_recipe("quikstart")


@pytest.mark.parametrize(
    ("words", "expected"), [("check quick", "quickstart"), ("recipes cp qwen3", "qwen3-8b-to-0.6b"), ("cur", "curate")]
)
def test_the_shell_completes_stages_and_recipes(words: str, expected: str) -> None:
    environment = {
        **os.environ,
        "_DISTILL_COMPLETE": "complete_bash",
        "COMP_WORDS": f"distill {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    code = "from distill.cli import app; app(prog_name='distill')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert expected in result.stdout.split(), result.stdout + result.stderr


@pytest.mark.slow
def test_a_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    source, home = tmp_path / "source", tmp_path / "home"
    home.mkdir()
    source.mkdir()
    for name in PARTS:  # a copy, since a build leaves folders behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source)]
    assert subprocess.run(built).returncode == 0
    wheel = next(tmp_path.glob("*.whl"))
    assert subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel)]).returncode == 0

    def distill(*words: str, module: str = "distill") -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        result = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=home, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "quickstart" in distill("recipes")
    assert "RECIPE" in distill("check", "--help")
    distill("recipes", "cp", "quickstart")
    assert (home / "quickstart.yaml").read_text() == (ROOT / "recipes" / "quickstart.yaml").read_text()
    assert "2,400 in" in distill("prompts", "quickstart")
    facts = (home / "runs" / "quickstart" / "prompts" / "manifest.json").read_text()
    assert '"git_revision": null' in facts
    inside = tmp_path / "site" / "distill"
    assert distill(module="distill.cluster.place").strip() == str(inside / "slurm")
    assert {path.name for path in (inside / "slurm").iterdir()} >= {path.name for path in (ROOT / "slurm").iterdir()}
    assert {path.name for path in (inside / "shelf" / "made").iterdir()} >= {path.name for path in (ROOT / "recipes" / "made").iterdir()}
    packaged = {path.relative_to(inside) for path in inside.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert expected <= packaged, expected - packaged
    assert list((tmp_path / "site").glob("recipe*")) == []  # nothing but the package itself
