"""Texts that are nearly the same, found among many by MinHash. Knows no prompts.

Two texts are as similar as their sets of runs of five characters are: the share of those in both, of those in either (Jaccard).
Characters and not words, because some scripts have no spaces. Of each text a signature of 128 numbers is cut into bands. Of those that
share two bands, the ones whose signatures are alike are compared by their runs themselves, so that nothing is called similar that is not.
Of pairs that are just as similar as is asked for one or two in a thousand are missed, of more similar ones far fewer; more where
thousands of texts are nearly similar, as those of one template, since a text is led to 4,000 others at most. In memory are 4 bytes a
band and the lowest byte of each number: of a text 200 bytes for a similarity of 0.9, 228 for 0.8, 384 for 0.5.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from distill.data.identities import Ids, Places
from distill.data.kept import TURN, Texts
from distill.data.windows import ranges, windows
from distill.run.log import progress

RUN = 5  # characters
_NUMBERS = 128  # of a signature
_MISSED = 0.001
_TOGETHER = 512  # texts that are looked up at once
_SHARED = 2  # bands
_STEPS = 4000  # others, each as often as it shares a band
_COMPARED = 50  # of those with the likeliest signatures
_FEW = 4  # are compared without a look at their signatures
_KNOWN = 4_000_000  # runs
_ERROR = 0.15  # of a similarity that is read off signatures: more than three standard deviations
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_FACTOR = np.uint64(0xD6E8FEB86659FD93)


class Near:
    """Texts by their signatures.

    Args:
        least: The lowest similarity that will be asked for.
        seed: Of the signatures.
        texts: Where they are kept; each is added there before it is here.
    """

    def __init__(self, least: float, seed: int, texts: Texts) -> None:
        self._rows = max(rows for rows in range(1, 17) if _missed(least, rows) <= _MISSED)
        self._bands = [array("I") for _ in range(_NUMBERS // self._rows)]
        self._signatures = bytearray()
        self._seed = seed
        self._texts, self._runs = texts, _Runs(texts)

    def add(self, texts: list[str]) -> None:
        """Takes texts in."""
        from rensa import RMinHash

        found, counts = _runs_of(texts)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        drawn = RMinHash.digest_matrix_from_flat_token_hashes(found, ends, _NUMBERS, self._seed)
        signatures = np.array(drawn.to_rows(), np.uint64)
        self._signatures += (signatures & np.uint64(0xFF)).astype(np.uint8).tobytes()
        for number, band in enumerate(self._bands):
            key = np.full(len(texts), number, np.uint64)
            for column in range(number * self._rows, (number + 1) * self._rows):
                key = (key ^ signatures[:, column]) * _FACTOR
                key ^= key >> _HALF
            band.frombytes((key & _LOW).astype(np.uint32).tobytes())

    def against(self, others: Places, asked: Places, least: float) -> Iterator[tuple[int, int, float]]:
        """Of those of `asked` that are similar to some of `others`: its place, that of the most similar, and how similar they are."""
        keys = [np.frombuffer(band, np.uint32) for band in self._bands]
        orders = [others[np.argsort(key[others], kind="stable")] for key in keys]
        bands = [(key, key[order], order) for key, order in zip(keys, orders, strict=True)]
        with progress(len(asked), "prompts", "similar", passing=True) as bar:
            for begin in range(0, len(asked), _TOGETHER):
                some = asked[begin : begin + _TOGETHER]
                shared = np.concatenate([_shared(*band, some) for band in bands])
                pairs, votes = np.unique(shared, return_counts=True)
                pairs, votes = pairs[votes >= _SHARED], votes[votes >= _SHARED]
                places, partners = (pairs >> _HALF).astype(np.int64), (pairs & _LOW).astype(np.int64)
                for start, end in _groups(places):
                    best = self._best(int(places[start]), partners[start:end], least)
                    if best is not None:
                        yield int(places[start]), *best
                bar.update(len(some))

    def among(self, places: Places, kept: int, least: float) -> Iterator[tuple[int, int, float]]:
        """Of texts that are similar to one before it, which stays itself: its place, that of the other, and how similar they are.

        Afterwards nothing more can be asked: what is known of the bands makes room for it.

        Args:
            places: Of the texts, in their order.
            kept: Number of the first of them that stay, whatever they are like.
            least: Similarity that is asked for.
        """
        links = [_linked(band, places) for band in self._bands]
        gone = bytearray(len(places))
        with progress(len(places), "prompts", "near-duplicates", passing=True) as bar:
            for at in range(len(places)):
                votes = _votes(links, at, gone)
                if at % _TOGETHER == 0:
                    bar.update(min(_TOGETHER, len(places) - at))
                if at < kept:
                    continue
                others = places[sorted(other for other, count in votes.items() if count >= _SHARED)] if votes else places[:0]
                best = self._best(int(places[at]), others, least) if len(others) else None
                if best is not None:
                    gone[at] = True
                    yield int(places[at]), *best

    def _best(self, place: int, others: Places, least: float) -> tuple[int, float] | None:
        """The most similar of some others, the first of several, and how similar it is; null where none is enough."""
        if len(others) > _FEW:
            signatures = np.frombuffer(self._signatures, np.uint8).reshape(-1, _NUMBERS)
            alike = (signatures[others] == signatures[place]).mean(axis=1)
            order = np.argsort(-alike, kind="stable")[:_COMPARED]
            others = others[order[alike[order] >= least - _ERROR]]
        if not len(others):
            return None
        similar = self._runs.similarity(place, others.tolist())
        for at in np.lexsort([others, -similar]).tolist():
            if similar[at] < least:
                break
            if not self._goes_on(place, int(others[at])):
                return int(others[at]), float(similar[at])
        return None

    def _goes_on(self, one: int, other: int) -> bool:
        """Whether a conversation is the beginning of the other, which asks something else then."""
        first, second = self._texts[one], self._texts[other]
        return first.startswith(second + TURN) or second.startswith(first + TURN)


class _Runs:
    """The runs of texts, each as a number of 64 bits; those that were asked for lately are in memory, 32 MB."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._known: dict[int, Ids] = {}
        self._size = 0

    def similarity(self, place: int, others: list[int]) -> npt.NDArray[np.float64]:
        """Of the text at a place with each of some others, in their order: the runs in both, of those in either."""
        own, *of_others = self._of([place, *others])
        flat, lengths = np.concatenate(of_others), np.array([len(each) for each in of_others])
        is_in_both = own[np.minimum(np.searchsorted(own, flat), len(own) - 1)] == flat
        both = np.add.reduceat(is_in_both.astype(np.int64), np.cumsum(lengths) - lengths)
        share: npt.NDArray[np.float64] = both / (len(own) + lengths - both)
        return share

    def _of(self, places: list[int]) -> list[Ids]:
        missing = [place for place in places if place not in self._known]
        if missing:
            numbers, counts = _runs_of([self._texts[place] for place in missing])
            for place, own in zip(missing, np.split(numbers, np.cumsum(counts)[:-1]), strict=True):
                self._known[place] = np.unique(own)
                self._size += len(self._known[place])
        found = [self._known[place] for place in places]
        while self._size > _KNOWN and len(self._known) > 1:
            self._size -= len(self._known.pop(next(iter(self._known))))
        return found


