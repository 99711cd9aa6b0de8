"""By what a prompt's passing traces are preferred to each other: a number each, of which the lowest are kept; NaN where there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.checks.choice import Evidence
from distill.data.normal import normal_form
from distill.run.tables import iter_pieces, rows_at

Values = NDArray[np.float64]
Shingles = NDArray[np.uint64]

_WIDTH = 8  # characters of a shingle: a short word or two, so that what two texts share are phrases rather than letters
_CHARS = 2**26  # of texts that are in memory


def by_mixed_length(evidence: Evidence, long_share: float, seed: int) -> Values:
    """Low for long traces in a share of the prompts, and for short ones in the others; which of both is drawn by prompt and seed."""
    prompts_P, place_R = np.unique(evidence.prompts_R, return_inverse=True)
    drawn_P = np.fromiter((_uniform(f"{seed}/{prompt}") for prompt in prompts_P.tolist()), np.float64, len(prompts_P))
    sign_P = np.where(drawn_P < long_share, -1.0, 1.0)
    values_R: Values = sign_P[place_R] * evidence.lengths_R
    return values_R


def _uniform(text: str) -> float:
    """In [0, 1), a function of the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64


def by_likelihood(traces: Path, num_rows: int) -> Values:
    """Negative mean log-probability, in nats a token, that the author gave the tokens it wrote; NaN where a server told nothing.

    Args:
        traces: Folder of the stage, whose table `alternatives` stands in the order of its traces.
        num_rows: Traces.
    """
    values_R, start = np.full(num_rows, np.nan), 0
    for piece in iter_pieces(traces, "alternatives", ["token_logprobs"]):
        for row, told in enumerate(piece["token_logprobs"], start):
            if told.is_valid and len(told):
                values_R[row] = -float(told.values.to_numpy(zero_copy_only=False).astype(np.float64).mean())
        start += len(piece)
    return values_R


def by_variety(traces: Path, evidence: Evidence, competing_R: NDArray[np.bool_], num_kept: int) -> Values:
    """The place of each competing trace in its prompt's order of variety; see `varied_order`.

    Texts of some prompts at a time are in memory.

    Args:
        traces: Folder of the stage.
        evidence: Of all traces.
        competing_R: Those that are looked at.
        num_kept: Of a prompt; the order of the others does not matter.
    """
    values_R = np.full(len(competing_R), np.nan)
    for prompts in _groups(evidence, competing_R):
        rows = np.sort(np.concatenate(prompts)).tolist()
        texts = rows_at(traces, "traces", rows, ["completion"])
        found = {row: shingles(text["completion"]) for row, text in zip(rows, texts, strict=True)}
        for mine in prompts:
            order = varied_order([found[row] for row in mine.tolist()], num_kept)
            values_R[mine[order]] = np.arange(len(order))
    return values_R


def _groups(evidence: Evidence, competing_R: NDArray[np.bool_]) -> Iterator[list[NDArray[np.int64]]]:
    """Rows of each prompt by their sample, the prompts as their first ones stand in the table, so many as have texts of some length."""
    rows = np.flatnonzero(competing_R)
    rows = rows[np.lexsort((rows, evidence.samples_R[rows], evidence.prompts_R[rows]))]
    prompts = np.split(rows, np.flatnonzero(np.diff(evidence.prompts_R[rows])) + 1)
    group: list[NDArray[np.int64]] = []
    chars = 0
    for mine in sorted((each for each in prompts if len(each)), key=lambda each: int(each.min())):
        length = int(evidence.lengths_R[mine].sum())
        if group and chars + length > _CHARS:
            yield group
            group, chars = [], 0
        group.append(mine)
        chars += length
    if group:
        yield group


def shingles(text: str) -> Shingles:
    """The different pieces of eight characters of a text, as hashes that rise; what is only spelling makes no other."""
    letters = np.frombuffer(normal_form(text).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    letters = np.pad(letters, (0, max(0, _WIDTH - len(letters))))
    hashes = np.zeros(len(letters) - _WIDTH + 1, np.uint64)
    for place in range(_WIDTH):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + letters[place : place + len(hashes)]
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def distance(one: Shingles, other: Shingles) -> float:
    """Jaccard distance of two texts: 1 less the share of their pieces that both have; 0 of equal ones, 1 where they share nothing."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return 1.0 - common / (len(one) + len(other) - common)


def varied_order(texts: Sequence[Shingles], number: int) -> list[int]:
    """Places of so many texts: the first, then always the one farthest from the nearest of those taken; the earlier of equally far ones.

    The greedy way to the largest least distance, which is at most twice what it finds (Ravi, Rosenkrantz and Tayi 1994).
    """
    order, nearest = [0], np.full(len(texts), np.inf)
    nearest[0] = -np.inf
    while len(order) < min(number, len(texts)):
        last = texts[order[-1]]
        for place in np.flatnonzero(nearest > -np.inf).tolist():
            nearest[place] = min(nearest[place], distance(last, texts[place]))
        order.append(int(nearest.argmax()))
        nearest[order[-1]] = -np.inf
    return order
