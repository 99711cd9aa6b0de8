"""Shards of target rows on disk: append, survive a kill, read any row. What a payload means is the codec's business.

A shard grows under the name `<shard>.part` and takes its own name when its index is written, so a shard under its own
name is complete. Every byte lies under a checksum that is compared when it is read.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Sequence
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from distill.errors import IntegrityError, StageConflictError
from distill.run.files import digest_file
from distill.targets.codec import Codec, Targets
from distill.targets.spec import TargetHeader

MAGIC = b"DSTLTGT\x01"  # the last byte is the version of the format
SUFFIX = ".part"

_ROW, _INDEX = b"ROW\n", b"IDX\n"
_HEAD = struct.Struct("<8sII")  # magic, bytes of JSON, CRC-32 of both and of the JSON
_FRAME = struct.Struct("<4sIIII")  # tag, bytes of payload, positions, bytes of key, CRC-32 of key and payload; then:
_CRC = struct.Struct("<I")  # CRC-32 of the frame
_FOOTER = struct.Struct("<QI")  # offset of the index, rows; then a CRC-32 of the index and these
_ENTRY = np.dtype([("offset", "<u8"), ("key", "<u8"), ("positions", "<u4")])
_FRAME_BYTES, _FOOTER_BYTES = _FRAME.size + _CRC.size, _FOOTER.size + _CRC.size

_REMAKE = "Restore it, or delete it and run the stage again to make it anew."


class TargetWriter:
    """Appends rows to a shard; opened on a shard that was begun before, it goes on behind the last whole row.

    Use as a context manager. A row cut short by a kill is cut off; any other damage is an error. One process writes a
    shard.

    Args:
        path: Where the finished shard will stand.
        header: What all rows have in common.

    Raises:
        StageConflictError: the shard is complete, or was begun with another header.
        IntegrityError: it was begun, and altered since.
    """

    def __init__(self, path: Path, header: TargetHeader) -> None:
        self.path = path
        self._part = path.with_name(path.name + SUFFIX)
        self._codec = Codec(header.target, header.vocab_size)
        self._entries: list[tuple[int, int, int]] = []
        self._keys: set[str] = set()
        if path.exists():
            raise StageConflictError(f"{path}: is complete, nothing can be added. Read it, or delete it to make it again.")
        end = self._resume(header) if self._part.exists() else 0
        self._file: BinaryIO = self._part.open("r+b" if end else "wb")
        if end:
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self._file.write(_header_bytes(header))
            self._file.flush()

    def __enter__(self) -> TargetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        """Whether a row was appended, now or before a restart."""
        return key in self._keys

    def append(self, key: str, targets: Targets) -> None:
        """Adds a row; it survives a kill of this process, and a power cut after `flush`.

        Args:
            key: Names the trace; no two rows share one.
            targets: One entry a supervised token, in the trace's order.

        Raises:
            ValueError: the key is already there, or the targets can't be encoded.
        """
        if key in self._keys:
            raise ValueError(f"{self.path}: has a row {key!r} already. Give every trace a key of its own.")
        payload, name = self._codec.encode(targets), key.encode()
        frame = _FRAME.pack(_ROW, len(payload), len(targets), len(name), zlib.crc32(name + payload))
        self._note(key, self._file.tell(), len(targets))
        self._file.write(frame + _CRC.pack(zlib.crc32(frame)) + name + payload)
        self._file.flush()

    def flush(self) -> None:
        """Returns when all rows appended so far are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> str:
        """Writes the index, gives the shard its name, and returns the SHA-256 of its bytes."""
        start = self._file.tell()
        index = _INDEX + np.array(self._entries, _ENTRY).tobytes() + _FOOTER.pack(start, len(self._entries))
        self._file.write(index + _CRC.pack(zlib.crc32(index)))
        self.flush()
        self._file.close()
        self._part.replace(self.path)
        return digest_file(self.path)

    def _note(self, key: str, offset: int, positions: int) -> None:
        self._keys.add(key)
        self._entries.append((offset, key_hash(key), positions))

    def _resume(self, header: TargetHeader) -> int:
        """Notes all whole rows of the begun shard and returns where they end; 0 if not even its header is whole."""
        data = _map(self._part)
        if len(data) < len(_header_bytes(header)) and _header_bytes(header).startswith(data[:]):
            return 0
        found, offset = _read_header(self._part, data)
        if found != header:
            raise StageConflictError(
                f"{self._part}: was begun with other settings or inputs: {_differences(found, header)}. "
                "Choose another run_dir, or add --redo to make the stage again."
            )
        while len(data) - offset >= _FRAME_BYTES and data[offset : offset + 4] != _INDEX:
            key_bytes, payload_bytes, positions, body_crc = _read_frame(self._part, data, offset)
            end = offset + _FRAME_BYTES + key_bytes + payload_bytes
            if end > len(data):
                break
            key, _ = _read_body(self._part, data[offset + _FRAME_BYTES : end], key_bytes, body_crc)
            self._note(key, offset, positions)
            offset = end
        return offset


