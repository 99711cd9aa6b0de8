"""Rows of one file, one at a time, of whatever kind; its digest is taken from the bytes on the way. Imports no torch.

Of a file of any length no more than some hundred rows are in memory, with one exception: a `.json` file is one value, which is
read whole; what is large belongs into a `.jsonl` file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.data.names import top_levels
from distill.errors import DataError, shown, visible
from distill.run.files import digest_file
from distill.run.log import say

Row = dict[str, Any]
Placed = tuple[str, Row]
"""A row, and where it stands: what an error about it begins with."""

KINDS = (".jsonl", ".json", ".csv", ".parquet")
PACKED = {".gz": "gzip", ".zst": "zstd"}
_CHUNK = 2**20  # bytes read at once
_ROWS = 512  # of a Parquet file, decoded at once
_LARGE_JSON = 2**29  # bytes, from which reading a .json file whole deserves a word
# What readers raise of a file that is damaged, beside the system's errors: Arrow has a kind of its own for each matter.
_UNREADABLE = (OSError, ValueError, EOFError, ArithmeticError, LookupError, RecursionError, MemoryError, TypeError, pa.ArrowException)
csv.field_size_limit(sys.maxsize)  # a long trace is over the 128 KiB that the module allows for a field


def kind_of(path: Path) -> str | None:
    """What a file's name says it holds, one of `KINDS`; null where it is none of them. Parquet is never packed again."""
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return None if kind not in KINDS or (kind == ".parquet" and path.suffix != kind) else kind


