"""Which text was found to be like which other, and in what: 33 bytes a pair in memory, whatever it is that both have."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.data.identities import Places
from distill.data.kept import Texts


class Match(NamedTuple):
    """A text and what it is too much like, by their places."""

    place: int
    other: int
    kind: str
    run: str | None = None
    """The words that both have."""
    similarity: float | None = None


class Matches:
    """Matches, each with the reason that it is to drop a prompt. Use as a context manager.

    Args:
        place: Folder where a file without a name may be made; null means the system's.
    """

    def __init__(self, place: Path | None) -> None:
        self._places, self._others = array("q"), array("q")
        self._similarities, self._ways = array("d"), array("B")
        self._named: list[tuple[str, str]] = []  # reason and kind of each way
        self._runs = Texts(place)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Closes the file."""
        self._runs.close()

    def add(self, match: Match, reason: str) -> None:
        """Notes a match."""
        if (reason, match.kind) not in self._named:
            self._named.append((reason, match.kind))
        self._places.append(match.place)
        self._others.append(match.other)
        self._ways.append(self._named.index((reason, match.kind)))
        self._similarities.append(-1.0 if match.similarity is None else match.similarity)
        self._runs.add([match.run or ""])

    def places(self, begin: int) -> Places:
        """Of the texts that were noted, from the one of this number on."""
        return np.array(self._places[begin:], np.int64)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many there are, by reason and kind."""
        found: dict[str, dict[str, int]] = {}
        for way, count in sorted(Counter(self._ways).items(), key=lambda each: self._named[each[0]]):
            reason, kind = self._named[way]
            found.setdefault(reason, {})[kind] = count
        return found

    def sorted(self) -> Iterator[tuple[Match, str]]:
        """All, with their reasons, in the order of the texts."""
        for number in np.argsort(np.array(self._places, np.int64), kind="stable").tolist():
            reason, kind = self._named[self._ways[number]]
            similarity = self._similarities[number] if self._similarities[number] >= 0 else None
            found = Match(self._places[number], self._others[number], kind, self._runs[number] or None, similarity)
            yield found, reason
