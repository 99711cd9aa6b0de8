"""Trainer arguments that would fail, or mean nothing, once the trainer is at work: refused with the recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distill.recipe.experiment import Recipe
from distill.recipe.learning import Train
from distill.recipe.trainer_args import check_trainer_args
from distill.trainers.arguments import build_arguments

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_eval_batch_size": -2}, "per_device_eval_batch_size must be at least 1, got -2"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"learning_rate": NAN}, "learning_rate must be a finite number, got nan"),
        ({"learning_rate": INF}, "learning_rate must be a finite number, got inf"),
        ({"learning_rate": -1e-4}, "learning_rate must be at least 0, got -0.0001"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1"),
        ({"neftune_noise_alpha": NAN}, "neftune_noise_alpha must be a finite number, got nan"),
        ({"neftune_noise_alpha": 0.0}, "neftune_noise_alpha must be greater than 0, got 0.0"),
        ({"num_train_epochs": 0.0}, "num_train_epochs must be greater than 0, got 0.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for no limit, got 0"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be at least 0 and less than 1, got 1.0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0"),
        ({"lr_scheduler_kwargs": {"min_lr": [NAN]}}, r"lr_scheduler_kwargs\.min_lr\[0\] must be a finite number, got nan"),
        ({"save_strategy": "best"}, "save_strategy best needs metric_for_best_model: one of .*eval_nll"),
        ({"save_only_model": True}, "save_only_model can't be true: a killed run couldn't go on"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size can't be true"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices can't be false"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy can't be batch_rebalance"),
        ({"accelerator_config": {"even_batches": False}}, r"accelerator_config\.even_batches would be ignored"),
        ({"metric_for_best_model": "eval_accuracy"}, "metric_for_best_model must be one of .*mean_token_accuracy.*, got 'eval_accuracy'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_values_that_can_t_come_right_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_trainer_args(given)


def test_values_that_can_are_taken() -> None:
    given = {"learning_rate": 0.0, "save_total_limit": 1, "max_steps": -1, "save_only_model": False, "save_strategy": "no"}
    assert check_trainer_args(given | {"metric_for_best_model": "eval_kl_lower_bound", "neftune_noise_alpha": 5.0}) is not None


@pytest.mark.parametrize(
    "given",
    [{"eval_strategy": "steps"}, {"eval_on_start": True}, {"load_best_model_at_end": True}, {"lr_scheduler_type": "greedy"}],
    ids=str,
)
def test_an_evaluation_needs_rows(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(given))} needs an evaluation while the student trains; set train.validation"):
        Train(trainer_args=given)
    assert Train(trainer_args=given, validation_prompts=4).validation_prompts == 4
    with pytest.raises(ValidationError, match="leave it out: there are no traces to evaluate on"):
        Train(method="on_policy", trainer_args=given)


def test_the_size_of_a_step_is_said_once() -> None:
    with pytest.raises(ValidationError, match=r"gradient_accumulation_steps follows from train\.global_batch_size"):
        Train(global_batch_size=16, trainer_args={"gradient_accumulation_steps": 2})
    sizes = [Train(global_batch_size=16, trainer_args={"per_device_train_batch_size": size}).identity() for size in (1, 4)]
    assert sizes[0] == sizes[1] != Train(global_batch_size=8).identity()  # how it is computed decides no row
    old = [Train(trainer_args={"per_device_train_batch_size": size}).identity() for size in (1, 4)]
    assert old[0] != old[1]


def test_a_seed_fits_into_every_generator() -> None:
    content = {"name": "x", "student": {"model": "m"}, "prompts": {"source": "s"}, "teacher": {"model": "m"}, "generate": {}}
    assert Recipe(**content, seed=2**31 - 1).seed
    with pytest.raises(ValidationError, match="seed"):
        Recipe(**content, seed=2**32)


def test_what_a_cpu_can_t_do_is_left_out_and_said(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from trl import SFTConfig

    from distill.trainers.arguments import precision_name

    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "fp16": True, "activation_offloading": True}
    found = build_arguments(SFTConfig, given)
    assert precision_name(found) == "fp32" and not found.activation_offloading and found.device == torch.device("cpu")
    assert "fp16 is left out: a CPU computes in fp32 here" in capsys.readouterr().out
