"""Runs of words that texts share with some others: what betrays a question of a benchmark inside a prompt. Knows no prompts.

A word is what stands between spaces and signs. In scripts without spaces (Chinese, Japanese, Thai, Khmer, ...) each character stands for
half a word, so that a run of 8 words is one of 16 characters in a text that is mostly of them. Of the runs of the others, 24 bytes
each are in memory.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distill.data.identities import Ids, Places
from distill.data.kept import Texts
from distill.data.normal import SIGNS
from distill.data.windows import windows
from distill.run.log import progress

_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNITS = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}{SIGNS}\\s]+")
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_COMMON = 10  # texts: what is in no more of them is no boilerplate, however few there are


class Found(NamedTuple):
    """A run of words that a text shares with another."""

    place: int
    """Of the text."""
    other: int
    words: int
    """That were asked for."""
    run: str


class Search:
    """Looks for runs of some texts in others.

    Args:
        texts: Where all are.
        others: Places of those whose runs are looked for.
        lengths: Words of a run, the largest first.
    """

    def __init__(self, texts: Texts, others: Sequence[int], lengths: list[int]) -> None:
        self._texts = texts
        self.num_common = 0
        """Runs, of the smallest length, that are boilerplate."""
        self._known = [_Known(texts, others, words) for words in lengths]

    def find(self, asked: Places, share: float, talks: Ids | None = None) -> Iterator[Found]:
        """The texts that share a run, each with one of the largest.

        Args:
            asked: Places of the texts.
            share: A run in more of them than this, and in more than ten, is boilerplate.
            talks: Which conversation the text at each place is of: in how many of its parts a run is says nothing. Null: each counts.
        """
        hits = self._counted(asked, asked.astype(np.uint64) if talks is None else talks[asked])
        most = max(_COMMON, int(share * len(asked)))
        for known in self._known:
            self.num_common = known.forget(most)
        for some, batch in self._texts.some(iter(hits)):
            yield from self._largest(some, list(map(units, batch)))

    def _counted(self, asked: Places, talks: Ids) -> array[int]:
        """The texts that share a run of the smallest length; in how many each run is, is noted."""
        hits = array("q")
        with progress(len(asked), "prompts", "runs of words", passing=True) as bar:
            for some, batch in self._texts.some(iter(asked.tolist())):
                words, of_talks = list(map(units, batch)), talks[bar.done : bar.done + len(some)].tolist()
                for known in self._known:
                    shared = [known.note(numbers, talk) for numbers, talk in zip(runs(words, known.words), of_talks, strict=True)]
                hits.extend(place for place, is_shared in zip(some, shared, strict=True) if is_shared)  # of the last, the smallest
                bar.update(len(some))
        return hits

    def _largest(self, places: list[int], texts: list[list[str]]) -> Iterator[Found]:
        of_each: dict[int, Found] = {}
        for known in reversed(self._known):
            for place, words, numbers in zip(places, texts, runs(texts, known.words), strict=True):
                first = known.first(numbers)
                if first is not None:
                    at, other = first
                    of_each[place] = Found(place, other, known.words, " ".join(words[at : at + size_of(words, known.words)]))
        yield from (of_each[place] for place in places if place in of_each)


class _Known:
    """The runs of one length that are looked for."""

    def __init__(self, texts: Texts, others: Sequence[int], words: int) -> None:
        self.words = words
        numbers, places = [np.array([], np.uint64)], [np.array([], np.int32)]
        for some, batch in texts.some(iter(others)):
            of_each = runs(list(map(units, batch)), words)
            numbers += of_each
            places += [np.full(len(each), place, np.int32) for place, each in zip(some, of_each, strict=True)]
        # Of a run in several texts the first is named.
        self._numbers, first = np.unique(np.concatenate(numbers), return_index=True)
        self._places = np.concatenate(places)[first]
        self._num_texts = np.zeros(len(first), np.int32)
        self._last = np.full(len(first), 2**64 - 1, np.uint64)

    def _at(self, numbers: Ids) -> Places:
        if not len(self._numbers):
            return np.full(len(numbers), -1)
        nearest = np.minimum(np.searchsorted(self._numbers, numbers), len(self._numbers) - 1)
        return np.where(self._numbers[nearest] == numbers, nearest, -1)

    def note(self, numbers: Ids, talk: int) -> bool:
        """Counts the runs of a text, each once a conversation, whose parts follow one another; whether there is one."""
        at = np.unique(self._at(numbers))
        at = at[at >= 0]
        self._num_texts[at[self._last[at] != talk]] += 1
        self._last[at] = talk
        return len(at) > 0

    def forget(self, most: int) -> int:
        """Looks no more for runs that are in more texts than this. Returns their number."""
        rare = self._num_texts <= most
        self._numbers, self._places = self._numbers[rare], self._places[rare]
        return int((~rare).sum())

    def first(self, numbers: Ids) -> tuple[int, int] | None:
        """Of a text's runs the first that is looked for: its place in the text, and the other text."""
        at = self._at(numbers)
        found = np.flatnonzero(at >= 0)
        return (int(found[0]), int(self._places[at[found[0]]])) if len(found) else None


def units(text: str) -> list[str]:
    """The words of a text in normal form; of scripts without spaces each character."""
    return _UNITS.findall(text)


def size_of(words: list[str], count: int) -> int:
    """How many units a run of so many words has in a text: twice as many where most are characters of scripts without spaces."""
    unspaced = sum(_IS_UNSPACED.match(word) is not None for word in words)
    return 2 * count if 2 * unspaced > len(words) else count


def runs(texts: list[list[str]], count: int) -> list[Ids]:
    """The runs of so many words in each of some texts, in their order, as numbers; none in a text of fewer."""
    found: list[Ids] = [np.array([], np.uint64)] * len(texts)
    sizes = np.array([size_of(words, count) for words in texts])
    for size in (count, 2 * count):
        places = np.flatnonzero(sizes == size).tolist()
        lengths = np.array([len(texts[place]) for place in places], np.int64)
        values = np.array([hash(word) % 2**64 | 1 for place in places for word in texts[place]], np.uint64)
        numbers, counts = windows(values, lengths, size)
        for place, own in zip(places, np.split(numbers, np.cumsum(counts)[:-1]) if places else [], strict=True):
            found[place] = own
    return found
