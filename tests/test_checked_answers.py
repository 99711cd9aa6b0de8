"""Evaluate with checks of its own, or curate's: what is right is said in one place, and other checks judge the same answers anew."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import commands
import pytest

from distill.errors import DataError
from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.stages import evaluate

pytestmark = pytest.mark.slow

RECIPE = """
name: test
run_dir: RUN
teacher: {model: embedded:teacher}
student: {model: embedded:student}
prompts: {source: embedded:arithmetic, max_prompts: 20, heldout_size: 12}
generate: {max_new_tokens: 8}
curate: {checks: [finish, math]}
evaluate: {models: [base], max_new_tokens: 96, batch_size: 16}
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and its run in which the base has answered."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "r.yaml").write_text(RECIPE.replace("RUN", str(folder / "run")))
    ok("prompts", folder / "r.yaml")
    ok("evaluate", folder / "r.yaml")
    return folder


def ok(*words: str | Path) -> str:
    result = commands.run(["-m", "distill", *words])
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def judged(folder: Path) -> dict[tuple[str, int], tuple[bool | None, str]]:
    return {
        (row["prompt_id"], row["sample_index"]): (row["correct"], row["reason"]) for row in read_rows(folder / "run" / "eval", "answers")
    }


def traces(folder: Path) -> list[Any]:
    return [(row["prompt_id"], row["completion"]) for row in read_rows(folder / "run" / "eval", "traces")]


def test_other_checks_judge_the_answers_that_are_there(answered: Path) -> None:
    by_math, written = judged(answered), traces(answered)
    assert {reason for _, reason in by_math.values()} <= {"right", "wrong_answer", "no_answer"} and len(by_math) == 12
    assert "checks" not in read_manifest(answered / "run" / "eval").settings["evaluate"]  # as an earlier kit had it
    said = ok("evaluate", answered / "r.yaml", "--evaluate.checks", "[number]")
    assert "12 traces were written before" in said
    by_number = judged(answered)
    assert {key: passed for key, (passed, _) in by_number.items()} == {key: passed for key, (passed, _) in by_math.items()}
    assert traces(answered) == written
    function = answered / "mine.py"
    function.write_text("def check(answer, reference, row):\n    return None if int(reference) % 2 else 'prompt' in row\n")
    ok("evaluate", answered / "r.yaml", "--evaluate.checks", f"[number, {{python: {{file: {function}}}}}]")
    odd = {row["prompt_id"]: int(row["reference"]) % 2 == 1 for row in read_rows(answered / "run" / "eval", "traces")}
    assert set(odd.values()) == {True, False}
    for key, (passed, reason) in judged(answered).items():
        right, why = by_number[key]
        unjudged = (None, "python:unjudged") if odd[key[0]] else (True, "right")
        assert (passed, reason) == (unjudged if right else (False, f"number:{why}"))
    assert traces(answered) == written and len(read_manifest(answered / "run" / "eval").settings["python_sha256"]) == 64
    ok("evaluate", answered / "r.yaml")  # and back
    assert judged(answered) == by_math


def test_what_curate_says_of_answers_holds_where_evaluate_says_nothing(answered: Path) -> None:
    ok("evaluate", answered / "r.yaml", "--curate.checks", "[finish, number, degenerate]")
    assert read_manifest(answered / "run" / "eval").settings["evaluate"]["checks"] == ["number"]


def test_without_references_only_what_needs_none_is_judged(answered: Path, tmp_path: Path) -> None:
    plain = ["--run_dir", str(tmp_path / "run"), "--prompts.columns", "{prompt: question}"]
    without = load_recipe(answered / "r.yaml", plain)
    with pytest.raises(DataError, match=r"prompts\.columns\.reference is null"):
        evaluate.plan(without)
    words = [answered / "r.yaml", *plain, "--evaluate.checks", "[{length: {max_tokens: 96}}, {language: {language: en}}]"]
    ok("prompts", *words, "--curate.checks", "[finish]")
    result = commands.run(["-m", "distill", "evaluate", *words, "--curate.checks", "[finish]"])
    assert result.returncode == 1 and "language:" in result.stderr  # sums are no language: nothing could be judged
    words[-1] = "[{length: {max_tokens: 40}}]"
    ok("evaluate", *words, "--redo", "--curate.checks", "[finish]")
    found = Counter(row["reason"] for row in read_rows(tmp_path / "run" / "eval", "answers"))
    assert found.total() == 12 and set(found) <= {"within_bounds", "too_long"}
