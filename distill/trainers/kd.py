"""`train.method: kd`: TRL's SFTTrainer with the teacher's stored distributions as the loss.

All that differs from `sft` is here: the loss is computed inside the model's own forward, so that DDP, FSDP and DeepSpeed
see a plain module that returns it; and its sums are averaged over tokens, whatever the batches were.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from trl import SFTTrainer, pack_dataset
from trl.trainer.utils import maybe_gather_lm_head_ctx

from distill.chat import IGNORE
from distill.errors import ModelError, RecipeError
from distill.heads import backbone, head_of
from distill.losses.distillation import DistillationLoss, distillation_loss
from distill.losses.settings import Objective
from distill.recipe_learning import DEEPSPEED_HAS_NO_PARTS, SchedulePart
from distill.trainers.targets import StepTargets, StoredTargets, TargetCollator

# Name in the log: the sum it comes from, and what it is divided by.
_METRICS = {
    "kd": ("kd", "num_targets"),
    "nll": ("nll", "num_positions"),
    "entropy": ("student_entropy", "num_positions"),
    "kl": ("forward_kl", "num_targets"),
    "log_ratio": ("log_ratio", "num_targets"),
    "top1_agreement": ("top1_agreements", "num_targets"),
    "target_share": ("num_targets", "num_positions"),
}


class _BatchSums:
    """Sums over a batch's supervised tokens, as one tensor, so that the ranks exchange them at once.

    A plain class, so that FSDP does not round them; see `StepTargets`.
    """

    def __init__(self, names: list[str], values: Tensor) -> None:
        self.names, self.values = names, values


class KDTrainer(SFTTrainer):
    """Trains on rows of `input_ids`, `labels` and `target_index`.

    The loss is divided by the supervised tokens of the whole optimizer step over all ranks, as SFTTrainer's. Logged beside
    it, averaged over tokens: `kd` (the distillation term), `nll`, `entropy` of the student; of top_k targets also `kl`, the
    forward KL to the teacher, and `top1_agreement`; of chosen_token ones `log_ratio`; `target_share`, the share of
    supervised tokens that have a target.

    Args:
        stored: The targets.
        objective: The loss.
        half_life: Tokens into an answer after which a token counts half; None weighs all alike.
        part: Of the learning rate's schedule; all of it, or one of so many equal parts that follow each other.
        kwargs: SFTTrainer's.

    Raises:
        ModelError: the launch splits sequences over processes.
        RecipeError: only a part of the schedule is wanted, and DeepSpeed's config has one of its own, which can't be divided.
    """

    def __init__(
        self,
        *,
        stored: StoredTargets,
        objective: Objective,
        half_life: int | None = None,
        part: SchedulePart = SchedulePart(),  # noqa: B008 (immutable)
        **kwargs: Any,
    ) -> None:
        self._part = part
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        super().__init__(**kwargs)
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ModelError("train: method kd has targets of whole sequences. Leave context and sequence parallelism out of the launch.")
        plugin = self.accelerator.state.deepspeed_plugin
        if part.of > 1 and plugin is not None and "scheduler" in plugin.deepspeed_config:
            raise RecipeError(f"rollouts.schedule_over: {DEEPSPEED_HAS_NO_PARTS}")
        self.data_collator = TargetCollator(self.data_collator, stored, half_life)
        model: Any = self.model
        add_distillation_head(model.get_base_model() if hasattr(model, "peft_config") else model, stored.vocab_size, objective)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate's schedule, or this training's part of it.

        Raises:
            RecipeError: the optimizer brings a schedule that has no parts.
        """
        number, of = self._part
        if of == 1 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        whole: Any = super().create_scheduler(num_training_steps * of, optimizer)
        if not isinstance(whole, LambdaLR):  # a layer-wise optimizer brings one of its own
            raise RecipeError(f"rollouts.schedule_over: optimizer {self.args.optim} has a schedule that can't be divided. Set each_round.")
        start = num_training_steps * (number - 1)
        self.lr_scheduler = LambdaLR(whole.optimizer, [functools.partial(_later, schedule, start) for schedule in whole.lr_lambdas])
        return self.lr_scheduler

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *others: Any) -> Any:
        """Rows are tokens already; SFTTrainer's own would drop `target_index` when it packs."""
        if not packing:
            return dataset
        shuffled = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        return pack_dataset(shuffled, args.max_length, args.packing_strategy)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "labels", "seq_lengths", "target_index"]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of a batch, divided by the supervised tokens of the optimizer step.

        Raises:
            ModelError: the outputs were asked for, which this trainer never computes.
        """
        if return_outputs:
            raise ModelError("train: method kd has no logits to return. Leave compute_metrics out.")
        outputs = model(**inputs, use_cache=False)
        mode = self._mode
        sums: _BatchSums = outputs["sums"]
        for name, value in zip(sums.names, self.accelerator.reduce(sums.values, reduction="sum").tolist(), strict=True):
            self._sums[mode][name] += value
        num_tokens = outputs["num_positions"] if num_items_in_batch is None else num_items_in_batch
        # FSDP gives the loss in the type of the weights; its value, unlike its gradient, needs more than three digits.
        loss = outputs["loss"] + (sums.values[sums.names.index("loss")] - outputs["loss"].detach())
        loss = loss / torch.as_tensor(num_tokens, device=outputs["loss"].device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and FSDP average gradients over the ranks
        if mode == "train":
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else torch.tensor(inputs["input_ids"].numel())
            self._total_train_tokens += int(self.accelerator.reduce(seen.to(loss.device), reduction="sum"))
        return loss

    @property
    def _mode(self) -> str:
        model: Any = self.model
        return "train" if model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs with the averages since the last time."""
        mode = self._mode
        sums, prefix = self._sums[mode], "" if mode == "train" else "eval_"
        for name, (total, count) in _METRICS.items():
            if total in sums and sums[count]:
                logs[prefix + name] = sums[total] / sums[count]
        if mode == "train":
            logs["num_tokens"] = self._total_train_tokens
        elif sums["num_positions"]:
            logs["eval_loss"] = sums["loss"] / sums["num_positions"]  # SFTTrainer averages over batches, which differ in size
        sums.clear()
        super().log(logs, start_time)


