"""Families of the installed transformers, each through the stages: scored, trained both ways, packed or refused, merged, reloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from test_train import traces
from test_train import train as run_training
from transformers import AutoModelForCausalLM

from distill.errors import ModelError
from distill.models.loading import load_model, load_trained
from distill.recipe.experiment import Recipe
from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.schema import TRACE
from distill.stages import score, train

QUICK = ("gemma2", "qwen2_moe", "falcon_h1")
SEE_EACH_OTHER = (
    *("opt", "bloom", "mpt", "falcon", "gpt_oss", "jamba", "falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h", "qwen3_next"),
    *("qwen3_5_text", "bamba", "granitemoehybrid", "lfm2", "minimax", "xlstm", "recurrent_gemma"),
)
"""Families whose rows can't be packed here: they see each other, or would need kernels that a CPU has not."""


def recipe_of(folder: Path, name: str, **changes: Any) -> Recipe:
    run = folder / name
    with StageFolder(run / "curated", "curate", {}) as out:
        out.write_table("curated", traces(4, filler=""), TRACE)
        out.finish(rows_in=4, rows_kept=4)
    arguments = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "warmup_steps": 0, "save_strategy": "no"}
    content: dict[str, Any] = {
        "name": name,
        "run_dir": str(run),
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student"), "adapter": {"type": "lora", "r": 2}},
        "prompts": {"source": "none.jsonl"},
        "generate": {},
        "score": {"target": {"kind": "top_k", "k": 8}},
        "train": {"method": "kd", "max_length": 256, "trainer_args": arguments | changes.pop("trainer_args", {})},
    }
    content["train"] |= changes
    if content["train"]["method"] == "sft":
        del content["score"]
    return Recipe.model_validate(content)


def log(student: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def sweep(family: str, folder: Path) -> None:
    for role, seed in (("teacher", 1), ("student", 0)):
        tiny_model(family, folder / role, seed=seed)
    distilled = recipe_of(folder, "kd")
    score.run(distilled)
    facts = train.run(distilled).facts
    student = folder / "kd" / "student"
    first = log(student)[0]
    assert first["kl_lower_bound"] > 0 and 0 < first["grad_norm"] < float("inf") and facts["adapter"]["share"] > 0.4

    learned = recipe_of(folder, "sft", method="sft")
    train.run(learned)
    packed = recipe_of(folder, "packed", method="sft", trainer_args={"packing": True})
    if family in SEE_EACH_OTHER:
        with pytest.raises(ModelError, match="packed"):
            train.run(packed)
    else:
        train.run(packed)
        both = [log(folder / name / "student")[0]["loss"] for name in ("sft", "packed")]
        assert both[0] == pytest.approx(both[1], rel=1e-4)

    cpu, ids = torch.device("cpu"), torch.arange(3, 35)[None]
    spec, adapter = distilled.student, distilled.student.adapter
    apart = logits(load_trained(spec, adapter, student, cpu, merge=False), ids)
    assert (apart - logits(load_model(spec, cpu), ids)).abs().max() > 1e-4  # it has learned
    merged: Any = load_trained(spec, adapter, student, cpu)
    torch.testing.assert_close(logits(merged, ids), apart, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(folder / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(reloaded, ids), apart, rtol=1e-3, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(student / "adapter")), ids), apart, rtol=1e-4, atol=1e-4)
    assert read_manifest(student).facts["adapter"] == facts["adapter"]


@pytest.mark.slow
def test_a_routers_loss_that_trl_can_t_compute_is_refused(tmp_path: Path) -> None:
    tiny_model("granitemoe", tmp_path / "student")
    with pytest.raises(ModelError, match=r"GraniteMoeForCausalLM: TRL can't compute .* Set train.trainer_args.router_aux_loss_coef: 0\."):
        train.run(recipe_of(tmp_path, "sft", method="sft", trainer_args={"router_aux_loss_coef": 0.1}))


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_a_few_families(family: str, tmp_path: Path) -> None:
    sweep(family, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(QUICK)))
def test_all_families(family: str, tmp_path: Path) -> None:
    sweep(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["{type: lora, r: 2}", "{type: full}"])
def test_a_model_that_could_see_learns_in_two_processes(adapter: str, tmp_path: Path) -> None:
    """Its vision gets no gradient from text, for which the processes would wait; both ways of training leave it as it was."""
    student = tiny_model("gemma3", tmp_path / "student")
    recipe_of(tmp_path, "run", method="sft")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"name: vision\nrun_dir: {tmp_path / 'run'}\nstudent: {{model: {student}, adapter: {adapter}}}\nteacher: {{model: {student}}}\n"
        "prompts: {source: none.jsonl}\ngenerate: {}\n"
        "train: {max_length: 256, trainer_args: {max_steps: 2, save_strategy: 'no', learning_rate: 0.01, per_device_train_batch_size: 2}}\n"
    )
    trained = run_training(recipe, processes=2)
    assert read_manifest(trained).facts["world_size"] == 2
    if "full" in adapter:
        before, after = (load_file(path / "model.safetensors") for path in (student, trained / "model"))
        changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
        assert changed and not any("vision" in name or "projector" in name for name in changed)
