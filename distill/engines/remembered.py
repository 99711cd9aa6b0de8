"""What a teacher thinks of answers as rows of a table, to float32's last bit: two models that are equal are no nat apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distill.run.schema import THOUGHT
from distill.targets.codec import Targets

Row = dict[str, Any]


def packed(rows: Sequence[Row], thoughts: Sequence[Targets | None]) -> pa.RecordBatch:
    """Rows of schema `THOUGHT`.

    Args:
        rows: With `prompt_id` and `sample_index`.
        thoughts: `top_k` targets of each, in the student's ids; null where it was not read.
    """
    lists = {
        "ids": [None if own is None else own.ids.ravel() for own in thoughts],
        "log_probs": [None if own is None else own.log_probs.ravel() for own in thoughts],
        "log_rest": [None if own is None else own.log_rest for own in thoughts],
        "first_lost": [None if own is None else own.first_lost for own in thoughts],
    }
    columns = {
        "prompt_id": [row["prompt_id"] for row in rows],
        "sample_index": [row["sample_index"] for row in rows],
        "tokens": [None if own is None else len(own) for own in thoughts],
        **lists,
    }
    return pa.RecordBatch.from_arrays([pa.array(columns[name], THOUGHT.field(name).type) for name in THOUGHT.names], schema=THOUGHT)


def unpacked(piece: pa.RecordBatch) -> list[Targets | None]:
    """The thoughts that rows of schema `THOUGHT` hold."""
    found: list[Targets | None] = []
    for place in range(len(piece)):
        tokens = piece["tokens"][place].as_py()
        if tokens is None:
            found.append(None)
            continue
        ids, log_probs, log_rest = (piece[name][place].values.to_numpy(zero_copy_only=False) for name in ("ids", "log_probs", "log_rest"))
        width = len(ids) // max(tokens, 1)
        shaped = ids.reshape(tokens, width), log_probs.reshape(tokens, width)
        lost = piece["first_lost"][place].as_py()
        first_lost = None if lost is None else np.array(lost, np.bool_)
        found.append(Targets(shaped[0].astype(np.int32), shaped[1].astype(np.float32), log_rest.astype(np.float32), first_lost))
    return found
