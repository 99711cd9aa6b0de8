"""The recipes for code, games, tools and customer service: their checks on made answers, and each whole, with a teacher of known skill.

The made teacher stands behind a server and answers as the rows say, so that what the report must say of it is known beforehand; base and
student are the embedded one, which can do nothing of the kind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from answering import Answering
from grading import Judging, shown
from trades import KEPT, judged, made_rows, made_words, recipe_of, run_made, scores

from distill.before import check
from distill.checks.sandbox import place_for
from distill.data.names import value_at
from distill.recipe.code import CodeSettings
from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows

TRADES = ["code-assistant", "game-dialogue", "tool-calling-agent"]
EXTRA = ["--prompts.template", "{prompt}"]
QUALITIES = {"code-assistant": "qwen2.5-instruct"}


class Teacher(Answering):
    """Writes to each prompt what its made row says; `answers` are by a text of the prompt's last turn."""

    answers: dict[str, str]

    def _written(self, body: dict[str, Any]) -> tuple[str, int, str]:
        asked = body["messages"][-1]["content"]
        return next(answer for text, answer in self.answers.items() if text in asked), 12, "stop"


def line_of(trade: str, row: dict[str, Any]) -> str:
    """What is asked in a made row."""
    return str(value_at(row, load_recipe(recipe_of(trade), EXTRA).prompts.columns.prompt or "", trade))


def verdict_of(trade: str) -> Any:
    """A judge that knows the made answers: good is what is kept."""
    good = {row["made_completion"] for row in made_rows(trade) if row["made_verdict"] == KEPT}

    def verdict(content: str, count: int) -> str:
        if "<A-" not in content:
            return "pass" if shown(content, "answer") in good else "fail"
        first, second = (shown(content, name) in good for name in ("A", "B"))
        return "tie" if first == second else "A" if first else "B"

    return verdict


@pytest.fixture
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Overrides that put a made teacher, and where the recipe has one a made judge, behind servers of their own."""
    trade = request.getfixturevalue("trade")
    if trade == "code-assistant" and isinstance(place := place_for(CodeSettings()), str):
        pytest.skip(f"no sandbox here: {place}")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with ExitStack() as stack:
        teacher = stack.enter_context(Teacher())
        teacher.answers = {line_of(trade, row): row["made_completion"] for row in made_rows(trade)}
        words = ["--teacher.server", json.dumps({"kind": "openai", "url": f"{teacher.url}/v1", "model": "tiny"})]
        if trade == "tool-calling-agent":
            words += ["--score.source", "process"]
        if trade == "game-dialogue":
            judge = json.dumps(stack.enter_context(Judging(verdict=verdict_of(trade))).model_section())
            words += ["--curate.checks.4.judge.model", judge, "--evaluate.preferences.model", judge, "--curate.keep_unjudged", "false"]
        yield words


@pytest.mark.parametrize("trade", TRADES)
def test_the_measure_that_is_asked_for_is_that_of_the_made_run(trade: str) -> None:
    recipe = load_recipe(recipe_of(trade), EXTRA)
    assert recipe.evaluate is not None and recipe.evaluate.models == ["base", "student", "teacher"] and recipe.judges_answers
    made = load_recipe(recipe_of(trade), [*made_words(trade), *EXTRA])
    assert [each.kind for each in made.checks_of_answers] == [each.kind for each in recipe.checks_of_answers]
    assert made.curate.reasoning == recipe.curate.reasoning and made.prompts.fields == recipe.prompts.fields


@pytest.mark.parametrize("trade", TRADES)
def test_right_answers_pass_and_wrong_ones_go_for_their_reason(trade: str, served: list[str], tmp_path: Path) -> None:
    found, wanted = judged(trade, tmp_path, [*served, *EXTRA, "--prompts.heldout_size", "0", "--evaluate", "null"])
    assert found == wanted and len(found) == len(made_rows(trade))
    assert 20 < Counter(found.values())[KEPT] < len(found) - 6


@pytest.mark.slow
@pytest.mark.parametrize("trade", TRADES)
def test_a_recipe_runs_whole_and_tells_how_good_the_teacher_is(trade: str, served: list[str], tmp_path: Path) -> None:
    told = run_made(trade, tmp_path / "run", *served, *EXTRA)
    asked = [row["messages"][-1]["content"] for row in read_rows(tmp_path / "run" / "prompts", "heldout")]
    right = [row["made_verdict"] == KEPT for row in made_rows(trade) if any(line_of(trade, row) in text for text in asked)]
    assert len(right) == 12 and 6 < sum(right) < 12
    found = scores(tmp_path / "run")
    assert found["teacher", "accuracy"]["value"] == sum(right) / 12 and found["base", "accuracy"]["value"] == 0
    assert found["teacher", "accuracy"]["low"] < sum(right) / 12 < found["teacher", "accuracy"]["high"]
    assert ("student-base", "accuracy_difference") in found and f"{100 * sum(right) / 12:.1f} %" in told
    assert read_manifest(tmp_path / "run" / "student").rows_kept == read_manifest(tmp_path / "run" / "curated").rows_kept
    if trade == "game-dialogue":
        wins = {(row["first_role"], row["second_role"]): row for row in read_rows(tmp_path / "run" / "eval", "wins")}
        print(wins)


@pytest.mark.slow
@pytest.mark.parametrize("trade", TRADES)
def test_a_recipe_holds_offline_with_the_real_tokenizers(trade: str, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the made rows, in the real models' templates and tokens; the judge is not asked anything."""
    words = made_words(trade)
    tokenizer = str(shared / "data" / "tokenizers" / QUALITIES.get(trade, "qwen3"))
    recipe = load_recipe(recipe_of(trade), words)
    print(recipe, tokenizer, check)