def _later(schedule: Callable[[int], float], start: int, step: int) -> float:
    return schedule(start + step)


def add_distillation_head(model: PreTrainedModel, vocab_size: int, objective: Objective) -> None:
    """Lets `model(..., labels=..., distillation=StepTargets)` return the loss instead of logits.

    The result is a dictionary: `loss`, the sum over supervised tokens, which alone has a gradient; `num_positions`; and
    `sums`, a `_BatchSums`. Without `distillation` the forward is the one it was.

    Args:
        model: A causal language model, not wrapped by peft.
        vocab_size: Number of token ids.
        objective: The loss.
    """
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads its signature
    def forward(self: PreTrainedModel, *args: Any, distillation: StepTargets | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return plain(*args, **kwargs)
        labels_BT = kwargs.pop("labels")
        hidden_BTH = backbone(self)(*args, **kwargs).last_hidden_state[:, :-1]
        layer: Any = self.get_output_embeddings()
        labels_BT = labels_BT[:, 1:].to(layer.weight.device)
        supervised_BT = labels_BT != IGNORE
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):  # DeepSpeed ZeRO-3 leaves the weight empty until then
            found = distillation_loss(
                hidden_BTH.to(labels_BT.device)[supervised_BT],
                head_of(self, vocab_size),
                labels_BT[supervised_BT],
                distillation.sparse,
                divergence=objective.divergence,
                jsd_beta=objective.jsd_beta,
                temperature=objective.temperature,
                kd_weight=objective.kd_weight,
                nll_weight=objective.nll_weight,
                position_weights_N=distillation.weights_M,
                falls_back_N=distillation.falls_back_M,
            )
        return {"loss": found.loss, "num_positions": found.num_positions, "sums": _sums(found)}

    model.forward = types.MethodType(forward, model)


def _sums(found: DistillationLoss) -> _BatchSums:
    fields = {"loss", *(name for pair in _METRICS.values() for name in pair)}
    known = {name: value for name in sorted(fields) if (value := getattr(found, name)) is not None}
    values = [torch.as_tensor(value, dtype=torch.float32, device=found.loss.device).detach() for value in known.values()]
    return _BatchSums(list(known), torch.stack(values))
