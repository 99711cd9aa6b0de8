"""Commands that begin at the same time, or are refused: what the run says of itself stays whole and true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import distill
from distill.errors import StageConflictError
from distill.recipe.reading import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def test_a_refused_run_leaves_the_recipe_of_what_is_there(tmp_path: Path) -> None:
    settings = {"run_dir": str(tmp_path / "run"), "prompts.max_prompts": 20, "prompts.heldout_size": 5}
    distill.run_stage("prompts", distill.load_recipe("quickstart", settings))
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(StageConflictError):
        distill.run_stage("prompts", distill.load_recipe("quickstart", settings | {"seed": 1}))
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["runs/s*", "exp[1]", "exp:1", "2026-01-31", "#3"])
def test_a_run_is_in_the_folder_of_that_very_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart", ["--run_dir", name, "--prompts.max_prompts", "20", "--prompts.heldout_size", "5"])
    distill.run_stage("prompts", recipe)
    assert len(distill.read_table(Path(name) / "prompts", "train")) == 20
    assert [str(place.relative_to(tmp_path)) for place in tmp_path.rglob("prompts")] == [f"{name}/prompts"]
    assert load_recipe(Path(name) / "recipe.yaml").run_dir == name


@pytest.mark.slow
def test_of_starts_at_the_same_time_one_works_and_the_others_say_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill", "prompts", "quickstart", "--run_dir", str(tmp_path / "run")]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(16)]
    endings = [(process.communicate()[1], process.returncode) for process in started]
    worked = [code for _, code in endings if code == 0]
    refused = [text for text, code in endings if code]
    assert worked and all(code in (0, 1) for _, code in endings)
    assert all(text.startswith("error: ") and "another process is working on this stage" in text for text in refused), refused
    assert load_recipe(tmp_path / "run" / "recipe.yaml").name == "quickstart"
