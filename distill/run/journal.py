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
    """Append-only record of finished batches: a batch is on disk whole, or will be done again.

    A line torn by a kill can only be the last one; it is cut off. Any other damage is an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[list[dict[str, Any]]] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            digest, _, body = line.partition(b" ")
            if hashlib.sha256(body).hexdigest()[:16].encode() != digest:
                raise IntegrityError(
                    f"{self.path}:{number}: this line was altered after it was written. "
                    "Delete the line to have its batch made again, or add --redo to start the stage over."
                )
            self.batches.append(json.loads(body))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds one batch and returns when it is on disk."""
        body = json.dumps(rows, ensure_ascii=False).encode()
        line = hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.batches.append(rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of all batches, in the order of writing."""
        for batch in self.batches:
            yield from batch
