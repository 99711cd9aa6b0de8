"""The traces of some requests: what was written before, what the journal of a killed run holds, and what an engine writes now."""

from __future__ import annotations

import base64
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from distill.engines.written import Alternatives, Completion, Engine, Failure, Request
from distill.errors import IntegrityError, ServerError, visible
from distill.run.journal import Journal
from distill.run.log import Progress
from distill.run.schema import ALTERNATIVES, DROPPED_TRACE, TRACE

_MANY = 20  # failures that end a stage before its window is whole
_AT_ONCE = 64  # rows of a journal that are Python's objects at once
_BYTES = ("token_bytes", "written_bytes")

Row = dict[str, Any]


class Window:
    """Traces of requests as they come; in the journal as soon as they are there, and in Arrow's memory, where ids take a ninth.

    Args:
        requests: All of them.
        author: Of the traces.
        journal: Of the requests under way.
        bar: Shows how far it is.
        alternatives: Whether those are kept.
        drops: Whether a request that failed for good is a row of the dropped ones; else it is a trace that ended by `error`.
    """

    def __init__(
        self, requests: Sequence[Request], author: str, journal: Journal, bar: Progress, *, alternatives: bool = False, drops: bool = False
    ) -> None:
        self._requests, self._author, self._journal, self._bar = requests, author, journal, bar
        self._alternatives, self._drops = alternatives, drops
        self._place = {(request.prompt_id, request.sample_index): place for place, request in enumerate(requests)}
        self._pieces: list[pa.RecordBatch] = []
        self._others: list[pa.RecordBatch] = []
        self._places: list[int] = []
        self._dropped: dict[int, Row] = {}

    def take_over(self, rows: Sequence[Row]) -> None:
        """Takes traces of an earlier making, as they are; also those that were dropped there."""
        self._keep([row | {"reference": self._requests[self._at(row)].reference} for row in rows])
        self._bar.update(len(rows))

    def fill(self, engine: Engine | None, max_failed: float, asked: int = 0, failed: int = 0) -> None:
        """Has what is missing written; what fails is asked for once more when all others are there.

        Args:
            engine: Writes it; null where nothing may be missing.
            max_failed: Share of all requests that may fail for good.
            asked: Requests of the table before these.
            failed: How many of them failed.

        Raises:
            ServerError: more did. What came is in the journal, and what failed is asked for by the next run.
            IntegrityError: something is missing, and there is no engine.
        """
        there = self._journalled()
        while rows := list(itertools.islice(there, _AT_ONCE)):
            self._keep(rows)
        failures: dict[int, Failure] = {}
        for _ in range(2):
            todo = self._missing()
            if not todo:
                return
            if engine is None:
                raise IntegrityError(f"{self._journal.path.parent}: {len(todo):,} of its traces are in none of its parts. Add --redo.")
            failures = self._ask(engine, todo, max_failed)
            if not failures:
                return
        if len(failures) + failed > max_failed * (asked + len(self._requests)):
            raise ServerError(_causes(list(failures.values()), asked + len(self._requests), failed, max_failed))
        lost = [self._failed(place, failures[place]) for place in sorted(failures)]
        self._journal.append(lost)  # all in one, so that a restart drops the same
        self._keep(lost)
        self._bar.update(len(lost))

    def _journalled(self) -> Iterator[Row]:
        """Rows of the journal that are wanted here and not there yet, each once."""
        wanted = set(self._missing())
        for row in self._journal.rows():
            place = self._place.get(self._key(row))
            if row["author"] == self._author and place in wanted:
                wanted.remove(place)
                yield row

    def traces(self) -> pa.Table:
        """The traces there are, in the order of their requests."""
        return self._in_order(self._pieces, TRACE)

    def others(self) -> pa.Table:
        """What else might have been written, a row a trace."""
        return self._in_order(self._others, ALTERNATIVES)

    def dropped(self) -> pa.Table:
        """Requests that failed for good, in their order."""
        return pa.Table.from_pylist([self._dropped[place] for place in sorted(self._dropped)], DROPPED_TRACE)

    def _missing(self) -> list[int]:
        done = {*self._places, *self._dropped}
        return [place for place in range(len(self._requests)) if place not in done]

    def _ask(self, engine: Engine, todo: list[int], max_failed: float) -> dict[int, Failure]:
        """Keeps what an engine writes, and returns what failed."""
        failures: dict[int, Failure] = {}
        answered, tokens, start_s = 0, 0, time.perf_counter()
        for ended in engine.write([self._requests[place] for place in todo]):
            failures |= {todo[number]: result for number, result in ended if isinstance(result, Failure)}
            rows = [self._row(todo[number], result) for number, result in ended if isinstance(result, Completion)]
            if rows:
                self._journal.append(rows)
                self._keep(rows)
                self._bar.update(len(rows))
            answered += len(ended)
            if len(failures) >= _MANY and len(failures) > max_failed * answered and not self._may_pass(failures, max_failed):
                raise ServerError(_causes(list(failures.values()), answered, 0, max_failed))
            tokens += sum(len(row["completion_ids"] or ()) for row in rows)
            if tokens:
                self._bar.set_postfix_str(f"{tokens / max(time.perf_counter() - start_s, 1e-9):,.0f} tokens/s")
        return failures

    def _may_pass(self, failures: dict[int, Failure], max_failed: float) -> bool:
        return len(failures) <= max_failed * len(self._requests)

    def _keep(self, rows: list[Row]) -> None:
        kept = []
        for row in rows:
            if row.get("reason") is None:
                kept.append(row)
            else:
                self._dropped[self._at(row)] = row
        if not kept:
            return
        self._pieces.append(pa.RecordBatch.from_pylist(kept, schema=TRACE))
        if self._alternatives:
            self._others.append(pa.RecordBatch.from_pylist([_others_of(row) for row in kept], schema=ALTERNATIVES))
        self._places.extend(self._at(row) for row in kept)

    def _in_order(self, pieces: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
        return pa.Table.from_batches(pieces, schema).combine_chunks().take(np.argsort(self._places))

    def _at(self, row: Row) -> int:
        return self._place[self._key(row)]

    @staticmethod
    def _key(row: Row) -> tuple[str, int]:
        return row["prompt_id"], row["sample_index"]

    def _row(self, place: int, written: Completion) -> Row:
        request = self._requests[place]
        row = {
            "prompt_id": request.prompt_id,
            "sample_index": request.sample_index,
            "author": self._author,
            "messages": request.messages,
            "reference": request.reference,
            "completion": written.text,
            "prompt_ids": written.prompt_ids,
            "completion_ids": written.completion_ids,
            "finish_reason": written.finish_reason,
            "seed": request.seed,
        }
        return row | {"alternatives": _as_json(written.alternatives)} if self._alternatives and written.alternatives else row

    def _failed(self, place: int, failure: Failure) -> Row:
        row = self._row(place, Completion("", None, None, "error"))
        return row | {"completion": None, "reason": failure.reason} if self._drops else row


def _causes(failures: list[Failure], asked: int, before: int, max_failed: float) -> str:
    """Why requests failed, the commonest cause first, each with an example of the server's words."""
    counts = Counter(failure.reason for failure in failures)
    example = {failure.reason: failure.detail for failure in reversed(failures)}
    lines = [f"\n  {count:>7,}  {reason:<16}  {visible(example[reason], 200)}".rstrip() for reason, count in counts.most_common()]
    more = f", {before:,} of them before" if before else ""
    return (
        f"server.max_failed: {len(failures) + before:,} of {asked:,} requests failed for good{more}, more than {max_failed:.1%}:"
        f"{''.join(lines)}\nWhat was answered is kept. Mend the cause and run this again, which asks only for what failed; or raise "
        "max_failed."
    )


def _as_json(found: Alternatives) -> Row:
    """As a journal can hold it: bytes in base64."""
    plain = {name: value for name, value in asdict(found).items() if value is not None}
    return {
        name: _mapped(value, lambda part: base64.b64encode(part).decode()) if name in _BYTES else value for name, value in plain.items()
    }


def _others_of(row: Row) -> Row:
    found = row.get("alternatives") or {}
    read = {name: _mapped(value, _decoded) if name in _BYTES else value for name, value in found.items()}
    return {"prompt_id": row["prompt_id"], "sample_index": row["sample_index"], **read}


def _encoded(part: bytes) -> str:
    return base64.b64encode(part).decode()


def _decoded(part: str | bytes) -> bytes:
    return part if isinstance(part, bytes) else base64.b64decode(part)


def _mapped(value: Any, change: Any) -> Any:
    return [_mapped(part, change) for part in value] if isinstance(value, list) else None if value is None else change(value)
