"""Curated traces as training rows: token ids and labels, over-long ones dropped and counted, never held in memory whole."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_dataset

from distill.chat import IGNORE, ChatFormat
from distill.errors import DataError
from distill.recipe_learning import Train


class TrainingRows(NamedTuple):
    """What training reads."""

    dataset: Dataset
    """Columns `input_ids` and `labels`: not shifted, `IGNORE` on the prompt."""
    drops: dict[str, int]
    """Rows that were left out, by reason."""
    num_tokens: int
    """Of all rows, prompts included."""


def training_rows(files: list[Path], chat: ChatFormat, train: Train, cache: Path, digest: str) -> TrainingRows:
    """The rows that fit into `train.max_length`.

    Args:
        files: Parquet files of curated traces.
        chat: The student's tokenizer and template.
        train: Limit, and what happens to longer rows.
        cache: Folder for the memory-mapped rows.
        digest: Digest of the files' content; with the tokenizer's and the template's it names the cached rows.

    Raises:
        DataError: no row is left.
    """
    name = hashlib.sha256(f"{digest} {chat.tokenizer_digest} {chat.template_digest} {train.max_length} {train.overlong}".encode())
    disable_progress_bars()  # of the reading, which takes no time
    traces = load_dataset("parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(cache))

    enable_progress_bars()

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        input_ids, labels = chat.row(row["messages"], row["completion"])
        length = len(input_ids)
        if train.overlong == "cut":
            input_ids, labels = input_ids[: train.max_length], labels[: train.max_length]
        return {"input_ids": input_ids, "labels": labels, "length": length, "supervised": sum(label != IGNORE for label in labels)}

    rows = traces.map(encode, remove_columns=traces.column_names, new_fingerprint=name.hexdigest()[:16], desc="tokenise")
    lengths, supervised = np.array(rows["length"]), np.array(rows["supervised"])
    too_long = (lengths > train.max_length) if train.overlong == "drop" else np.zeros(len(rows), dtype=bool)
    unsupervised = ~too_long & (supervised == 0)
    keep = np.flatnonzero(~too_long & ~unsupervised)
    if not len(keep):
        raise DataError(
            f"train.max_length: none of {len(rows):,} traces fits into {train.max_length:,} tokens; "
            f"the shortest has {lengths.min():,}. Raise train.max_length."
        )
    counted = {"too_long": int(too_long.sum()), "no_supervised_token": int(unsupervised.sum())}
    return TrainingRows(
        dataset=rows.select(keep).select_columns(["input_ids", "labels"]),
        drops={reason: count for reason, count in counted.items() if count},
        num_tokens=int(np.minimum(lengths[keep], train.max_length).sum()),
    )
