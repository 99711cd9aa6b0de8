"""What a stage that is under way has finished, a batch a line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import IntegrityError
from distill.run.early import held


class Journal:
    """Append-only record of finished batches: a batch is on disk whole, or will be done again. Nothing of it is held in memory.

    A line torn by a kill can only be the last one; it is cut off. Any other damage is an error. Each line has a digest of itself and
    of what the journal belongs to, so that no line of another run, or of other settings, is taken for one of this.

    Args:
        path: Of the file; it need not be there.
        belongs_to: What its rows are made of and from: `StagePlan.binding`.

    Raises:
        IntegrityError: a line was altered.
    """

    def __init__(self, path: Path, belongs_to: str = "") -> None:
        self.path, self._belongs_to = path, belongs_to
        whole = sum(len(line) for line in _lines(path, belongs_to))
        if path.exists() and whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds one batch and returns when it is on disk."""
        body = json.dumps(rows, ensure_ascii=False).encode()
        line = _digest(body, self._belongs_to) + b" " + body + b"\n"
        with held(), self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Forgets all batches: what they hold is kept elsewhere now."""
        self.path.unlink(missing_ok=True)

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """Keeps these rows alone; after a kill either they are there or all that was."""
        if not rows:
            self.clear()
            return
        other = Journal(self.path.with_name(f"{self.path.name}.tmp"), self._belongs_to)
        other.clear()
        other.append(rows)
        other.path.replace(self.path)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of all batches, in the order of writing."""
        return check_journal(self.path, self._belongs_to)


def check_journal(path: Path, belongs_to: str) -> Iterator[dict[str, Any]]:
    """All rows of a journal that another process may be writing; a torn last line is passed over.

    Raises:
        IntegrityError: a line was altered.
    """
    for line in _lines(path, belongs_to):
        yield from json.loads(line.partition(b" ")[2])


def _lines(path: Path, belongs_to: str) -> Iterator[bytes]:
    """Whole lines, each as it was written."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest, _, body = line.partition(b" ")
            if not line.endswith(b"\n"):
                return
            if _digest(body[:-1], belongs_to) != digest:
                raise IntegrityError(
                    f"{path}:{number}: this line was altered after it was written, or belongs to another run. "
                    "Delete the line to have its batch made again, or the file where all lines are so, as those of an earlier kit are; "
                    "or add --redo to start the stage over."
                )
            yield line


def _digest(body: bytes, belongs_to: str) -> bytes:
    return hashlib.sha256(belongs_to.encode() + body).hexdigest()[:16].encode()
