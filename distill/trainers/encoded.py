"""A table of traces as token ids on disk: made once, on all cores, and found again by whoever trains on the same.

Lies in the run's folder `cache`, under a name made of everything that decides a row: `rows-<name>.arrow` has the tokens, mapped
into memory, and `rows-<name>.parquet` beside it what is asked of a row before it is trained on; `rows-<name>.json`, written last, has
the digests of both. All can be deleted at any time, and what was altered is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import NDArray

from distill.engines.batching import one_ahead
from distill.engines.reading import COLUMNS, lists_of
from distill.errors import IntegrityError
from distill.models.chat import IGNORE, ChatFormat
from distill.recipe.learning import Train
from distill.run.clock import is_main_process
from distill.run.files import commit, digest_file, read_json, write_json
from distill.run.log import progress, say
from distill.run.manifest import read_manifest
from distill.run.schema import prompt_id, trace_key
from distill.run.tables import iter_pieces
from distill.trainers.targets import NO_TARGET, StoredTargets

_WAY = 3  # in which a trace becomes a row; raised where another comes of the same trace, so that no older rows are found again
_BYTES_PER_BATCH = 32 * 2**20  # of tokens that are written together: fewer and larger ones are mapped faster
_TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_PLACES = pa.field("target_index", pa.list_(pa.int64()))
_ABOUT = pa.schema([("length", pa.int32()), ("supervised", pa.int32()), ("conversation", pa.string())])


class EncodedTraces:
    """Rows in the order of their traces; the tokens of one that is too long to be trained on are left out.

    Args:
        path: Of the file with the tokens.
    """

    def __init__(self, path: Path) -> None:
        self.tokens = Dataset.from_file(str(path))
        """`input_ids` and `labels`, not shifted, and with targets `target_index`."""
        self._about = pq.ParquetFile(_about(path))
        columns = self._about.read(["length", "supervised"])
        self.lengths: NDArray[np.int32] = columns["length"].to_numpy()
        """(rows,) tokens before any was left out or cut off."""
        self.supervised: NDArray[np.int32] = columns["supervised"].to_numpy()
        """(rows,) supervised tokens, after cutting."""

    def __len__(self) -> int:
        return len(self.lengths)

    def conversations(self) -> Iterator[str]:
        """Of each row the id of its prompt, or of how its conversation begins; a piece of the table in memory at a time."""
        for piece in self._about.iter_batches(columns=["conversation"]):
            yield from piece["conversation"].to_pylist()


def encoded_traces(
    folder: Path, table: str, chat: ChatFormat, train: Train, cache: Path, stored: StoredTargets | None, source: int
) -> EncodedTraces:
    """The rows of a table, which are made where they are not there yet, or altered; one process at a time may do so.

    Args:
        folder: Of the stage that wrote the traces.
        table: Its name there.
        chat: The student's tokenizer and template.
        train: Limit, and what happens to longer rows.
        cache: Where they are kept.
        stored: Where the targets of the rows are; None for none.
        source: Number of the table among the sources of `stored`.

    Raises:
        IntegrityError: a shard of the table was altered; or a row has no targets, or not as many as supervised tokens.
    """
    path = cache / rows_name(folder, chat, train, stored, source)
    if is_main_process() and not _whole(path):  # the others come behind it
        cache.mkdir(parents=True, exist_ok=True)
        _write(path, _TOKENS if stored is None else _TOKENS.append(_PLACES), _batches(folder, table, chat, train, stored, source))
    return EncodedTraces(path)


def rows_name(folder: Path, chat: ChatFormat, train: Train, stored: StoredTargets | None, source: int) -> str:
    """Name of the file with the tokens: another wherever any of them could be another."""
    targets = None if stored is None else (source, stored.places_digest)
    content = [_WAY, read_manifest(folder).digest, chat.tokenizer_digest, chat.template_digest, train.max_length, train.overlong, targets]
    return f"rows-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}.arrow"


def keep_only(cache: Path, names: Sequence[str]) -> None:
    """Deletes all rows but some from the cache, so that it holds no more than one training reads, and what a trainer made of them.

    Packs and orders are kept by nobody's digest, and quickly made.
    """
    kept = {path.name for name in names for path in _files(cache / name)}
    for path in (*cache.glob("rows-*"), *cache.glob("cache-*")):
        if path.name not in kept:
            path.unlink()


def _about(path: Path) -> Path:
    return path.with_suffix(".parquet")


def _files(path: Path) -> tuple[Path, Path, Path]:
    """With the tokens, about the rows, with the digests of both."""
    return path, _about(path), path.with_suffix(".json")


def _whole(path: Path) -> bool:
    """Whether the rows are there as they were written."""
    tokens, about, digests = _files(path)
    if not digests.exists():
        return False
    try:
        expected = read_json(digests)
        whole = all(file.is_file() and digest_file(file) == expected.get(file.name) for file in (tokens, about))
    except IntegrityError:
        whole = False
    if not whole:
        say(f"train     {path}: was altered, so the traces are tokenised again.")
    return whole


def _batches(
    folder: Path, table: str, chat: ChatFormat, train: Train, stored: StoredTargets | None, source: int
) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Tokens of some hundred rows, and what is asked of them; the next are tokenised while these are written."""
    bar = progress(read_manifest(folder).rows(table), "traces", "tokenise")
    with bar, _all_cores():
        for traces, rows in one_ahead((traces, chat.trace_rows(traces)) for traces in lists_of(iter_pieces(folder, table, COLUMNS))):
            yield _batch(traces, rows, train, stored, source)
            bar.update(len(rows))


