"""What used to be found only after the teacher was paid: each case ends in one clear error before a run has written anything.

Most are refused with the recipe, or at a glance at packages, device, data and numbers; those that need the trainer are rehearsed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import build_tiny_model

from distill.before import check, record
from distill.before.packages import REPORTERS, needs
from distill.before.rehearsal import rehearse
from distill.errors import DistillError, RecipeError
from distill.recipe.reading import load_recipe
from distill.stages import Step, steps_of

ARGUMENT = "--train.trainer_args."
LIVE = ["--train.method", "on_policy", "--train.on_policy.max_new_tokens", "64", "--generate", "null"]
NO_GPU = "needs a GPU, and there is none here"

AT_A_GLANCE = {
    "report_to that is not installed": ([ARGUMENT + "report_to", "comet_ml"], "`pip install comet_ml`"),
    "report_to that nobody knows": ([ARGUMENT + "report_to", "wandbb"], "Did you mean wandb?"),
    "an optimizer of another package": ([ARGUMENT + "optim", "galore_adamw"], "`pip install galore-torch`"),
    "an unknown optimizer": ([ARGUMENT + "optim", "adamm"], "adamm is not a valid"),
    "liger": ([ARGUMENT + "use_liger_kernel", "true"], "`pip install liger-kernel`"),
    "offloading on a CPU": ([ARGUMENT + "activation_offloading", "true"], NO_GPU),
    "flash-attention": (["--student.attn_implementation", "flash_attention_2"], "`pip install flash-attn"),
    "a step larger than all prompts": ([*LIVE, "--train.global_batch_size", "512"], "takes 512 completions, but there are 100 prompts"),
    "too many validation prompts": (["--train.validation_prompts", "100"], "there are 100 training prompts"),
    "fsdp in one process": ([ARGUMENT + "fsdp", "full_shard"], "accelerate launch --use_fsdp"),
    "deepspeed without a launch": ([ARGUMENT + "deepspeed", "{zero_optimization: {stage: 2}}"], "accelerate launch --use_deepspeed"),
    "no references": (
        ["--prompts.columns", "{prompt: question}", "--curate.checks", "[finish]", "--evaluate.models", "[base, student]"],
        "evaluate: null",
    ),
    "pushing while offline": ([ARGUMENT + "push_to_hub", "true"], "the Hub is switched off here"),
    "a column that is not there": (["--prompts.template", "{context} {prompt}"], "no column 'context', only 'question'"),
    "prompts that all go": (["--prompts.answer_pattern", "= (.*)"], "100 no_answer_match"),
}  # fmt: skip

WITH_THE_RECIPE = {
    "evaluating without validation rows": ([ARGUMENT + "eval_strategy", "steps"], "train.validation_prompts"),
    "the best checkpoint by no measure": ([ARGUMENT + "save_strategy", "best"], "save_strategy best needs metric_for_best_model"),
    "a metric that nobody knows": ([ARGUMENT + "metric_for_best_model", "eval_f1"], "metric_for_best_model must be one of"),
    "checkpoints without optimizer": ([ARGUMENT + "save_only_model", "true"], "save_only_model can't be true"),
    "a seed of 33 bits": (["--seed", "4294967296"], "seed: input should be less than"),
    "no rows at once": ([ARGUMENT + "per_device_train_batch_size", "0"], "must be at least 1"),
    "fewer rows than none": ([ARGUMENT + "per_device_train_batch_size", "-1"], "must be at least 1"),
    "no pass": ([ARGUMENT + "gradient_accumulation_steps", "0"], "must be at least 1"),
    "a learning rate that is no number": ([ARGUMENT + "learning_rate", ".nan"], "not a finite number"),
    "a negative learning rate": ([ARGUMENT + "learning_rate", "-1.0"], "learning_rate must be at least 0"),
    "fewer workers than none": ([ARGUMENT + "dataloader_num_workers", "-1"], "must be at least 0"),
    "noise that is no number": ([ARGUMENT + "neftune_noise_alpha", ".nan"], "not a finite number"),
    "a check without an end": (["--curate.check_timeout_s", ".inf"], "not a finite number"),
    "an infinite adapter": (["--student.adapter.lora_alpha", ".inf"], "not a finite number"),
    "a template's own argument": (["--student.chat_template_kwargs", "{messages: 5}"], "messages is what the kit itself gives"),
}  # fmt: skip

REHEARSED = {
    "no target module": (["--student.adapter.target_modules", "[kk_proj]"], "kk_proj"),
    "empty target modules": (["--student.adapter.target_modules", "[]"], "target_modules"),
    "a metric that is not measured here": (
        ["--train.validation_prompts", "5", ARGUMENT + "load_best_model_at_end", "true", ARGUMENT + "metric_for_best_model", "eval_kd"],
        "eval_nll",
    ),
    "a schedule's unknown setting": ([ARGUMENT + "lr_scheduler_kwargs", "{cycles: 1}"], "cycles"),
    "an unknown loss": ([ARGUMENT + "loss_type", "focal"], "focal"),
    "an unknown packing": ([ARGUMENT + "packing", "true", ARGUMENT + "packing_strategy", "tight"], "tight"),
    "a compiler that is none": ([ARGUMENT + "torch_compile_backend", "gcc"], "GCC"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {i} plus {2 * i}?", "answer": 3 * i, "name": ["Paris", "Rome"][i % 2]} for i in range(120)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: late\nrun_dir: {tmp_path / 'run'}\nteacher: {{model: embedded:teacher}}\n"
        "student: {model: embedded:student, adapter: {type: lora, r: 4}}\n"
        f"prompts: {{source: {tmp_path / 'problems.jsonl'}, heldout_size: 20, columns: {{prompt: question, reference: answer}}}}\n"
        "generate: {max_new_tokens: 192, temperature: 1.0, top_p: 1.0}\n"
        "train: {max_length: 256, trainer_args: {per_device_train_batch_size: 8}}\n"
    )
    return path


def refused(path: Path, *overrides: str) -> str:
    """What a run of a recipe is refused with; nothing of it is there then."""
    with pytest.raises(DistillError) as found:
        loaded = load_recipe(path, list(overrides))
        check.before_run(loaded, steps_of(loaded))
    assert not (path.parent / "run").exists()
    return str(found.value)


@pytest.mark.parametrize("case", AT_A_GLANCE)
def test_one_error_at_a_glance(case: str, recipe: Path) -> None:
    overrides, words = AT_A_GLANCE[case]
    message = refused(recipe, *overrides)
    assert words in message and "--no-check" in message and "rehearsal" not in message


@pytest.mark.parametrize("case", WITH_THE_RECIPE)
def test_one_error_with_the_recipe(case: str, recipe: Path) -> None:
    overrides, words = WITH_THE_RECIPE[case]
    assert words in refused(recipe, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("case", REHEARSED)
def test_one_error_of_the_rehearsal(case: str, recipe: Path) -> None:
    overrides, words = REHEARSED[case]
    message = refused(recipe, *overrides)
    assert words in message and "a claim of `distill check` failed" in message and "rehearsal of train" in message


def test_four_bits_without_bitsandbytes_name_the_extra(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = refused(recipe, "--student.quantization", "nf4")
    assert "student.quantization nf4" in message and "pip install 'distill-kit[qlora]'" in message and "network" not in message


def test_a_package_that_is_broken_is_not_there(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swanlab.py").write_text("raise OSError('libswan.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = refused(recipe, ARGUMENT + "report_to", "swanlab")
    assert "is installed, but can't be imported: libswan.so" in message


def test_every_optimizer_and_reporter_of_transformers_has_its_package(recipe: Path) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import OptimizerNames

    assert set(INTEGRATION_TO_CALLBACK) == set(REPORTERS)
    of_torch = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_torch_xla", "adamw_torch_npu_fused"}
    bare = {str(name.value) for name in OptimizerNames if not needs(load_recipe(recipe, [ARGUMENT + "optim", str(name.value)]))}
    assert bare == of_torch


def test_what_another_device_decides_is_left_open(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.before.rehearsal.rehearse", lambda *_: None)
    loaded = load_recipe(recipe, [ARGUMENT + "activation_offloading", "true", ARGUMENT + "fsdp", "full_shard"])
    assert check.run(loaded, processes=4)
    said = capsys.readouterr().out
    assert "activation_offloading: not checked here, it needs a GPU" in said and "fsdp: not checked here, the launch decides it" in said
    assert "32 rows an optimizer step" in said and not record.is_noted(loaded)


def test_a_run_begins_with_it_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rehearsal itself, and that it is not repeated before something has changed."""
    loaded = load_recipe(recipe, [])
    before = torch.get_rng_state()
    check.before_run(loaded, steps_of(loaded))
    assert "nothing speaks against this recipe" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before) and not Path(loaded.run_dir or "").exists()
    check.before_run(loaded, steps_of(loaded))
    assert capsys.readouterr().out == ""
    with (recipe.parent / "problems.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What is 1 plus 1?", "answer": 2}) + "\n")
    assert not record.is_noted(loaded)


