"""`distill check`: quick without torch, and on a sample of whatever there is; what is known to fail is refuted by either."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import distill, write_recipe
from test_train import traces

from distill.before import brought, check, machine, quick
from distill.before.findings import Findings, evenly
from distill.before.packages import needs
from distill.models.loading import pick_device
from distill.recipe.models import ModelSpec
from distill.recipe.reading import load_recipe
from distill.run.folder import StageFolder
from distill.run.schema import TRACE
from distill.stages.prompts import survey

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
        (lambda _: {"prompts__decontaminate": "{benchmarks: [{source: embedded:arithmetic, column: text}]}"}, "there is no column 'text'"),
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
    assert result.returncode == 1 and "of these claims failed" in result.stdout and not result.stderr


def test_quick_knows_what_is_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill("prompts", recipe).returncode == 0
    holds, text = said(quick, recipe, capsys)
    assert holds and "keep: prompts; make: generate" in text
    holds, text = said(quick, recipe, capsys, seed=6)
    assert not holds and "prompts" in text and "seed" in text and "5" in text


def test_brought_traces_are_sampled_and_counted(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brought, "SAMPLE", 10)
    monkeypatch.setattr("distill.before.rehearsal.rehearse", lambda *_: None)
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
    monkeypatch.setattr(brought, "SAMPLE", 10)
    monkeypatch.setattr("distill.before.rehearsal.rehearse", lambda *_: None)
    with StageFolder(tmp_path / "run" / "curated", "curate", {}) as out:
        out.write_table("curated", traces(45), TRACE)
        out.finish(rows_in=45, rows_kept=45)
    holds, text = said(check, recipe, capsys)
    assert holds and "45 curated ones" in text and "prompt and completion, 9 of 45 rows looked at" in text, text


def test_a_recipe_is_proved(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holds, text = said(check, recipe, capsys)
    assert holds and "nothing speaks against" in text and "»»" in text and "<|im_end|>««" in text, text
    assert "rehearsal of train  2 steps" in text
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"prompts__source": "absent.jsonl"}, "there is no such file"),
        ({"prompts__heldout_size": 500}, "500"),
        ({"train__max_length": 5}, "not one fits"),
        ({"student__tokenizer": "/proc"}, "the tokenizer can't be loaded"),
        ({"train__trainer_args__optim": "adamm"}, "train.trainer_args"),
        ({"student__pad_token": "<|im_end|>"}, "also ends a turn"),
        ({"run_dir": "/proc/nowhere"}, "run folder"),
    ],
    ids=str,
)
def test_a_broken_recipe_is_refuted(broken: dict[str, Any], words: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holds, text = said(check, recipe, capsys, **broken)
    assert not holds and words in text and text.count("  FAIL  ") == 2, text  # where it was found, and in the list at the end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("r1-distill-qwen-7b-to-qwen2.5-1.5b", "deepseek-r1-distill-qwen", "qwen2.5-instruct"),
        ("qwen3-8b-to-0.6b", "qwen3", "qwen3"),
        ("r1-distill-qwen-7b-to-qwen2.5-1.5b-kd", "deepseek-r1-distill-qwen", "qwen2.5-instruct"),
        ("qwen3-8b-to-0.6b-rounds", "qwen3", "qwen3"),
    ],
)
def test_the_recipes_for_real_models_hold(name: str, teacher: str, student: str, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shared / "data"
    sources = {"prompts__source": data / "gsm8k" / "train.jsonl", "prompts__heldout_source": data / "gsm8k" / "test.jsonl"}
    tokenizers = {"teacher__tokenizer": data / "tokenizers" / teacher, "student__tokenizer": data / "tokenizers" / student}
    holds, text = said(check, ROOT / "recipes" / f"{name}.yaml", capsys, prompts__subset="null", **sources, **tokenizers)
    assert holds and "7,473 to train on" in text and "»»<think>" in text and "<|im_end|>««" in text, text
    assert "rehearsal: not checked here, the config of Qwen/" in text


def test_nothing_controls_the_terminal(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, traces and names of columns are shown with their controls as escapes."""
    rows = [{"question": f"\x1b]0;owned\x07\x1b[2J {i} \u202e plus \x9b31m one?", "answer": i, "t\x1b[1m": 1} for i in range(72)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for how, overrides in ((check, {}), (quick, {}), (check, {"prompts__columns__prompt": "t\x1b[1n"})):
        _, text = said(how, recipe, capsys, **overrides)
        assert not set(text) & set("\x1b\x07\x9b\u202e"), text
    assert "\\x1b" in text


def test_the_share_of_brought_traces_that_would_be_kept(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def brought_by(answer: Callable[[int], str]) -> Findings:
        rows = [{"question": f"What is {i} plus {2 * i}?", "text": answer(i)} for i in range(72)]
        (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "brought.yaml"
        plain = recipe.read_text().replace("generate: {", f"traces: {{source: {tmp_path / 'traces.jsonl'}, completion: text}}\n#")
        path.write_text(plain.replace("checks: []", "checks: [finish, think, math], workers: 1"))
        loaded, found = load_recipe(path, []), Findings()
        brought.check_traces(loaded, survey(loaded.prompts, loaded.seed, 100), found)
        return found

    good = "<think>\nAdded.\n</think>\n\n\\boxed{{{}}}".format
    found = brought_by(lambda i: good(3 * i) if i % 3 else good(1))
    text = capsys.readouterr().out
    assert not found.failed and not found.warnings and "% of 48 traces looked at would be kept; dropped: " in text
    assert "math:wrong_answer" in text
    found = brought_by(lambda i: good(3 * i) if not i % 5 else good(1))
    assert not found.failed and "would be kept" in found.warnings[0]
    found = brought_by(lambda i: f"It is {3 * i}.")
    assert "0% of 48 traces" in found.refuted[0] and "100% think:no_reasoning" in found.refuted[0]
    assert "curate.checks: [finish, math]" in found.refuted[0]


@pytest.mark.parametrize("total", [0, 1, 7, 10, 11, 40, 41, 1000])
def test_evenly_drawn_means_at_one_distance(total: int) -> None:
    kept, count = evenly(range(total), 5)
    assert count == total and min(total, 5) <= len(kept) <= 10
    assert len(set(map(int.__sub__, kept[1:], kept))) <= 1 and kept[:1] == list(range(total))[:1]
    assert not total or total - 1 - kept[-1] < total / 5


def test_packed_weights_are_not_counted_as_whole_ones(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A model that comes in 4 bits has room where its whole weights would have none."""
    shutil.copytree(tiny_model_dir, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    specs = [ModelSpec(model=str(model), dtype="bfloat16") for model in (tiny_model_dir, tmp_path / "packed")]
    assert [machine._bytes_each(spec, pick_device()) for spec in specs] == [2, 0.5]


def test_packages_that_stand_for_others_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("quickstart", {"student.attn_implementation": "flash_attention_2", "train.trainer_args.report_to": "tensorboard"})
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert {need.module for need in needs(recipe)} >= {"flash_attn"}
    for name in ("kernels", "tensorboardX"):
        (tmp_path / f"{name}.py").touch()
    importlib.invalidate_caches()
    assert needs(recipe) == []
