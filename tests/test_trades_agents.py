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
from distill.checks.judging import Judges, given_of
from distill.checks.sandbox import place_for
from distill.data.names import value_at
from distill.data.turns import answered, completion_of, turns_of
from distill.pipeline import run_stage
from distill.recipe.code import CodeSettings
from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows

TRADES = ["code-assistant", "game-dialogue", "tool-calling-agent"]
SERVICE = "customer-service-agent"
TOKENIZERS = {"code-assistant": "qwen2.5-instruct"}


class Teacher(Answering):
    """Writes to each prompt what its made row says; `answers` are by a text of the prompt's last turn."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, str] = {}

    def _written(self, body: dict[str, Any]) -> tuple[str, int, str]:
        asked = body["messages"][-1]["content"]
        return next(answer for text, answer in self.answers.items() if text in asked), 12, "stop"


def line_of(trade: str, row: dict[str, Any]) -> str:
    """What is asked in a made row."""
    return str(value_at(row, load_recipe(recipe_of(trade)).prompts.columns.prompt or "", trade))


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


@pytest.mark.parametrize("trade", [*TRADES, SERVICE])
def test_the_measure_that_is_asked_for_is_that_of_the_made_run(trade: str) -> None:
    recipe = load_recipe(recipe_of(trade))
    assert recipe.evaluate is not None and recipe.evaluate.models == ["base", "student", "teacher"] and recipe.judges_answers
    made = load_recipe(recipe_of(trade), made_words(trade))
    assert [each.kind for each in made.checks_of_answers] == [each.kind for each in recipe.checks_of_answers]
    assert made.curate.reasoning == recipe.curate.reasoning and made.prompts.fields == recipe.prompts.fields


@pytest.mark.parametrize("trade", ["tool-calling-agent"])
def test_right_answers_pass_and_wrong_ones_go_for_their_reason(trade: str, tmp_path: Path) -> None:
    """Where no model and no sandbox is needed for it; of the others, the whole runs below show it."""
    found, wanted = judged(trade, tmp_path, ["--prompts.heldout_size", "0", "--evaluate", "null"])
    assert found == wanted and len(found) == len(made_rows(trade))


@pytest.mark.parametrize(("ended", "right"), [("stop", True), ("length", False)])
def test_a_turn_that_was_cut_does_not_act_as_the_reference_did(ended: str, right: bool) -> None:
    """Noise without an end calls nothing, as the reference does, and is not right for that."""
    tools = value_at(made_rows(SERVICE)[0], "tools", SERVICE)
    given = given_of({"completion": "I have", "reference": "It is done.", "finish_reason": ended, "num_tokens": 2}, {"tools": tools})
    with Judges(load_recipe(recipe_of(SERVICE)).checks_of_answers, 10.0, 1) as judges:
        [(_, (passed, _))] = judges.answers([(0, given)])
    assert passed is right


@pytest.mark.slow
@pytest.mark.parametrize("trade", TRADES)
def test_a_recipe_runs_whole_and_tells_how_good_the_teacher_is(trade: str, served: list[str], tmp_path: Path) -> None:
    """Of the made answers those to training prompts are judged as traces, the others as what the teacher answers."""
    told, run = run_made(trade, tmp_path / "run", *served), tmp_path / "run"
    verdicts = {row["made_completion"]: row["made_verdict"] for row in made_rows(trade)}
    found = {row["completion"]: KEPT for row in read_rows(run / "curated", "curated")}
    found |= {row["completion"]: row["reason"] for row in read_rows(run / "curated", "dropped")}
    assert found == {completion: verdicts[completion] for completion in found}
    assert len(verdicts) == len(found) + 12 and read_manifest(run / "student").rows_kept == Counter(found.values())[KEPT]
    right = sum(verdict == KEPT for completion, verdict in verdicts.items() if completion not in found) / 12
    measured = scores(run)
    assert measured["base", "accuracy"]["value"] == 0 and measured["teacher", "accuracy"]["value"] == right
    assert measured["teacher", "accuracy"]["low"] < right < measured["teacher", "accuracy"]["high"] and f"{100 * right:.1f} %" in told
    assert ("student-base", "accuracy_difference") in measured and (run / "report" / "report.html").exists()
    if trade == "game-dialogue":
        wins = {(row["model_role"], row["against"]): row["value"] for row in read_rows(run / "eval", "wins")}
        assert wins["student", "teacher"] <= (1 - right) / 2 and wins["student", "base"] == 0.5  # an empty answer never ties


def curated(folder: Path, *overrides: str) -> tuple[Counter[str], int]:
    """What the checks of customer service say of the made conversations' turns, by reason, and how many are kept."""
    words = [*made_words(SERVICE), "--run_dir", str(folder), "--prompts.heldout_size", "0", "--evaluate", "null", *overrides]
    recipe = load_recipe(recipe_of(SERVICE), words)
    for stage in ("prompts", "generate", "curate"):
        run_stage(stage, recipe)
    dropped = Counter(row["reason"] for row in read_rows(folder / "curated", "dropped"))
    return dropped, read_manifest(folder / "curated").rows_kept or 0


