"""A finished run made of plain rows, for tests of what reads a run: no model wrote any of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.recipe.experiment import Recipe
from distill.run.files import read_json, write_json
from distill.run.folder import StageFolder
from distill.run.manifest import MANIFEST
from distill.run.schema import DROPPED_TRACE, PROMPT, SCORE, TRACE, VERDICT, prompt_id

CONTROLS = "\x1b]0;title\x07\x1b[2J\x9b31m \u202eabc\u2066 \x00"
"""What would name a terminal, empty it, colour it, and turn text around."""
HOSTILE = f"<script>alert(1)</script></textarea> {{{{ 7 * 7 }}}} {{% raw %}} <img src=https://example.org/x.png> | **bold** ``` {CONTROLS}"
PACKAGES = {"torch": "2.13.0", "transformers": "5.23.0"}
SCORES = {"base": (0.25, 0.20, 0.30), "student": (0.71, 0.66, 0.76), "teacher": (0.90, 0.87, 0.93)}
GAP = (0.7077, 0.63, 0.79)


def recipe_for(run_dir: Path, **changes: Any) -> Recipe:
    """A recipe whose stages lie in `run_dir`; a change replaces a whole section."""
    sections: dict[str, Any] = {
        "name": "small-run",
        "run_dir": str(run_dir),
        "teacher": {"model": "Qwen/Qwen3-8B"},
        "student": {"model": "Qwen/Qwen3-0.6B"},
        "prompts": {"source": "problems.jsonl"},
        "generate": {"temperature": 1.0},
    }
    return Recipe.model_validate(sections | changes)


def trace(index: int, question: str, completion: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {
        "prompt_id": prompt_id(messages),
        "sample_index": index % 2,
        "author": "teacher",
        "messages": messages,
        "reference": str(index),
        "completion": completion,
        "completion_ids": list(range(40)),
        "finish_reason": "stop",
        "seed": index,
    }


def facts(**more: Any) -> dict[str, Any]:
    stamp = {"kit_version": "0.1.0", "finished_at": "2026-11-23T20:00:00+00:00", "git_revision": "0123456789ab"}
    return {**stamp, "wall_s": 65.5, "packages": PACKAGES, "device": "cpu", **more}


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest in its place."""
    manifest = read_json(folder / MANIFEST)
    change(manifest)
    write_json(folder / MANIFEST, manifest)


def make_run(
    run_dir: Path,
    *,
    evaluated: bool = True,
    kept: int = 30,
    dropped: int = 10,
    gap: tuple[Any, Any, Any] | None = GAP,
    unjudged: float = 0.0,
) -> None:
    """Writes prompts/, traces/, curated/, student/ and, if asked, eval/, as the stages write them."""
    traces = [
        trace(i, f"What is {i} + 0?", f"<think>\nAdding nothing to {i}.\n</think>\n\nIt is \\boxed{{{i}}}.") for i in range(kept + dropped)
    ]
    traces[0] = trace(0, f"Hostile {HOSTILE}", f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}")
    traces[-1]["completion"] = "<think>\nStill thinking " + "on and on " * 400
    _write_traces(run_dir, traces, kept)
    _write_student(run_dir, kept)
    if evaluated:
        _write_scores(run_dir, gap, unjudged)


