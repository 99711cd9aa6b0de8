"""What a stage that is under way has finished, a batch a line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import IntegrityError


class Journal:
    """Append-only record of finished batches: a batch is on disk whole, or will be done again. Nothing of it is held in memory.

    A line torn by a kill can only be the last one; it is cut off. Any other damage is an error.

    Args:
        path: Of the file; it need not be there.

    Raises:
        IntegrityError: a line was altered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = sum(len(line) for line in self._lines())
        if path.exists() and whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds one batch and returns when it is on disk."""
        body = json.dumps(rows, ensure_ascii=False).encode()
        line = hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Forgets all batches: what they hold is kept elsewhere now."""
        self.path.unlink(missing_ok=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of all batches, in the order of writing."""
        for line in self._lines():
            yield from json.loads(line.partition(b" ")[2])

    def _lines(self) -> Iterator[bytes]:
        """Whole lines, each as it was written."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest, _, body = line.partition(b" ")
                if not line.endswith(b"\n"):
                    return
                if hashlib.sha256(body[:-1]).hexdigest()[:16].encode() != digest:
                    raise IntegrityError(
                        f"{self.path}:{number}: this line was altered after it was written. "
                        "Delete the line to have its batch made again, or add --redo to start the stage over."
                    )
                yield line
