"""What lm-eval's files say as rows: differences, what was forgotten, groups. From files written by hand; lm-eval is not needed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill.benchmarks.scores import DIFFERENCE, FORGOT, FROM_ERRORS, NO_LOSS, PAIRED, UNKNOWN, differences, forgetting, rows_of
from distill.recipe.benchmarks import Benchmarks

DATE = "2026-01-02T03-04-05.678901"
Values = dict[str, list[float]]


def write(
    place: Path, values: Values, *, group: str = "", stderr: float | str = 0.1, better: bool | None = True, shown: float | None = None
) -> Path:
    """lm-eval's files of some tasks, by the values of their documents; with `group` they are one group with a number of its own."""
    place.mkdir(parents=True, exist_ok=True)
    means = {task: shown if shown is not None else sum(of) / len(of) for task, of in values.items()}
    names = dict(values)
    if group:
        everything = [value for of in values.values() for value in of]
        means[group], names[group] = sum(everything) / len(everything), everything
    found: dict[str, Any] = {
        "results": {
            task: {"alias": task, "sample_len": len(names[task]), "acc,none": mean, "acc_stderr,none": stderr}
            for task, mean in means.items()
        },
        "group_subtasks": {group: list(values)} if group else {},
        "configs": {task: {"output_type": "multiple_choice"} for task in values},
        "versions": dict.fromkeys(means, 1.0),
        "n-shot": dict.fromkeys(means, 0),
        "higher_is_better": {task: {"acc": better} for task in means},
        "n-samples": {task: {"original": len(names[task]), "effective": len(names[task])} for task in values},
    }
    (place / f"results_{DATE}.json").write_text(json.dumps(found))
    for task, of in values.items():
        rows = [{"doc_id": number, "filter": "none", "metrics": ["acc"], "acc": value} for number, value in enumerate(of)]
        (place / f"samples_{task}_{DATE}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def compared(base: Path, student: Path, asked: str) -> list[dict[str, Any]]:
    found = [dict(rows_of(role, asked, place, "0.4.13")) for role, place in (("base", base), ("student", student))]
    return [each.row for of in found for each in of.values()] + list(differences(*found, 0, 0.95))


@pytest.mark.parametrize(("lost", "finding"), [(0, NO_LOSS), (1, NO_LOSS), (40, FORGOT)])
def test_what_is_worse_beyond_the_noise_is_forgotten(tmp_path: Path, lost: int, finding: str) -> None:
    base = [1.0] * 80 + [0.0] * 20
    student = [0.0] * lost + base[lost:]
    rows = compared(write(tmp_path / "b", {"t": base}), write(tmp_path / "s", {"t": student}), "t")
    difference = rows[-1]
    assert difference["model_role"] == DIFFERENCE and difference["value"] == pytest.approx(-lost / 100)
    assert difference["interval_by"] == PAIRED and difference["low"] <= difference["value"] <= difference["high"]
    if lost:
        assert difference["low"] < difference["high"]
    assert [each["finding"] for each in forgetting(rows, ["t"])] == [finding]


def test_questions_that_are_hard_for_both_cancel_in_the_difference(tmp_path: Path) -> None:
    """The pairing narrows the interval: as wide as the standard errors allow, it would hold 0."""
    draw = random.Random(0)
    base = [float(draw.random() < 0.5) for _ in range(200)]
    student = [0.0 if number < 30 else value for number, value in enumerate(base)]
    paired = compared(write(tmp_path / "b", {"t": base}, stderr=0.035), write(tmp_path / "s", {"t": student}, stderr=0.035), "t")[-1]
    assert paired["high"] < 0
    other = [  # a metric that is no mean of its documents': lm-eval's standard errors are all there is
        write(tmp_path / name, {"t": of}, stderr=0.035, shown=sum(of) / 400) for name, of in (("b2", base), ("s2", student))
    ]
    unpaired = compared(*other, "t")[-1]
    assert unpaired["interval_by"] == FROM_ERRORS and unpaired["high"] - unpaired["low"] == pytest.approx(
        2 * 1.96 * 0.035 * 2**0.5, rel=1e-3
    )


def test_without_standard_errors_or_a_direction_nothing_is_claimed(tmp_path: Path) -> None:
    places = [write(tmp_path / name, {"t": [1.0, 0.0]}, stderr="N/A", shown=0.3) for name in "bs"]
    rows = compared(*places, "t")
    assert rows[-1]["low"] is None and rows[-1]["interval_by"] is None
    assert forgetting(rows, ["t"])[0]["finding"] == UNKNOWN
    places = [write(tmp_path / name, {"t": of}, better=None) for name, of in (("b3", [1.0] * 50), ("s3", [0.0] * 50))]
    assert forgetting(compared(*places, "t"), ["t"])[0]["finding"] == UNKNOWN


def test_where_less_is_better_more_is_forgetting(tmp_path: Path) -> None:
    places = [write(tmp_path / name, {"t": of}, better=False) for name, of in (("b", [1.0, 1.1] * 20), ("s", [2.0, 2.1] * 20))]
    assert forgetting(compared(*places, "t"), ["t"])[0]["finding"] == FORGOT


def test_a_group_is_compared_over_the_documents_of_all_its_tasks(tmp_path: Path) -> None:
    base, student = {"a": [1.0] * 30, "b": [1.0, 0.0] * 5}, {"a": [0.0] * 15 + [1.0] * 15, "b": [1.0, 0.0] * 5}
    rows = compared(write(tmp_path / "b", base, group="all"), write(tmp_path / "s", student, group="all"), "all")
    difference = next(row for row in rows if row["task"] == "all" and row["model_role"] == DIFFERENCE)
    assert difference["value"] == pytest.approx(-15 / 40) and difference["interval_by"] == PAIRED
    assert [(each["task"], each["finding"]) for each in forgetting(rows, ["all"])] == [("all", FORGOT)]  # of its parts nothing is said


def second(*checks: Any) -> dict[str, Any]:
    return {"tasks": ["a"], "models": ["base"], "second_checks": list(checks)}


@pytest.mark.parametrize(
    ("benchmarks", "words"),
    [
        ({}, "names no task"),
        ({"tasks": ["a"], "models": []}, "at least one"),
        ({"forgetting": ["a"], "models": ["student"]}, "name both"),
        ({"tasks": ["a"], "models": ["base"], "think_end": "</t>"}, "would be ignored without apply_chat_template"),
        ({"tasks": ["a"], "models": ["base"], "second_reference": "a"}, "exactly one group"),
        ({"tasks": ["a"], "models": ["base"], "second_checks": []}, "names no check"),
        (second({"judge": {"rubric": "Right?", "model": {"model": "embedded:teacher"}}}), "judge can't judge here.* no model that grades"),
        (second("math", {"length": {"max_tokens": 5}}), "length can't judge here.* no tokens"),
        (second("agreement"), "agreement can't judge here.* no other samples"),
        (second("code"), "code can't judge here.* no further columns"),
        (second({"label": {"column": "choices"}}), "label can't judge here.* no further columns"),
        (second("language"), "language can't judge here.* no prompt"),
        ({"tasks": ["../a"], "models": ["base"]}, "tasks"),
    ],
)
def test_what_can_not_come_right_is_refused_with_the_recipe(benchmarks: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Benchmarks.model_validate(benchmarks)
