"""`import distill`: its page runs as it stands, silently; importing it loads nothing; its errors are the kit's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from distill.errors import DataError, RecipeError
from distill.run.log import is_quiet, say, silence

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "distill" / "LIBRARY.md").read_text(), flags=re.DOTALL)


def test_the_page_runs_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS[:2]:
        exec(block, names)
    printed, errors = capfd.readouterr()
    assert printed.count("\n") == 1 and ": traces" not in errors, "only the page's own print"
    for block in BLOCKS[2:]:
        exec(block, names)
    printed = capfd.readouterr().out
    assert "</think>" in printed and "4)" in printed and "nats a token" in printed
    with pytest.raises(DataError, match="no table 'rows', only curated, dropped, verdicts"):
        distill.read_table("runs/library/curated", "rows")
    assert set(distill.read_table("runs/library/curated", "curated", ["reference"])[0]) == {"reference"}
    distill.run_stage("curate", distill.load_recipe("runs/library/recipe.yaml"), talk=True)
    assert "nothing to do" in capfd.readouterr().out


def test_importing_it_loads_nothing() -> None:
    code = """
import sys, distill
assert not {"pydantic", "torch", "distill.library"} & set(sys.modules)
assert {"load_recipe", "distillation_loss"} <= set(dir(distill))
distill.load_recipe("quickstart")
assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_everything_it_names_is_there_and_nothing_else() -> None:
    for name in distill.__all__:
        assert getattr(distill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distill.nothing


def test_overrides_are_values_by_key() -> None:
    changes = {"seed": 3, "train.trainer_args.learning_rate": 1e-3, "evaluate": None, "student.adapter": {"type": "full"}}
    recipe = distill.load_recipe("quickstart", changes)
    assert recipe.seed == 3 and recipe.train.trainer_args["learning_rate"] == 1e-3
    assert recipe.evaluate is None and recipe.student.adapter.type == "full"
    for wrong, words in [
        ({"sed": 3}, "overrides: sed: unknown key"),
        ({"seed": "3"}, "overrides: seed:"),
        ({"name.x": 1}, "overrides: name.x: name is"),
    ]:
        with pytest.raises(RecipeError, match=words):
            distill.load_recipe("quickstart", wrong)
    with pytest.raises(RecipeError, match="no stage 'generat'"):
        distill.run_stage("generat", recipe)


def test_silence_ends_where_it_began(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_QUIET", "1")
    with silence():
        say("nothing", result=True)
    assert is_quiet()
    say("a result", result=True)
    assert capsys.readouterr().out == "a result\n"