class DataFile:
    """A file of rows.

    Args:
        path: Where it is.
        given: As the recipe names it.
    """

    def __init__(self, path: Path, given: str) -> None:
        self.path, self.given = path, given
        state = path.stat()
        self.size, self.mtime_ns = state.st_size, state.st_mtime_ns
        self._sha256: str | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of its bytes; the file is read for it, unless its rows were."""
        if self._sha256 is None:
            self._sha256 = digest_file(self.path)
        return self._sha256

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"path": self.given, "size": self.size, "mtime_ns": self.mtime_ns, "sha256": self.sha256}

    def recognise(self, records: Sequence[dict[str, Any]]) -> None:
        """Takes the digest of a record over where path, size and time of the last change are still the same."""
        for known in records:
            if (known["path"], known["size"], known["mtime_ns"]) == (self.given, self.size, self.mtime_ns):
                self._sha256 = known["sha256"]

    def rows(self, columns: Sequence[str] | None = None, on_bytes: Callable[[int], object] | None = None) -> Iterator[Placed]:
        """All rows with their places; after the last one the digest is known.

        Args:
            columns: Names that will be looked up; of a Parquet file only their columns are read. None reads all.
            on_bytes: Told the number of bytes read.

        Raises:
            DataError: it can't be read; names the line.
        """
        kind = kind_of(self.path)
        if kind is None:
            packed = ", ".join(PACKED)
            raise DataError(f"{self.path}: its kind is not known by its name. Use {', '.join(KINDS)}; the first three also with {packed}.")
        try:
            with self.path.open("rb", buffering=0) as file:
                tap = _Tap(file, on_bytes)
                yield from _parquet(self.path, tap, columns) if kind == ".parquet" else _text(self.path, kind, tap)
                tap.read_to(None)
        except DataError:
            raise
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {_not_utf8(error)}") from None
        except _UNREADABLE as error:
            what = visible(str(error).strip().split("\n")[0] or type(error).__name__, 200).rstrip(".")
            as_kind = " as parquet" * (kind == ".parquet")
            raise DataError(f"{self.path}: can't be read{as_kind}: {what}. Make the file anew, or leave it out.") from None
        state = self.path.stat()
        if (state.st_size, state.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path}: was changed while it was read. Run this again when nobody writes to it.")
        self._sha256 = tap.sha256


class _Tap(io.RawIOBase):
    """An open file whose bytes are hashed and counted as they pass."""

    def __init__(self, file: io.FileIO, on_bytes: Callable[[int], object] | None) -> None:
        self._file, self._on_bytes = file, on_bytes
        self._hash = hashlib.sha256()
        self._place = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._hash.update(memoryview(buffer)[:count])
        self._place += count
        if self._on_bytes is not None:
            self._on_bytes(count)
        return count

    def read_to(self, end: int | None) -> None:
        """Passes over the bytes before a place, or over all that are left."""
        buffer = bytearray(_CHUNK)
        while end is None or self._place < end:
            wanted = _CHUNK if end is None else min(_CHUNK, end - self._place)
            if not self.readinto(memoryview(buffer)[:wanted]):
                return


def _parquet(path: Path, tap: _Tap, columns: Sequence[str] | None) -> Iterator[Placed]:
    """Row groups as they stand; each is hashed just before it is decoded, so that the disk is read once."""
    number = 0
    # With a buffer a column is read page by page; without, whole column chunks would be in memory.
    # Of a relative path `exp:1/` would be a URI to Arrow.
    with pq.ParquetFile(path.absolute(), buffer_size=_CHUNK, pre_buffer=False, page_checksum_verification=True) as file:
        names = top_levels(columns, file.schema_arrow.names) if columns is not None else None
        for group in range(file.num_row_groups):
            meta = file.metadata.row_group(group)
            chunks = [meta.column(place) for place in range(meta.num_columns)]
            tap.read_to(max((chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks), default=0))
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row


def _text(path: Path, kind: str, tap: _Tap) -> Iterator[Placed]:
    data = io.BufferedReader(tap, _CHUNK)
    if path.suffix in PACKED:
        if path.stat().st_size == 0:
            raise EOFError("it is empty")
        data = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(data, mode="r"), PACKED[path.suffix]), _CHUNK)
    if kind == ".jsonl":
        yield from _json_lines(path, data)
        return
    # A byte-order mark, which spreadsheets write, is no part of the first column's name.
    text = io.TextIOWrapper(data, encoding="utf-8-sig", newline="")
    yield from (_json if kind == ".json" else _csv)(path, text)


def _json_lines(path: Path, lines: IO[bytes]) -> Iterator[Placed]:
    name = str(path)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number}: {_not_utf8(error)}") from None
        except RecursionError:
            raise DataError(f"{name}:{number}: is nested too deeply to be read. Correct or remove the line.") from None
        except ValueError as error:
            if not line.strip():
                continue
            raise DataError(f"{name}:{number}: not valid JSON: {visible(str(error), 200)}. Correct or remove the line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{name}:{number}: holds {type(row).__name__}, not an object with columns. Correct or remove the line.")
        yield f"{name}:{number}", row


def _json(path: Path, file: IO[str]) -> Iterator[Placed]:
    if path.stat().st_size > _LARGE_JSON:
        say(f"{path}: is read into memory whole, because it is one JSON value. One object a line in a .jsonl file takes no memory.")
    try:
        content = json.load(file)
    except UnicodeDecodeError:
        raise
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply to be read. Write it flatter.") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {visible(str(error), 200)}. One object a line belongs into a .jsonl file.") from None
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list) or not all(isinstance(row, dict) for row in lists[0]):
        raise DataError(f"{path}: must hold a list of objects, or an object with one such list.")
    for number, row in enumerate(lists[0], start=1):
        yield f"{path}: row {number}", row


def _csv(path: Path, file: IO[str]) -> Iterator[Placed]:
    reader = csv.DictReader(file, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: two columns have the same name, got {shown(names, 200)}. Rename one.")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():  # how the module marks too many and too few fields
                raise DataError(f"{where}: has not as many fields as there are columns ({len(names)}). Correct the line.")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: not valid CSV: {error}. Correct the row that begins there.") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text ({error.reason} {error.object[error.start]:#04x}). Convert it first."
