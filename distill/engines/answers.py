"""Answers as a model is given them to read, and what it thinks of them as numbers that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill.engines.comparing import Opinion, Row
from distill.errors import ModelError
from distill.models.chat import IGNORE, ChatFormat
from distill.run.schema import THINK_CLOSE
from distill.targets.codec import Targets

_WINDOW_ROWS, _WINDOW_CHARS = 128, 2**18  # answers that are read between two shards, or fewer long ones


def windows(answers: pa.Table) -> Iterator[pa.Table]:
    """Some answers each, by their number and texts alone, so that a restart makes the same."""
    lengths, start, chars = pc.utf8_length(answers["completion"]).to_pylist(), 0, 0
    for place, length in enumerate(lengths):
        if place > start and (place - start == _WINDOW_ROWS or chars + length > _WINDOW_CHARS):
            yield answers.slice(start, place - start)
            start, chars = place, 0
        chars += length
    if start < len(lengths):
        yield answers.slice(start)


def whole(chat: ChatFormat, trace: dict[str, Any], thoughts: Targets | None) -> Row | None:
    """An answer as a model reads it; null where the template does not take it, or nothing of it is left."""
    try:
        ids, labels = chat.trace_row(trace)
    except ModelError:
        return None
    labels_T = np.array(labels, np.int32)
    return Row(np.array(ids, np.int32), labels_T, thoughts) if (labels_T != IGNORE).any() else None


def final(chat: ChatFormat, trace: dict[str, Any]) -> Row | None:
    """An answer of which the tokens behind the reasoning are looked at, without the end of the turn."""
    row = whole(chat, trace, None)
    if row is None:
        return None
    labels = row.labels.copy()
    places = np.flatnonzero(labels != IGNORE)
    written = labels[places].tolist()
    labels[places[: _behind_reasoning(chat, written)]] = IGNORE
    if written[-1] in chat.stop_ids:
        labels[places[-1]] = IGNORE
    return Row(row.input_ids, labels) if (labels != IGNORE).any() else None


def _behind_reasoning(chat: ChatFormat, written: list[int]) -> int:
    """How many of the written tokens lead up to the end of the reasoning, it included; 0 where there is none."""
    if THINK_CLOSE not in chat.text_of(written):
        return 0
    first, last = 0, len(written)
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if THINK_CLOSE in chat.text_of(written[:middle]) else (middle, last)
    return last


def sums(row: Row, opinion: Opinion) -> dict[str, Any]:
    """What is kept of an opinion."""
    written = row.labels[row.labels != IGNORE]
    found = {
        "num_tokens": len(written),
        "log_prob": float(opinion.log_probs.sum()),
        "predicted": int((opinion.best == written).sum()),
    }
    if row.teacher is None:
        return found | {"compared": 0}
    known = ~np.isnan(opinion.kl_nats)
    agreed = opinion.best[known] == row.teacher.ids[known, 0] if known.any() else np.empty(0, bool)
    if row.teacher.first_lost is not None:  # the first candidate is then not the teacher's most probable token
        agreed &= ~row.teacher.first_lost[known]
    return found | {
        "compared": int(known.sum()),
        "kl_nats": max(0.0, float(opinion.kl_nats[known].sum())),  # rounding goes below 0
        "agreed": int(agreed.sum()),
        "held": float(-np.expm1(row.teacher.log_rest[known].astype(np.float64)).sum()),
    }


def num_ids(chat: ChatFormat) -> int:
    """Number of token ids."""
    return max([*chat.tokenizer.get_vocab().values(), *chat.tokenizer.added_tokens_decoder]) + 1
