"""How alike models are to a teacher: the numbers against their definitions, and what a recipe without references measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated import recipe_for

from distill.before.findings import Findings
from distill.before.likeness import check_likeness
from distill.errors import DataError
from distill.measure import intervals
from distill.measure.calibration import calibration, calibration_scores
from distill.measure.likeness import lengths, likeness_scores
from distill.measure.texts import chrf
from distill.stages import evaluate

NO_REFERENCE = {"source": "x.jsonl", "columns": {"prompt": "question", "reference": None}}
MEASURED = {"base": (40.0, 20.0), "student": (10.0, 5.0)}


def read(role: str, prompt: str, tokens: int, kl: float, **more: Any) -> dict[str, Any]:
    plain = {"num_bytes": 4 * tokens, "log_prob": -kl, "predicted": 0, "compared": tokens, "agreed": tokens // 2, "held": float(tokens)}
    return {"model_role": role, "prompt_id": prompt, "reason": None, "num_tokens": tokens, "kl_nats": kl, "chrf": 50.0} | plain | more


def scored(rows: list[dict[str, Any]], *, exact: bool = False) -> dict[tuple[str, str], dict[str, Any]]:
    found = likeness_scores(rows, ["base", "student"], 0.95, 0, exact=exact)
    return {(row["model_role"], row["metric"]): row for row in found}


def test_long_answers_count_by_their_tokens() -> None:
    rows = [read(role, prompt, *what) for role, kls in MEASURED.items() for prompt, what in (("a", (10, kls[0])), ("b", (90, kls[1])))]
    found = scored(rows)
    assert found["base", "kl_nats_lower_bound"]["value"] == pytest.approx(0.6)
    assert found["student", "kl_nats_lower_bound"]["value"] == pytest.approx(0.15)
    assert found["base", "perplexity"]["value"] == pytest.approx(np.exp(0.6)) and found["base", "top1_agreement"]["value"] == 0.5
    assert found["gap", "divergence_recovered"]["value"] == pytest.approx(0.75) and found["base", "chrf"]["value"] == 50.0
    low, high = (found["base", "kl_nats_lower_bound"][name] for name in ("low", "high"))
    assert low == pytest.approx(20 / 90) and high == pytest.approx(4.0)  # all resamples of two prompts that are one twice
    assert ("base", "kl_nats") in scored(rows, exact=True)


def test_lengths_need_no_right_answer() -> None:
    answers = [{"model_role": "base", "prompt_id": str(n), "num_tokens": n or None, "truncated": n == 2} for n in range(4)]
    assert {row["metric"]: row["value"] for row in lengths(answers, ["base"])} == {"mean_tokens": 2.0, "truncation_rate": 0.25}


def test_nothing_is_recovered_of_a_base_that_rounding_alone_keeps_from_its_teacher() -> None:
    rows = [read(role, str(prompt), 100, 0.01) for role in MEASURED for prompt in range(5)]
    assert scored(rows)["gap", "divergence_recovered"]["value"] is None


def test_without_the_teachers_thoughts_the_written_tokens_are_compared() -> None:
    silent = {"compared": 0, "kl_nats": None, "agreed": None, "held": None, "predicted": 30}
    found = scored([read(role, str(prompt), 40, 1.0, **silent) for role in MEASURED for prompt in range(3)])
    assert found["student", "top1_of_written"]["value"] == 0.75
    assert not {metric for _, metric in found} & {"kl_nats", "kl_nats_lower_bound", "top1_agreement", "divergence_recovered"}


def test_answers_that_were_not_read_or_given_count_nowhere() -> None:
    rows = [read(role, str(prompt), 10, 1.0) for role in MEASURED for prompt in range(3)]
    rows += [{"model_role": role, "prompt_id": "x", "reason": "does_not_fit", "chrf": None} for role in MEASURED]
    found = scored(rows)
    assert found["base", "kl_nats_lower_bound"]["num_prompts"] == found["base", "chrf"]["num_prompts"] == 3


def test_chrf_is_that_of_its_definition() -> None:
    """F2 over character n-grams without spaces, averaged over the orders that both texts have."""
    text, reference = "abcd", "abce"
    parts = []
    for order in range(1, 5):
        ours, theirs = ({each[start : start + order] for start in range(5 - order)} for each in (text, reference))
        share = len(ours & theirs) / (5 - order)
        parts.append((share, share))
    precision, recall = (sum(part[place] for part in parts) / len(parts) for place in (0, 1))
    assert chrf(text, reference) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    assert chrf("", "") == chrf("x y", "x y") == 100 and chrf("", "x") == 0


def test_calibration_is_that_of_its_definition() -> None:
    """Ten bins of two answers: each is sure by 0.05, 0.15, ... and half of each are right."""
    sure = np.repeat(np.arange(10) / 10 + 0.05, 2)
    right = np.tile([0.0, 1.0], 10)
    found = calibration(sure, right, [str(place) for place in range(20)], 0.95, 0)
    assert found.error.value == pytest.approx(np.abs(np.arange(10) / 10 + 0.05 - 0.5).mean())
    assert [one.answers for one in found.bins] == [2] * 10 and found.bins[0].sure == pytest.approx(0.05) and found.bins[0].right == 0.5


def test_answers_that_are_equally_sure_share_a_bin() -> None:
    """Else chance alone would put right ones here and wrong ones there."""
    found = calibration(np.full(100, 0.5), np.arange(100) % 2 * 1.0, list(map(str, range(100))), 0.95, 0)
    assert len(found.bins) == 1 and found.error.value == 0.0


@pytest.mark.parametrize(("lead", "holds_zero"), [(0.0, 18), (0.3, 0)])
def test_the_interval_holds_its_own_error_and_zero_where_there_is_none(
    lead: float, holds_zero: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 sets of 100 answers, of a model that is right as often as it is sure, and of one that is too sure by 0.3."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    rng, zero = np.random.default_rng(0), 0
    for _ in range(20):
        sure = rng.uniform(0.3, 1, 100)
        value, low, high = calibration(sure, (rng.random(100) < sure - lead) * 1.0, list(map(str, range(100))), 0.95, 0).error
        assert value is not None and low is not None and high is not None and low <= value <= high
        zero += low == 0
    assert zero >= holds_zero and (not lead or zero == 0)


@pytest.mark.parametrize(("of_label", "sure"), [(True, 0.25), (False, 0.5)])
def test_unjudged_answers_are_left_out_and_labels_count_whole(of_label: bool, sure: float) -> None:
    read = [
        {"model_role": "base", "prompt_id": str(place), "sample_index": 0, "num_tokens": 2, "log_prob": np.log(0.25)} for place in range(3)
    ]
    answers = [{**row, "correct": correct} for row, correct in zip(read, (True, False, None), strict=True)]
    [score], bins = calibration_scores(read, answers, ["base"], of_label=of_label, confidence=0.95, seed=0)
    assert bins["base"][0].sure == pytest.approx(sure) and bins["base"][0].answers == 2
    assert score["value"] == pytest.approx(abs(0.5 - sure)) and score["num_prompts"] == 2


def test_a_recipe_without_references_measures_likeness(tmp_path: Path) -> None:
    assert recipe_for(tmp_path, prompts=NO_REFERENCE).likeness is not None
    assert recipe_for(tmp_path).likeness is None
    assert recipe_for(tmp_path, evaluate={"likeness": {"top_k": 8}}).likeness is not None
    judged = recipe_for(tmp_path, prompts=NO_REFERENCE, evaluate={"checks": [{"text": {"reference": "ignore", "pattern": "^ok"}}]})
    assert judged.judges_answers and judged.likeness is None


@pytest.mark.parametrize("asked", ["preferences", "sets"])
def test_without_references_a_judge_or_a_further_set_is_enough(tmp_path: Path, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.jsonl").write_text('{"q": "1 + 1?", "r": "2"}\n')
    sections: dict[str, Any] = {
        "preferences": {"model": {"model": "judge"}},
        "sets": {"more": {"source": str(tmp_path / "more.jsonl"), "columns": {"prompt": "q", "reference": "r"}}},
    }
    recipe = recipe_for(tmp_path, prompts=NO_REFERENCE, evaluate={"models": ["base", "student"], asked: sections[asked]})
    assert not recipe.judges_answers and recipe.likeness is None
    assert evaluate.plan(recipe).settings["evaluate"]
    found = Findings()
    check_likeness(recipe, found)
    assert not found.failed and "can be judged right or wrong" in capsys.readouterr().out


def test_a_judge_that_is_to_see_a_reference_where_there_is_none_measures_nothing(tmp_path: Path) -> None:
    preferences = {"model": {"model": "judge"}, "rubric": "Which is nearer to {reference}?"}
    recipe = recipe_for(tmp_path, prompts=NO_REFERENCE, evaluate={"models": ["base", "student"], "preferences": preferences})
    with pytest.raises(DataError, match="no answer could be judged"):
        evaluate.plan(recipe)


def test_without_teacher_and_reference_there_is_nothing_to_measure(tmp_path: Path) -> None:
    alone = recipe_for(tmp_path, prompts=NO_REFERENCE, evaluate={"models": ["base", "student"]})
    with pytest.raises(DataError, match=r"name teacher in evaluate\.models"):
        evaluate.plan(alone)
    for section, message in (
        ({"models": ["base"], "likeness": {}}, r"evaluate\.likeness .* name teacher in evaluate\.models"),
        ({"calibration": True}, r"evaluate\.calibration .* prompts\.columns\.reference"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_for(tmp_path, prompts=NO_REFERENCE, evaluate=section)
