"""Answers as people and models write them, in many languages: a row has a reference, what says the same, and what does not.

Of kind `sentence` are whole answers; all others are put into a box, and compared both ways.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.checks.agreement import answer_number
from distill.checks.answers import compare

ROWS: list[dict[str, Any]] = [json.loads(line) for line in Path(__file__).with_name("right_answers.jsonl").read_text("utf-8").splitlines()]
KINDS = list(dict.fromkeys(row["kind"] for row in ROWS if row["kind"] != "sentence"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_says_the_same_is_right_and_nothing_else_is(kind: str) -> None:
    wrong = []
    for row in (row for row in ROWS if row["kind"] == kind):
        for right, answers in ((True, row["same"]), (False, row["other"])):
            for one, other in ((answer, row["reference"]) for answer in answers):
                if (compare(f"\\boxed{{{one}}}", other)[0], compare(f"\\boxed{{{other}}}", one)[0]) != (right, right):
                    wrong.append((one, other, right))
    assert not wrong


@pytest.mark.parametrize("row", [row for row in ROWS if row["kind"] == "sentence"], ids=lambda row: row["reference"])
def test_the_answer_is_found_in_a_sentence_of_many_languages(row: dict[str, Any]) -> None:
    asked = {answer: True for answer in row["same"]} | {answer: False for answer in row["other"]}
    assert {answer: compare(answer, row["reference"])[0] for answer in asked} == asked


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (["\\boxed{1/2}", "The answer is 0.5.", "\\frac{1}{2}", "1:2", "x = 0.50", "**one half**"], "2"),
        (["\\boxed{1, 2}", "2 and 1", "x = 2, x = 1", "\\{1,2\\}"], "(1, 2)"),
        (["March 5, 2024", "2024-03-05", "5 de marzo de 2024"], "2024-03-06"),
        (["Paris", "The answer is **paris**.", "\\boxed{\\text{Paris}}"], "London"),
        (["(B) 7", "B", "The answer is B. 7"], "C"),
        (["x < 4", "(-\\infty, 4)"], "(-\\infty, 4]"),
    ],
)
def test_answers_that_say_the_same_are_counted_as_one(same: list[str], other: str) -> None:
    assert len({answer_number(answer) for answer in same}) == 1 and answer_number(other) != answer_number(same[0])
