"""Values of trainer arguments that TRL and transformers take, and that fail, or mean nothing, once the trainer is at work.

What the names mean is theirs; here stands what would be found out only after the teacher was paid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers that an argument may be; without end upwards unless one is named."""

    least: float = 0
    below: float = math.inf
    without_least: bool = False

    def __str__(self) -> str:
        least = f"{'greater than' if self.without_least else 'at least'} {self.least:g}"
        return least + (f" and less than {self.below:g}" if self.below < math.inf else "")

    def has(self, value: float) -> bool:
        """Whether a number is among them."""
        return (value > self.least if self.without_least else value >= self.least) and value < self.below


_COUNTS = Range(1)
_POSITIVE = Range(0, without_least=True)
_RANGES: dict[str, Range] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), _COUNTS),
    **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor", "save_total_limit"), _COUNTS),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "adam_epsilon", "neftune_noise_alpha"), _POSITIVE),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "eval_delay"), Range()),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(0, 1)),
    **dict.fromkeys(("ddp_timeout", "ddp_bucket_cap_mb"), _COUNTS),
}
_REFUSED: dict[tuple[str, Any], str] = {
    ("save_only_model", True): "a killed run couldn't go on from a checkpoint without optimizer; save_total_limit says how many stay",
    ("ignore_data_skip", True): "a run that goes on would train on the same rows again",
    ("auto_find_batch_size", True): "a step would take fewer rows than it was asked to; set train.global_batch_size, and lower "
    "per_device_train_batch_size until it fits",
    ("average_tokens_across_devices", False): "the loss of a step would depend on how its rows are dealt out to processes",
    ("train_sampling_strategy", "batch_rebalance"): "it deals rows out by the number of processes, and repeats some; take group_by_length",
}
_DEALT_BY_ACCELERATE = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
_EVAL_METRICS = frozenset(
    {"loss", "nll", "entropy", "mean_token_accuracy", "kd", "kl_lower_bound", "log_ratio", "top1_agreement", "target_share"}
    | {"runtime", "samples_per_second", "steps_per_second"}
)


def check_trainer_values(given: Mapping[str, Any]) -> None:
    """Looks at values whose types are right.

    Raises:
        ValueError: one is out of range, no number, or refused; the message starts with its field.
    """
    for name, value in given.items():
        for place, number in _numbers(name, value):
            if not math.isfinite(number):
                raise ValueError(f"{place} must be a finite number, got {number}")
        allowed = _RANGES.get(name)
        if allowed is not None and isinstance(value, int | float) and not allowed.has(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if isinstance(value, str | bool) and (name, value) in _REFUSED:
            raise ValueError(f"{name} can't be {str(value).lower()}: {_REFUSED[name, value]}")
    steps = given.get("max_steps")
    if isinstance(steps, int) and steps != -1 and steps < 1:
        raise ValueError(f"max_steps must be at least 1, or -1 for no limit, got {steps}")
    dealt = sorted(set(_DEALT_BY_ACCELERATE) & set(given.get("accelerator_config") or {}))
    if dealt:
        raise ValueError(f"accelerator_config.{dealt[0]} would be ignored: the kit deals rows out to processes itself")
    metric, known = given.get("metric_for_best_model"), ", ".join(f"eval_{name}" for name in sorted(_EVAL_METRICS))
    if isinstance(metric, str) and metric.removeprefix("eval_") not in _EVAL_METRICS:
        raise ValueError(f"metric_for_best_model must be one of {known}, got {metric!r}")
    if metric is None and given.get("save_strategy") == "best":
        raise ValueError(f"save_strategy best needs metric_for_best_model: one of {known}")


def needs_evaluation(given: Mapping[str, Any]) -> str | None:
    """The first argument that asks for an evaluation while the student trains; None where none does."""
    asks = {
        "eval_strategy": given.get("eval_strategy", "no") not in ("no", False),
        "eval_on_start": given.get("eval_on_start") is True,
        "load_best_model_at_end": given.get("load_best_model_at_end") is True,
        "metric_for_best_model": given.get("metric_for_best_model") is not None,
        "lr_scheduler_type": given.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"),
    }
    return next((name for name, asked in asks.items() if asked), None)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a value, with the place where it stands."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{name}.{key}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(f"{name}[{index}]", item)
