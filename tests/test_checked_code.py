"""Traces of programs, checked by running them, as a user does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_checked_runs import Rows, claims, curated, ok, recipe_file, verdicts

from distill.checks.sandbox import place_for
from distill.recipe.code import CodeSettings
from distill.recipe.reading import load_recipe
from distill.run.manifest import JOURNAL
from distill.stages import curate, import_traces, prompts, run_dir

FIELDS: dict[str, Any] = {"prompts": {"fields": ["tests"], "columns": {"prompt": "q"}}}
NOWHERE: dict[str, Any] = {"python": "/nowhere/python"}


@pytest.fixture
def sandbox() -> None:
    place = place_for(CodeSettings())
    if isinstance(place, str):
        pytest.skip(f"no sandbox here: {place}")


def row(question: str, code: str, tests: Any) -> dict[str, Any]:
    return {"q": question, "tests": tests, "trace": f"<think>\nI write it down.\n</think>\n\n```python\n{code}\n```"}


ROWS: Rows = [
    row("Double it.", "def double(x):\n    return 2 * x", "assert double(2) == 4"),
    row("Square it.", "def square(x):\n    return 2 * x", "assert square(3) == 9"),
    row("Halve it.", "def halve(x):\n    while True:\n        pass", ["assert halve(4) == 2"]),
    row("Print twice the input.", "print(2 * int(input()))", [{"input": "4", "output": "8"}, {"input": "-1", "output": "-2"}]),
    row("Print it.", "print(1)", [{"input": "4", "output": "4"}]),
    row("Print nothing.", "pass", None),
]
CHECKS = ["finish", {"code": {"timeout_s": 3.0}}]


@pytest.mark.usefixtures("sandbox")
def test_programs_through_the_commands(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, ROWS, CHECKS, **FIELDS)
    for command in ("prompts", "generate"):
        ok(command, recipe)
    assert "2 traces kept · 4 dropped (1 code:no_tests, 1 code:timed_out, 1 code:wrong_output, 1 code:wrong_result)" in ok("curate", recipe)
    assert {found for found in verdicts(tmp_path) if found[0] == "code"} == {
        ("code", True, "tests_passed"),
        ("code", False, "wrong_result"),
        ("code", False, "timed_out"),
        ("code", False, "wrong_output"),
        ("code", None, "no_tests"),
    }


@pytest.mark.usefixtures("sandbox")
def test_code_stands_beside_checks_of_other_processes_and_is_not_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [*CHECKS, {"text": {"pattern": "def|print", "reference": "ignore"}}]
    recipe = load_recipe(recipe_file(tmp_path, ROWS, checks, **FIELDS))
    prompts.run(recipe)
    import_traces.run(recipe)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("distill.stages.curate._write", lambda *_: 1 // 0)
        curate.run(recipe)
    assert (run_dir(recipe) / "curated" / JOURNAL).read_text().count('"code"') == len(ROWS)
    monkeypatch.setattr("distill.checks.code.judge_code", lambda *_: 1 // 0)
    assert curate.run(recipe).rows_kept == 2


def test_where_there_is_no_sandbox_nothing_is_run(tmp_path: Path) -> None:
    """Neither by a stage, which would call every trace unjudged, nor after `check`, which says it before."""
    said = claims(tmp_path, ROWS, ["finish", {"code": NOWHERE}], **FIELDS)
    assert "FAIL  checks: checks: code: no sandbox can be had on this machine" in said and "unprotected: true" in said
    with pytest.raises(ValueError, match="code: no sandbox can be had on this machine"):
        curated(tmp_path, ROWS, ["finish", {"code": NOWHERE}], **FIELDS)


@pytest.mark.usefixtures("sandbox")
def test_check_runs_a_program_and_reads_the_tests(tmp_path: Path) -> None:
    said = claims(tmp_path, ROWS, CHECKS, **FIELDS)
    assert "ok    checks  code" in said
    assert "code can't judge 1 of 6 prompts looked at (the first: tests_unreadable" in said
    said = claims(tmp_path, [entry | {"tests": 5 if number else entry["tests"]} for number, entry in enumerate(ROWS)], CHECKS, **FIELDS)
    assert "FAIL  references: code can't judge 5 of 6 prompts" in said


def test_the_column_of_the_tests_is_carried_along(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts\.fields: the check code looks at the column 'tests'"):
        load_recipe(recipe_file(tmp_path, ROWS, CHECKS, prompts={"columns": {"prompt": "q"}}))
