"""Which traces are trained on: those that fit, drawn where a share is wanted, some prompts kept apart. Told by number, never copied."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable
from numpy.typing import NDArray

from distill.errors import DataError
from distill.models.chat import ChatFormat
from distill.recipe.learning import Train
from distill.run.clock import is_main_process
from distill.run.log import say
from distill.trainers.encoded import EncodedTraces, encoded_traces, keep_only, rows_name
from distill.trainers.targets import StoredTargets

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class TraceTable:
    """A table of traces to train on."""

    folder: Path
    """Of the stage that wrote them."""
    name: str
    """Of the table in it."""
    share_of_rest: float | None = None
    """How many of its rows are taken, drawn by the seed, as a share of all rows of the other tables; null takes all."""
    draw_seed: int = 0
    """Of that drawing: another in each round."""


class TrainingRows(NamedTuple):
    """What training reads."""

    dataset: Dataset
    """Columns `input_ids` and `labels`: not shifted, `IGNORE` on the prompt; with kd also `target_index`."""
    validation: Dataset | None
    """The same of the prompts that are not trained on; with `target_index` wherever there are targets."""
    drops: dict[str, int]
    """Rows that were left out, by reason."""
    rows_in: int
    num_tokens: int
    """Of all rows, prompts included."""


def training_rows(
    tables: Sequence[TraceTable], chat: ChatFormat, train: Train, cache: Path, seed: int, stored: StoredTargets | None = None
) -> TrainingRows:
    """The rows that fit into `train.max_length`.

    Their tokens are mapped into memory from the cache; what is held of a row are some numbers.

    Args:
        tables: Traces; the order is that of the sources of `stored`.
        chat: The student's tokenizer and template.
        train: Limit, what happens to longer rows, and prompts kept apart.
        cache: Folder for the memory-mapped rows; those of another training are deleted.
        seed: Of the validation prompts.
        stored: Where the targets of the rows are; None for none.

    Raises:
        DataError: no row is left.
        IntegrityError: a row has no targets, or not as many as supervised tokens.
    """
    if is_main_process():
        keep_only(cache, [rows_name(table.folder, chat, train, stored, number) for number, table in enumerate(tables)])
    parts = [encoded_traces(table.folder, table.name, chat, train, cache, stored, number) for number, table in enumerate(tables)]
    drops: Counter[str] = Counter()
    kept: list[Numbers] = []
    for part in parts:
        too_long = (part.lengths > train.max_length) if train.overlong == "drop" else np.zeros(len(part), dtype=bool)
        unsupervised = ~too_long & (part.supervised == 0)
        drops.update({"too_long": int(too_long.sum()), "no_supervised_token": int(unsupervised.sum())})
        kept.append(np.flatnonzero(~too_long & ~unsupervised))
    drawn = [_drawn(numbers, table, kept) for numbers, table in zip(kept, tables, strict=True)]
    drops["not_drawn"] = sum(map(len, kept)) - sum(map(len, drawn))
    starts = np.cumsum([0, *map(len, parts)])
    rows = np.concatenate([numbers + start for numbers, start in zip(drawn, starts, strict=False)])
    lengths = np.concatenate([part.lengths for part in parts])
    if not len(rows):
        raise DataError(
            f"train.max_length: none of {len(lengths):,} traces fits into {train.max_length:,} tokens; "
            f"the shortest has {lengths.min(initial=2**31 - 1):,}. Raise train.max_length."
        )
    rows, validation = _split(rows, parts, train.validation_prompts, seed)
    drops["validation"] = 0 if validation is None else len(validation)
    tokens = concatenate_datasets([part.tokens for part in parts])
    return TrainingRows(
        dataset=_chosen(tokens, rows, with_targets=train.method != "sft"),
        validation=None if validation is None else _chosen(tokens, validation),
        drops={reason: count for reason, count in drops.items() if count},
        rows_in=len(lengths),
        num_tokens=int(np.minimum(lengths[rows], train.max_length).sum()),
    )


def _drawn(rows: Numbers, table: TraceTable, all_rows: list[Numbers]) -> Numbers:
    if table.share_of_rest is None:
        return rows
    wanted = round(table.share_of_rest * sum(len(others) for others in all_rows if others is not rows))
    if wanted > len(rows):
        say(f"train     {wanted:,} of these traces were asked for, there are {len(rows):,}: {table.folder}")
    if wanted >= len(rows):
        return rows
    return rows[np.sort(np.random.default_rng(table.draw_seed).choice(len(rows), wanted, replace=False))]


def _split(rows: Numbers, parts: list[EncodedTraces], prompts: int, seed: int) -> tuple[Numbers, Numbers | None]:
    """Rows to train on, and those of so many prompts, drawn by their hash."""
    if not prompts:
        return rows, None
    ranks = np.fromiter((_rank(f"validation/{seed}/{name}") for part in parts for name in part.conversations()), np.uint64)[rows]
    known = np.unique(ranks)
    if prompts >= len(known):
        raise DataError(f"train.validation_prompts: {prompts:,} asked for, but the traces have {len(known):,} prompts. Lower it.")
    apart = ranks < known[prompts]
    return rows[~apart], rows[apart]


def _rank(text: str) -> int:
    """64 bits of a hash, in whose order prompts are drawn: two of a million are alike once in forty million runs."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _chosen(tokens: Dataset, rows: Numbers, with_targets: bool = True) -> Dataset:
    """Some rows, by number; `Dataset.select` would make a Python object of each."""
    names = ["input_ids", "labels", *(["target_index"] if with_targets and "target_index" in tokens.column_names else [])]
    if len(rows) < len(tokens):
        numbers = pa.array(rows, pa.uint64())
        tokens = Dataset(tokens.data, info=tokens.info, indices_table=InMemoryTable(pa.table({"indices": numbers})))
    return tokens.select_columns(names)
