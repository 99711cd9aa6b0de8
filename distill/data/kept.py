"""Texts that wait in a file, to be compared with one another. In memory are 16 bytes a text, and what tells equal ones."""

from __future__ import annotations

import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType

from distill.data.normal import normal_form
from distill.run.schema import Message

TURN = "\n"
"""Between the turns of a text; no normal form has it."""

_PLACE = re.compile(r"\{prompt\}|(?<![\w\\}\]^])\{[A-Za-z_][\w.]*\}")  # for a text, in a template
_TOGETHER = 512


class Texts:
    """Texts by their places, in the order they were added. Use as a context manager.

    Args:
        place: Folder where a file without a name may be made; null means the system's.
    """

    def __init__(self, place: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 (closed by __exit__)
        self._ends = array("q", [0])

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, texts: list[str]) -> None:
        """Takes texts in."""
        for text in texts:
            written = text.encode()
            self._file.write(written)
            self._ends.append(self._ends[-1] + len(written))
        self._file.flush()

    def __getitem__(self, place: int) -> str:
        start, end = self._ends[place : place + 2]
        return os.pread(self._file.fileno(), end - start, start).decode()

    def some(self, places: Iterator[int]) -> Iterator[tuple[list[int], list[str]]]:
        """Some hundred places at a time, with their texts."""
        while batch := list(islice(places, _TOGETHER)):
            yield batch, [self[place] for place in batch]


def own_text(messages: list[Message], template: str) -> str:
    """What is a conversation's own, in normal form: its turns, without those of the system and what the template puts around the last.

    Args:
        messages: As they are put to a model.
        template: Of the user's last turn.
    """
    places = list(_PLACE.finditer(template))
    before, behind = (template[: places[0].start()], template[places[-1].end() :]) if places else ("", "")
    last = max((place for place, turn in enumerate(messages) if turn["role"] == "user"), default=-1)
    texts = []
    for place, turn in enumerate(messages):
        if turn["role"] != "system":
            content = turn["content"]
            texts.append(normal_form(content.removeprefix(before).removesuffix(behind) if place == last else content))
    return TURN.join(texts)
