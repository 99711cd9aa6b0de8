"""Properties of right answers, over references of every kind that are drawn, not listed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distill.checks.answers import compare
from tests.answer_kinds import KINDS, changes, references, says_the_same


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_in_a_box_is_right_and_changed_in_one_place_it_is_wrong(kind: str) -> None:
    compare_all(kind, count=5, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_of_many_references(kind: str) -> None:
    compare_all(kind, count=60, seed=1)


def compare_all(kind: str, count: int, seed: int) -> None:
    tried, kept = 0, []
    for reference in references(kind, count, seed):
        for answer in (f"\\boxed{{{reference}}}", f"So it must be \\boxed{{ {reference} }}.", f"The answer is {reference}."):
            assert compare(answer, reference) == (True, "right"), (answer, reference)
        for change in changes(reference, seed):
            verdicts = [compare(f"\\boxed{{{change}}}", reference)[0], compare(f"\\boxed{{{reference}}}", change)[0]]
            assert verdicts[0] == verdicts[1], (reference, change)  # symmetric
            tried += 1
            if verdicts[0] is not False and not says_the_same(reference, change):
                kept.append((reference, change))
    assert tried and len(kept) <= tried // 1000, kept


@pytest.mark.parametrize(
    ("reference", "changed"),
    [("0", "-0"), ("0/5", "0/7"), ("3_5", "3_6"), ("x^{0}y", "x^{-0}y"), ("\\binom{6}{2}", "\\binom{6}{4}"), ("5!", "120"), ("x-x", "y-y")],
)
def test_what_mathematics_truly_equates_stays_equal(reference: str, changed: str) -> None:
    assert compare(f"\\boxed{{{changed}}}", reference)[0] is compare(f"\\boxed{{{reference}}}", changed)[0] is True


@pytest.mark.parametrize(("reference", "answer"), [("12.5%", "12.5"), ("12.5%", "0.125"), ("12.5", "12.5%"), ("0.125", "12.5%")])
def test_percent_is_a_unit_and_a_hundredth(reference: str, answer: str) -> None:
    assert compare(f"\\boxed{{{answer}}}", reference)[0] is True
    assert compare("\\boxed{12.5}", "0.125")[0] is compare("\\boxed{0.125}", "12.5")[0] is False


def test_numbers_and_words_are_compared_without_sympy() -> None:
    heavy = {"sympy", "latex2sympy2_extended", "pint"}
    pairs = [("\\boxed{1,234.5}", "1234.6"), ("\\boxed{7/3}", "2 1/3"), ("The answer is Paris.", "London"), ("\\boxed{3, 2}", "2, 4")]
    program = f"""
import sys
from distill.checks.answers import compare
print([compare(answer, reference)[0] for answer, reference in {pairs!r}], sorted({heavy!r} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split("] [") == ["[False, True, False, False", "]\n"]


SAID = [
    "The answer is {}.",
    "**{}**",
    "{}",
    "So we get {}.",
    "x = 3 first.\n\nThus it is {}.",
    "\u7b54\u6848\u662f\uff1a{}",
    "Therefore, \\[ {} \\]",
]


@pytest.mark.parametrize("said", SAID)
def test_nor_is_a_changed_reference_right_in_a_sentence(said: str) -> None:
    pairs = [(change, reference) for kind in KINDS for reference in references(kind, 2, seed=2) for change in changes(reference, seed=2)]
    kept = [(change, reference) for change, reference in pairs if compare(said.format(change), reference)[0] is not False]
    assert len(kept) <= len(pairs) // 1000, kept
