"""The report of several held-out sets, tags and labels; scores are the kit's own, of answers that chance wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated import HOSTILE, facts, make_run, recipe_for

from distill.measure.scores import Measured, scores_of
from distill.run.folder import StageFolder
from distill.run.schema import CONFUSION, SCORE
from distill.stages import evaluate, report

MODELS = ("base", "student", "teacher")
LABELS = ["refund", "delivery", f"other {HOSTILE}"]


def answers(name: str, chances: tuple[float, ...], samples: int, labels: bool = False) -> list[dict[str, Any]]:
    """Of 200 prompts; a model gives the right label, or one of the others."""
    rng = np.random.default_rng(7)
    rows = []
    for role, chance in zip(MODELS, chances, strict=True):
        for prompt in range(200):
            for sample in range(samples):
                correct = bool(rng.random() < chance)
                final = LABELS[(prompt + (0 if correct else 1)) % 3] if labels else str(correct)
                same = {"set": name, "reason": "x", "truncated": False, "num_tokens": 9, "tags": [["hard", "easy"][prompt % 2]]}
                mark = {"correct": correct, "final": final, "in_form": bool(rng.random() < 0.9)}
                rows.append({**same, **mark, "model_role": role, "prompt_id": f"{name}/{prompt}", "sample_index": sample})
    return rows


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    make_run(folder, evaluated=False)
    right = {f"intents/{prompt}": LABELS[prompt % 3] for prompt in range(200)}
    asked = [
        (Measured("heldout", MODELS, 1, 0.95, 0), answers("heldout", (0.3, 0.6, 0.9), 1)),
        (Measured("hard", MODELS, 4, 0.95, 0), answers("hard", (0.5, 0.5, 0.5), 4)),
        (Measured("intents", MODELS, 1, 0.95, 0, LABELS, right), answers("intents", (0.4, 0.9, 0.7), 1, labels=True)),
    ]
    models = {role: {"model": f"m/{role}", "revision": None, "parameters": 1000} for role in MODELS}
    with StageFolder(folder / "eval", "evaluate", {}, [folder / "prompts", folder / "student"]) as out:
        out.write_table("scores", [row for measured, rows in asked for row in scores_of(rows, measured)], SCORE)
        out.write_table("confusion", [row for measured, rows in asked for row in evaluate._confusion(rows, measured)], CONFUSION)
        further = {"hard": {"prompts": 200, "left_out": {"in_training": 3, "not_drawn": 50}}}
        out.finish(facts=facts(models=models, confidence=0.95, tokens=1, sets=further))
    report.run(recipe_for(folder))
    return folder


def test_the_summary_has_a_table_a_set_and_says_better_only_beyond_the_noise(run_dir: Path) -> None:
    text = (run_dir / "report" / "summary.txt").read_text()
    main, hard, intents = re.split(r"\n\n(?=\w+: 200 prompts)", text)
    assert re.search(r"student better than base by [\d.]+ points \[[\d.]+, [\d.]+\]\nteacher better than student by", main)
    assert "gap recovered: 0." in main and "parameters" in main and "avg@" not in main
    assert hard.startswith("hard: 200 prompts, 4 answers a prompt") and re.search(r"avg@4 +interval +pass@4 +maj@4 +tokens", hard)
    assert "no difference between student and base beyond the noise" in hard and " better " not in hard
    assert "gap recovered: not " in hard and "left out: 3 that are among the prompts that were trained on" in hard
    assert "student better than teacher by" in intents and "macro-F1" in intents
    assert max(map(len, text.splitlines())) <= 120 and all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_the_pages_show_sets_tags_and_labels(run_dir: Path, name: str) -> None:
    text = (run_dir / "report" / name).read_text()
    for words in ("hard: 200 prompts, 4 answers a prompt", "intents, by tag", "intents, labels by the student", "precision", "in form"):
        assert words in text, words
    assert "<script>alert" not in text.replace("\\<", "") and "None" not in re.sub(r"None asked for|None,", "", text)


def test_the_square_of_labels_is_a_picture_of_its_own(run_dir: Path) -> None:
    html = (run_dir / "report" / "report.html").read_text()
    assert html.count("How often each label") == 1 and 'id="confusion-intents-' in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