def reopen(path: Path) -> None:
    """Makes a complete shard one that was begun: a writer goes on behind its last row."""
    path.replace(path.with_name(path.name + SUFFIX))


class TargetReader:
    """Rows of one or more complete shards, in the order of the shards; any row is read from disk when asked for.

    Shards are memory-mapped: what stays in memory are the pages last used, and 36 bytes a row after the first `find`.
    Pickles as its paths, so that a data loader's workers open the files themselves.

    Args:
        paths: Shards of one header.

    Raises:
        IntegrityError: a shard is gone, unfinished or altered, or the shards don't belong together.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise IntegrityError("targets: no shard to read. Run the stage score first.")
        self._shards = [_Shard(path) for path in paths]
        self.header = self._shards[0].header
        for shard in self._shards[1:]:
            if shard.header != self.header:
                raise IntegrityError(
                    f"{shard.path}: doesn't belong to {paths[0]}: {_differences(shard.header, self.header)}. "
                    "Read shards of one stage only, or make the stage again with --redo."
                )
        self._starts = np.cumsum([0, *(len(shard.entries) for shard in self._shards)])
        self._codec = Codec(self.header.target, self.header.vocab_size)
        self._by_hash: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def __reduce__(self) -> tuple[type[TargetReader], tuple[list[Path]]]:
        return TargetReader, ([shard.path for shard in self._shards],)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Targets:
        """The targets of a row.

        Raises:
            IndexError: there is no such row.
            IntegrityError: its bytes were altered.
        """
        return self._codec.decode(self._read(row)[1])

    def key(self, row: int) -> str:
        """The key a row was appended with."""
        return self._read(row)[0]

    @cached_property
    def positions(self) -> NDArray[np.uint32]:
        """(rows,) number of supervised tokens of every row, read from the index alone."""
        return np.concatenate([shard.entries["positions"] for shard in self._shards])

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """(rows,) `key_hash` of every row's key, read from the index alone."""
        return np.concatenate([shard.entries["key"] for shard in self._shards])

    @property
    def places_digest(self) -> str:
        """SHA-256 of which key stands in which row, and with how many positions."""
        return hashlib.sha256(self.hashes.tobytes() + self.positions.tobytes()).hexdigest()

    def find(self, key: str) -> int:
        """The row of a key.

        Raises:
            KeyError: no row has it.
        """
        if self._by_hash is None:
            order = np.argsort(self.hashes, kind="stable")
            self._by_hash = self.hashes[order], order
        hashes, order = self._by_hash
        first, last = (int(np.searchsorted(hashes, np.uint64(key_hash(key)), side)) for side in ("left", "right"))
        for row in order[first:last]:
            # Where one row alone has these 64 bits it is not read: a training asks for every row of all shards.
            if last - first == 1 or self.key(int(row)) == key:
                return int(row)
        raise KeyError(key)

    def _read(self, row: int) -> tuple[str, bytes]:
        if not 0 <= row < len(self):
            raise IndexError(f"targets: there is no row {row}, only {len(self)} from 0")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._shards[shard].read(row - int(self._starts[shard]))


