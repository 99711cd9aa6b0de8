"""What several answers to a prompt come to, against the definitions: every draw and every vote written out, where there are few enough."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from distill.checks import Given
from distill.checks.finals import final_of, in_form
from distill.measure.intervals import RESAMPLES, mean_interval, resampled_means
from distill.measure.labels import confusion, macro_f1, of_labels
from distill.measure.marks import marks_of
from distill.measure.repeated import pass_at, useful_k, vote
from distill.measure.scores import Measured, scores_of
from distill.recipe.checks import Check

MODELS = ("base", "student", "teacher")


def answer(role: str, prompt: int, sample: int, correct: bool | None, **more: Any) -> dict[str, Any]:
    same = {"set": "s", "tags": [], "reason": "x", "truncated": False, "num_tokens": 5, "final": str(correct), "in_form": True}
    return {**same, "model_role": role, "prompt_id": f"s/{prompt}", "sample_index": sample, "correct": correct, **more}


def scores(answers: list[dict[str, Any]], samples: int = 1, models: tuple[str, ...] = MODELS, **more: Any) -> dict[tuple[Any, ...], Any]:
    rows = scores_of(answers, Measured("s", models, samples, 0.95, 0, **more))
    return {(row.get("tag"), row["model_role"], row["metric"]): row for row in rows}


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_answer(samples: int) -> None:
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        drawn = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        [[found]] = pass_at(k, np.array([[right]]), samples)
        assert found == pytest.approx(np.mean([any(draw) for draw in drawn]))


def test_pass_at_k_is_unbiased() -> None:
    """Over all ways that 5 samples come out at a chance of 0.3 its mean is that of one right among 3."""
    ways = list(itertools.product([0, 1], repeat=5))
    chances = [0.3 ** sum(way) * 0.7 ** (5 - sum(way)) for way in ways]
    [found] = pass_at(3, np.array([[sum(way) for way in ways]]), 5)
    assert np.dot(found, chances) == pytest.approx(1 - 0.7**3)


def test_k_are_powers_of_two_and_all() -> None:
    assert [useful_k(samples) for samples in (1, 2, 3, 8, 10)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 10]]


def test_a_vote_is_what_a_drawn_one_of_the_commonest_is_on_average() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        given = [(None if text == "none" else text, text == "a") for text in rng.choice(["a", "b", "c", "none"], size=rng.integers(1, 8))]
        counts = Counter(text for text, _ in given if text is not None)
        commonest = [text for text, count in counts.items() if count == max(counts.values())]
        assert vote(given) == pytest.approx(np.mean([text == "a" for text in commonest]) if commonest else 0.0)


def test_scores_say_what_the_definitions_say() -> None:
    """Ten prompts of four answers: accuracy, pass@k and votes by counting."""
    rng = np.random.default_rng(1)
    marks = {role: rng.random((10, 4)) < chance for role, chance in zip(MODELS, (0.2, 0.5, 0.9), strict=True)}
    answers = [
        answer(role, prompt, sample, bool(marks[role][prompt, sample]), tags=["even" if prompt % 2 == 0 else "odd"])
        for role, prompt, sample in itertools.product(MODELS, range(10), range(4))
    ]
    found = scores(answers, 4)
    for role in MODELS:
        right = marks[role]
        assert found[None, role, "accuracy"]["value"] == pytest.approx(right.mean())
        assert found[None, role, "pass@4"]["value"] == pytest.approx(right.any(axis=1).mean())
        halves = [np.mean([any(pair) for pair in itertools.combinations(row, 2)]) for row in right]
        assert found[None, role, "pass@2"]["value"] == pytest.approx(np.mean(halves))
        wins = np.where(right.sum(axis=1) == 2, 0.5, right.sum(axis=1) > 2)
        assert found[None, role, "maj@4"]["value"] == pytest.approx(wins.mean())
        assert found["even", role, "accuracy"]["value"] == pytest.approx(right[::2].mean())
        assert found["even", role, "accuracy"]["num_prompts"] == 5
    difference = found[None, "teacher-base", "accuracy_difference"]
    assert difference["value"] == pytest.approx(marks["teacher"].mean() - marks["base"].mean()) and difference["low"] > 0


@pytest.mark.slow
def test_the_interval_holds_the_truth_where_prompts_and_samples_are_both_drawn_anew() -> None:
    """120 experiments of 40 prompts, each as hard as chance has it, and 4 samples: about 95 % of the intervals hold the mean of all."""
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(120):
        right = rng.random((40, 4)) < rng.beta(0.8, 1.2, size=(40, 1))
        found = mean_interval(right.mean(axis=1), resampled_means(right.mean(axis=1)[None], seed)[0], 0.95)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.4 <= found.high
    assert 0.90 <= covered / 120 <= 0.99


def test_an_interval_of_pass_at_k_holds_its_estimate() -> None:
    """One right answer in sixteen everywhere: pass@16 is 1, which drawing samples anew inside a prompt would put near 1 - 1/e."""
    answers = [answer("base", prompt, sample, sample == 3) for prompt, sample in itertools.product(range(20), range(16))]
    row = scores(answers, 16, ("base",))[None, "base", "pass@16"]
    assert (row["low"], row["value"], row["high"]) == (1.0, 1.0, 1.0)


def test_of_two_equal_models_none_is_better() -> None:
    """The same chance for both: nine in ten comparisons and more hold zero; and the gap to an equal teacher is not told."""
    rng = np.random.default_rng(5)
    beyond = 0
    for _ in range(20):
        answers = [answer(role, prompt, 0, bool(rng.random() < 0.5)) for role in MODELS for prompt in range(30)]
        found = scores(answers)
        row = found[None, "teacher-base", "accuracy_difference"]
        is_beyond = row["low"] > 0 or row["high"] < 0
        beyond += is_beyond
        by_chance = found[None, "teacher-base", "accuracy_difference_p"]["value"]
        assert (found[None, "gap", "gap_recovered"]["value"] is None) == (row["low"] <= 0 or by_chance > 0.05)
    assert beyond <= 3


def test_an_unjudged_answer_counts_as_wrong_everywhere() -> None:
    answers = [answer("base", 0, 0, None), answer("base", 0, 1, True), answer("base", 1, 0, False), answer("base", 1, 1, False)]
    found = scores(answers, 2, ("base",))
    assert found[None, "base", "accuracy"]["value"] == 0.25 and found[None, "base", "accuracy_if_unjudged_right"]["value"] == 0.5
    assert found[None, "base", "pass@2"]["value"] == 0.5 and found[None, "base", "unjudged_rate"]["value"] == 0.25
    assert marks_of(answers, ["base"]).unjudged_RP.tolist() == [[1, 0]]


def brute_f1(pairs: list[tuple[str, str | None]], label: str) -> float:
    hits = sum(right == given == label for right, given in pairs)
    named, wanted = sum(given == label for _, given in pairs), sum(right == label for right, _ in pairs)
    precision, recall = (hits / named if named else 0.0), hits / wanted
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def test_macro_f1_is_the_mean_of_the_labels_f1() -> None:
    rng = np.random.default_rng(3)
    labels = ["a", "b", "c", "never"]
    pairs = [(str(rng.choice(labels[:3])), given) for given in rng.choice(["a", "b", "c", "never", None], size=60).tolist()]
    answers = [answer("base", place, 0, right == given, final=given) for place, (right, given) in enumerate(pairs)]
    right = {f"s/{place}": label for place, (label, _) in enumerate(pairs)}
    each = [brute_f1(pairs, label) for label in labels[:3]]
    found = macro_f1(answers, right, labels, list(right), 0, 0.95)
    assert found.value == pytest.approx(np.mean(each)) and found.low is not None and found.high is not None
    assert found.low < found.value < found.high
    counts = confusion(answers, right, labels)
    assert [row.f1 for row in of_labels(counts, labels)] == pytest.approx(each) and counts.sum() == 60
    assert counts[0, -1] == sum(pair == ("a", None) for pair in pairs)


def test_a_label_that_is_always_answered_has_the_f1_of_guessing() -> None:
    answers = [answer("base", place, 0, place < 3, final="yes") for place in range(4)]
    right = {f"s/{place}": "yes" if place < 3 else "no" for place in range(4)}
    found = scores(answers, 1, ("base",), labels=["yes", "no"], right=right)[None, "base", "macro_f1"]
    assert found["value"] == pytest.approx((2 * 0.75 / 1.75 + 0) / 2)


@pytest.mark.parametrize(
    ("check", "text", "reason", "final", "formed"),
    [
        ("math", "So it is \\boxed{12}.", "right", "12", True),
        ("math", "<think>well</think>\n\nThe sum of 3 and 4, and some more words, would come to 7 then", "wrong_answer", None, False),
        ("math", "<think>12, or", "no_answer", None, False),
        ({"label": {"choices": ["Refund", "Other"]}}, "It is **refund**", "wrong_label", "Refund", True),
        ({"label": {"choices": ["Refund", "Other"]}}, "refund or other", "several_labels", None, False),
        ({"json": {"reference": "ignore"}}, "no JSON here", "no_json", None, False),
        ({"python": {"file": "x.py"}}, "whatever", "wrong", None, None),
    ],
)
def test_what_is_put_forward_and_whether_it_is_in_form(check: Any, text: str, reason: str, final: str | None, formed: bool | None) -> None:
    checks = [Check.model_validate(check)]
    assert in_form(Given(text, "12"), {checks[0].called: (False, reason)}, checks) is formed
    if final is not None or formed is None:
        assert final_of(Given(text, "12"), checks) == final


def test_equal_answers_vote_together() -> None:
    checks = [Check.model_validate("math")]
    assert len({final_of(Given(text, "Paris"), checks) for text in ("\\boxed{Paris}", "The answer is paris.", "**PARIS**")}) == 1


def test_there_are_as_many_resamples_as_are_said() -> None:
    assert resampled_means(np.ones((2, 3)), 0).shape == (2, RESAMPLES)


def test_a_prompt_that_nobody_could_judge_stays_unless_the_prompt_itself_is_why() -> None:
    """Half right and half timed out is half right, with bounds, not right throughout."""
    timed_out = [answer("base", prompt, 0, None, reason="math:checker_timed_out") for prompt in range(5, 10)]
    without = [answer("base", prompt, 0, None, reason="math:no_reference") for prompt in range(10, 20)]
    found = scores([*(answer("base", prompt, 0, True) for prompt in range(5)), *timed_out, *without], models=("base",))
    assert found[None, "base", "accuracy"]["value"] == 0.5 and found[None, "base", "accuracy"]["num_prompts"] == 10
    assert found[None, "base", "accuracy_if_unjudged_right"]["value"] == 1.0
    assert scores(timed_out, models=("base",)) == {}


def test_few_prompts_make_no_model_better() -> None:
    """Three of three won: every resample says 1, and chance alone says as much one time in four."""
    answers = [answer(role, prompt, 0, role != "base") for prompt in range(3) for role in MODELS]
    found = scores(answers)
    assert found[None, "student-base", "accuracy_difference"]["low"] == 1.0
    assert found[None, "student-base", "accuracy_difference_p"]["value"] == 0.25
    assert found[None, "gap", "gap_recovered"]["value"] is None
    many = scores([answer(role, prompt, 0, role != "base") for prompt in range(8) for role in MODELS])
    assert many[None, "student-base", "accuracy_difference_p"]["value"] == 2 / 2**8 and many[None, "gap", "gap_recovered"]["value"] == 1.0


def test_votes_go_to_values_not_to_spellings() -> None:
    math = [Check.model_validate("math")]
    finals = [
        final_of(Given(f"\\boxed{{{text}}}", "1/2"), math)
        for text in ("0.5", "1/2", "\\frac{1}{2}", ".5", "5", "5!", "[0,1)", "(0,1]", "[0,1]")
    ]
    assert len(set(finals[:4])) == 1 and len(set(finals)) == 6


def test_macro_f1_reads_the_label_also_beside_another_check() -> None:
    checks = [Check.model_validate(each) for each in ("math", {"label": {"choices": ["Billing", "Refund Status"]}})]
    assert final_of(Given("\\boxed{Refund Status}", "Refund Status"), checks) == "Refund Status"
