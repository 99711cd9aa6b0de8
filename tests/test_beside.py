"""Runs with other teachers, students and methods beside each other: what is compared, by figures made by hand, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fabricated import change_manifest, facts, make_run
from typer.testing import CliRunner

from distill.cli import app
from distill.cluster.compare import compare, comparison
from distill.errors import DataError
from distill.reporting.prices import rates_of
from distill.run.folder import StageFolder, delete_stage
from distill.run.schema import ANSWER, PROMPT, SCORE

CHECKS = [{"number": {"tolerance": 0.0}}]
GREEDY = {"temperature": 0.0, "top_p": 0.95, "samples_per_prompt": 1, "max_new_tokens": 64}


def answered(
    run: Path,
    right: str,
    *,
    first: int = 0,
    asked: dict[str, Any] | None = None,
    references: Sequence[str] | None = None,
    teacher: str = "Qwen/Qwen3-8B",
    method: str = "sft",
) -> Path:
    """A made run whose student gives right (`x`) and wrong (`.`) answers to prompts that are numbered from `first`."""
    make_run(run, evaluated=False)
    (run / "recipe.yaml").write_text(json.dumps({"teacher": {"model": teacher}, "train": {"method": method}}))
    ids = [f"{number:016d}" for number in range(first, first + len(right))]
    told = references or ["1"] * len(ids)
    prompts = [
        {"prompt_id": name, "messages": [{"role": "user", "content": name}], "reference": what}
        for name, what in zip(ids, told, strict=True)
    ]
    delete_stage(run / "prompts")
    with StageFolder(run / "prompts", "prompts", {}) as out:
        out.write_table("train", [], PROMPT)
        out.write_table("heldout", prompts, PROMPT)
        out.finish(rows_in=len(ids), rows_kept=len(ids), facts=facts())
    same = {"set": "heldout", "model_role": "student", "sample_index": 0, "truncated": False, "num_tokens": 10}
    rows = [{**same, "prompt_id": name, "correct": mark == "x", "reason": "math:equal"} for name, mark in zip(ids, right, strict=True)]
    scores = {"accuracy": right.count("x") / len(right), "mean_tokens": 10.0, "truncation_rate": 0.0, "unjudged_rate": 0.0}
    with StageFolder(run / "eval", "evaluate", {"evaluate": GREEDY | (asked or {})}, [run / "prompts"]) as out:
        out.write_table("answers", rows, ANSWER)
        shared = {"set": "heldout", "num_prompts": len(ids), "samples_per_prompt": 1, "model_role": "student"}
        out.write_table("scores", [{**shared, "metric": name, "value": value} for name, value in scores.items()], SCORE)
        models = {"student": {"model": "Qwen/Qwen3-0.6B", "revision": None, "parameters": 1}}
        out.finish(rows_in=len(ids), rows_kept=len(ids), facts=facts(models=models, confidence=0.95, tokens=100))
    change_manifest(
        run / "traces", lambda made: made["facts"].update(author={"model": teacher}, licence="MIT" if "R1" in teacher else "Apache-2.0")
    )
    change_manifest(run / "student", lambda made: made["settings"].update(train={"method": method}))
    return run


def test_students_are_compared_on_the_prompts_they_share(tmp_path: Path) -> None:
    good = answered(tmp_path / "old", "x" * 12)
    bad = answered(tmp_path / "new", "." * 10, first=2, teacher="deepseek-ai/DeepSeek-R1", method="kd")
    result = CliRunner().invoke(app, ["compare", str(bad), str(good), "--gpu-hour", "3.6"])
    said = result.stdout
    assert result.exit_code == 0, result.output
    assert "on these: old 100.0 %, new 0.0 % (95 % intervals, paired bootstrap over 10 held-out prompts that all share)" in said
    assert "old is better than new by 100.0 points [100.0, 100.0], p = 0.002" in said  # 2 of 2 ** 10 signs
    assert "compared on the 10 held-out prompts that all share; old has 12" in said
    best = next(line for line in said.splitlines() if line.strip().startswith("old"))
    assert "Qwen/Qwen3-8B" in best and "Apache-2.0" in best and "sft" in best and "at least $0.0655" in best and " 10 " in best
    other = next(line for line in said.splitlines() if line.strip().startswith("new"))
    assert "DeepSeek-R1" in other and "MIT" in other and "kd" in other
    assert "all: student Qwen/Qwen3-0.6B" in said


def test_the_best_of_several_needs_more_than_the_best_of_two(tmp_path: Path) -> None:
    runs = [answered(tmp_path / "a", "x" * 12), answered(tmp_path / "b", "x" * 6 + "." * 6)]  # p = 2 / 2 ** 6
    two = comparison(runs, rates_of()).as_object()["shared"]
    assert two["leads"][0]["by_chance"] == pytest.approx(2 / 64) and two["leads"][0]["is_beyond_noise"]
    assert two["leads"][0]["difference"]["value"] == 0.5 and two["accuracy"]["b"]["value"] == 0.5
    runs.append(answered(tmp_path / "c", "x" * 11 + "."))
    three = json.loads(CliRunner().invoke(app, ["compare", *map(str, runs), "--json"]).stdout)
    assert [run["run"] for run in three["runs"]] == ["a", "c", "b"]
    assert [(lead["other"], lead["is_beyond_noise"]) for lead in three["shared"]["leads"]] == [("c", False), ("b", False)]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"first": 50}, "share no held-out prompt .*prompts.source, heldout_size and seed"),
        ({"asked": {"checks": CHECKS}}, r"judged by other checks \(math and number\).*run evaluate again"),
        ({"references": ["1"] * 11 + ["2"]}, "1 of 12 held-out prompts that they share have another right answer"),
    ],
)
def test_what_can_not_be_compared_is_refused_with_the_reason(other: dict[str, Any], expected: str, tmp_path: Path) -> None:
    runs = [answered(tmp_path / "a", "x" * 12), answered(tmp_path / "b", "x" * 12, **other)]
    with pytest.raises(DataError, match=expected):
        compare(runs)


def test_other_sampling_is_said(tmp_path: Path) -> None:
    runs = [answered(tmp_path / "a", "x" * 4), answered(tmp_path / "b", "x" * 4, asked={"temperature": 0.6})]
    (note,) = comparison(runs, rates_of()).notes
    assert "a: temperature 0.0" in note and "b: temperature 0.6, top_p 0.95" in note
    same = [runs[0], answered(tmp_path / "c", "x" * 4, asked={"top_p": 0.5})]  # of the most probable token
    assert comparison(same, rates_of()).notes == []


def test_runs_of_one_name_are_told_apart_and_those_without_answers_are_shown(tmp_path: Path) -> None:
    runs = [answered(tmp_path / "one" / "run", "xx.."), answered(tmp_path / "two" / "run", "x...")]
    make_run(tmp_path / "none")
    (tmp_path / "none" / "recipe.yaml").write_text("{}")
    found = comparison([*runs, tmp_path / "none"], rates_of())
    assert [run.name for run in found.runs] == [f"{tmp_path.name}/none", "one/run", "two/run"]
    assert found.pairs is not None and found.pairs.num_prompts == 4
    assert "no answers that were judged are kept" in found.notes[0]
