"""Public benchmarks in a report: the table, both scorers, what was forgotten in words. From a stage's files written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import HOSTILE, facts, make_run, recipe_for

from distill.benchmarks.scores import DIFFERENCE, FORGOT, forgetting
from distill.reporting.benchmarks import NOTHING, benchmarks_shown, benchmarks_text
from distill.run.folder import StageFolder
from distill.run.schema import BENCHMARK
from distill.stages import report


def row(role: str, value: float, **more: Any) -> dict[str, Any]:
    plain = {"model_role": role, "asked": "gsm8k", "task": "gsm8k", "metric": "exact_match", "filter": "strict-match", "value": value}
    plain |= {"num_documents": 1319, "num_fewshot": 5, "higher_is_better": True, "task_version": "3.0"}
    return plain | {"scorer": "lm-eval", "scorer_version": "0.4.13", "stderr": 0.012} | more


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make_run(tmp_path, evaluated=False)
    kit = {"scorer": "distill-kit: math", "scorer_version": "0.1.0", "metric": "accuracy", "filter": "whole answer", "stderr": None}
    rows = [row("base", 0.31), row("student", 0.52), row("base", 0.33, **kit), row("student", 0.55, **kit)]
    other = {"asked": "arc", "task": f"arc {HOSTILE}", "metric": "acc", "filter": "none", "task_version": "1.0"}
    rows += [row("base", 0.60, **other), row("student", 0.41, **other)]
    rows += [row(DIFFERENCE, -0.19, low=-0.22, high=-0.16, interval_by="paired bootstrap", **other)]
    rows += [row(DIFFERENCE, 0.21, low=0.18, high=0.24, interval_by="paired bootstrap")]
    settings = {"benchmarks": {"limit": 100}}
    with StageFolder(tmp_path / "benchmarks", "benchmark", settings, [tmp_path / "student"]) as out:
        out.write_table("scores", rows, BENCHMARK)
        models = {role: {"model": "Qwen/Qwen3-0.6B", "revision": None, "parameters": 1} for role in ("base", "student")}
        out.finish(rows_in=4, rows_kept=4, facts=facts(models=models, confidence=0.95, forgetting=forgetting(rows, ["arc"])))
    return tmp_path


def test_what_was_forgotten_is_said_in_words_beside_both_scorers(run_dir: Path) -> None:
    benchmarks = {"tasks": ["gsm8k"], "forgetting": ["arc"], "models": ["base", "student"], "limit": 100}
    report.run(recipe_for(run_dir, evaluate=None, benchmarks=benchmarks))
    text = (run_dir / "report" / "summary.txt").read_text()
    assert f"(acc, lm-eval): {FORGOT}, -0.190 [-0.220, -0.160]" in " ".join(text.split())
    page, markdown = (run_dir / "report" / name for name in ("report.html", "report.md"))
    for shown in (page.read_text(), markdown.read_text()):
        assert "Public benchmarks" in shown and "lm-eval 0.4.13" in shown and "distill-kit: math 0.1.0" in shown
        assert "0.310 ± 0.012" in shown and "+0.210" in shown and "first 100 questions" in shown and FORGOT in shown
        assert "<script>" not in shown and "\x1b" not in shown


def test_a_run_without_them_says_nothing(tmp_path: Path) -> None:
    assert benchmarks_shown(tmp_path) == NOTHING and benchmarks_text(NOTHING) == ""
