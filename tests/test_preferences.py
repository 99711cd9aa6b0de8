"""Evaluation by a judge: which answers it prefers, in both orders, and what is asked of it when more is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from grading import Judging, first_is_better, shown

from distill.measure.wins import win_rate
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.stages import evaluate, folder, prompts

ROOT = Path(__file__).resolve().parent.parent


def recipe_for(tmp_path: Path, server: Judging, **more: Any) -> Recipe:
    """The tiny pair before any training: base and teacher, and a judge of their answers."""
    sections = load_recipe(ROOT / "recipes" / "quickstart.yaml").model_dump(mode="json")
    sections["run_dir"] = str(tmp_path / "run")
    sections["prompts"] |= {"max_prompts": 20, "heldout_size": 6}
    asked = {"preferences": {"model": server.model_section()}, "checks": ["math"]}
    sections["evaluate"] = {"models": ["base", "teacher"], "max_new_tokens": 200} | asked | more
    return Recipe.model_validate(sections)


def shorter(content: str, count: int) -> str:
    """A judge that passes every answer, and of two prefers the shorter one."""
    if "<A-" not in content:
        return "pass"
    first, second = (len(shown(content, name)) for name in ("A", "B"))
    return "A" if first < second else "B" if second < first else "tie"


@pytest.mark.slow
def test_a_judge_compares_in_both_orders_and_is_asked_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Judging(verdict=shorter) as server:
        checks = ["math", {"judge": {"model": server.model_section(), "rubric": "Short?"}}]
        recipe = recipe_for(tmp_path, server, checks=checks)
        prompts.run(recipe)
        manifest = evaluate.run(recipe)
        place = folder(recipe, "evaluate")
        pairs, right = list(read_rows(place, "preferences")), [row for row in read_rows(place, "answers") if row["correct"]]
        judged = [pair for pair in pairs if pair["reason"] not in ("equal", "the_other_is_empty")]
        assert len(pairs) == 6 and len(server.questions) == len(right) + 2 * len(judged)
        assert {*manifest.facts["judges"]} == {"judge", "judge_of_pairs"} and manifest.facts["server"]["requests"] == len(server.questions)
        before = len(server.questions)
        evaluate.run(recipe_for(tmp_path, server, checks=checks, confidence=0.9))  # anew, of what has been said
        assert len(server.questions) == before
        other = {"preferences": {"model": server.model_section(), "rubric": "Which is nicer?"}}
        evaluate.run(recipe_for(tmp_path, server, checks=checks, **other))
        assert len(server.questions) == before + 2 * len(judged)
    assert read_manifest(place).tables.keys() >= {"preferences", "wins", "judged_judge", "compared"}


@pytest.mark.slow
def test_what_a_judge_said_is_kept_while_it_is_asked_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken away, something else changed, and asked for again: no question is put twice."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Judging(verdict=shorter) as server:
        checks = ["math", {"judge": {"model": server.model_section(), "rubric": "Short?"}}]
        recipe = recipe_for(tmp_path, server, checks=checks)
        prompts.run(recipe)
        evaluate.run(recipe)
        place, before = folder(recipe, "evaluate"), len(server.questions)
        said = {name: sorted(row["prompt_id"] for row in read_rows(place, name)) for name in ("judged_judge", "compared")}
        assert said["compared"] and before == sum(len(names) for names in said.values())
        for confidence in (0.95, 0.9):
            found = evaluate.run(recipe_for(tmp_path, server, preferences=None, confidence=confidence))
            assert "judges" not in found.facts and "preferences" not in found.tables and not (place / "earlier").exists()
        evaluate.run(recipe_for(tmp_path, server, checks=checks))
        assert len(server.questions) == before
    assert {name: sorted(row["prompt_id"] for row in read_rows(place, name)) for name in said} == said


@pytest.mark.slow
def test_a_judge_that_likes_what_stands_first_prefers_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Judging(verdict=first_is_better) as server:
        recipe = recipe_for(tmp_path, server)
        prompts.run(recipe)
        evaluate.run(recipe)
    asked = [row for row in read_rows(folder(recipe, "evaluate"), "preferences") if row["reason"] != "the_other_is_empty"]
    assert asked and {row["winner"] for row in asked} == {"tie"}


def pair(prompt: int, winner: str | None) -> dict[str, Any]:
    return {"model_role": "student", "against": "teacher", "prompt_id": str(prompt), "winner": winner}


def test_pairs_of_a_prompt_count_as_one_and_ties_as_half() -> None:
    pairs = [pair(0, "student"), pair(0, "teacher"), pair(1, "student"), pair(2, "tie"), pair(3, None)]
    found = win_rate(pairs, 0, 0.95)
    assert found is not None and found["value"] == pytest.approx(2 / 3) and found["num_prompts"] == 3
    assert found["tie_rate"] == 0.25 and found["unjudged_rate"] == pytest.approx(0.2)
    assert found["low"] <= found["value"] <= found["high"]
    assert win_rate([pair(0, None)], 0, 0.95) is None


def test_one_model_is_compared_with_nobody(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preferences compares the answers of two models"):
        Recipe.model_validate(
            {
                "name": "x",
                "student": {"model": "embedded:student"},
                "prompts": {"source": "p.jsonl"},
                "traces": {"source": "t.jsonl"},
                "evaluate": {"models": ["base"], "preferences": {"model": {"model": "embedded:teacher"}}},
            }
        )
