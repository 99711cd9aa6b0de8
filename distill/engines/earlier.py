"""Traces of finished stages, for one that grows from one, or was written in parts: what was written before is not written again."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import StageConflictError
from distill.run.manifest import read_manifest
from distill.run.schema import ALTERNATIVES
from distill.run.tables import iter_rows, rows_at

Key = tuple[str, int]
"""Prompt and sample."""
_OTHERS = [name for name in ALTERNATIVES.names if name not in ("prompt_id", "sample_index")]


class EarlierTraces:
    """The traces of finished stages, by author, prompt and sample; 24 bytes of each are in memory.

    Args:
        folders: Of the stages: one that is to grow, or the parts of one.
        authors: Only theirs: another model of the same name has written nothing yet.
        failed: Whether requests that failed for good there count too; else they are asked again.
        table: Where they stand.
    """

    def __init__(self, folders: Path | Sequence[Path], authors: Collection[str], *, failed: bool = False, table: str = "traces") -> None:
        places = [folders] if isinstance(folders, Path) else folders
        tables = (table, "dropped") if failed else (table,)
        self._sources = [(folder, name) for folder in places for name in tables if name in read_manifest(folder).tables]
        hashes, sources, numbers = array("Q"), array("Q"), array("Q")
        self._counts = dict.fromkeys(authors, 0)
        for source, (folder, name) in enumerate(self._sources):
            for number, row in enumerate(iter_rows(folder, name, columns=["author", "prompt_id", "sample_index", "finish_reason"])):
                if row["author"] in self._counts and (failed or row["finish_reason"] != "error"):
                    self._counts[row["author"]] += 1
                    hashes.append(_number_of(row["author"], (row["prompt_id"], row["sample_index"])))
                    sources.append(source)
                    numbers.append(number)
        found = np.array(hashes, np.uint64)
        order = np.argsort(found)
        self._hashes = found[order]
        self._source_of, self._number_of = (np.array(values, np.int64)[order] for values in (sources, numbers))

    def count(self, author: str) -> int:
        """Traces of an author."""
        return self._counts.get(author, 0)

    def rows(self, author: str, keys: Sequence[Key], *, alternatives: bool = False) -> list[dict[str, Any]]:
        """TRACE rows of those keys that there are; of requests that failed with a `reason`.

        Args:
            author: Of the traces.
            keys: Wanted.
            alternatives: Add what else might have been written under that name, where it is kept beside the traces.
        """
        if not len(self._hashes):
            return []
        wanted = np.array([_number_of(author, key) for key in keys], np.uint64)
        nearest = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        hits = nearest[self._hashes[nearest] == wanted]
        asked, found = set(keys), []  # 64 bits may be shared
        for source in np.unique(self._source_of[hits]).tolist():
            folder, table = self._sources[source]
            numbers = np.sort(self._number_of[hits[self._source_of[hits] == source]]).tolist()
            rows = list(rows_at(folder, table, numbers))
            if alternatives and table == "traces" and "alternatives" in read_manifest(folder).tables:
                others = rows_at(folder, "alternatives", numbers, _OTHERS)
                rows = [row | {"alternatives": other} for row, other in zip(rows, others, strict=True)]
            found += [row for row in rows if row["author"] == author and (row["prompt_id"], row["sample_index"]) in asked]
        return found


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
