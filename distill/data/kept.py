"""Texts that wait in a file, to be compared with one another. In memory are 8 bytes a text."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType

from distill.data.normal import normal_form
from distill.recipe.prompts import pieces_of
from distill.run.schema import Message

TURN = "\n"
"""Between the turns of a text; no normal form has it."""

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
        self.close()

    def close(self) -> None:
        """Closes the file; nothing can be read any more."""
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


def around(template: str) -> tuple[str, str]:
    """What a template puts before the first value of a row, and behind the last."""
    pieces = pieces_of(template)
    filled = [place for place, piece in enumerate(pieces) if piece.name is not None]
    before, behind = pieces[: filled[0]], pieces[filled[-1] + 1 :]
    return "".join(piece.text for piece in before), "".join(piece.text for piece in behind)


def own_text(messages: list[Message], around: tuple[str, str] = ("", "")) -> str:
    """What is a conversation's own, in normal form: its turns with their calls, without those of the system and without the template.

    Args:
        messages: As they are put to a model.
        around: What the template puts before and behind the text of the last turn of the user's.
    """
    before, behind = around
    last = max((place for place, turn in enumerate(messages) if turn["role"] == "user"), default=-1)
    texts = []
    for place, turn in enumerate(messages):
        if turn["role"] != "system":
            content = turn["content"]
            content = content.removeprefix(before).removesuffix(behind) if place == last else content
            texts.append(normal_form(f"{content} {turn.get('tool_calls') or ''}"))
    return TURN.join(texts)
