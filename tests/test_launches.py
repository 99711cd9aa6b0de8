"""Every launch file with every method and kind of training: it works, with weights really dealt out, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launches import dealt_out, in_two_processes
from test_kd import FULL, HALVES, Make, in_rounds, make, round_of, student_dir, teacher  # noqa: F401 (fixtures)
from test_train import losses, traces

from distill.run.folder import StageFolder
from distill.run.schema import PROMPT

METHODS = ("sft", "kd", "round", "on_policy")
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "qlora": {"quantization": "nf4"}, "full": FULL}
FEW = HALVES | {"max_steps": 3}


def recipe(make: Make, teacher: Path, method: str, kind: str) -> Path:  # noqa: F811
    """A recipe with all it needs to train."""
    name = f"{method}{kind}"
    if method == "round":
        return in_rounds(make, teacher, name, 1, trainer_args=FEW, student=KINDS[kind])
    if method == "kd":
        return make(name, trainer_args=FEW, student=KINDS[kind])
    train = {"method": method} | ({"on_policy": {"max_new_tokens": 8}} if method == "on_policy" else {})
    path = make(name, trainer_args=FEW, student=KINDS[kind], train=train, score=False)
    unused = {"score"} | ({"generate"} if method == "on_policy" else set())
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in unused}))
    with StageFolder(path.parent / "run" / "prompts", "prompts", {}) as out:
        rows = [{"prompt_id": row["prompt_id"], "messages": row["messages"]} for row in traces(48)]
        out.write_table("train", rows, PROMPT)
        out.write_table("heldout", rows[:4], PROMPT)
        out.finish()
    return path


def folder_of(path: Path, method: str) -> Path:
    """Beside the student's folder."""
    return round_of(path, 1) if method == "round" else path.parent / "run"


def works(file: str, made: dict[str, Path], kind: str) -> dict[str, list[float]]:
    """Trains each method's recipe in one launch; its losses."""
    in_two_processes(file, *made.values())
    for method, path in made.items():
        if file != "ddp":
            dealt_out(folder_of(path, method), weights=file != "zero2")
    return {method: losses(folder_of(path, method) / "student") for method, path in made.items()}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["fsdp2", "zero2", "zero3", "zero3-offload"])
def test_every_launch_trains_every_method(file: str, kind: str, make: Make, teacher: Path) -> None:  # noqa: F811
    alone = works("ddp", {method: recipe(make, teacher, method, kind) for method in METHODS}, kind)
    found = works(file, {method: recipe(make, teacher, method, kind) for method in METHODS}, kind)
    for method in METHODS:
        assert found[method] == pytest.approx(alone[method], rel=1e-4 if method != "on_policy" else 0.2), method
