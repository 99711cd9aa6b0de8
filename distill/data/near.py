"""Texts that are nearly the same, found among many by MinHash. Knows no prompts.

Two texts are as similar as their sets of runs of five characters are: the share of those in both, of those in either (Jaccard).
Characters and not words, because some scripts have no spaces. Of each text a signature of 128 numbers is cut into bands; those that
share a band are compared by their runs themselves, so that nothing is called similar that is not. Of pairs that are just as similar
as is asked for at most one in a thousand shares no band; of more similar ones far fewer. In memory is a number of 4 bytes a band: of
a text 72 bytes for a similarity of 0.9, 100 for 0.8, 256 for 0.5.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import lru_cache
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
_TOGETHER = 4096  # texts that are looked up at once
_STEPS, _COMPARED = 400, 50  # that a text is led to by its bands, and compared with, at most: where thousands share a band, the likeliest
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
        self._seed, self._texts = seed, texts
        self._runs = lru_cache(4096)(lambda place: runs(texts[place]))

    def add(self, texts: list[str]) -> None:
        """Takes texts in."""
        from rensa import RMinHash

        values = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.uint64) + np.uint64(1)
        found, counts = windows(values, np.array([len(text) for text in texts], np.int64), RUN, whole=True)
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        drawn = RMinHash.digest_matrix_from_flat_token_hashes(found, ends, _NUMBERS, self._seed)
        signatures = np.array(drawn.to_rows(), np.uint64)
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
        with progress(len(asked), "prompts", "similar", passing=True) as bar:
            for begin in range(0, len(asked), _TOGETHER):
                some = asked[begin : begin + _TOGETHER]
                shared = np.concatenate([_shared(key, order, some) for key, order in zip(keys, orders, strict=True)])
                pairs, votes = np.unique(shared, return_counts=True)
                places, partners = (pairs >> _HALF).astype(np.int64), (pairs & _LOW).astype(np.int64)
                for start, end in _groups(places):
                    place, likely = int(places[start]), start + np.argsort(-votes[start:end], kind="stable")[:_COMPARED]
                    similarity, other = max((self._similarity(place, one), -one) for one in partners[likely].tolist())
                    if similarity >= least:
                        yield place, -other, similarity
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
                for other in sorted(votes, key=lambda one: (-votes[one], one))[:_COMPARED]:
                    similarity = self._similarity(int(places[at]), int(places[other]))
                    if similarity >= least:
                        gone[at] = True
                        yield int(places[at]), int(places[other]), similarity
                        break

    def _similarity(self, one: int, other: int) -> float:
        first, second = self._texts[one], self._texts[other]
        # A conversation that goes on asks something else than its beginning did.
        if first.startswith(second + TURN) or second.startswith(first + TURN):
            return 0.0
        return jaccard(self._runs(one), self._runs(other))


def runs(text: str) -> frozenset[str]:
    """The runs of characters in a text; one that is shorter is one."""
    return frozenset(text[at : at + RUN] for at in range(max(len(text) - RUN + 1, 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Share of what both have, of what either has."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def _missed(similarity: float, rows: int) -> float:
    """Chance that two texts of this similarity share no band of so many numbers."""
    return float((1 - similarity**rows) ** (_NUMBERS // rows))


def _shared(key: npt.NDArray[np.uint32], order: Places, asked: Places) -> Ids:
    """Pairs of those asked for and others that share a band, each as one number, of which `order` has the others by their keys."""
    first, behind = (np.searchsorted(key[order], key[asked], side=side) for side in ("left", "right"))
    counts = np.minimum(behind - first, _STEPS)
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