def test_it_is_left_out_where_it_would_be_late(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = load_recipe(recipe, [ARGUMENT + "report_to", "comet_ml"])
    check.before_run(broken, [Step("report"), Step("export")])
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    check.before_run(broken, steps_of(broken))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(RecipeError):
        check.before_run(broken, steps_of(broken))


KD = ["--train.method", "kd", "--score", "{target: {kind: top_k, k: 16}}", "--train.validation_prompts", "5"]
ROUNDS = ["--rounds", "2", "--rollouts", "{max_new_tokens: 64, stop_kl: 0.1, trainer_args: {learning_rate: 1e-4}}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (KD, "rehearsal of score"),
        ([*KD, *ROUNDS], "rehearsal of round 1 train"),
        (LIVE, "stopped and gone on with"),
        ([ARGUMENT + "save_strategy", "no"], "no checkpoint is asked for"),
        ([ARGUMENT + "save_strategy", "epoch", ARGUMENT + "packing", "true"], "stopped and gone on with"),
        (["--student.quantization", "nf4", ARGUMENT + "optim", "paged_adamw_8bit"], "stopped and gone on with"),
        (["--student.adapter.target_modules", "[layers.2.self_attn.q_proj]"], "stopped and gone on with"),
        (["--student.adapter", "{type: full}"], "stopped and gone on with"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_what_works_is_proved(overrides: list[str], words: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "nf4" in overrides:
        pytest.importorskip("bitsandbytes")
    assert check.run(load_recipe(recipe, overrides)), capsys.readouterr().out
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_with_other_tokens_is_rehearsed(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tiny_model(tmp_path / "teacher")
    build_tiny_model(tmp_path / "student", hidden_size=48)
    config = json.loads((tmp_path / "student" / "tokenizer.json").read_text())
    config["model"]["merges"] = [["1", "2"]]
    config["model"]["vocab"]["12"] = len(config["model"]["vocab"]) + 2
    (tmp_path / "student" / "tokenizer.json").write_text(json.dumps(config))
    words = ["--teacher.model", str(tmp_path / "teacher"), "--student.model", str(tmp_path / "student")]
    assert check.run(load_recipe(recipe, [*words, "--train.method", "cross_tokenizer", *LIVE[2:]])), capsys.readouterr().out
    assert "stopped and gone on with" in capsys.readouterr().out


SMALL: dict[str, Any] = {
    "vocab_size": 270, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
PACKED = [ARGUMENT + "packing", "true"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "settings", "overrides", "words"),
    [
        ("Qwen3_5TextConfig", LINEAR, PACKED, "packed"),
        ("Qwen3NextConfig", LINEAR | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, PACKED, "packed"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}, PACKED, "pack"),
        ("GraniteMoeHybridConfig", MAMBA | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4}, PACKED, "pack"),
    ],
)
def test_families_end_in_one_error(
    config: str, settings: dict[str, Any], overrides: list[str], words: str, recipe: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Of a student its config and its tokenizer are enough."""
    place = tmp_path / "student"
    shutil.copytree(tiny_model_dir, place, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    getattr(transformers, config)(**SMALL | settings).save_pretrained(place)
    message = refused(recipe, "--student.model", str(place), "--train.max_length", "512", *overrides)
    assert words in message.lower() and "rehearsal of train" in message


def test_a_tokenizer_larger_than_the_embedding_is_refused(recipe: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    (tmp_path / "student" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    assert "the model 200 rows" in refused(recipe, "--student.model", str(tmp_path / "student"))


def test_what_libraries_patch_is_put_back(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run computes the same with and without the rehearsal before it."""
    from transformers.models.qwen3 import modeling_qwen3

    from distill.before.findings import Findings
    from distill.stages import train

    kept = modeling_qwen3.Qwen3RMSNorm

    def patched(*_: Any, **__: Any) -> None:
        modeling_qwen3.Qwen3RMSNorm = torch.nn.Identity
        raise RuntimeError("after it was patched")

    monkeypatch.setattr(train, "run", patched)
    found = Findings()
    row = {"messages": [{"role": "user", "content": "2+2?"}], "completion": "<think>\nSum.\n</think>\n\n4"}
    rehearse(load_recipe(recipe, []), [row], found)
    assert modeling_qwen3.Qwen3RMSNorm is kept and "after it was patched (RuntimeError" in found.refuted[0]
