"""Prompts by their ids, in 16 bytes each: which of them is which row. Knows nothing of where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


def as_numbers(prompt_ids: Sequence[str]) -> Ids:
    """Ids as numbers: their 16 hex digits are 64 bits."""
    return np.frombuffer(bytes.fromhex("".join(prompt_ids)), dtype=">u8").astype(np.uint64)


def rank(salt: str, number: int) -> int:
    """Where a prompt stands among others in an order that depends on its content and the salt alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{number:016x}".encode()).digest()[:8], "big")


class Identities:
    """Where each of some ids stands.

    Args:
        ids: Distinct ids.
    """

    def __init__(self, ids: Ids) -> None:
        self._order = np.argsort(ids)
        self._sorted = ids[self._order]

    def __len__(self) -> int:
        return len(self._sorted)

    def places(self, ids: Ids) -> Places:
        """The place of each id among those given at the start, from 0; -1 where it is none of them."""
        if not len(self._sorted):
            return np.full(len(ids), -1)
        nearest = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[nearest] == ids, self._order[nearest], -1)
