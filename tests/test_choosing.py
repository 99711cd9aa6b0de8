"""Which of a prompt's passing traces are kept, and which prompts are too hard or too easy: against their definitions, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from test_curate import trace

from distill.checks.preferred import distance, shingles, varied_order
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Curate
from distill.run.folder import StageFolder
from distill.run.schema import ALTERNATIVES, TOLD, TRACE
from distill.run.tables import read_rows
from distill.stages.curate import plan, run

SERVED = {"model": "t", "server": {"kind": "vllm", "url": "http://localhost:1"}}


def recipe_of(run_dir: Path, *, samples: int | None = None, logprobs: int | None = None, seed: int = 0, **curate: Any) -> Recipe:
    """Brought traces, or so many written ones."""
    sections: dict[str, Any] = {"student": {"model": "none"}, "prompts": {"source": "x.jsonl"}, "evaluate": None}
    source: dict[str, Any] = {"traces": {"source": "x.jsonl", "verdict": "v" if "math" in curate.get("checks", []) else None}}
    if samples is not None:
        source = {"teacher": SERVED, "generate": {"samples_per_prompt": samples, "logprobs": logprobs}}
    asked = {"workers": 1, "checks": ["finish"], "max_per_prompt": 2, **curate}
    return Recipe.model_validate({"name": "test", "run_dir": str(run_dir), "seed": seed, **sections, **source, "curate": asked})


def curate_rows(recipe: Recipe, rows: list[dict[str, Any]], alternatives: list[dict[str, Any]] | None = None) -> dict[str, set[int]]:
    """The samples that are kept of each prompt."""
    with StageFolder(Path(recipe.run_dir or "") / "traces", "generate", {}) as out:
        out.write_table("traces", rows, TRACE.append(TOLD) if "verdict" in rows[0] else TRACE)
        if alternatives is not None:
            out.write_table("alternatives", alternatives, ALTERNATIVES)
        out.finish()
    run(recipe)
    kept: dict[str, set[int]] = {}
    for row in read_rows(Path(recipe.run_dir or "") / "curated", "curated"):
        kept.setdefault(row["prompt_id"], set()).add(row["sample_index"])
    return kept


def graded(prompt: str, marks: str) -> list[dict[str, Any]]:
    """A trace for each of r (right), w (wrong), u (nobody knows), c (cut), by what their source says of them."""
    verdicts = {"r": True, "w": False, "u": None, "c": True}
    return [
        trace(f"text {number}", prompt, number, verdict=verdicts[mark], finish_reason="length" if mark == "c" else "stop")
        for number, mark in enumerate(marks)
    ]


PROMPTS = {"never": "wwww", "one": "rwwc", "half": "rruw", "easy": "rrrr", "single": "r", "unknown": "uu", "twins": "rrw"}


@pytest.mark.parametrize(
    ("bounds", "kept", "drops"),
    [
        ({"min_pass_rate": 0.25}, {"one", "half", "easy", "single", "twins"}, {}),
        ({"min_pass_rate": 0.3}, {"half", "easy", "single", "twins"}, {"too_hard": 1}),
        ({"max_pass_rate": 0.9}, {"one", "half", "twins"}, {"too_easy": 5}),
        ({"min_pass_rate": 0.3, "max_pass_rate": 0.7}, {"half", "twins"}, {"too_hard": 1, "too_easy": 5}),
        ({"min_pass_rate": 0.3, "max_pass_rate": 0.9, "keep_unjudged": True}, {"half", "twins", "unknown"}, {"too_hard": 1, "too_easy": 5}),
    ],
)
def test_prompts_are_bound_by_the_share_of_judged_traces_that_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bounds: dict[str, Any], kept: set[str], drops: dict[str, int]
) -> None:
    """Rates by hand: never 0, one 1/4 (what was cut counts), half and twins 2/3, easy and single 1; of unknown none. Before duplicates."""
    rows = [row for prompt, marks in PROMPTS.items() for row in graded(prompt, marks)]
    for row in rows:
        if row["prompt_id"] == "twins":
            row["completion"] = "right" if row["verdict"] else "wrong"  # two are the same text, and count as two
    recipe = recipe_of(tmp_path, checks=["finish", "math"], max_per_prompt=9, **bounds)
    assert set(curate_rows(recipe, rows)) == kept
    manifest = run(recipe)
    assert {reason: count for reason, count in manifest.drops.items() if reason.startswith("too")} == drops
    found = manifest.facts["pass_rates"]
    assert {name: found[name] for name in ("prompts", "never", "always", "one_sample")} == {
        "prompts": 6,
        "never": 1,
        "always": 2,
        "one_sample": 1,
    }
    assert found["mean"] == pytest.approx((0 + 1 / 4 + 2 / 3 + 1 + 1 + 2 / 3) / 6)
    assert "1 have one judged trace, whose rate is 0 or 1" in capsys.readouterr().out


def test_a_trace_with_a_control_token_inside_does_not_pass(tmp_path: Path) -> None:
    rows = graded("p", "rr")
    rows[1]["completion_ids"] = [7]
    with StageFolder(tmp_path / "traces", "generate", {}) as out:
        out.write_table("traces", rows, TRACE.append(TOLD))
        out.finish(facts={"control_ids": [7]})
    assert run(recipe_of(tmp_path, checks=["finish", "math"], max_pass_rate=0.5)).facts["pass_rates"]["mean"] == 0.5


def test_the_most_varied_are_the_first_and_then_always_the_one_farthest_from_those(tmp_path: Path) -> None:
    """Also of traces that stand anywhere, and whatever the order of their samples in the table."""
    texts = {
        0: "We add two and two, and the sum is four.",
        1: "we add  TWO and two, and the sum is four!",
        2: "We add two and two, and then the sum is five.",
        3: "Count on your fingers: three, four. So four.",
        4: "Multiply two by itself. That makes four as well.",
    }
    rows = [trace(texts[sample], "p", sample) for sample in (3, 1, 4, 0, 2)]
    rows.insert(2, trace("alone", "q", 0))
    kept = curate_rows(recipe_of(tmp_path, prefer="varied", max_per_prompt=3), rows)
    assert kept == {"p": {0, *_naive(texts, 3)}, "q": {0}} and kept["p"] == {0, 3, 4}


def _pieces(text: str) -> set[str]:
    plain = " ".join(text.casefold().split())
    return {plain[start : start + 8] for start in range(max(1, len(plain) - 7))}


def _far(one: str, other: str) -> float:
    return 1 - len(_pieces(one) & _pieces(other)) / len(_pieces(one) | _pieces(other))


def _naive(texts: dict[int, str], number: int) -> list[int]:
    taken = [0]
    while len(taken) < number:
        rest = [place for place in texts if place not in taken]
        taken.append(max(rest, key=lambda place: (min(_far(texts[place], texts[other]) for other in taken), -place)))
    return taken


def test_distances_are_those_of_sets_of_pieces() -> None:
    draw = np.random.default_rng(0)
    words = ["four", "two", "and", "\u0627\u062b\u0646\u0627\u0646", "\u56db", "Sum"]
    texts = [" ".join(draw.choice(words, size)) for size in (0, 1, 2, 9, 9, 30, 30)]
    for one in texts:
        for other in texts:
            assert distance(shingles(one), shingles(other)) == pytest.approx(_far(one, other))
    assert varied_order([shingles(text) for text in texts], 3)[0] == 0
    assert varied_order([shingles("same"), shingles("same")], 2) == [0, 1]


def test_a_share_of_the_prompts_keeps_the_longest_and_the_others_the_shortest(tmp_path: Path) -> None:
    rows = [trace("x" * length, f"p{prompt}", sample) for prompt in range(400) for sample, length in enumerate((5, 9, 2))]
    found = [
        curate_rows(recipe_of(tmp_path / str(seed), prefer="mixed", long_share=0.25, max_per_prompt=1, seed=seed), rows) for seed in (0, 1)
    ]
    for kept in found:
        assert len(kept) == 400 and all(samples in ({1}, {2}) for samples in kept.values())
        assert 70 <= sum(samples == {1} for samples in kept.values()) <= 130  # 100, and 3 standard deviations of 8.7
    assert found[0] != found[1]
    shuffled = curate_rows(recipe_of(tmp_path / "again", prefer="mixed", long_share=0.25, max_per_prompt=1), rows[::-1])
    assert shuffled == found[0]


def test_the_likeliest_are_those_of_the_highest_mean_log_probability(tmp_path: Path) -> None:
    told = [[-1.0], [-0.1] * 20, [-0.2], None, [-0.5, -0.1], []]  # a sum would put the second behind the first
    rows = [trace(f"text {sample}", "p", sample) for sample in range(len(told))]
    others = [{"prompt_id": "p", "sample_index": sample, "token_logprobs": values} for sample, values in enumerate(told)]
    recipe = recipe_of(tmp_path, samples=6, logprobs=1, prefer="likeliest", max_per_prompt=4)
    assert curate_rows(recipe, rows, others) == {"p": {0, 1, 2, 4}}


@pytest.mark.parametrize(
    ("samples", "curate", "says"),
    [
        (None, {"prefer": "likeliest"}, "take rank_surprisal"),
        (4, {"prefer": "likeliest"}, "set generate.logprobs: 1"),
        (2, {"prefer": "varied"}, "not more than curate.max_per_prompt"),
        (1, {"min_pass_rate": 0.5}, "raise generate.samples_per_prompt"),
        (4, {"long_share": 0.5}, "give both or neither"),
        (4, {"prefer": "mixed"}, "give both or neither"),
        (4, {"min_pass_rate": 0.5, "max_pass_rate": 0.4}, "no prompt is between"),
        (4, {"max_pass_rate": 0.4, "checks": []}, "without checks every trace passes"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path: Path, samples: int | None, curate: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        recipe_of(tmp_path, samples=samples, **curate)


def test_what_is_not_asked_for_makes_no_other_stage(tmp_path: Path) -> None:
    assert set(Curate().identity()) == {"checks", "keep_unjudged", "max_per_prompt", "prefer"}
    with StageFolder(tmp_path / "traces", "generate", {}) as out:
        out.write_table("traces", [trace()], TRACE)
        out.finish()
    assert set(plan(recipe_of(tmp_path, prefer="longest")).settings) == {"curate"}
    assert set(plan(recipe_of(tmp_path, prefer="mixed", long_share=0.5)).settings) == {"curate", "seed"}
    assert math.isclose(plan(recipe_of(tmp_path, max_pass_rate=0.5)).settings["curate"]["max_pass_rate"], 0.5)


def test_a_wider_bound_lets_the_stage_grow(tmp_path: Path) -> None:
    rows = [row for prompt, marks in PROMPTS.items() for row in graded(prompt, marks)]
    kept = curate_rows(recipe_of(tmp_path, checks=["finish", "math"], max_pass_rate=0.5), rows)
    more = run(recipe_of(tmp_path, checks=["finish", "math"]))
    assert set(kept) == {"one"} and more.grew_from and "too_easy" not in more.drops
