"""Optimizer steps of a trainer, as a user would run it: seconds from end to end of a step, tokens, and the most memory held."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from distill.recipe.experiment import Recipe
from distill.recipe.learning import Distillation
from distill.trainers.arguments import training_arguments
from distill.trainers.targets import StoredTargets
from distill.trainers.traces import TraceTrainer
from gpu_sections.frame import Figures

WARM_UP, MEASURED = 2, 5
Who = Literal["ours", "TRL"]


class StepClock(TrainerCallback):
    """Times whole steps, from the end of one to the end of the next, and knows the tokens of each.

    Args:
        device: Waited for at the end of each step.
        warm_up: Steps before those that count; the peak, too, counts from there.
    """

    def __init__(self, device: torch.device, warm_up: int = WARM_UP) -> None:
        self._cuda, self._warm_up = device.type == "cuda", warm_up
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes the time."""
        if self._cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self._cuda and len(self.ends) == self._warm_up:
            torch.cuda.reset_peak_memory_stats()

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Notes the tokens of a step, padding not among them."""
        sizes = [batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel() for batch in batches]
        self.tokens.append(int(sum(sizes)))

    @property
    def tokens_per_s(self) -> float:
        """Over the steps behind the warm-up."""
        return sum(self.tokens[self._warm_up : len(self.ends)]) / (self.ends[-1] - self.ends[self._warm_up - 1])

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step behind the warm-up."""
        return [end - start for start, end in zip(self.ends[self._warm_up - 1 :], self.ends[self._warm_up :])]


def make_trainer(
    who: Who,
    model: PreTrainedModel,
    rows: Dataset,
    tokens: PreTrainedTokenizerBase,
    *,
    stored: StoredTargets | None = None,
    steps: int = WARM_UP + MEASURED,
    warm_up: int = WARM_UP,
    full: bool = False,
    **arguments: Any,
) -> SFTTrainer:
    """A trainer on rows of token ids: the kit's with its own defaults, or TRL's as its documentation sets it up.

    Args:
        who: Whose.
        model: Trained in place.
        rows: Of `shapes.make_rows`.
        tokens: Their tokenizer.
        stored: Targets, for the kit's method kd.
        steps: Optimizer steps.
        warm_up: See `StepClock`.
        full: Train every weight; else LoRA of rank 32 on all linear layers.
        arguments: Of SFTConfig, for both alike.
    """
    device = model.device
    common = {"max_steps": steps, "gradient_accumulation_steps": 1, "gradient_checkpointing": True, "save_strategy": "no"} | arguments
    limit: Any = common.pop("max_length")
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    recipe = _recipe(full, limit, common)
    args = training_arguments(recipe, recipe.train, Path(folder.name), device)
    if who == "TRL":
        # The same rows in the same order, none cut, in the same precision; what is not named here is TRL's own default.
        chosen = {name: getattr(args, name) for name in ("max_length", "bf16", "fp16", "use_cpu", "learning_rate", "seed")}
        args = SFTConfig(output_dir=folder.name, report_to="none", **(chosen | common))
    adapter = None if full else LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    given: dict[str, Any] = {"model": model, "args": args, "train_dataset": rows, "processing_class": tokens, "peft_config": adapter}
    clock = StepClock(device, warm_up)
    given["callbacks"] = [clock]
    objective = None if stored is None else Distillation().objective(stored.target)
    trainer: Any = SFTTrainer(**given) if who == "TRL" else TraceTrainer(stored=stored, objective=objective, **given)
    trainer.bench_folder = folder  # goes when the trainer goes
    _counted(trainer, clock)
    return trainer  # type: ignore[no-any-return]


def _counted(trainer: Any, clock: StepClock) -> None:
    """Lets the clock see the batches of each step."""
    plain = trainer.get_batch_samples

    def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
        batches, num_items = plain(*args, **kwargs)
        if batches:
            clock.count(batches)
        return batches, num_items

    trainer.get_batch_samples = get_batch_samples


def _recipe(full: bool, limit: int, trainer_args: dict[str, Any]) -> Recipe:
    adapter = {"type": "full"} if full else {"type": "lora"}
    return Recipe.model_validate(
        {
            "name": "bench",
            "student": {"model": "random", "adapter": adapter},
            "prompts": {"source": "none.jsonl"},
            "traces": {"source": "none.jsonl"},
            "train": {"max_length": limit, "trainer_args": {**trainer_args, "disable_tqdm": True}},
            "evaluate": None,
        }
    )


def measure(trainer: SFTTrainer) -> Figures:
    """Median milliseconds of a step, tokens a step and a second over all measured ones, and the peak in GiB (0 on a CPU).

    Args:
        trainer: Of `make_trainer`.
    """
    [clock] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepClock)]
    with quiet():
        trainer.train()
    step_s = statistics.median(clock.step_s)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    mean_s = statistics.mean(clock.step_s)
    return {
        "step_ms": 1e3 * step_s,
        "mean_step_ms": 1e3 * mean_s,
        "tokens_per_step": clock.tokens_per_s * mean_s,
        "tokens_per_s": clock.tokens_per_s,
        "peak_gib": peak,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines and bars that a trainer prints."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        yield


def profile(trainer: SFTTrainer, loss: tuple[Any, str]) -> Figures:
    """Median milliseconds of a step's parts; each is waited for, so their sum is more than an undisturbed step.

    The kit takes the loss's gradients in the forward, TRL in the backward: compare forward and backward together.

    Args:
        trainer: Of `make_trainer`.
        loss: The object and the name of its function that the loss is computed by, a part of the forward.
    """
    spent: dict[str, list[float]] = {"data": [], "forward": [], "loss": [], "backward": [], "optimizer": []}
    _timed(trainer, "get_batch_samples", spent["data"])
    _timed(trainer, "compute_loss", spent["forward"])
    _timed(trainer.accelerator, "backward", spent["backward"])
    plain_optimizer = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = plain_optimizer(*args, **kwargs)
        _timed(optimizer, "step", spent["optimizer"])
        return optimizer

    trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]
    before = getattr(*loss)
    _timed(*loss, spent["loss"])
    try:
        with quiet():
            trainer.train()
    finally:
        setattr(*loss, before)
    found = {f"{part}_ms": 1e3 * statistics.median(times[WARM_UP:]) for part, times in spent.items() if len(times) > WARM_UP}
    if "loss_ms" in found and "forward_ms" in found:
        found["forward_ms"] -= found["loss_ms"]
    return found


def _timed(owner: Any, name: str, spent: list[float]) -> None:
    """Lets a function note the seconds of each call."""
    plain: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        result = plain(*args, **kwargs)
        spent.append(_now() - start)
        return result

    setattr(owner, name, timed)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
