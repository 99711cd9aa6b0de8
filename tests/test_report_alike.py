"""What a report says of likeness and calibration, from the files of an evaluation alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fabricated import facts

from distill.measure.likeness import likeness_scores
from distill.reporting.alike import Alike, alike_of, alike_texts
from distill.reporting.pages import render
from distill.reporting.plots import reliability
from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.schema import SCORE

SAME = {"set": "heldout", "samples_per_prompt": 1}
BINS = {"base": [[0.2, 0.4, 10], [0.9, 0.5, 10]], "student": [[0.5, 0.5, 10], [0.9, 0.9, 10]]}


def found(folder: Path, *, compared: int = 40, told: bool = True, exact: bool = False) -> Alike:
    """An evaluation of three prompts with answers of 40 tokens."""
    rows = [
        {"model_role": role, "prompt_id": str(prompt), "reason": None, "num_tokens": 40, "num_bytes": 120, "log_prob": -kl, "chrf": chrf}
        | {"predicted": 30, "compared": compared if told else 0, "kl_nats": kl if told else None, "agreed": 30, "held": 0.99 * compared}
        for role, kl, chrf in (("base", 40.0, 20.0), ("student", 4.0, 60.0))
        for prompt in range(3)
    ]
    scores: list[dict[str, Any]] = [SAME | row for row in likeness_scores(rows, ["base", "student"], 0.95, 0, exact=exact)]
    error = {"metric": "calibration_error", "value": 0.3, "low": 0.2, "high": 0.4, "num_prompts": 3}
    scores += [SAME | {"model_role": role} | error for role in BINS]
    scores.append(SAME | {"set": "other", "model_role": "base", "metric": "perplexity", "value": 77.0, "low": 70.0, "high": 80.0})
    record = {"model": "x/y", "revision": None, "parameters": 1}
    likeness = {"answers": 3, "read_by": "process" if told else None, "top_k": 64, "exact": exact}
    with StageFolder(folder / "eval", "evaluate", {}) as out:
        out.write_table("scores", scores, SCORE)
        more = {"likeness": likeness, "calibration": {"of_label": True, "bins": BINS}}
        out.finish(facts=facts(models=dict.fromkeys(("base", "student"), record), confidence=0.95, **more))
    alike = alike_of(folder / "eval", read_manifest(folder / "eval"))
    assert alike is not None
    return alike


def test_the_table_has_a_row_a_model_and_says_what_it_rests_on(tmp_path: Path) -> None:
    alike = found(tmp_path)
    assert alike.rows == [
        ["base", "1.000 [1.000, 1.000]", "75.0 % [75.0, 75.0]", "2.72 [2.72, 2.72]", "20.0 [20.0, 20.0]"],
        ["student", "0.100 [0.100, 0.100]", "75.0 % [75.0, 75.0]", "1.11 [1.11, 1.11]", "60.0 [60.0, 60.0]"],
    ]
    notes = " ".join(alike.notes)
    assert "lower bound: over the teacher's 64 most probable tokens, which hold 99.00 %" in notes and "that is gone: 0.90" in notes
    assert (
        alike.sentence
        == "On the teacher's answers the student is at least 0.100 nats a token from it; before training it was at least 1.000."
    )
    assert "at least" not in found(tmp_path / "exact", exact=True).sentence
    assert alike.calibration[0] == ["base", "0.300 [0.200, 0.400]", "90.0 %", "50.0 %", "10", "20.0 %", "40.0 %", "10"]
    shown = "\n".join(alike_texts(alike))
    assert "likeness to the teacher" in shown and "sure and right" in shown


def test_other_tokenizers_are_told_in_bits_a_byte(tmp_path: Path) -> None:
    notes = " ".join(found(tmp_path, compared=30).notes)
    assert "75.0 % of the tokens are tokens of both" in notes and "base 0.481, student 0.048" in notes


def test_a_teacher_that_tells_nothing_has_no_divergence(tmp_path: Path) -> None:
    alike = found(tmp_path, told=False)
    assert alike.rows[0][1:3] == ["", "75.0 % [75.0, 75.0]"]
    assert alike.sentence.endswith("is the written one 75.0 % of the time; before training it was 75.0 %.")
    assert any("tells nothing of what it thinks" in note for note in alike.notes)


def test_pages_show_both(tmp_path: Path) -> None:
    alike = found(tmp_path)
    for page in ("alike.md.j2", "alike.html.j2"):
        text = render(page, summary=SimpleNamespace(alike=alike), reliability_svg=reliability(alike.bins))
        assert all(words in text for words in ("Likeness to the teacher", "Sure and right", "nats a token", "student"))
    nothing = render("alike.md.j2", summary=SimpleNamespace(alike=None))
    assert not nothing.strip()
