"""Traces of a finished stage, for one that grows from it: what was written before is not written again."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import StageConflictError
from distill.run.tables import iter_rows, rows_at

Key = tuple[str, int]
"""Prompt and sample."""


class EarlierTraces:
    """The traces of a finished stage, by author, prompt and sample; 16 bytes of each are in memory.

    Args:
        folder: Of the stage.
        authors: Only theirs: another model of the same name has written nothing yet.
    """

    def __init__(self, folder: Path, authors: Collection[str]) -> None:
        self._folder = folder
        hashes, places = array("Q"), array("Q")
        self._counts = dict.fromkeys(authors, 0)
        for place, row in enumerate(iter_rows(folder, "traces", columns=["author", "prompt_id", "sample_index"])):
            if row["author"] in self._counts:
                self._counts[row["author"]] += 1
                hashes.append(_number_of(row["author"], (row["prompt_id"], row["sample_index"])))
                places.append(place)
        found = np.array(hashes, np.uint64)
        order = np.argsort(found)
        self._hashes, self._places = found[order], np.array(places, np.int64)[order]

    def count(self, author: str) -> int:
        """Traces of an author."""
        return self._counts.get(author, 0)

    def rows(self, author: str, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """TRACE rows of those keys that there are."""
        if not len(self._hashes):
            return []
        wanted = np.array([_number_of(author, key) for key in keys], np.uint64)
        nearest = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        places = np.sort(self._places[nearest[self._hashes[nearest] == wanted]])
        asked = set(keys)  # 64 bits may be shared
        rows = rows_at(self._folder, "traces", places.tolist())
        return [row for row in rows if row["author"] == author and (row["prompt_id"], row["sample_index"]) in asked]


def refuse_another(role: str, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuses to put traces of another model beside those there are.

    Args:
        role: Whose.
        now: What the model is known by.
        before: The same of the one that wrote them; what was not recorded is not compared.

    Raises:
        StageConflictError: they differ.
    """
    other = [f"{name} is {before[name]} there and {now[name]} here" for name in sorted(now) if name in before and before[name] != now[name]]
    if other:
        raise StageConflictError(
            f"{role}: is not the model that wrote what is there: {'; '.join(other)}. Set it back (a revision, or the files in its folder), "
            "give another run_dir, or make the stage and all that follows from it anew with `distill run --redo`."
        )


def _number_of(author: str, key: Key) -> int:
    """64 bits that are equal for equal keys, within this process."""
    return hash((author, *key)) % 2**64
