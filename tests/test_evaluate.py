"""What evaluate refuses, and when: before a model answers anything that nobody could judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import facts, recipe_for, trace

from distill.errors import DataError
from distill.measure.marks import in_doubt
from distill.measure.scores import Measured
from distill.recipe.experiment import Recipe
from distill.run.folder import StageFolder
from distill.run.schema import PROMPT
from distill.stages import evaluate


def recipe_of(run_dir: Path, **changes: Any) -> Recipe:
    """Models that are nowhere: whoever loads one fails with another error."""
    return recipe_for(run_dir, evaluate={"models": ["base"]}, student={"model": "nobody/nothing"}, **changes)


def write_prompts(run_dir: Path, references: list[str | None]) -> None:
    rows = [trace(index, f"What is {index} + 0?", "") for index in range(len(references))]
    kept = [
        {"prompt_id": r["prompt_id"], "messages": r["messages"], "reference": reference}
        for r, reference in zip(rows, references, strict=True)
    ]
    with StageFolder(run_dir / "prompts", "prompts", {}) as out:
        out.write_table("train", kept, PROMPT)
        out.write_table("heldout", kept, PROMPT)
        out.finish(rows_in=len(rows), rows_kept=len(rows), facts=facts())


def test_a_recipe_that_names_no_reference_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    columns = {"prompt": "question", "reference": None}
    with pytest.raises(DataError, match=r"^evaluate: prompts\.columns\.reference is null.*evaluate: null"):
        evaluate.plan(recipe_of(tmp_path, prompts={"source": "x.jsonl", "columns": columns}))


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([None, None, None], r"not one of 3 held-out prompts has a reference.*evaluate: null"),
        ([], r"holds no held-out prompt.*heldout_size"),
    ],
)
def test_prompts_that_measure_nothing_are_refused_before_a_model_is_loaded(
    tmp_path: Path, references: list[str | None], message: str
) -> None:
    write_prompts(tmp_path, references)
    with pytest.raises(DataError, match=message):
        evaluate.run(recipe_of(tmp_path))


def test_answers_of_which_none_can_be_judged_say_why() -> None:
    answers = [
        {"model_role": "base", "prompt_id": str(index), "correct": None, "reason": "checker_timed_out" if index else "no_reference"}
        for index in range(4)
    ]
    with pytest.raises(DataError, match=r"\(3 checker_timed_out, 1 no_reference\).*check_timeout_s"):
        evaluate._scores(answers, Measured("heldout", ["base"], 1, 0.95, 0))


def marked(role: str, marks: list[bool | None]) -> list[dict[str, object]]:
    """An answer of a model to each prompt."""
    return [
        {
            "model_role": role,
            "prompt_id": str(place),
            "sample_index": 0,
            "correct": mark,
            "reason": "x",
            "truncated": False,
            "num_tokens": 5,
            "tags": [],
            "in_form": None,
        }
        for place, mark in enumerate(marks)
    ]


def scored(answers: list[dict[str, object]], models: list[str]) -> dict[tuple[str, str], float]:
    rows = evaluate._scores(answers, Measured("heldout", models, 1, 0.95, 0))
    return {(row["model_role"], row["metric"]): row["value"] for row in rows}


def test_a_model_that_is_unjudged_where_it_is_wrong_gains_nothing() -> None:
    """Two of five right, the others null: the accuracy is two fifths, not one, also with a prompt of which nobody's answer was judged."""
    found = scored(
        marked("base", [True, True, None, None, None]) + marked("student", [True, False, False, True, None]), ["base", "student"]
    )
    assert found["base", "accuracy"] == found["student", "accuracy"] == 0.4 and found["student", "accuracy_if_unjudged_right"] == 0.6
    assert found["base", "accuracy_if_unjudged_right"] == 1.0 and found["base", "unjudged_rate"] == 0.6


@pytest.mark.parametrize(
    ("bounds", "pairs"),
    [
        ({"base": (0.5, 0.5), "student": (0.6, 0.6)}, []),
        ({"base": (0.5, 0.55), "student": (0.6, 0.9)}, []),
        ({"base": (0.5, 0.65), "student": (0.6, 0.6)}, [("base", "student")]),
        ({"base": (0.5, 0.6), "student": (0.4, 0.4), "teacher": (0.6, 0.7)}, [("base", "teacher")]),
        ({"base": (0.5, 0.5), "student": (0.5, 0.5)}, []),
        ({"base": (0.5, 0.5), "student": (0.5, 0.7)}, [("student", "base")]),
    ],
)
def test_when_unjudged_answers_could_change_the_order(bounds: dict[str, tuple[float, float]], pairs: list[tuple[str, str]]) -> None:
    assert in_doubt(bounds) == pairs
