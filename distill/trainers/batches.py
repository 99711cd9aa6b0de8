"""Which rows an optimizer step takes: the same on any number of processes, every row of an epoch once.

Loaders of accelerate deal batches out in turn, and repeat rows where they don't come out even, so that a row is trained on twice and
the rows of a step depend on the number of processes. Here a step is so many rows of the epoch's order, the last of an epoch the rest;
each process takes its share of them. One without a row takes a stand-in that supervises nothing: the loss is divided by the
supervised tokens of the whole step, so it counts nothing, but every process passes through the model equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers.trainer_pt_utils import get_length_grouped_indices

from distill.models.chat import IGNORE

Order = Callable[[int], NDArray[np.int64]]
_STAND_IN_TOKENS = 8


class StepBatches:
    """One process's batches of an epoch, as numbers of rows; some may be empty. For `DataLoader(batch_sampler=...)`.

    Args:
        order: Of the rows in an epoch, by its number.
        rows: How many there are.
        step: Rows that all processes take together between two optimizer steps.
        at_once: Most rows of one process in a batch.
        rank: Of this process among those that share a step.
        processes: That share a step.
        drop_last: Leave a shorter step at the end of an epoch out, unless there is no other.
    """

    def __init__(
        self, order: Order, rows: int, step: int, at_once: int, rank: int = 0, processes: int = 1, drop_last: bool = False
    ) -> None:
        self._order, self._step, self._at_once, self._rank, self._processes = order, step, at_once, rank, processes
        self._ends = rows - rows % step if drop_last and rows >= step else rows
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; the trainer calls it before each epoch."""
        self._epoch = epoch

    def _passes(self, start: int) -> int:
        share = -(-min(self._step, self._ends - start) // self._processes)
        return -(-share // self._at_once)

    def __len__(self) -> int:
        return sum(map(self._passes, range(0, self._ends, self._step)))

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self._epoch)
        for start in range(0, self._ends, self._step):
            own = np.array_split(order[start : min(start + self._step, self._ends)], self._processes)[self._rank]
            for batch in np.array_split(own, self._passes(start)):
                yield batch.tolist()


class StandIn:
    """A collator for batches that may be empty: such a one becomes some tokens of a row, none of them supervised.

    Args:
        collate: For the others.
        rows: At least one.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], rows: Dataset) -> None:
        self._collate = collate
        self._row = {name: list(value)[:_STAND_IN_TOKENS] for name, value in rows[0].items()}
        tokens = len(self._row["input_ids"])
        self._row["labels"] = [IGNORE] * tokens
        if "seq_lengths" in self._row:  # of a pack
            self._row["seq_lengths"] = [tokens]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch."""
        return self._collate(examples or [self._row])


def order_of(rows: Dataset, strategy: str, seed: int, step: int) -> Order:
    """The order of the rows in each epoch, whatever the number of processes.

    Args:
        rows: With `input_ids`.
        strategy: `random`, `sequential` or `group_by_length`, as transformers calls them.
        seed: Of the order; every epoch has its own.
        step: Rows of an optimizer step, among which lengths are alike where they are grouped.
    """
    if strategy == "sequential":
        return lambda epoch: np.arange(len(rows))
    if strategy == "group_by_length":
        pieces = rows.select_columns(["input_ids"]).with_format("arrow").iter(1000)
        lengths = np.concatenate([pc.list_value_length(piece["input_ids"].combine_chunks()).to_numpy() for piece in pieces]).tolist()

        def grouped(epoch: int) -> NDArray[np.int64]:
            return np.array(get_length_grouped_indices(lengths, step, generator=torch.Generator().manual_seed(_mixed(seed, epoch))))

        return grouped
    return lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows))


def _mixed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
