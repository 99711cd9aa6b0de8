"""Which rows an optimizer step takes: the same on any number of processes, each row of an epoch once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from test_train import logged, losses, recipe, same, train  # noqa: F401
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distill.errors import RecipeError
from distill.recipe.steps import AT_ONCE, PASSES, step_size
from distill.trainers.batches import StandIn, StepBatches, order_of

Make = Callable[..., Path]


def dealt(rows: int, step: int, at_once: int, processes: int, **more: Any) -> list[list[list[int]]]:
    """Of each process its batches of the second epoch."""
    found = []
    for rank in range(processes):
        order = order_of(Dataset.from_dict({"input_ids": [[0]] * rows}), "random", 3, step)
        batches = StepBatches(order, rows, step, at_once, rank, processes, **more)
        batches.set_epoch(1)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


def steps(found: list[list[list[int]]], passes: int) -> list[set[int]]:
    """The rows of each optimizer step, which every process makes in as many passes."""
    assert len({len(batches) for batches in found}) == 1
    starts = range(0, len(found[0]), passes)
    return [{row for batches in found for batch in batches[start : start + passes] for row in batch} for start in starts]


@pytest.mark.parametrize("rows", [31, 32, 33, 1, 16])
@pytest.mark.parametrize(("processes", "at_once"), [(1, 16), (2, 8), (4, 4), (2, 1), (3, 2), (5, 1), (8, 2)])
def test_a_step_takes_the_same_rows_on_any_number_of_processes(rows: int, processes: int, at_once: int) -> None:
    alone, together = dealt(rows, 16, 16, 1), dealt(rows, 16, at_once, processes)
    passes = step_size(16, {AT_ONCE: at_once}, processes, True).passes
    assert steps(together, passes) == steps(alone, 1)
    seen = Counter(row for batches in together for batch in batches for row in batch)
    assert seen == Counter(range(rows))  # none twice, none left out
    assert max(len(batch) for batches in together for batch in batches) <= at_once


def test_epochs_have_orders_of_their_own() -> None:
    rows = Dataset.from_dict({"input_ids": [[0] * (1 + index % 7) for index in range(40)]})
    for strategy in ("random", "group_by_length"):
        order = order_of(rows, strategy, 3, 8)
        assert sorted(order(0)) == sorted(order(1)) == list(range(40)) and list(order(0)) != list(order(1))
        assert list(order(1)) == list(order_of(rows, strategy, 3, 8)(1)) != list(order_of(rows, strategy, 4, 8)(1))
    assert list(order_of(rows, "sequential", 3, 8)(1)) == list(range(40))
    rows = Dataset.from_dict({"input_ids": [[0] * (1 + index % 7) for index in range(400)]})
    lengths = np.array([len(row) for row in rows["input_ids"]])[order_of(rows, "group_by_length", 3, 8)(0)]
    assert np.ptp(lengths.reshape(50, 8), axis=1).mean() < 1


def test_a_shorter_last_step_is_left_out_unless_there_is_no_other() -> None:
    assert [len(batches) for batches in dealt(31, 16, 8, 2, drop_last=True)] == [1, 1]
    assert [len(batches) for batches in dealt(7, 16, 8, 2, drop_last=True)] == [1, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_process_without_a_row_takes_one_that_supervises_nothing(packed: bool) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]} | ({"seq_lengths": [3]} if packed else {})]
    collate = StandIn(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed), Dataset.from_list(rows))
    batch = collate([])
    assert batch["input_ids"].tolist() == [[5, 6, 7]] and batch["labels"].tolist() == [[-100, -100, -100]]
    assert collate(rows)["labels"].tolist()[0][1:] == [6, 7]


def test_what_a_process_takes_at_once_follows_from_the_rows_of_a_step() -> None:
    assert step_size(None, {}, 1, False) == (16, 1, 16) and step_size(None, {}, 4, False) == (16, 1, 4)
    assert step_size(None, {}, 1, True) == (16, 16, 1) and step_size(64, {}, 1, True) == (64, 32, 2)
    assert step_size(16, {AT_ONCE: 4}, 2, False) == (16, 4, 2) and step_size(16, {AT_ONCE: 64}, 2, False) == (16, 8, 1)
    assert step_size(16, {}, 3, False) == (16, 1, 6)  # dealt out as 6, 5 and 5
    # The keys that say it of each process go on doing so.
    assert step_size(None, {AT_ONCE: 4}, 2, True) == (8, 4, 1) and step_size(None, {AT_ONCE: 4}, 2, False) == (128, 4, 16)
    assert step_size(None, {PASSES: 8}, 1, False) == (8, 1, 8)


def test_what_trl_deals_out_must_come_out_even() -> None:
    assert step_size(70, {}, 2, True, whole=True) == (70, 7, 5)
    with pytest.raises(RecipeError, match=r"16 can't be dealt out evenly to 3 processes\. The nearest that can: 15 or 18"):
        step_size(16, {}, 3, False, whole=True)
    with pytest.raises(RecipeError, match=r"2 processes that take 32 at once\. The nearest that can: 64"):
        step_size(16, {AT_ONCE: 32}, 2, False, whole=True)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_the_same_recipe_learns_the_same_on_any_number_of_processes(packing: bool, recipe: Make) -> None:  # noqa: F811
    """31 rows divide by nothing; the packs of 31 rows neither. Losses, evaluation, weights."""
    length = {"max_length": 128} if packing else {}
    settings = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "eval_strategy": "epoch", "packing": packing}
    train_section = "  global_batch_size: 16\n  validation_prompts: 5\n"
    found = {}
    for processes in (1, 2, 3):
        path = recipe(f"on{processes}", trainer_args=settings | {"per_device_eval_batch_size": 2}, train=train_section, count=36)
        if length:
            path.write_text(path.read_text().replace("max_length: 256", "max_length: 128"))
        found[processes] = train(path, processes=processes if processes > 1 else 0)
    for processes in (2, 3):
        same(found[1], found[processes])
        assert len(losses(found[1])) == len(losses(found[processes])) >= 2
        for name in ("eval_loss", "eval_nll", "nll", "num_tokens", "grad_norm", "learning_rate"):
            assert logged(found[processes], name) == pytest.approx(logged(found[1], name), rel=1e-5), name