def _runs_of(texts: list[str]) -> tuple[Ids, Places]:
    """The runs of texts, one text behind the other, and how many each has; a text that is shorter than one is one."""
    texts = [text or " " for text in texts]
    values = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.uint64) + np.uint64(1)
    return windows(values, np.array([len(text) for text in texts], np.int64), RUN, whole=True)


def _missed(similarity: float, rows: int) -> float:
    """Chance that two texts of this similarity share fewer than two bands of so many numbers."""
    bands, one = _NUMBERS // rows, similarity**rows
    return float((1 - one) ** bands + bands * one * (1 - one) ** (bands - 1))


def _shared(key: npt.NDArray[np.uint32], sorted_keys: npt.NDArray[np.uint32], order: Places, asked: Places) -> Ids:
    """Pairs of those asked for and others that share a band, each as one number, of which `order` has the others by their keys."""
    first, behind = (np.searchsorted(sorted_keys, key[asked], side=side) for side in ("left", "right"))
    counts = np.minimum(behind - first, _STEPS // 10)
    pairs: Ids = (np.repeat(asked, counts).astype(np.uint64) << _HALF) | order[ranges(first, counts)].astype(np.uint64)
    return pairs


def _groups(values: Places) -> Iterator[tuple[int, int]]:
    """Where runs of equal values begin and end."""
    cuts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return pairwise(cuts) if len(values) else iter(())


def _linked(band: array[int], places: Places) -> memoryview:
    """For each of some texts the one before it that shares the band, as a number among `places`, or -1; in the band's own memory."""
    keys = np.frombuffer(band, np.uint32)
    own = keys[places]
    order = np.argsort(own, kind="stable")
    same = np.flatnonzero(own[order][1:] == own[order][:-1])
    links = np.frombuffer(band, np.int32)[: len(places)]
    links[:] = -1
    links[order[same + 1]] = order[same]
    return memoryview(links.data)


def _votes(links: list[memoryview], at: int, gone: bytearray) -> dict[int, int]:
    """The texts before one that stay, by the number of bands that they share with it."""
    votes: dict[int, int] = {}
    steps = _STEPS
    for link in links:
        other = link[at]
        if other >= 0 and gone[other]:  # what that one was led to stays
            other = link[at] = link[other]
        while other >= 0 and steps:
            votes[other] = votes.get(other, 0) + 1
            other, steps = link[other], steps - 1
    return votes