class _Shard:
    """A complete shard, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            state = f"is not finished ({path.name}{SUFFIX} is)" if path.with_name(path.name + SUFFIX).exists() else "is gone"
            raise IntegrityError(f"{path}: {state}. Run the stage score to its end.")
        self._data = _map(path)
        self.header, start = _read_header(path, self._data)
        end = len(self._data) - _FOOTER_BYTES
        index, rows = _FOOTER.unpack_from(self._data, end) if end >= start else (0, 0)
        if not start <= index == end - rows * _ENTRY.itemsize - len(_INDEX) or not _checks(self._data[index:]):
            raise IntegrityError(f"{path}: its index was altered or cut. {_REMAKE}")
        self._end = index
        self.entries: NDArray[np.void] = np.frombuffer(self._data, _ENTRY, rows, index + len(_INDEX))

    def read(self, row: int) -> tuple[str, bytes]:
        """Key and payload of a row, after their checksums were compared."""
        offset = int(self.entries["offset"][row])
        end = int(self.entries["offset"][row + 1]) if row + 1 < len(self.entries) else self._end
        key_bytes, payload_bytes, _, body_crc = _read_frame(self.path, self._data, offset)
        if offset + _FRAME_BYTES + key_bytes + payload_bytes != end:
            raise IntegrityError(f"{self.path}: row {row} doesn't end where the next begins. {_REMAKE}")
        return _read_body(self.path, self._data[offset + _FRAME_BYTES : end], key_bytes, body_crc)


def _map(path: Path) -> mmap | bytes:
    """The bytes of a file, read as they are asked for; an empty file can't be mapped."""
    with path.open("rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ) if path.stat().st_size else b""


def _header_bytes(header: TargetHeader) -> bytes:
    text = header.model_dump_json().encode()
    return _HEAD.pack(MAGIC, len(text), zlib.crc32(MAGIC + text)) + text


def _read_header(path: Path, data: mmap | bytes) -> tuple[TargetHeader, int]:
    """The header of a shard, and the offset of what follows it."""
    if len(data) < _HEAD.size or data[:7] != MAGIC[:7]:
        raise IntegrityError(f"{path}: holds no targets, or its beginning was altered. {_REMAKE}")
    magic, size, crc = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise IntegrityError(f"{path}: has format version {magic[7]}, this kit reads {MAGIC[7]}. Make the stage again with --redo.")
    text = data[_HEAD.size : _HEAD.size + size]
    if len(text) != size or zlib.crc32(magic + text) != crc:
        raise IntegrityError(f"{path}: its header was altered. {_REMAKE}")
    try:
        return TargetHeader.model_validate_json(text), _HEAD.size + size
    except ValidationError as error:
        raise IntegrityError(f"{path}: its header can't be read ({str(error).splitlines()[0]}). {_REMAKE}") from None


def _read_frame(path: Path, data: mmap | bytes, offset: int) -> tuple[int, int, int, int]:
    """Bytes of key and of payload, positions, and checksum of the body of the row at an offset."""
    frame = data[offset : offset + _FRAME_BYTES]
    if len(frame) < _FRAME_BYTES or not _checks(frame):
        raise IntegrityError(f"{path}: the row at byte {offset} was altered. {_REMAKE}")
    _, payload_bytes, positions, key_bytes, body_crc = _FRAME.unpack_from(frame)
    return key_bytes, payload_bytes, positions, body_crc


def _read_body(path: Path, body: bytes, key_bytes: int, crc: int) -> tuple[str, bytes]:
    if zlib.crc32(body) != crc:
        raise IntegrityError(f"{path}: the row {body[:key_bytes]!r} was altered. {_REMAKE}")
    return body[:key_bytes].decode(), body[key_bytes:]


def _checks(block: bytes) -> bool:
    """Whether the last four bytes are the CRC-32 of those before."""
    return block[-_CRC.size :] == _CRC.pack(zlib.crc32(block[: -_CRC.size]))


def key_hash(key: str) -> int:
    """64 bits of a key's SHA-256, by which an index knows it."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def _differences(found: TargetHeader, expected: TargetHeader) -> str:
    pairs = ((name, getattr(found, name), getattr(expected, name)) for name in TargetHeader.model_fields)
    return "; ".join(f"{name} is {there}, asked for {asked}" for name, there, asked in pairs if there != asked)
