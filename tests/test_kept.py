"""Targets from log-probabilities that came while the teacher wrote are those of reading, where tokens are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_score import distill, folder_of, load, other_model_dir, rows_of, score, traces

from distill.engines.scoring import score_rows
from distill.models.chat import ChatFormat
from distill.models.loading import load_chat_format
from distill.models.vocabulary import align, vocabulary_map
from distill.recipe.models import ModelSpec
from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.schema import ALTERNATIVES, TRACE
from distill.targets.spec import TopK

__all__ = ["other_model_dir"]
K = 8


def alternatives(model: Any, chat: ChatFormat, trace: dict[str, Any], *, by_ids: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trace as the teacher drew it, and what it thought of its tokens, as servers tell it."""
    prompt, ids = chat.prompt_ids(trace["messages"]), chat.completion_ids(trace["completion"])
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, : len(chat.tokenizer)].log_softmax(-1)
    best = log_probs.topk(K, dim=-1)
    texts = vocabulary_map(chat, chat).teacher.texts
    found = best.indices.tolist()
    told = {
        "prompt_id": trace["prompt_id"],
        "sample_index": trace["sample_index"],
        "token_logprobs": log_probs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(),
        "logprobs": best.values.tolist(),
        "token_ids": found if by_ids else None,
        "token_bytes": None if by_ids else [[texts[index] for index in place] for place in found],
        "written_bytes": None if by_ids else [texts[index] for index in ids],
    }
    known = {"completion_ids": ids, "prompt_ids": prompt} if by_ids else {"completion_ids": None, "prompt_ids": None}
    return trace | known | {"finish_reason": "stop", "author": "teacher"}, told


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """A run with traces, what the teacher thought of them, and the curated ones, and a recipe over it."""

    def make(teacher: Path, *, by_ids: bool, target: str = f"{{kind: top_k, k: {K}}}", **score: Any) -> Path:
        model, chat = load(teacher)
        pairs = [alternatives(model, chat, trace, by_ids=by_ids) for trace in traces(6)]
        run = tmp_path / "run"
        with StageFolder(run / "traces", "generate", {}) as out:
            out.write_table("traces", [trace for trace, _ in pairs], TRACE)
            out.write_table("alternatives", [told for _, told in pairs], ALTERNATIVES)
            out.finish(rows_in=6, rows_kept=6, facts={"author": {"model": str(teacher)}})
        with StageFolder(run / "curated", "curate", {}) as out:
            out.write_table("curated", [trace for trace, _ in pairs][1:], TRACE)
            out.finish(rows_in=6, rows_kept=5)
        settings = json.dumps({"source": "generation", **score})[1:-1]
        path = tmp_path / "run.yaml"
        path.write_text(
            f"name: run\nrun_dir: {run}\nteacher: {{model: {teacher}, server: {{kind: vllm, url: 'http://127.0.0.1:9'}}}}\n"
            f"student: {{model: {tiny_model_dir}}}\nprompts: {{source: none.jsonl}}\ngenerate: {{logprobs: {K}}}\n"
            f"score: {{target: {target}, {settings}}}\ntrain: {{method: kd, max_length: 256}}\n"
        )
        return path

    return make


@pytest.mark.parametrize("other", [False, True], ids=["one tokenizer", "other tokenizer"])
@pytest.mark.parametrize("by_ids", [True, False], ids=["by ids", "by text"])
def test_kept_targets_are_those_of_reading(
    by_ids: bool, other: bool, recipe: Callable[..., Path], tiny_model_dir: Path, other_model_dir: Path
) -> None:
    teacher = other_model_dir if other else tiny_model_dir
    path = recipe(teacher, by_ids=by_ids)
    said = score(path)
    assert "nothing is read once more" in said
    manifest = read_manifest(folder_of(path))
    assert manifest.facts["verification"] is None and "kept" not in manifest.facts["device"] and manifest.facts["source"] == "generation"
    model, chat = load(teacher)
    student = load_chat_format(ModelSpec(model=str(tiny_model_dir)))
    vocabulary = vocabulary_map(chat, student)
    expected = {
        row.key: row for row in score_rows(model, [align(t, chat, student, vocabulary) for t in traces(6)[1:]], TopK(k=K), vocabulary)
    }
    found = rows_of(path)
    assert set(found) == set(expected)
    for key, targets in found.items():
        want = expected[key].targets
        there = targets.log_probs[:, 0] > -np.inf
        np.testing.assert_array_equal(there, want.log_probs[:, 0] > -np.inf)
        np.testing.assert_array_equal(targets.ids, want.ids)
        np.testing.assert_allclose(targets.log_probs, want.log_probs, atol=0.03)
        np.testing.assert_allclose(np.exp(targets.log_rest), np.exp(want.log_rest), atol=2e-3)
    share = manifest.facts["aligned_share"]
    assert share == 1 if not other else 0.9 < share < 1


def test_too_little_that_matches_is_refused(recipe: Callable[..., Path], other_model_dir: Path) -> None:
    result = distill("score", recipe(other_model_dir, by_ids=True, min_aligned=0.999))
    assert result.returncode == 1 and "score.min_aligned: only 9" in result.stderr


def test_chosen_tokens_are_kept_too(recipe: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = recipe(tiny_model_dir, by_ids=True, target="{kind: chosen_token}")
    score(path)
    assert read_manifest(folder_of(path)).facts["aligned_share"] == 1


def test_what_a_source_cannot_give_is_refused(recipe: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = recipe(tiny_model_dir, by_ids=True)
    for words, expected in [
        (["--score.target", "{kind: sampled, draws: 5}"], "set score.source: process"),
        (["--score.target", "{kind: top_k, k: 64}"], "generate.logprobs keeps 8"),
        (["--generate.logprobs", "null"], "needs generate.logprobs"),
        (["--score.source", "server", "--teacher.server.kind", "llama_cpp"], "kind llama_cpp tells no log-probabilities of a prompt"),
        (["--teacher.server", "null"], "needs teacher.server"),
    ]:
        result = distill("score", path, *words)
        assert result.returncode == 1 and expected in result.stderr, result.stderr


@pytest.mark.slow
def test_a_student_trains_on_them(recipe: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = recipe(tiny_model_dir, by_ids=False)
    score(path)
    size = {"max_steps": 15, "per_device_train_batch_size": 5, "logging_steps": 1, "learning_rate": 5e-3}
    ran = distill("train", str(path), "--train.trainer_args", json.dumps(size))
    assert ran.returncode == 0, ran.stderr[-3000:]
    student = path.parent / "run" / "student"
    losses = [entry["loss"] for entry in map(json.loads, (student / "metrics.jsonl").read_text().splitlines()) if "loss" in entry]
    assert len(losses) == 15 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02 and (student / "adapter").is_dir()
