"""Tables of stages: Parquet shards, written and read a piece at a time, their digests checked when they are read.

Of a table of any length no more than a piece of rows and, while a shard is written, what Arrow has compressed of it is in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill.errors import IntegrityError, MissingStageError
from distill.run.files import commit, digest_file
from distill.run.journal import Journal
from distill.run.manifest import Shard, read_manifest
from distill.run.schema import EXTRAS, MESSAGES

ROWS_PER_SHARD = 4096
_ROWS_PER_PIECE = 512  # of a row group
_GROUPS_KEPT = 4  # row groups in memory where single rows are read
_LONG = {"prompt_id", "messages", "completion"}  # hardly two values are equal, so a dictionary of them costs time and saves nothing
_BYTES_PER_SHARD = 64 * 2**20  # in Arrow's memory: traces of 32,000 tokens make shorter shards


class TableWriter:
    """A table that is written as its rows come; a shard appears under its name when it is whole and on disk.

    Compression and writing go on in a thread of their own, one piece at most behind the rows; the bytes do not depend on it.

    Args:
        folder: Of the stage.
        name: Of the table.
        schema: Of its rows.
        before: Shards that are there already, behind which the new ones stand.
        record: Where each shard is noted, for a restart that goes on behind it.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, before: Sequence[Shard] = (), record: Journal | None = None) -> None:
        self._folder, self._name, self._schema, self._record = folder, name, schema, record
        self._columns = set(schema.names)
        self._dictionaries = [leaf for field in schema if field.name not in _LONG for leaf in _leaves(field)]
        self._shards = list(before)
        self._num_shards = len(before)  # and those given to the thread
        self._rows: list[dict[str, Any]] = []
        self._pieces: list[pa.RecordBatch] = []
        self._num_waiting = 0  # rows in those pieces
        self._file: pq.ParquetWriter | None = None
        self._num_rows = self._num_bytes = 0  # of the shard that is open
        self._num_before = sum(shard.rows for shard in before)  # rows of the shards that are not
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"write-{name}")
        self._job: Future[None] | None = None

    @property
    def name(self) -> str:
        """Of the table."""
        return self._name

    @property
    def num_rows(self) -> int:
        """Rows given so far, those of the shards before among them."""
        return self._num_before + self._num_rows + self._num_waiting + len(self._rows)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; a missing key becomes null.

        Raises:
            KeyError: the schema has no such column.
        """
        if not row.keys() <= self._columns:
            raise KeyError(f"{self._path.name}: row has columns that the schema lacks: {sorted(row.keys() - self._columns)}")
        self._rows.append(row)
        if len(self._rows) >= self._room:
            self._convert()

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows."""
        for row in rows:
            self.append(row)

    def add(self, piece: pa.RecordBatch) -> None:
        """Adds rows that are Arrow's already, with the columns of the schema."""
        self._convert()
        self._take(piece)

    def end_shard(self) -> None:
        """Puts the rows that are not on disk yet there, as a shard of their own."""
        self._convert()
        if self._num_waiting:
            self._write()
        self._end()
        self._wait()

    def close(self) -> list[Shard]:
        """Ends the table and returns its shards; an empty one keeps a shard with its schema."""
        if not self._num_shards:
            self._open()
        self.end_shard()
        self.stop()
        return self._shards

    def pieces(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """What stands in whole shards so far, in pieces of some hundred rows; to be asked after `end_shard`.

        Args:
            columns: Only these; None reads all.
        """
        for shard in self._shards:
            with pq.ParquetFile(self._folder / shard.file) as file:
                yield from map(_with_extras, file.iter_batches(batch_size=_ROWS_PER_PIECE, columns=columns))

    def stop(self) -> None:
        """Ends the thread after what it is doing; of a table that was not closed nothing more is written."""
        self._thread.shutdown()

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._name}-{self._num_shards:05d}.parquet"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(self._path.name + ".tmp")

    @property
    def _room(self) -> int:
        """Rows that complete a piece."""
        return min(_ROWS_PER_PIECE, ROWS_PER_SHARD - self._num_rows) - self._num_waiting

    def _open(self) -> pq.ParquetWriter:
        if self._file is None:
            self._file = pq.ParquetWriter(self._temporary, self._schema, compression="zstd", use_dictionary=self._dictionaries)
        return self._file

    def _convert(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._take(pa.RecordBatch.from_pylist(rows, schema=self._schema))

    def _take(self, piece: pa.RecordBatch) -> None:
        while len(piece):
            part, piece = piece[: self._room], piece[self._room :]
            self._pieces.append(part)
            self._num_waiting += len(part)
            if self._room == 0:
                self._write()

    def _write(self) -> None:
        piece = pa.Table.from_batches(self._pieces, schema=self._schema).combine_chunks()
        self._pieces, self._num_waiting = [], 0
        self._num_rows += len(piece)
        self._num_bytes += piece.nbytes
        self._in_thread(self._open().write_table, piece)
        if self._num_rows >= ROWS_PER_SHARD or self._num_bytes >= _BYTES_PER_SHARD:
            self._end()

    def _end(self) -> None:
        if self._file is None:
            return
        self._in_thread(self._finish, self._file, self._temporary, self._path, self._num_rows)
        self._num_before += self._num_rows
        self._num_rows = self._num_bytes = 0
        self._num_shards += 1
        self._file = None

    def _finish(self, file: pq.ParquetWriter, temporary: Path, path: Path, num_rows: int) -> None:
        file.close()
        self._shards.append(Shard(file=path.name, rows=num_rows, sha256=digest_file(temporary)))
        if self._record is not None:  # first, so that there is no shard without its digest
            self._record.append([self._shards[-1].model_dump()])
        commit(temporary, path)

    def _in_thread(self, job: Callable[..., None], *arguments: Any) -> None:
        self._wait()
        self._job = self._thread.submit(job, *arguments)

    def _wait(self) -> None:
        """Until the last job of the thread is done; an error of its comes out here."""
        job, self._job = self._job, None
        if job is not None:
            job.result()


def _leaves(field: pa.Field, path: str = "") -> Iterator[str]:
    """The columns that Parquet makes of a field, by their paths."""
    path = f"{path}{field.name}"
    if pa.types.is_list(field.type):
        yield from _leaves(pa.field("element", field.type.value_type), f"{path}.list.")
    elif pa.types.is_struct(field.type):
        for child in field.type:
            yield from _leaves(child, f"{path}.")
    else:
        yield path


def whole_shards(folder: Path, name: str, record: Journal) -> list[Shard]:
    """The shards of a table that a killed run has left: under their names are only whole ones.

    Args:
        folder: Of the stage.
        name: Of the table.
        record: Their digests. Where it is lost altogether, the shards are what they say they are, and are noted so.

    Raises:
        IntegrityError: one was altered.
    """
    known = {row["file"]: Shard(**row) for row in record.rows()}
    shards: list[Shard] = []
    while (path := folder / f"{name}-{len(shards):05d}.parquet").exists():
        try:
            shard = Shard(file=path.name, rows=pq.read_metadata(path).num_rows, sha256=digest_file(path))
        except (pa.ArrowException, OSError):
            shard = None
        if shard is None or (known and known.get(path.name) != shard):
            raise IntegrityError(f"{path}: was altered after it was written. Delete it to have its rows made again, or add --redo.")
        shards.append(shard)
    if shards and not known:  # else the next one noted would make strangers of these
        record.append([shard.model_dump() for shard in shards])
    return shards


def read_rows(folder: Path, table: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a finished stage's table, after its digests were checked; for tables that are short, or narrow columns."""
    return list(iter_rows(folder, table, columns=columns))


def iter_rows(folder: Path, table: str, first: int = 0, step: int = 1, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every `step`-th row of a finished stage's table, from `first`; a piece of a shard at a time is in memory.

    Args:
        folder: Of the stage.
        table: Its name.
        first: Number of the first row wanted, below `step`.
        step: From one to the next.
        columns: Only these; None reads all.
    """
    before = 0
    for piece in iter_pieces(folder, table, columns):
        wanted = pa.array(range((first - before) % step, len(piece), step), pa.int64())
        yield from rows_of(piece.take(wanted) if step > 1 else piece)
        before += len(piece)


def iter_pieces(folder: Path, table: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """A finished stage's table in pieces of some hundred rows, each shard's digest checked before its first."""
    for path in table_files(folder, table):
        with pq.ParquetFile(path) as file:
            yield from map(_with_extras, file.iter_batches(batch_size=_ROWS_PER_PIECE, columns=columns))


def rows_of(piece: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Arrow's rows as dictionaries; a turn of a conversation has no key for what it lacks."""
    rows: list[dict[str, Any]] = piece.to_pylist()
    if "messages" in piece.schema.names:
        for turn in (turn for row in rows for turn in row["messages"] or ()):
            for name in EXTRAS:
                if turn.get(name, "") is None:
                    del turn[name]
    return rows


def _with_extras(piece: pa.RecordBatch) -> pa.RecordBatch:
    """A piece whose conversations have all columns of the schema: a kit that knew no tools wrote tables without."""
    place = piece.schema.get_field_index("messages")
    if place < 0 or piece.schema.field(place).type == MESSAGES:
        return piece
    return piece.set_column(place, "messages", piece.column(place).cast(MESSAGES))


def rows_at(folder: Path, table: str, places: Sequence[int], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Some rows of a finished stage's table, in their order; only shards and row groups that have one are read.

    Args:
        folder: Of the stage.
        table: Its name.
        places: Their numbers from 0, rising.
        columns: Only these; None reads all.
    """
    wanted, before = np.asarray(places, np.int64), 0
    for shard in _shards(folder, table):
        of_shard = _within(wanted, before, shard.rows)
        before += shard.rows
        if not len(of_shard):
            continue
        with pq.ParquetFile(_checked(folder, shard)) as file:
            start = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                here = _within(of_shard, start, num_rows)
                start += num_rows
                if len(here):
                    yield from rows_of(file.read_row_group(group, columns).take(here))


class RandomRows:
    """Single rows of a finished stage's table, in any order: digests are checked once, and the last row groups read stay in memory.

    Args:
        folder: Of the stage.
        table: Its name.
    """

    def __init__(self, folder: Path, table: str) -> None:
        self._folder, self._shards = folder, list(_shards(folder, table))
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def row(self, place: int) -> dict[str, Any]:
        """The row of a number from 0."""
        number, group = 0, 0
        while place >= self._shards[number].rows:
            place -= self._shards[number].rows
            number += 1
        if number not in self._files:
            self._files[number] = pq.ParquetFile(_checked(self._folder, self._shards[number]))
        file = self._files[number]
        while place >= file.metadata.row_group(group).num_rows:
            place -= file.metadata.row_group(group).num_rows
            group += 1
        if (number, group) not in self._groups:
            self._groups[number, group] = file.read_row_group(group)
        self._groups.move_to_end((number, group))
        while len(self._groups) > _GROUPS_KEPT:
            self._groups.popitem(last=False)
        [found] = rows_of(self._groups[number, group].slice(place, 1))
        return dict(found)


def _within(places: NDArray[np.int64], start: int, count: int) -> NDArray[np.int64]:
    """Those of the rising places that lie in a stretch, counted from its start."""
    first, last = np.searchsorted(places, [start, start + count])
    return places[first:last] - start


def table_files(folder: Path, table: str) -> Iterator[Path]:
    """The Parquet files of a finished stage's table, in order; each after its digest was checked.

    Raises:
        MissingStageError: the stage is not finished.
        IntegrityError: a shard is gone or not what the manifest says.
    """
    for shard in _shards(folder, table):
        yield _checked(folder, shard)


def _shards(folder: Path, table: str) -> list[Shard]:
    manifest = read_manifest(folder)
    if table not in manifest.tables:
        raise MissingStageError(f"{folder}: has no table {table!r}, only {sorted(manifest.tables)}.")
    return manifest.tables[table]


def _checked(folder: Path, shard: Shard) -> Path:
    path = folder / shard.file
    if not path.exists() or digest_file(path) != shard.sha256:
        what = "is gone" if not path.exists() else "was altered after it was written"
        raise IntegrityError(f"{path}: {what}. Restore it, or make the stage again with --redo.")
    return path
