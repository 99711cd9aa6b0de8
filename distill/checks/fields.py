"""What checks look at beside prompt and answer: further columns of the prompts, as `prompts.fields` names them."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from distill.data.identities import Identities, as_numbers
from distill.run.tables import iter_pieces


def as_fields(text: str | None) -> dict[str, Any]:
    """Fields as the tables of prompts hold them; none for null."""
    fields: dict[str, Any] = json.loads(text) if text is not None else {}
    return fields


class PromptFields:
    """The fields of a run's training prompts, by the prompt's id: in a file, of which 16 bytes a prompt are in memory.

    Use as a context manager.

    Args:
        prompts: Folder of the stage.
        place: Where a file without a name may be made.
    """

    def __init__(self, prompts: Path, place: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 (closed by __exit__)
        self._ends = array("q", [0])
        ids = array("Q")
        for piece in iter_pieces(prompts, "train", ["prompt_id", "fields"]):
            ids.extend(as_numbers(piece["prompt_id"].to_pylist()).tolist())
            for text in piece["fields"].to_pylist():
                written = (text or "{}").encode()
                self._file.write(written)
                self._ends.append(self._ends[-1] + len(written))
        self._file.flush()
        self._identities = Identities(np.frombuffer(ids, dtype=np.uint64))

    def __enter__(self) -> PromptFields:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def of(self, prompt_ids: list[str]) -> list[dict[str, Any]]:
        """The fields of some prompts; none for one that is not there."""
        return [self._at(place) for place in self._identities.places(as_numbers(prompt_ids)).tolist()]

    def _at(self, place: int) -> dict[str, Any]:
        if place < 0:
            return {}
        start, end = self._ends[place : place + 2]
        return as_fields(os.pread(self._file.fileno(), end - start, start).decode())
