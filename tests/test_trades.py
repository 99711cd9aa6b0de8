"""The recipes for shops, medicine, law and Arabic: their checks on made answers without a model, and each whole with the embedded pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from trades import KEPT, judged, made_rows, made_words, recipe_of, run_made, scores

from distill.before import check
from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest

TRADES = ["law"]


@pytest.mark.parametrize("trade", TRADES)
def test_all_three_models_are_measured_on_prompts_that_nobody_trains_on(trade: str) -> None:
    recipe = load_recipe(recipe_of(trade))
    assert recipe.evaluate is not None and recipe.evaluate.models == ["base", "student", "teacher"]
    assert recipe.prompts.heldout_size >= 500 and recipe.judges_answers
    assert load_recipe(recipe_of(trade), made_words(trade)).checks_of_answers == recipe.checks_of_answers


@pytest.mark.parametrize("trade", TRADES)
def test_right_answers_pass_and_wrong_ones_go_for_their_reason(trade: str, tmp_path: Path) -> None:
    found, wanted = judged(trade, tmp_path)
    assert found == wanted
    assert len(found) == len(made_rows(trade)) - 12 and Counter(wanted.values())[KEPT] < len(found) - 3


@pytest.mark.slow
@pytest.mark.parametrize("trade", TRADES)
def test_a_recipe_runs_whole_on_its_made_data(trade: str, tmp_path: Path) -> None:
    """Two steps of a tiny model teach nothing: what is shown is that each measure that a recipe names is there, with its interval."""
    told = run_made(trade, tmp_path / "run")
    found = scores(tmp_path / "run")
    for role in ("base", "student", "teacher"):
        accuracy = found[role, "accuracy"]
        assert accuracy["num_prompts"] == 12 and accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert found[role, "unjudged_rate"]["value"] < 1 and found[role, "mean_tokens"]["value"] > 0
        if trade != "arabic-qa":
            assert 0 <= found[role, "macro_f1"]["value"] <= 1 and "macro-F1" in told
    assert ("student-base", "accuracy_difference") in found and (tmp_path / "run" / "report" / "report.html").exists()
    assert read_manifest(tmp_path / "run" / "student").rows_kept == read_manifest(tmp_path / "run" / "curated").rows_kept


@pytest.mark.slow
@pytest.mark.parametrize("trade", TRADES)
def test_a_recipe_holds_offline_with_the_real_tokenizers(trade: str, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the made prompts; the real models' templates and ids, and lengths in their tokens."""
    keys = ("prompts.source", "prompts.subset", "prompts.split")
    words = [word for key, value in pairs(made_words(trade)) if key in keys for word in (f"--{key}", value)]
    tokenizer = str(shared / "data" / "tokenizers" / "qwen3")
    words += ["--prompts.heldout_source", "null", "--prompts.heldout_size", "12", "--prompts.max_prompts", "null"]
    held = check.run(load_recipe(recipe_of(trade), [*words, "--teacher.tokenizer", tokenizer, "--student.tokenizer", tokenizer]))
    text = capsys.readouterr().out
    assert held and f"{len(made_rows(trade)) - 12} to train on, 12 held out, 0 dropped" in text and "<|im_end|>««" in text, text


def pairs(words: list[str]) -> list[tuple[str, Any]]:
    """Keys and values of a command line."""
    return [(key.removeprefix("--"), value) for key, value in zip(words[::2], words[1::2], strict=True)]
