"""Non-negative integers as bit streams, packed and unpacked by numpy without a loop over values.

Bit i of a stream is bit i % 8, counted from the least significant, of byte i // 8; a stream is filled up with zero bits to
a whole byte. Values whose size is known go in with a fixed width, values that are mostly small in a Rice code: the low
bits with a fixed width, what is above them in unary. The unary parts of all streams stand together at the end, because
they can be told apart only by counting.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_UNARY_OFFSET = struct.Struct("<I")
_MAX_WIDTH = 32
# A group of eight values may reach behind the end of its stream, and each of them is read as eight bytes.
_READ_AHEAD = bytes(_MAX_WIDTH + 8)


class BitWriter:
    """Collects streams. `BitReader` gets them back if it is asked in the same order."""

    def __init__(self) -> None:
        self._streams: list[bytes] = []
        self._unary: list[Integers] = []

    def fixed(self, values: Integers, width: int) -> None:
        """Adds a stream of the low `width` bits of values, at most 32."""
        # Eight values fill exactly `width` bytes, here words of 64 bits; one that begins in a word may end in the next.
        groups = np.zeros((-(-len(values) // 8), 8), np.uint64)
        groups.reshape(-1)[: len(values)] = values & ((1 << width) - 1)
        words = np.zeros((len(groups), -(-width // 8)), "<u8")
        for j in range(8):
            word, shift = divmod(j * width, 64)
            if width:
                words[:, word] |= groups[:, j] << np.uint64(shift)
            if shift + width > 64:
                words[:, word + 1] |= groups[:, j] >> np.uint64(64 - shift)
        self._streams.append(words.view(np.uint8)[:, :width].tobytes()[: -(-len(values) * width // 8)])

    def rice(self, values: Integers) -> None:
        """Adds a Rice-coded stream of values below 2^32, after a byte that says how many low bits stand apart."""
        shift = best_shift(values)
        self._streams.append(bytes([shift]))
        self.fixed(values, shift)
        self._unary.append(values >> shift)

    def to_bytes(self) -> bytes:
        """The offset of the unary stream in four bytes, the streams in order, and the unary stream."""
        streams = b"".join(self._streams)
        ends = np.cumsum(np.concatenate([np.empty(0, np.int64), *self._unary]) + 1) - 1
        bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
        bits[ends] = 1
        unary = np.packbits(bits, bitorder="little").tobytes()
        return _UNARY_OFFSET.pack(_UNARY_OFFSET.size + len(streams)) + streams + unary


class BitReader:
    """Reads the streams that a `BitWriter` wrote.

    Args:
        data: Unaltered bytes of `BitWriter.to_bytes`.
    """

    def __init__(self, data: bytes) -> None:
        (unary_offset,) = _UNARY_OFFSET.unpack_from(data)
        ends = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8, offset=unary_offset), bitorder="little"))
        self._unary: Integers = np.diff(ends, prepend=-1) - 1
        self._buffer = data + _READ_AHEAD
        self._offset = _UNARY_OFFSET.size

    def fixed(self, count: int, width: int) -> Integers:
        """The next stream, of `count` values of `width` bits."""
        start = self._offset
        self._offset += (count * width + 7) // 8
        if count * width == 0:
            return np.zeros(count, np.int64)
        # Eight values fill exactly `width` bytes, so the j-th of every eight starts at the same bit of its group.
        groups = (count + 7) // 8
        values = np.empty((groups, 8), np.int64)
        for j in range(8):
            byte, shift = divmod(j * width, 8)
            words: Integers = np.ndarray((groups,), "<i8", self._buffer, start + byte, (width,))
            values[:, j] = (words >> shift) & ((1 << width) - 1)
        return values.reshape(-1)[:count]

    def rice(self, count: int) -> Integers:
        """The next Rice-coded stream, of `count` values."""
        shift = self._buffer[self._offset]
        self._offset += 1
        low = self.fixed(count, shift)
        high, self._unary = self._unary[:count], self._unary[count:]
        return (high << shift) + low


def best_shift(values: Integers) -> int:
    """The Rice parameter that makes a stream smallest; a value v costs `shift` + (v >> shift) + 1 bits."""
    widest = int(values.max(initial=0)).bit_length()
    return min(range(widest + 1), key=lambda shift: rice_bits(values, shift))


def rice_bits(values: Integers, shift: int) -> int:
    """Size of a Rice-coded stream."""
    return (shift + 1) * len(values) + int((values >> shift).sum())
