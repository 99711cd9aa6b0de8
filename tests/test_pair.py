"""Whether a teacher can teach a student: the numbers against their definitions, the verdict's rules, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import commands
import numpy as np
import pytest
from conftest import build_tiny_model

from distill.measure.pairing import NUM_DEPTHS, TOP_K, Answers, Depth, Findings, Reading, read, verdict
from distill.targets.codec import Targets

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 64


def think(seed: int, written: np.ndarray) -> tuple[tuple[Targets, Targets], np.ndarray]:
    """A random model's targets for a row of written tokens, and its dense log-probabilities."""
    logits = 2 * np.random.default_rng(seed).standard_normal((len(written), VOCAB))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-log_p, axis=1)[:, :TOP_K]
    best = np.take_along_axis(log_p, ids, 1)
    rest = np.log(1 - np.exp(best).sum(1))
    top = Targets(ids.astype(np.int32), best.astype(np.float32), rest.astype(np.float32))
    chosen = log_p[np.arange(len(written)), written].astype(np.float32)[:, None]
    return (top, Targets(np.empty((len(written), 0), np.int32), chosen, np.zeros(len(written), np.float32))), log_p


def test_numbers_are_those_of_their_definitions() -> None:
    written = np.random.default_rng(0).integers(0, VOCAB, 24)
    (teacher, log_p), (student, log_q) = think(1, written), think(2, written)
    found = read([teacher], [student], student_wrote=True)
    overlaps, of_student, of_teacher, ratios = [], [], [], []
    for i, token in enumerate(written):
        common = set(np.argsort(-log_p[i])[:TOP_K]) & set(np.argsort(-log_q[i])[:TOP_K])
        overlaps.append(len(common) / TOP_K)
        of_student.append(sum(np.exp(log_q[i][list(common)])))
        of_teacher.append(sum(np.exp(log_p[i][list(common)])))
        ratios.append(log_p[i][token] - log_q[i][token])
    assert found.overlap == pytest.approx(np.mean(overlaps), rel=1e-6)
    assert found.shared_mass_student == pytest.approx(np.mean(of_student), rel=1e-5)
    assert found.shared_mass_teacher == pytest.approx(np.mean(of_teacher), rel=1e-5)
    assert found.divergence == pytest.approx(-np.mean(ratios), rel=1e-5)
    assert read([teacher], [student], student_wrote=False).divergence == pytest.approx(np.mean(ratios), rel=1e-5)
    quarters = np.array(ratios).reshape(NUM_DEPTHS, -1).mean(1)
    assert [depth.mean for depth in found.advantage] == pytest.approx(list(quarters), rel=1e-5)
    assert [depth.tokens for depth in found.advantage] == [6] * NUM_DEPTHS


def test_a_model_paired_with_itself_differs_in_nothing() -> None:
    written = np.arange(12)
    model, _ = think(3, written)
    found = read([model], [model], student_wrote=True)
    assert found.overlap == 1 and found.divergence == 0 and found.shared_mass_student == found.shared_mass_teacher


def test_positions_without_a_target_are_left_out() -> None:
    written = np.arange(8)
    (top, chosen), _ = think(1, written)
    student, _ = think(2, written)
    holes = chosen.log_probs.copy()
    holes[::2] = -np.inf
    assert read([(top, Targets(chosen.ids, holes, chosen.log_rest))], [student], student_wrote=True).tokens == 4


READING = Reading(0.8, 0.98, 0.98, 0.2, [Depth(-0.2, 50)] * NUM_DEPTHS, 200)
GOOD = Findings(1.0, 1.0, Answers(1.0, 80, 0.9), Answers(1.0, 70, 0.3), READING, READING, (0.4, 0.8))


@pytest.mark.parametrize(
    ("changed", "good", "says"),
    [
        ({}, True, "Yes: this teacher can teach this student."),
        ({"aligned_share": 0.3}, False, "cross_tokenizer"),
        ({"difference": (-0.2, -0.01)}, False, "nothing new to learn"),
        ({"difference": (-0.1, 0.2)}, True, "not certain on so few prompts"),
        ({"teacher": Answers(0.2, 900, 0.9)}, False, "teacher's answers are cut off"),
        ({"student": Answers(0.2, 900, 0.3)}, True, "stop_truncation_rate"),
        ({"on_student": replace(READING, shared_mass_student=0.4)}, False, "don't think alike"),
        ({"on_student": replace(READING, shared_mass_student=0.8)}, True, "first will help"),
        ({"on_student": replace(READING, advantage=[Depth(-0.2, 9)] * 3 + [Depth(-3.0, 9)])}, True, "first_max_new_tokens"),
        ({"difference": None}, True, "Yes: this teacher"),
    ],
)
def test_the_verdict_says_what_to_do(changed: dict[str, object], good: bool, says: str) -> None:
    found = verdict(replace(GOOD, **changed), min_aligned=0.8, advice="or cross_tokenizer")  # type: ignore[arg-type]
    assert found[0] is good and says in " ".join(found[1])


@pytest.mark.slow
def test_the_command_measures_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    teacher = build_tiny_model(tmp_path / "teacher", seed=4, hidden_size=48)
    problems = [json.dumps({"question": f"What is {n} plus {n}?", "answer": 2 * n}) for n in range(12)]
    (tmp_path / "problems.jsonl").write_text("\n".join(problems))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: pair\nrun_dir: {tmp_path / 'run'}\nteacher: {{model: {teacher}}}\nstudent: {{model: {tiny_model_dir}}}\n"
        f"prompts: {{source: {tmp_path / 'problems.jsonl'}, heldout_size: 2}}\n"
        "generate: {max_new_tokens: 12, temperature: 1.0, top_p: 1.0}\n"
    )
    words = ["-m", "distill", "pair", recipe, "--prompts"]
    first = commands.run([*words, "5"])
    assert first.returncode in (0, 3), first.stderr[-2000:]
    assert "answers to 5 prompts" in first.stdout and "teacher's advantage, part 4 of 4" in first.stdout
    kept = tmp_path / "run" / "pair" / "findings.json"
    found = json.loads(kept.read_text())
    assert found["aligned_share"] == 1 and found["on_student"]["tokens"] > 0 and found["verdict"][0] in first.stdout
    assert first.returncode == (0 if found["good"] else 3)
    written = kept.stat().st_mtime_ns
    second = commands.run([*words, "5"])
    assert second.returncode == first.returncode and kept.stat().st_mtime_ns == written and "writes" not in second.stderr
    assert found["verdict"][0] in second.stdout
    other = commands.run([*words, "4"])
    assert other.returncode == 1 and "num_prompts is 5 there and 4 here" in other.stderr and "--redo" in other.stderr
    again = commands.run([*words, "4", "--redo"])
    assert again.returncode in (0, 3) and "answers to 4 prompts" in again.stdout
