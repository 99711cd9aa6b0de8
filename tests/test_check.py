"""`distill check`: quick without torch, and on a sample of whatever there is; what is known to fail is refuted by either."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import distill, write_recipe
from test_train import traces

from distill.before import check, quick
from distill.before.findings import evenly
from distill.recipe.reading import load_recipe
from distill.run.folder import StageFolder
from distill.run.schema import TRACE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    path = write_recipe(tmp_path, tiny_model_dir)
    path.write_text(path.read_text() + f"run_dir: {tmp_path / 'run'}\n")
    return path


def said(how: Any, path: Path, capsys: pytest.CaptureFixture[str], **overrides: Any) -> tuple[bool, str]:
    holds = how.run(load_recipe(path, [text for key, value in overrides.items() for text in (f"--{key.replace('__', '.')}", str(value))]))
    return holds, capsys.readouterr().out


def test_quick_is_without_torch_and_writes_nothing(recipe: Path) -> None:
    code = f"""
import json, sys
sys.argv = ["distill", "check", {str(recipe)!r}, "--quick"]
from distill.cli import main
try: main()
except SystemExit: pass
print(json.dumps(sorted({{"torch", "transformers", "datasets", "trl", "peft", "accelerate"}} & set(sys.modules))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(result.stdout.splitlines()[-1]) == [], result.stdout + result.stderr
    assert "of the first 72 rows 72 can be used" in result.stdout and "make: prompts, generate" in result.stdout
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda place: {"prompts__source": place / "absent.jsonl"}, "there is no such file"),
        (lambda _: {"prompts__columns__prompt": "questoin"}, "Did you mean 'question'"),
        (lambda _: {"prompts__answer_pattern": "= (.*)"}, "none of the first 72 rows can be used: 72 no_answer_match"),
        (lambda _: {"prompts__columns": "{prompt: question, reference: answer.value}"}, "there is nothing in 'answer'"),
        (lambda _: {"run_dir": "/proc/nowhere"}, "run folder"),
    ],
)
def test_quick_refutes(
    change: Callable[[Path], dict[str, Any]], words: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holds, text = said(quick, recipe, capsys, **change(tmp_path))
    assert not holds and "FAIL" in text and words in text, text


def test_quick_ends_with_an_exit_code(recipe: Path) -> None:
    result = distill("check", recipe, "--quick", "--prompts.columns.prompt", "absent")
    assert result.returncode == 1 and "1 of these claims failed" in result.stdout and not result.stderr


def test_quick_knows_what_is_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill("prompts", recipe).returncode == 0
    holds, text = said(quick, recipe, capsys)
    assert holds and "keep: prompts; make: generate" in text
    holds, text = said(quick, recipe, capsys, seed=6)
    assert not holds and "prompts" in text and "seed" in text and "5" in text


def test_brought_traces_are_sampled_and_counted(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SAMPLE", 10)
    rows = [{"question": f"What is {index} plus {2 * index}?", "text": f"It is {3 * index}."} for index in range(72)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "brought.yaml"
    path.write_text(
        recipe.read_text().replace(
            "generate: {", "traces: {source: %s, completion: text, author_model: x}\n#" % (tmp_path / "traces.jsonl")
        )
    )
    for how, words in ((quick, "of the first 72 rows 72 can be used"), (check, "48 of 72 belong to a training prompt")):
        holds, text = said(how, path, capsys)
        assert words in text, text
    assert holds and "12 of 48 rows looked at" in text, text
    holds, text = said(quick, path, capsys, traces__completion="txt")
    assert not holds and "Did you mean 'text'" in text


def test_curated_traces_are_sampled(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "SAMPLE", 10)
    with StageFolder(tmp_path / "run" / "curated", "curate", {}) as out:
        out.write_table("curated", traces(45), TRACE)
        out.finish(rows_in=45, rows_kept=45)
    holds, text = said(check, recipe, capsys)
    assert holds and "45 curated ones" in text and "prompt and completion, 9 of 45 rows looked at" in text, text


@pytest.mark.parametrize("total", [0, 1, 7, 10, 11, 40, 41, 1000])
def test_evenly_drawn_means_at_one_distance(total: int) -> None:
    kept, count = evenly(range(total), 5)
    assert count == total and min(total, 5) <= len(kept) <= 10
    assert len(set(map(int.__sub__, kept[1:], kept))) <= 1 and kept[:1] == list(range(total))[:1]
    assert not total or total - 1 - kept[-1] < total / 5
