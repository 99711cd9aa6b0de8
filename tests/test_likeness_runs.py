"""Stage evaluate without references, on the embedded pair: what it leaves behind, a kill on the way, and what growing keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import commands
import pytest

from distill.engines import answers
from distill.engines.comparing import Comparer
from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.servers import likeness
from distill.stages import evaluate, prompts

pytestmark = pytest.mark.slow

RECIPE = """
name: alike
teacher: {model: embedded:teacher, dtype: float32}
student: {model: embedded:student, dtype: float32, adapter: {type: lora, r: 4}}
prompts:
  source: embedded:arithmetic
  columns: {prompt: question, reference: null}
  max_prompts: 4
  heldout_size: 6
generate: {max_new_tokens: 96}
curate: {checks: [finish]}
evaluate: {models: [base, teacher], max_new_tokens: 192, batch_size: 8}
"""


def recipe_in(folder: Path, *overrides: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE + f"run_dir: {folder / 'run'}\n")
    return load_recipe(path, list(overrides))


def scores(folder: Path) -> dict[tuple[str, str], float]:
    return {(row["model_role"], row["metric"]): row["value"] for row in read_rows(folder / "run" / "eval", "scores")}


class Killed(BaseException):
    """What ends a reading, as a kill would."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each call of a reader read; windows hold two answers."""
    monkeypatch.setattr(answers, "_WINDOW_ROWS", 2)
    counts: list[int] = []
    read = Comparer.read

    def counted(self: Comparer, rows: Any, batch_size: int = 8) -> Any:
        counts.append(len(rows))
        return read(self, rows, batch_size)

    monkeypatch.setattr(Comparer, "read", counted)
    return counts


def test_a_killed_reading_goes_on_and_a_grown_one_reads_what_is_new(tmp_path: Path, reads: list[int], monkeypatch: Any) -> None:
    recipe = recipe_in(tmp_path)
    prompts.run(recipe)
    chrf, alike = likeness.chrf, 0

    def killed(text: str, reference: str) -> float:
        nonlocal alike
        alike += 1
        if alike == 4:  # of the base's second window the second answer
            raise Killed
        return chrf(text, reference)

    monkeypatch.setattr(likeness, "chrf", killed)
    with pytest.raises(Killed):
        evaluate.run(recipe)
    assert reads == [2, 2, 2, 2, 2]  # by the teacher three windows, by the base two, the second of which is lost
    reads.clear()
    manifest = evaluate.run(recipe)
    assert reads == [2, 2]
    found, facts = scores(tmp_path), manifest.facts["likeness"]
    assert facts["answers"] == 6 and facts["read_by"] == "process" and not facts["exact"]
    assert found["base", "kl_nats_lower_bound"] > 0.05 and found["teacher", "perplexity"] < found["base", "perplexity"]
    assert not {metric for _, metric in found} & {"accuracy", "gap_recovered"}
    reads.clear()
    before = read_rows(tmp_path / "run" / "eval", "likeness")
    evaluate.run(recipe_in(tmp_path, "--evaluate.confidence", "0.9", "--evaluate.calibration", "false"))
    assert reads == [] and read_rows(tmp_path / "run" / "eval", "likeness") == before
    evaluate.run(recipe_in(tmp_path, "--evaluate.likeness.top_k", "403"))
    assert reads == [2] * 6 and read_manifest(tmp_path / "run" / "eval").facts["likeness"]["exact"]
    assert scores(tmp_path)["base", "kl_nats"] > found["base", "kl_nats_lower_bound"] - 1e-6


def test_the_command_measures_without_references_and_with_them(tmp_path: Path) -> None:
    recipe_in(tmp_path)
    words = ["-m", "distill", "evaluate", tmp_path / "recipe.yaml"]
    assert not commands.run(["-m", "distill", "prompts", tmp_path / "recipe.yaml"]).returncode
    done = commands.run(words)
    assert not done.returncode, done.stderr
    assert scores(tmp_path)["base", "top1_agreement"] > 0.2
    judged = ["--prompts.columns.reference", "answer", "--curate.checks", "[finish, math]", "--run_dir", tmp_path / "judged"]
    judged += ["--evaluate.calibration", "true", "--evaluate.likeness", "{}"]
    for command in (["-m", "distill", "prompts", tmp_path / "recipe.yaml"], words):
        done = commands.run([*command, *judged])
        assert not done.returncode, done.stderr
    metrics = {(row["model_role"], row["metric"]) for row in read_rows(tmp_path / "judged" / "eval", "scores")}
    wanted = {("teacher", "accuracy"), ("teacher", "calibration_error"), ("base", "calibration_error"), ("base", "kl_nats_lower_bound")}
    assert wanted <= metrics
