"""Traces on their way to a teacher: some thousand at a time are aligned, in a thread while it reads those before, and dealt out by length.

So what is in memory does not grow with the number of traces, the teacher begins at once, and a restart aligns only what it must read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distill.engines.batching import by_length, one_ahead
from distill.models.chat import ChatFormat
from distill.models.vocabulary import AlignedRow, VocabularyMap, align
from distill.recipe.learning import Train
from distill.run.schema import trace_key
from distill.run.tables import rows_of

COLUMNS = ["prompt_id", "sample_index", "author", "messages", "completion", "prompt_ids", "completion_ids", "finish_reason"]
"""Of a trace, those that say which tokens are read and learned."""
WINDOW_ROWS = 2048
"""Traces that are sorted by length together: a batch of 64 is padded by some 2 % more than if all were."""
WINDOW_CHARS = 16 * 2**20
"""Or fewer, of long traces: about 150 MB when they are aligned."""
_BYTES_AT_ONCE = 2 * 2**20  # of traces that are Python objects at once


class LeftOut(NamedTuple):
    """A trace that is not read."""

    key: str
    reason: str


class Window(NamedTuple):
    """Traces that are dealt out together."""

    rows: list[AlignedRow]
    left_out: list[LeftOut]


def lists_of(pieces: Iterable[pa.RecordBatch], first: int = 0, step: int = 1) -> Iterator[list[dict[str, Any]]]:
    """Every `step`-th trace from `first` of a table's pieces with `COLUMNS`, as lists of so many as are tokenised well together."""
    before = 0
    for piece in pieces:
        wanted = np.arange((first - before) % step, len(piece), step)
        before += len(piece)
        piece = piece.take(pa.array(wanted)) if step > 1 else piece
        together = max(1, len(piece) * _BYTES_AT_ONCE // max(piece.nbytes, 1))
        for start in range(0, len(piece), together):
            yield rows_of(piece.slice(start, together))


@dataclass(frozen=True)
class Reader:
    """How traces are put to a teacher whose student trains on them."""

    teacher: ChatFormat
    student: ChatFormat
    vocabulary: VocabularyMap
    train: Train
    """How the student trains: what it leaves out is not read."""

    def row(self, trace: dict[str, Any]) -> AlignedRow | LeftOut:
        """A trace aligned, and cut as training cuts it; or why it is left out."""
        row = align(trace, self.teacher, self.student, self.vocabulary)
        if self.train.overlong == "drop" and len(row.input_ids) > self.train.max_length:
            return LeftOut(row.key, "too_long")
        row = row.cut(self.train.max_length)
        return row if len(row.positions) else LeftOut(row.key, "no_supervised_token")

    def windows(self, traces: Iterable[dict[str, Any]], known: Callable[[str], bool]) -> Iterator[Window]:
        """Traces in their order, each window aligned while the one before it is in use; without windows that are known whole.

        Args:
            traces: The same, in the same order, as before a restart.
            known: Whether the trace of a key has been read or left out before.
        """

        def aligned() -> Iterator[Window]:
            for window in _windows(traces):
                if not all(known(trace_key(trace)) for trace in window):
                    found = [self.row(trace) for trace in window]
                    yield Window([row for row in found if isinstance(row, AlignedRow)], [row for row in found if isinstance(row, LeftOut)])

        return one_ahead(aligned())


def batches_of(window: Window, batch_size: int, known: Callable[[str], bool]) -> list[list[AlignedRow]]:
    """Batches that are not known whole; the same after a restart, so that what is made of them has the same bytes."""
    batches = by_length(window.rows, lambda row: len(row.teacher_ids), batch_size)
    return [batch for batch in batches if not all(known(row.key) for row in batch)]


def _windows(traces: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Some thousand traces each, by their number and texts alone."""
    window: list[dict[str, Any]] = []
    chars = 0
    for trace in traces:
        window.append(trace)
        chars += len(trace["completion"])
        if len(window) == WINDOW_ROWS or chars >= WINDOW_CHARS:
            yield window
            window, chars = [], 0
    if window:
        yield window