def _batch(
    traces: list[dict[str, Any]], rows: list[tuple[list[int], list[int]]], train: Train, stored: StoredTargets | None, source: int
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    found: dict[str, list[NDArray[Any]]] = {"input_ids": [], "labels": [], **({} if stored is None else {"target_index": []})}
    about: dict[str, list[Any]] = {"length": [], "supervised": [], "conversation": [_beginning(trace) for trace in traces]}
    for trace, (whole, whole_labels) in zip(traces, rows, strict=True):
        end = train.max_length if train.overlong == "cut" else len(whole) * (len(whole) <= train.max_length)
        input_ids, labels = np.array(whole[:end], np.int32), np.array(whole_labels[:end], np.int32)
        places = np.flatnonzero(labels != IGNORE)
        about["length"].append(len(whole))
        about["supervised"].append(len(places))
        found["input_ids"].append(input_ids)
        found["labels"].append(labels)
        if stored is not None:
            index = np.full(len(labels), NO_TARGET, np.int64)
            if len(places):
                index[places] = stored.indices(source, trace_key(trace), len(places))
            found["target_index"].append(index)
    tokens = pa.RecordBatch.from_pydict({name: _lists(values) for name, values in found.items()})
    return tokens, pa.RecordBatch.from_pydict(about, schema=_ABOUT)


def _beginning(trace: dict[str, Any]) -> str:
    """The id of a trace's prompt, or, where that is a conversation that has gone on, of it up to the user's first turn."""
    messages = trace["messages"]
    first = next((place for place, turn in enumerate(messages, start=1) if turn["role"] == "user"), len(messages))
    return str(trace["prompt_id"]) if first == len(messages) else prompt_id(messages[:first])


def _lists(rows: list[NDArray[Any]]) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, rows)], dtype=np.int32), np.concatenate(rows))


def _write(path: Path, schema: pa.Schema, batches: Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]) -> None:
    """Puts both files in their places when they are whole, and their digests behind them."""
    for file in _files(path):
        file.unlink(missing_ok=True)
    temporary = [place.with_name(place.name + ".tmp") for place in (path, _about(path))]
    with pa.ipc.new_stream(str(temporary[0]), schema) as tokens_file, pq.ParquetWriter(temporary[1], _ABOUT) as about_file:
        waiting: list[pa.RecordBatch] = []
        for tokens, about in batches:
            about_file.write_batch(about)
            waiting.append(tokens)
            if sum(batch.nbytes for batch in waiting) >= _BYTES_PER_BATCH:
                tokens_file.write_batch(pa.concat_batches(waiting))
                waiting = []
        if waiting:
            tokens_file.write_batch(pa.concat_batches(waiting))
    for place, final in zip(temporary, (path, _about(path)), strict=True):
        commit(place, final)
    write_json(path.with_suffix(".json"), {file.name: digest_file(file) for file in (path, _about(path))})


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Lets a tokenizer use every core this process may use, unless it is told otherwise from outside.

    Afterwards it keeps to one: a process that forks behind its threads, as a loader of batches does, would be warned of at length.
    """
    if "TOKENIZERS_PARALLELISM" in os.environ:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
