"""Runs of a few values in many texts at once, each as a number."""

from __future__ import annotations

import numpy as np

from distill.data.identities import Ids, Places

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits everywhere
_SHIFT = np.uint64(29)


def windows(values: Ids, lengths: Places, size: int, *, whole: bool = False) -> tuple[Ids, Places]:
    """A number for every run of `size` values, text by text, and how many each text has; equal runs have equal ones.

    Args:
        values: Of all texts, one behind the other; none is 0.
        lengths: Of the texts.
        size: Of a run.
        whole: Whether a text that is shorter is one run, and not none.
    """
    # Zeros behind each text, so that a short one has something to be read to its end.
    starts = np.cumsum(lengths + size) - (lengths + size)
    padded = np.zeros(int((lengths + size).sum()), np.uint64)
    padded[ranges(starts, lengths)] = values
    counts = np.maximum(lengths - size + 1, 0)
    if whole:
        counts = np.maximum(counts, np.minimum(lengths, 1))
    at = ranges(starts, counts)
    found = np.zeros(len(at), np.uint64)
    for place in range(size):
        found = found * _FACTOR + padded[at + place]
        found ^= found >> _SHIFT
    return found, counts


def ranges(starts: Places, counts: Places) -> Places:
    """`counts` places from each of `starts` on, one range behind the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(int(ends[-1]) if len(ends) else 0)
