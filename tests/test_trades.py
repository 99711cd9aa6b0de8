"""The recipes for shops, medicine, law and Arabic: their checks on made answers without a model, and each whole with the embedded pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from trades import KEPT, MadeTeacher, judged, made_rows, made_words, recipe_of, run_made, scores

from distill.before import check
from distill.checks import Given
from distill.checks.label import check_label
from distill.recipe.models import ModelSpec
from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows

TOLD_BY = {"shop-recommendations": "product_title", "medicine": "question", "law": "text", "arabic-qa": "question"}
"""Of each trade the column by which a prompt is told from others."""
TRADES = list(TOLD_BY)
LEARNED = {"shop-recommendations": "{Exact}", "medicine": "{yes}", "law": "{Governing Laws}", "arabic-qa": "{1874}"}
"""Of each trade what the first row that is shown as learned ends with."""


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
    assert len(found) == len(made_rows(trade)) and Counter(wanted.values())[KEPT] <= len(found) - 8


def test_each_of_the_hundred_labels_of_law_is_asked_for_and_found() -> None:
    recipe = load_recipe(recipe_of("law"))
    label = next(check.label for check in recipe.curate.checks if check.label is not None)
    assert label.choices is not None and len(label.choices) == 100
    assert (recipe.prompts.system_prompt or "").endswith(f"The topics are: {', '.join(label.choices)}.")
    for number, name in enumerate(label.choices):
        for answer in (f"\\boxed{{{name}}}", f"The topic is **{name}**."):
            assert check_label(Given(answer, str(number)), label) == (True, "right"), answer
            assert check_label(Given(answer, str((number + 1) % 100)), label) == (False, "wrong_label"), answer


@pytest.mark.slow
@pytest.mark.parametrize("trade", [trade for trade in TRADES if trade != "shop-recommendations"])
def test_a_recipe_runs_whole_and_tells_how_good_the_teacher_is(trade: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher answers as the made rows do; base and student are the embedded one, which answers nothing of the kind."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with MadeTeacher(trade, TOLD_BY[trade]) as teacher:
        told = run_made(trade, tmp_path / "run", *teacher.words)
    asked = [row["messages"][-1]["content"] for row in read_rows(tmp_path / "run" / "prompts", "heldout")]
    rows = [row for row in made_rows(trade) if any(row[TOLD_BY[trade]] in text for text in asked)]
    # Whether there is reasoning is asked of what is learned from, not of an answer.
    right = sum(row["made_verdict"] == KEPT or row["made_verdict"].startswith("think:") for row in rows) / len(rows)
    found = scores(tmp_path / "run")
    assert len(rows) == 12 and 0.5 < right < 1 and found["teacher", "accuracy"]["value"] == pytest.approx(right)
    assert found["teacher", "accuracy"]["low"] < right < found["teacher", "accuracy"]["high"] and f"{100 * right:.1f} %" in told
    assert found["base", "accuracy"]["value"] == 0 and "teacher better than student by" in told
    if trade != "arabic-qa":
        assert 0 < found["teacher", "macro_f1"]["low"] < found["teacher", "macro_f1"]["value"] < 1 and "macro-F1" in told
    assert read_manifest(tmp_path / "run" / "student").rows_kept == read_manifest(tmp_path / "run" / "curated").rows_kept


@pytest.mark.slow
def test_a_shop_learns_from_the_teachers_probabilities_and_is_measured_by_country(tmp_path: Path) -> None:
    told = run_made("shop-recommendations", tmp_path / "run")
    found = scores(tmp_path / "run")
    for role in ("base", "student", "teacher"):
        accuracy = found[role, "accuracy"]
        assert accuracy["num_prompts"] == 12 and accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert found[role, "macro_f1"]["value"] <= 1 and found[role, "mean_tokens"]["value"] > 0
        countries = {
            metric: row["num_prompts"] for (model, metric), row in found.items() if model == role and metric.startswith("accuracy/")
        }
        assert countries.keys() <= {"accuracy/us", "accuracy/es", "accuracy/jp"} and sum(countries.values()) == 12
    assert ("student-base", "accuracy_difference") in found and "tokens an answer" in told and "parameters" in told
    assert read_manifest(tmp_path / "run" / "targets").rows_kept == read_manifest(tmp_path / "run" / "curated").rows_kept


@pytest.mark.slow
def test_the_recipes_hold_offline_with_the_real_tokenizers(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the made prompts; the real models' templates and ids, and lengths in their tokens. The tokenizer is the same for all."""
    from distill.models import loading  # and torch with it

    tokenizer = str(shared / "data" / "tokenizers" / "qwen3")
    read = loading.load_tokenizer(ModelSpec(model=tokenizer))
    monkeypatch.setattr(loading, "load_tokenizer", lambda spec: read if spec.tokenizer == tokenizer else None)
    keys = ("--prompts.source", "--prompts.subset", "--prompts.heldout_split")
    for trade, shown in LEARNED.items():
        made = made_words(trade)
        words = [word for key, value in zip(made[::2], made[1::2], strict=True) if key in keys for word in (key, value)]
        words += ["--prompts.heldout_source", "null", "--prompts.heldout_size", "12", "--prompts.max_prompts", "null"]
        recipe = load_recipe(recipe_of(trade), [*words, "--teacher.tokenizer", tokenizer, "--student.tokenizer", tokenizer])
        assert check.run(recipe), capsys.readouterr().out
        text = capsys.readouterr().out
        assert f"{len(made_rows(trade)) - 12} to train on, 12 held out, 0 dropped" in text and "can't judge" not in text, text
        assert f"{shown}<|im_end|>««" in text, text
