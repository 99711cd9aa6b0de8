"""Engines write completions. One protocol, and the loop that every stage runs them in.

The loop knows nothing of how tokens are made: it hands requests over, keeps every finished completion on disk, asks
only for what is missing after a restart, and gives rows in the order of the requests.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill.engines.earlier import EarlierTraces
from distill.engines.written import Alternatives, Completion, Failure, Request
from distill.recipe.base import Sampling
from distill.run.journal import Journal
from distill.run.log import Progress, progress, say
from distill.run.schema import TRACE
from distill.run.tables import ROWS_PER_SHARD, TableWriter

__all__ = ["Alternatives", "Completion", "Engine", "Failure", "Request", "TraceTable", "request_seed", "requests_for", "write_traces"]

_TOKENS_PER_WINDOW = 2**24  # at most, of completions: about 150 MB
_LEAST_ROWS = 512  # of a window, however long they may be


class Engine(Protocol):
    """Something that writes completions."""

    def write(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion | Failure]]]:
        """Completions as they end, in any order, each with its place among the requests; or why one failed for good.

        A request's random numbers depend on its seed alone, its tokens also on rounding.
        """
        ...


def requests_for(prompts: Sequence[dict[str, Any]], samples_per_prompt: int, seed: int) -> list[Request]:
    """`samples_per_prompt` requests for each prompt row, each with a seed of its own."""
    return [
        Request(row["prompt_id"], index, row["messages"], row["reference"], request_seed(seed, row["prompt_id"], index))
        for row in prompts
        for index in range(samples_per_prompt)
    ]


def request_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """64-bit seed of one request: independent of batch, order and restart."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


class TraceTable:
    """A table of traces, filled a window of prompts at a time, so that a million of them never lie in memory.

    A finished batch goes to the journal, a finished window as shards to the table, and the journal begins anew. After a kill the
    whole shards count as they are, and the journal is that of the window under way, or of the one whose shards are there already:
    rows of other requests in it are passed over.

    Args:
        table: Opened to resume.
        journal: Of its window.
        sampling: How tokens are drawn, how often, and how many sequences at once.
        seed: Of the stage.
        earlier: Traces that need not be written again, where the stage grows.
    """

    def __init__(self, table: TableWriter, journal: Journal, sampling: Sampling, seed: int, earlier: EarlierTraces | None = None) -> None:
        self._table, self._journal, self._sampling, self._seed, self._earlier = table, journal, sampling, seed, earlier
        self._asked = 0  # rows that belong into the table so far
        self.tokens = 0
        self.finish_reasons: Counter[str] = Counter()
        for piece in table.pieces(["completion_ids", "finish_reason"]):
            self._count(piece)

    @property
    def num_rows(self) -> int:
        """Rows in the table."""
        return self._table.num_rows

    def write(self, engine: Engine, prompts: Iterable[dict[str, Any]], num_prompts: int, author: str, description: str) -> None:
        """Adds a trace for each prompt and sample, in their order, as far as they are not there.

        Args:
            engine: Writes them.
            prompts: With `prompt_id`, `messages` and `reference`; the same after a restart.
            num_prompts: How many.
            author: Of the traces.
            description: For the progress bar.
        """
        samples = self._sampling.samples_per_prompt
        total, there = num_prompts * samples, self.num_rows - self._asked
        source = iter(prompts)
        if self._earlier is not None and self._earlier.count(author):
            say(f"{description}: {self._earlier.count(author):,} traces were written before, and are not written again")
        done = min(max(there, 0) + _journalled(self._journal, author), total)
        with progress(total, "traces", description, done=done) as bar:
            while window := list(itertools.islice(source, self._window)):
                self._asked += len(window) * samples
                missing = min(self._asked - self.num_rows, len(window) * samples)
                if missing <= 0:
                    continue
                requests = requests_for(window, samples, self._seed)
                known = self._earlier.rows(author, [_key_of(request) for request in requests]) if self._earlier is not None else []
                rows = _written(engine, requests, self._sampling, self._journal, author, bar, known)
                for piece in rows[len(rows) - missing :].to_batches():  # a kill between two shards of a window leaves the first
                    self._table.add(piece)
                    self._count(piece)
                self._table.end_shard()
                self._journal.clear()

    @property
    def _window(self) -> int:
        """Prompts whose traces are in memory at once: by the tokens that they can have, but enough to sort by length."""
        rows = min(max(_TOKENS_PER_WINDOW // self._sampling.max_new_tokens, _LEAST_ROWS), ROWS_PER_SHARD)
        return max(1, rows // self._sampling.samples_per_prompt)

    def _count(self, piece: pa.RecordBatch) -> None:
        self.tokens += pc.sum(pc.list_value_length(piece["completion_ids"])).as_py() or 0
        self.finish_reasons.update(piece["finish_reason"].to_pylist())


def write_traces(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, journal: Journal, author: str, description: str
) -> list[dict[str, Any]]:
    """Trace rows for requests that are few, in their order, keeping every finished one in the journal.

    After a restart a sequence has other neighbours, as with another `batch_size`: that changes only the rounding of the logits.
    """
    with progress(len(requests), "traces", description, done=_journalled(journal, author)) as bar:
        rows: list[dict[str, Any]] = _written(engine, requests, sampling, journal, author, bar).to_pylist()
        return rows


def _written(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    journal: Journal,
    author: str,
    bar: Progress,
    known: Sequence[dict[str, Any]] = (),
) -> pa.Table:
    """Trace rows for all requests, in their order: known ones, those in the journal, and others, which go there a batch at a time."""
    place = {_key_of(request): index for index, request in enumerate(requests)}
    pieces: list[pa.RecordBatch] = []  # Arrow's, because ids take nine times as much as Python's integers
    places: list[int] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        pieces.append(pa.RecordBatch.from_pylist(rows, schema=TRACE))
        places.extend(place[_key(row)] for row in rows)

    if known:
        keep([row | {"reference": requests[place[_key(row)]].reference} for row in known])
        bar.update(len(known))
    there = (row for row in journal.rows() if row["author"] == author and _key(row) in place)
    while rows := list(itertools.islice(there, sampling.batch_size)):
        keep(rows)
    done = set(places)
    todo = [request for index, request in enumerate(requests) if index not in done]
    tokens, start_s = 0, time.perf_counter()
    for ended in engine.write(todo):
        rows = [_row(todo[number], written, author) for number, written in ended if isinstance(written, Completion)]
        journal.append(rows)
        keep(rows)
        bar.update(len(rows))
        tokens += sum(len(row["completion_ids"]) for row in rows)
        bar.set_postfix_str(f"{tokens / max(time.perf_counter() - start_s, 1e-9):,.0f} tokens/s")
    return pa.Table.from_batches(pieces, TRACE).combine_chunks().take(np.argsort(places))


def _journalled(journal: Journal, author: str) -> int:
    return sum(row["author"] == author for row in journal.rows())


def _key_of(request: Request) -> tuple[str, int]:
    return request.prompt_id, request.sample_index


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["prompt_id"], row["sample_index"]


def _row(request: Request, completion: Completion, author: str) -> dict[str, Any]:
    return {
        "prompt_id": request.prompt_id,
        "sample_index": request.sample_index,
        "author": author,
        "messages": request.messages,
        "reference": request.reference,
        "completion": completion.text,
        "prompt_ids": completion.prompt_ids,
        "completion_ids": completion.completion_ids,
        "finish_reason": completion.finish_reason,
        "seed": request.seed,
    }
