"""Traces as training rows: token ids and labels, over-long ones dropped and counted, never held in memory whole."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets, disable_progress_bars, enable_progress_bars, load_dataset

from distill.errors import DataError
from distill.models.chat import IGNORE, ChatFormat
from distill.recipe.learning import Train
from distill.run.log import say
from distill.trainers.targets import NO_TARGET, StoredTargets


@dataclass(frozen=True)
class TraceTable:
    """A table of traces to train on."""

    files: list[Path]
    """Parquet files."""
    digest: str
    """Digest of their content."""
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

    Args:
        tables: Traces; the order is that of the sources of `stored`.
        chat: The student's tokenizer and template.
        train: Limit, what happens to longer rows, and prompts kept apart.
        cache: Folder for the memory-mapped rows.
        seed: Of the validation prompts.
        stored: Where the targets of the rows are; None for none.

    Raises:
        DataError: no row is left.
        IntegrityError: a row has no targets, or not as many as supervised tokens.
    """
    parts = [_encoded(table, number, chat, train, cache, stored) for number, table in enumerate(tables)]
    drops: Counter[str] = Counter()
    kept: list[Dataset] = []
    for rows in parts:
        lengths, supervised = np.array(rows["length"]), np.array(rows["supervised"])
        too_long = (lengths > train.max_length) if train.overlong == "drop" else np.zeros(len(rows), dtype=bool)
        unsupervised = ~too_long & (supervised == 0)
        drops.update({"too_long": int(too_long.sum()), "no_supervised_token": int(unsupervised.sum())})
        kept.append(rows.select(np.flatnonzero(~too_long & ~unsupervised)))
    drawn = [_drawn(rows, table, kept) for rows, table in zip(kept, tables, strict=True)]
    drops["not_drawn"] = sum(map(len, kept)) - sum(map(len, drawn))
    rows = concatenate_datasets(drawn)
    if not len(rows):
        shortest = min(min(part["length"]) for part in parts if len(part))
        raise DataError(
            f"train.max_length: none of {sum(map(len, parts)):,} traces fits into {train.max_length:,} tokens; "
            f"the shortest has {shortest:,}. Raise train.max_length."
        )
    rows, validation = _split(rows, train.validation_prompts, seed)
    drops["validation"] = 0 if validation is None else len(validation)
    return TrainingRows(
        dataset=_columns(rows, with_targets=train.method != "sft"),
        validation=None if validation is None else _columns(validation),
        drops={reason: count for reason, count in drops.items() if count},
        rows_in=sum(map(len, parts)),
        num_tokens=int(np.minimum(np.array(rows["length"]), train.max_length).sum()),
    )


def _encoded(table: TraceTable, number: int, chat: ChatFormat, train: Train, cache: Path, stored: StoredTargets | None) -> Dataset:
    """A row a trace, over-long ones included; the result of an earlier, killed run is found in the cache."""
    content = [table.digest, chat.tokenizer_digest, chat.template_digest, train.max_length, train.overlong, number, stored is not None]
    name = hashlib.sha256(" ".join(map(str, content)).encode()).hexdigest()[:16]
    disable_progress_bars()  # of the reading, which takes no time
    traces = load_dataset("parquet", data_files=[str(file) for file in table.files], split="train", cache_dir=str(cache))
    enable_progress_bars()

    def encode(trace: dict[str, Any]) -> dict[str, Any]:
        input_ids, labels = chat.trace_row(trace)
        length = len(input_ids)
        if train.overlong == "cut":
            input_ids, labels = input_ids[: train.max_length], labels[: train.max_length]
        places = np.flatnonzero(np.array(labels) != IGNORE)
        row = {"input_ids": input_ids, "labels": labels, "length": length, "supervised": len(places), "prompt_id": trace["prompt_id"]}
        if stored is not None:
            index = np.full(len(labels), NO_TARGET, dtype=np.int64)
            if len(places) and len(input_ids) <= train.max_length:
                index[places] = stored.indices(number, f"{trace['prompt_id']}/{trace['sample_index']}", len(places))
            row["target_index"] = index
        return row

    return traces.map(encode, remove_columns=traces.column_names, new_fingerprint=name, desc="tokenise")


def _drawn(rows: Dataset, table: TraceTable, all_rows: list[Dataset]) -> Dataset:
    if table.share_of_rest is None:
        return rows
    wanted = round(table.share_of_rest * sum(len(others) for others in all_rows if others is not rows))
    if wanted > len(rows):
        say(f"train     {wanted:,} of these traces were asked for, there are {len(rows):,}: {table.files[0].parent}")
    if wanted >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(table.draw_seed).choice(len(rows), wanted, replace=False)))


def _split(rows: Dataset, prompts: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and those of so many prompts, drawn by their hash."""
    if not prompts:
        return rows, None
    known = sorted(set(rows["prompt_id"]), key=lambda identity: hashlib.sha256(f"validation/{seed}/{identity}".encode()).digest())
    if prompts >= len(known):
        raise DataError(f"train.validation_prompts: {prompts:,} asked for, but the traces have {len(known):,} prompts. Lower it.")
    apart = np.isin(np.array(rows["prompt_id"]), known[:prompts])
    return rows.select(np.flatnonzero(~apart)), rows.select(np.flatnonzero(apart))


def _columns(rows: Dataset, with_targets: bool = True) -> Dataset:
    names = ["input_ids", "labels", *(["target_index"] if with_targets and "target_index" in rows.column_names else [])]
    return rows.select_columns(names)
