"""Methods `sft` and `kd`: TRL's SFTTrainer with the kit's own loss, on finished traces.

All that differs from TRL's is here: the loss is computed inside the model's own forward (`trainers.losshead`), with its
gradients taken on the way instead of a second product with the head; and its sums are averaged over tokens, whatever the
batches were. They stay on the device until they are logged.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker
from trl import SFTTrainer, pack_dataset

from distill.errors import ModelError, RecipeError
from distill.losses.settings import Objective
from distill.models.chat import IGNORE
from distill.models.probes import check_head, check_packing, is_whole, stand_in
from distill.recipe.learning import DEEPSPEED_HAS_NO_PARTS, SchedulePart
from distill.trainers.batches import StandIn, StepBatches, order_of
from distill.trainers.losshead import BatchSums, Divisor, add_loss_head
from distill.trainers.targets import StoredTargets, TargetCollator

# Name in the log: the sum it comes from, and what it is divided by.
_ALWAYS = {
    "nll": ("nll", "weight"),
    "entropy": ("student_entropy", "num_positions"),
    "mean_token_accuracy": ("hits", "num_positions"),
}
_ON_TARGETS = {
    "kd": ("kd", "target_weight"),
    "kl_lower_bound": ("kl_lower_bound", "num_targets"),
    "log_ratio": ("log_ratio", "num_targets"),
    "top1_agreement": ("top1_agreements", "num_targets"),
    "target_share": ("num_targets", "num_positions"),
}


class TraceTrainer(SFTTrainer):
    """Trains on rows of `input_ids` and `labels`, and with targets `target_index`.

    The loss is divided by the supervised tokens of the whole optimizer step over all ranks, as SFTTrainer's (weighted ones by the sum of
    their weights). Logged beside
    it, averaged over tokens: `nll`, `entropy` of the student, `mean_token_accuracy`. Of batches with targets also `kd` (the
    distillation term), `target_share` (the share of supervised tokens that have one), of top_k targets `kl_lower_bound`,
    at most the forward KL from the teacher, and `top1_agreement`; of chosen_token ones `log_ratio`.

    Where a loss of TRL's own is asked for (`loss_type: dft`, label smoothing, a router's loss), the likelihood is left to it.

    Args:
        stored: The targets; None learns from the traces alone.
        objective: The loss on them; None without them.
        half_life: Tokens into an answer after which a token counts half; None weighs all alike.
        part: Of the learning rate's schedule; all of it, or one of so many equal parts that follow each other.
        step_rows: Rows of an optimizer step over all processes; None for as many as the arguments have room for.
        kwargs: SFTTrainer's.

    Raises:
        ModelError: the model's logits are not those of its head; its rows see each other where they are packed; or its routers' loss
            can't be computed.
        RecipeError: only a part of the schedule is wanted, and DeepSpeed's config has one of its own, which can't be divided.
    """

    def __init__(
        self,
        *,
        stored: StoredTargets | None = None,
        objective: Objective | None = None,
        half_life: int | None = None,
        part: SchedulePart = SchedulePart(),  # noqa: B008 (immutable)
        step_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._part, self._step_rows = part, step_rows
        self._sums: dict[str, BatchSums | None] = {"train": None, "eval": None}
        self._seen: Tensor | int = 0
        self._evaluated: Tensor | int = 0  # TRL's loss on the validation rows so far, and their supervised tokens
        super().__init__(**kwargs)
        plugin = self.accelerator.state.deepspeed_plugin
        if part.of > 1 and plugin is not None and "scheduler" in plugin.deepspeed_config:
            raise RecipeError(f"rollouts.schedule_over: {DEEPSPEED_HAS_NO_PARTS}")
        arguments: Any = self.args
        self._loss_is_trls = arguments.loss_type != "nll" or arguments.label_smoothing_factor > 0 or self.aux_loss_enabled
        model: Any = self.model
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        tried = plain if is_whole(plain) else stand_in(plain)
        check_head(tried)
        if self.padding_free:
            check_packing(tried, self.data_collator)
        if self.aux_loss_enabled and not hasattr(plain.config.get_text_config(), "num_experts"):
            raise ModelError(
                f"{type(plain).__name__}: TRL can't compute the loss that balances its routers, whose number its config names otherwise. "
                "Set train.trainer_args.router_aux_loss_coef: 0."
            )
        if stored is not None:
            self.data_collator = TargetCollator(self.data_collator, stored, half_life)
        add_loss_head(plain, None if stored is None else stored.vocab_size, objective)

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

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of which every optimizer step takes the same rows on any number of processes."""
        arguments, rows = self.args, cast(Dataset, self.train_dataset)
        at_once, processes = self._train_batch_size, arguments.world_size
        step = min(self._step_rows or sys.maxsize, at_once * arguments.gradient_accumulation_steps * processes)
        order = order_of(rows, arguments.train_sampling_strategy, arguments.seed, step)
        drop_last = arguments.dataloader_drop_last
        return self._loader(rows, StepBatches(order, len(rows), step, at_once, arguments.process_index, processes, drop_last), seeded=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches that together are every row once."""
        arguments, rows = self.args, cast(Dataset, self.eval_dataset if eval_dataset is None else eval_dataset)
        at_once, processes = arguments.eval_batch_size, arguments.world_size
        order = order_of(rows, "sequential", arguments.seed, 1)
        return self._loader(rows, StepBatches(order, len(rows), at_once * processes, at_once, arguments.process_index, processes))

    def _loader(self, rows: Dataset, batches: StepBatches, *, seeded: bool = False) -> DataLoader[Any]:
        arguments = self.args
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=StandIn(self.data_collator, rows),
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers and seeded,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            in_order=arguments.dataloader_in_order,
            worker_init_fn=functools.partial(seed_worker, num_workers=arguments.dataloader_num_workers, rank=arguments.process_index)
            if seeded
            else None,
        )
        # For one process: the batches are those of this one already.
        prepared: DataLoader[Any] = prepare_data_loader(loader, arguments.device, num_processes=1, process_index=0, put_on_device=True)
        return prepared

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *others: Any) -> Any:
        """Rows are tokens already; SFTTrainer's own would drop `target_index` when it packs."""

        def shuffled(rows: Any) -> Any:
            return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows

        return shuffled(pack_dataset(shuffled(dataset), args.max_length, args.packing_strategy) if packing else dataset)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "labels", "seq_lengths", "target_index"]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of a batch, divided by the supervised tokens of the optimizer step.

        Raises:
            ModelError: the outputs were asked for, which this loss never computes.
        """
        if self._loss_is_trls:
            return self._loss_of_trl(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise ModelError("train: the loss has no logits to return. Leave compute_metrics out.")
        divisor = None
        if num_items_in_batch is not None:  # DDP and FSDP average gradients over the ranks
            divisor = Divisor(torch.as_tensor(num_items_in_batch, device=self.args.device).clamp(min=1) / self.accelerator.num_processes)
        outputs = model(**inputs, use_cache=False, trace_loss=True, divisor=divisor)
        sums, num_positions = outputs["sums"], outputs["num_positions"]
        # FSDP gives the loss in the type of the weights; its value needs more than three digits.
        exact = sums.of("loss").float() / (max(num_positions, 1) if divisor is None else divisor.value)
        loss = outputs["loss"] + (exact - outputs["loss"].detach())
        self._add(sums)
        if self._mode == "train" and num_positions:  # no stand-in
            self._seen = self._seen + (inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel())
        return loss

    def _loss_of_trl(self, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        if "distillation" in inputs:
            with torch.no_grad():
                self._add(model(**inputs, use_cache=False, trace_loss=True)["sums"])
        plain = {name: value for name, value in inputs.items() if name != "distillation"}
        found = super().compute_loss(model, plain, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if self._mode == "eval":  # a mean over the batch, none of whose tokens may be supervised
            loss: Tensor = found[0] if return_outputs else found
            count = (plain["labels"][..., 1:] != IGNORE).sum()
            self._evaluated = self._evaluated + torch.stack([loss.detach().nan_to_num(0) * count, count])
        return found

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Supervised tokens of a step over all ranks; where they are weighted, the sum of their weights."""
        weights = [batch["distillation"].weights_M for batch in batch_samples if "distillation" in batch]
        if not weights or weights[0] is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        return self.accelerator.gather(torch.cat(weights).sum().to(device)).sum()

    def sums(self) -> dict[str, Any] | None:
        """What this process has summed up since the last log, as JSON values, for a run that goes on from here."""
        sums = self._sums["train"]
        if sums is None:
            return None
        return {"names": sums.names, "values": sums.values.tolist(), "seen": int(self._seen)}

    def restore(self, found: dict[str, Any]) -> None:
        """Takes what `sums` gave up again."""
        self._sums["train"], self._seen = BatchSums.of_values(found["names"], found["values"], self.args.device), found["seen"]

    def _add(self, sums: BatchSums) -> None:
        before = self._sums[self._mode]
        if before is not None:
            sums.values += before.values
        self._sums[self._mode] = sums

    @property
    def _mode(self) -> str:
        model: Any = self.model
        return "train" if model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs with the averages since the last time, over all ranks."""
        mode = self._mode
        sums, self._sums[mode] = self._sums[mode], None
        if mode == "eval" and isinstance(self._evaluated, Tensor):
            loss, count = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
            logs["eval_loss"], self._evaluated = loss / max(count, 1), 0
        if sums is not None:
            logs |= self._averages(sums, "" if mode == "train" else "eval_")
        super().log(logs, start_time)

    def _averages(self, sums: BatchSums, prefix: str) -> dict[str, float]:
        seen = torch.as_tensor(self._seen, device=sums.values.device, dtype=sums.values.dtype)
        *totals, seen_by_all = self.accelerator.reduce(torch.cat([sums.values, seen[None]]), reduction="sum").tolist()
        total = dict(zip(sums.names, totals, strict=True))
        names = _ALWAYS | (_ON_TARGETS if total["num_targets"] else {})
        found = {prefix + name: total[of] / total[by] for name, (of, by) in names.items() if of in total and total[by]}
        if prefix:
            # SFTTrainer averages over batches, which differ in size.
            averages = not self._loss_is_trls and total["num_positions"]
            return found | ({"eval_loss": total["loss"] / total["weight"]} if averages else {})
        self._total_train_tokens += int(seen_by_all)
        self._seen = 0
        return found | {"num_tokens": self._total_train_tokens}


def _later(schedule: Callable[[int], float], start: int, step: int) -> float:
    return schedule(start + step)
