"""The report of a run whose own held-out prompts have no right answers: what a judge prefers, what reading gave, a further set."""

from __future__ import annotations

from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fabricated import facts, make_run, recipe_for

from distill.recipe.results import Export
from distill.run.folder import StageFolder
from distill.run.schema import SCORE, WINS
from distill.stages import export, report

UNJUDGED = "No answer to the run's own held-out prompts was judged right or wrong"
PREFERRED = "40.0 % [30.0 %, 50.0 %]"
LIKENESS = {"answers": 100, "read_by": None, "top_k": None, "exact": False}


def score(name: str, role: str, metric: str, value: float, margin: float = 0.0) -> dict[str, Any]:
    interval = {"value": value, "low": value - margin, "high": value + margin}
    return {"set": name, "model_role": role, "metric": metric, "num_prompts": 100, "samples_per_prompt": 1, **interval}


READ = [
    score("heldout", role, metric, value + (0.2 if role == "student" else 0))
    for role in ("base", "student")
    for metric, value in (("perplexity", 3.0), ("top1_of_written", 0.7), ("chrf", 50.0), ("bits_per_byte", 1.0))
]
FURTHER = [
    *(score("extra", role, metric, 0.5) for role in ("base", "student", "teacher") for metric in ("accuracy", "mean_tokens")),
    *(score("extra", role, metric, 0.0) for role in ("base", "student", "teacher") for metric in ("truncation_rate", "unjudged_rate")),
    score("extra", "student-base", "accuracy_difference", 0.3, 0.1),
]


def reported(folder: Path, scores: list[dict[str, Any]], *, compared: bool = True, read: bool = True) -> dict[str, str]:
    """The files of the report, and the model card, of an evaluation that wrote these scores."""
    make_run(folder, evaluated=False)
    wins = {"model_role": "student", "against": "teacher", "value": 0.4, "low": 0.3, "high": 0.5, "num_prompts": 100, "tie_rate": 0.1}
    models = {role: {"model": f"m/{role}", "revision": None, "parameters": 1000} for role in ("base", "student", "teacher")}
    with StageFolder(folder / "eval", "evaluate", {}, [folder / "prompts", folder / "student"]) as out:
        out.write_table("scores", scores, SCORE)
        if compared:
            out.write_table("wins", [wins | {"unjudged_rate": 0.0}], WINS)
        out.finish(facts=facts(models=models, confidence=0.95, tokens=1, **({"likeness": LIKENESS} if read else {})))
    recipe = recipe_for(folder, student={"model": "Qwen/Qwen3-0.6B", "adapter": {"type": "full"}})
    report.run(recipe)
    parity = {"prompts": 1, "token_agreement": 1.0, "positions": 1, "mean_kl_nats": 0.0}
    made = {"author": "m", "licence": "unknown", "parity": parity, "notes": [], "least_transformers": "4.57"}
    files = {name: (folder / "report" / name).read_text() for name in ("summary.txt", "report.html", "report.md")}
    return {name: unescape(text.replace("\\", "")) for name, text in (files | {"card": export._card(recipe, Export(), made)}).items()}


@pytest.mark.parametrize("read", [True, False])
def test_what_a_judge_prefers_is_shown_where_nothing_can_be_right(tmp_path: Path, read: bool) -> None:
    for name, text in reported(tmp_path, READ if read else [], read=read).items():
        assert text.count("By a judge, in both orders") >= 1 and PREFERRED in text, name
        assert "has not been measured" not in text and (name == "summary.txt" or UNJUDGED in text), name


def test_a_further_set_takes_neither_the_wins_nor_the_head(tmp_path: Path) -> None:
    found = reported(tmp_path, [*READ, *FURTHER])
    for name, text in found.items():
        assert PREFERRED in text and (name == "summary.txt" or UNJUDGED in text), name
    head = found["report.html"].split("<main>")[0]
    assert "better than" not in head and "better than" in found["report.html"]
    assert "whether an answer to the run's own is right was not" in found["card"]


def test_the_sentence_says_what_was_measured(tmp_path: Path) -> None:
    read = reported(tmp_path / "read", [*READ, *FURTHER])["report.md"]
    assert "the student's most probable token is the written one 90.0 % of the time; before training it was 70.0 %." in read
    wins = "A judge prefers the student's answer to that of the teacher on 40.0 % of 100 held-out prompts, a tie counted as half."
    assert wins in reported(tmp_path / "won", FURTHER, read=False)["card"]
    set_alone = reported(tmp_path / "set", FURTHER, compared=False, read=False)["report.html"]
    assert "The student answers 50.0 % of 100 prompts of the set extra correctly; before training it was 50.0 %" in set_alone