def _write_traces(run_dir: Path, traces: list[dict[str, Any]], kept: int) -> None:
    rows = [
        {"prompt_id": t["prompt_id"], "messages": t["messages"], "reference": t["reference"], "source": "problems.jsonl"} for t in traces
    ]
    author = {"model": "Qwen/Qwen3-8B", "revision": "feedc0de1234", "parameters": 8_190_735_360}
    with StageFolder(run_dir / "prompts", "prompts", {}) as out:
        out.write_table("train", rows, PROMPT)
        out.write_table("heldout", [], PROMPT)
        out.finish(rows_in=len(rows) + 2, rows_kept=len(rows), drops={"duplicate": 2}, facts=facts())
    with StageFolder(run_dir / "traces", "generate", {}, [run_dir / "prompts"]) as out:
        out.write_table("traces", traces, TRACE)
        out.finish(
            rows_in=len(rows),
            rows_kept=len(traces),
            facts=facts(author=author, licence="Apache-2.0", tokens=40 * len(traces), device="cuda:0"),
        )
    lost = [{**t, "reason": "finish:length" if t is traces[-1] else "math:wrong_answer"} for t in traces[kept:]]
    drops = {"math:wrong_answer": len(lost) - 1, "finish:length": 1} if lost else {}
    with StageFolder(run_dir / "curated", "curate", {}, [run_dir / "traces"]) as out:
        out.write_table("curated", traces[:kept], TRACE)
        out.write_table("dropped", lost, DROPPED_TRACE)
        out.write_table("verdicts", [verdict for t in traces for verdict in _verdicts(t, t in traces[kept:])], VERDICT)
        counts = {
            "finish": {"passed": len(traces) - 1, "failed": 1, "unjudged": 0},
            "math": {"passed": kept, "failed": len(lost), "unjudged": 0},
        }
        out.finish(rows_in=len(traces), rows_kept=kept, drops=drops, facts=facts(verdicts=counts, author=author, licence="Apache-2.0"))


def _verdicts(row: dict[str, Any], lost: bool) -> list[dict[str, Any]]:
    place = {"prompt_id": row["prompt_id"], "sample_index": row["sample_index"]}
    cut = "</think>" not in row["completion"]
    return [
        {**place, "check": "finish", "passed": not cut, "reason": "length" if cut else "stop"},
        {**place, "check": "math", "passed": not lost, "reason": "wrong_answer" if lost else "equal"},
    ]


def _write_student(run_dir: Path, rows: int) -> None:
    with StageFolder(run_dir / "student", "train", {}, [run_dir / "curated"]) as out:
        lines = [
            {"step": 5 * i, "epoch": i / 8, "loss": 0.3 + math.exp(-i / 8), "learning_rate": 2e-3 * (1 - i / 40)} for i in range(1, 33)
        ]
        (out.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 160, "train_loss": 0.5}]))
        (out.path / "adapter").mkdir()
        (out.path / "adapter" / "weights").write_text("stand-in")
        out.finish(
            rows_in=rows,
            rows_kept=rows - 3,
            drops={"too_long": 3},
            files=[out.path / "adapter" / "weights"],
            records=[out.path / "metrics.jsonl"],
            facts=facts(
                parameters=600_000_000, trainable_parameters=10_000_000, steps=160, tokens=123_456, precision="bf16", world_size=1,
                peak_memory_gib=3.25, tokenizer_digest="ab" * 32, template_digest="cd" * 32,
            ),
        )  # fmt: skip


def _write_scores(run_dir: Path, gap: tuple[Any, Any, Any] | None, unjudged: float) -> None:
    rows = []
    for role, (value, low, high) in SCORES.items():
        plain = {
            "mean_tokens": 120.4,
            "truncation_rate": 0.02,
            "unjudged_rate": 0.01 + unjudged,
            "accuracy_if_unjudged_right": value + unjudged,
        }
        rows.append({"model_role": role, "metric": "accuracy", "value": value, "low": low, "high": high})
        rows += [{"model_role": role, "metric": metric, "value": number} for metric, number in plain.items()]
    if gap is not None:
        rows.append({"model_role": "gap", "metric": "gap_recovered", **dict(zip(("value", "low", "high"), gap, strict=True))})
    names = {
        "base": ("Qwen/Qwen3-0.6B", 596_049_920),
        "student": ("Qwen/Qwen3-0.6B", 606_049_920),
        "teacher": ("Qwen/Qwen3-8B", 8_190_735_360),
    }
    models = {role: {"model": name, "revision": "c1b2a3", "parameters": size} for role, (name, size) in names.items()}
    with StageFolder(run_dir / "eval", "evaluate", {}, [run_dir / "prompts", run_dir / "student"]) as out:
        out.write_table("scores", [{"set": "heldout", "num_prompts": 300, "samples_per_prompt": 1, **row} for row in rows], SCORE)
        out.finish(rows_in=900, rows_kept=900, facts=facts(models=models, confidence=0.95, tokens=108_000))