def test_a_service_learns_what_came_to_a_good_end_and_checks_alone_see_no_policy(tmp_path: Path) -> None:
    """The reward takes every turn of a conversation out that failed; the calls alone show those that no tool takes, and no more."""
    rows = made_rows(SERVICE)
    turns = [sum(turn["role"] == "assistant" for turn in json.loads(row["messages"])) for row in rows]
    failed = sum(count for count, row in zip(turns, rows, strict=True) if not row["reward"])
    assert curated(tmp_path / "told") == (Counter({"tool_calls:brought_wrong": failed}), sum(turns) - failed)
    seen = Counter(row["made_verdict"] for row in rows if row["made_verdict"] != KEPT)
    assert curated(tmp_path / "seen", "--traces.verdict", "null") == (seen, sum(turns) - seen.total())
    assert sum(not row["reward"] for row in rows) == seen.total() + 3


@pytest.mark.slow
def test_a_service_runs_whole_and_tells_whether_it_acts_as_the_reference_does(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher says the reference's words and makes its calls, but for refunds: those it never pays."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Teacher() as teacher:
        for row in made_rows(SERVICE):
            messages = turns_of(row["messages"], "messages", SERVICE)
            for before, turn in answered(messages):
                said = completion_of(turn)
                teacher.answers[before[-1]["content"]] = "I will not." if '"name": "refund"' in said else said
        words = [
            "--teacher.server",
            json.dumps({"kind": "openai", "url": f"{teacher.url}/v1", "model": "tiny"}),
            "--score.source",
            "process",
        ]
        words += ["--teacher.model", str(tiny_model_dir), "--student.model", str(tiny_model_dir), "--prompts.max_prompts", "12"]
        told, run = run_made(SERVICE, tmp_path / "run", *words), tmp_path / "run"
    references = [row["reference"] for row in read_rows(run / "prompts", "heldout")]
    # Calls that no tool takes are wrong, though the conversation has them.
    no_good = ('"refund"', '"track_parcel"', '"customer"')
    right = sum(not any(part in reference for part in no_good) for reference in references) / 12
    measured = scores(run)
    assert measured["teacher", "accuracy"]["value"] == right and 0 < right < 1 and f"{100 * right:.1f} %" in told
    assert measured["teacher", "accuracy/shop"]["value"] == right
    spoken = sum(not reference.startswith("[") for reference in references) / 12
    assert measured["base", "accuracy"]["value"] <= spoken < 1  # it calls nothing
    assert read_manifest(run / "student").rows_kept == read_manifest(run / "curated").rows_kept


@pytest.mark.slow
@pytest.mark.parametrize("trade", [*TRADES, SERVICE])
def test_a_recipe_holds_offline_with_the_real_tokenizers(trade: str, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the made rows, in the real models' templates and tokens."""
    real, tokenizer = load_recipe(recipe_of(trade)), shared / "data" / "tokenizers" / TOKENIZERS.get(trade, "qwen3")
    words = made_words(trade)
    for role, spec in (("teacher", real.teacher), ("student", real.student)):
        assert spec is not None
        words += [f"--{role}.model", spec.model, f"--{role}.tokenizer", str(tokenizer)]
        words += [f"--{role}.chat_template", "null", f"--{role}.chat_template_kwargs", json.dumps(spec.chat_template_kwargs)]
    holds, text = check.run(load_recipe(recipe_of(trade), words)), capsys.readouterr().out
    assert holds and "nothing speaks against" in text and "<|im_end|>««" in text, text
