"""What becomes of each prompt: held out, trained on, or dropped and why. Knows rows by a few bytes each, never their texts.

Which prompts are held out depends on their content and the seed, not on their order. A prompt in another spelling (`data/normal`)
of a held-out one is not trained on; other spellings of one prompt are all trained on, or all measured on, if they are there.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill.data.alike import Alike
from distill.data.calls import UNUSABLE
from distill.data.files import Row
from distill.data.identities import Identities, Ids, Places, as_numbers, rank
from distill.data.mapping import BEGINNING
from distill.data.normal import normal_numbers
from distill.data.texts import mentions_controls
from distill.errors import DataError, StageConflictError
from distill.recipe.prompts import Prompts
from distill.run.tables import iter_pieces

TRAIN, HELDOUT = 0, 1  # fates; those from 2 on are reasons to drop a row
REASONS = [
    "empty_prompt",
    "no_answer_match",
    "duplicate",
    "duplicate_other_reference",
    "in_heldout_source",
    "twin_of_heldout",
    "part_of_heldout",
    "no_supervised_turn",
    "in_benchmark",
    "near_heldout",
    "near_duplicate",
    "not_drawn",
    *UNUSABLE,
]
_CODES = {reason: code for code, reason in enumerate(REASONS, start=2)}
_REMEDIES = {
    "empty_prompt": "Name the column of the prompts in prompts.columns.",
    "no_answer_match": "Correct prompts.answer_pattern, or leave it out where the reference is the answer alone.",
    "in_heldout_source": "Give a prompts.source with other prompts than prompts.heldout_source.",
    "part_of_heldout": "Give a prompts.source with conversations that begin otherwise than held-out ones.",
    "no_supervised_turn": "Mark turns that are to be learned, or take last or all for prompts.turns.",
    "twin_of_heldout": "Give a prompts.source with prompts that differ from held-out ones in more than spaces, case and digits.",
    "in_benchmark": "Look at what prompts.decontaminate compares with, and how.",
    "near_heldout": "Raise the similarity of prompts.near_duplicates, or ask less of prompts.decontaminate.",
}

Fates = npt.NDArray[np.uint8]


class Split(NamedTuple):
    """What becomes of the rows."""

    fates: Fates
    """Of each row."""
    twins_kept: int
    """Prompts that a run has trained on before, though they are held-out ones in another spelling."""


class Index:
    """What is kept of every row read: 25 bytes. Rows of the held-out source come behind the others."""

    def __init__(self) -> None:
        self._ids, self._references, self._normals, self._codes = array("Q"), array("Q"), array("Q"), array("B")
        self._beginnings = array("Q")  # where a conversation gives several rows
        self.num_main = 0
        """Rows of the first source."""
        self.num_controls = 0
        """Rows that hold names of control tokens; they are read as text, in pieces."""

    def add(self, rows: list[Row], reasons: list[str | None]) -> None:
        """Takes rows in, each with the reason to drop it or null."""
        self._ids.extend(as_numbers([row["prompt_id"] for row in rows]).tolist())
        self._references.extend(number_of(row["reference"]) for row in rows)
        self._normals.extend(normal_numbers(row["messages"] for row in rows).tolist())
        self._codes.extend(_CODES[reason] if reason else TRAIN for reason in reasons)
        self._beginnings.extend(row[BEGINNING] for row in rows if BEGINNING in row)
        self.num_controls += sum(any(mentions_controls(turn["content"]) for turn in row["messages"]) for row in rows)

    @property
    def ids(self) -> Ids:
        """Of all rows."""
        return np.frombuffer(self._ids, dtype=np.uint64)

    @property
    def references(self) -> Ids:
        """A number for each row's reference; equal references have equal ones."""
        return np.frombuffer(self._references, dtype=np.uint64)

    @property
    def beginnings(self) -> Ids:
        """A number for how each row's conversation begins: rows of one are held out together, or not at all."""
        return np.frombuffer(self._beginnings, dtype=np.uint64)

    @property
    def normals(self) -> Ids:
        """A number for each row's conversation in normal form."""
        return np.frombuffer(self._normals, dtype=np.uint64)

    def split(self, prompts: Prompts, seed: int, before: Before | None = None, alike: Alike | None = None) -> Split:
        """What becomes of each row.

        Args:
            prompts: The recipe's section.
            seed: The recipe's.
            before: The prompts that were there, where there are to be more: they stay what they are.
            alike: Says which are too much like others, where that is asked for.

        Raises:
            DataError: there are fewer prompts than asked for, or none is left to train on.
            StageConflictError: prompts that were there are gone, or are others now.
        """
        fates = np.frombuffer(self._codes, dtype=np.uint8).copy()
        main = slice(0, self.num_main)
        self._drop_duplicates(fates, main)
        apart = self._hold_out(fates, prompts, seed, before)
        kept = before.places(self, fates, before.train, prompts.source) if before else np.array([], np.int64)
        twins = np.flatnonzero(np.isin(self.normals[main], self.normals[apart]) & (fates[main] == TRAIN))
        fates[np.setdiff1d(twins, kept)] = _CODES["twin_of_heldout"]
        if self._beginnings:
            parts = np.flatnonzero(np.isin(self.beginnings[main], self.beginnings[apart]) & (fates[main] == TRAIN))
            fates[np.setdiff1d(parts, kept)] = _CODES["part_of_heldout"]
        if alike is not None:
            for place, reason in alike.judged(np.flatnonzero(fates[main] == TRAIN), apart, kept):
                fates[place] = _CODES[reason]
        if prompts.max_prompts is not None and prompts.max_prompts < (fates[main] == TRAIN).sum():
            _, rest = self._draw(fates, main, prompts.max_prompts, f"train/{seed}", prompts.source, kept)
            fates[rest] = _CODES["not_drawn"]
        if not (fates == TRAIN).any():
            raise DataError(f"{prompts.source}: no prompt is left to train on. {self._advice(fates[main])}")
        return Split(fates, int(np.isin(twins, kept).sum()))

    def _advice(self, fates: Fates) -> str:
        """What to do where all is held out, or dropped."""
        if self._beginnings and len(np.unique(self.beginnings[: self.num_main][fates == HELDOUT])) == 1:
            return (
                "All conversations that are held out begin with the same turn of the user's, so that they can't be parted. Give a "
                "prompts.heldout_source, or 0 for prompts.heldout_size."
            )
        return _advice(fates)

    def _hold_out(self, fates: Fates, prompts: Prompts, seed: int, before: Before | None) -> Places:
        """Holds prompts out. Returns the places of all that are kept apart: of a source of their own also those that are not drawn."""
        main, others = slice(0, self.num_main), slice(self.num_main, None)
        if prompts.heldout_source is None:
            if before is not None:
                drawn = before.places(self, fates, before.heldout, prompts.source)
            else:
                drawn, _ = self._draw_heldout(fates, main, prompts.heldout_size, f"heldout/{seed}", prompts.source)
            fates[drawn] = HELDOUT
            return drawn
        self._drop_duplicates(fates, others)
        known = Identities(self.ids[others][fates[others] == TRAIN]).places(self.ids[main])
        fates[main][(known >= 0) & (fates[main] == TRAIN)] = _CODES["in_heldout_source"]
        drawn, rest = self._draw_heldout(fates, others, prompts.heldout_size, f"heldout/{seed}", prompts.heldout_source)
        fates[drawn] = HELDOUT
        fates[rest] = _CODES["not_drawn"]
        return np.concatenate([drawn, rest])

    def _drop_duplicates(self, fates: Fates, rows: slice) -> None:
        """Of the rows of one prompt the first stays."""
        places = np.flatnonzero(fates[rows] == TRAIN) + (rows.start or 0)
        order = places[np.argsort(self.ids[places], kind="stable")]
        ids = self.ids[order]
        again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
        first = np.searchsorted(ids, ids[again])
        same = self.references[order[again]] == self.references[order[first]]
        fates[order[again]] = np.where(same, _CODES["duplicate"], _CODES["duplicate_other_reference"])

    def _draw_heldout(self, fates: Fates, rows: slice, count: int, salt: str, name: str) -> tuple[Places, Places]:
        """`_draw`; where conversations give several rows, of whole ones: those of the lowest hash that fit, or a short one more."""
        drawn, rest = self._draw(fates, rows, count, salt, name)
        if not self._beginnings or not count:
            return drawn, rest
        places = np.concatenate([drawn, rest])
        beginnings, which, sizes = np.unique(self.beginnings[places], return_inverse=True, return_counts=True)
        order = sorted(range(len(beginnings)), key=lambda number: rank(salt, int(beginnings[number])))
        taken = np.zeros(len(beginnings), np.bool_)
        total = 0
        for number in order:
            if total + sizes[number] <= count:
                taken[number], total = True, total + int(sizes[number])
        if total < count:
            taken[min((number for number in order if not taken[number]), key=lambda number: sizes[number])] = True
        return places[taken[which]], places[~taken[which]]

    def _draw(self, fates: Fates, rows: slice, count: int, salt: str, name: str, first: Places | None = None) -> tuple[Places, Places]:
        """The places of `count` rows, those of `first` and then of the lowest hash, and of the others."""
        places = np.flatnonzero(fates[rows] == TRAIN) + (rows.start or 0)
        if count > len(places):
            raise DataError(
                f"{name}: prompts.heldout_size asks for {count:,} prompts, but there are {len(places):,}. {_advice(fates[rows])}"
            )
        # Of the hash 64 bits: that two of a million rows share them happens once in 40 million runs.
        ranks = np.fromiter((rank(salt, int(number)) for number in self.ids[places]), np.uint64, len(places))
        order = places[np.argsort(ranks, kind="stable")]
        if first is not None:
            order = np.concatenate([first, order[~np.isin(order, first)]])
        return order[:count], order[count:]


class Before(NamedTuple):
    """The prompts of a stage that is to grow: ids, and a number for the reference of each."""

    train: tuple[Ids, Ids]
    heldout: tuple[Ids, Ids]

    @classmethod
    def read(cls, finished: Path) -> Before:
        """Those of a finished stage."""
        return cls(*(_numbered(finished, table) for table in ("train", "heldout")))

    @staticmethod
    def places(index: Index, fates: Fates, before: tuple[Ids, Ids], source: str) -> Places:
        """Where these prompts are now.

        Raises:
            StageConflictError: some are gone, or have other references.
        """
        free = np.flatnonzero(fates[: index.num_main] == TRAIN)
        found = Identities(index.ids[free]).places(before[0])
        gone = int((found < 0).sum())
        if gone:
            raise StageConflictError(
                f"{source}: {gone:,} of the run's {len(found):,} prompts are not in it any more, or would be held out now. Prompts can be "
                "added to a run, not taken away: put them back, or give another run_dir."
            )
        places: Places = free[found]
        other = int((index.references[places] != before[1]).sum())
        if other:
            raise StageConflictError(
                f"{source}: {other:,} prompts of the run have another reference now. Set them back, give another run_dir, or make "
                "everything anew with `distill run --redo`."
            )
        return places


def _numbered(finished: Path, table: str) -> tuple[Ids, Ids]:
    ids, references = array("Q"), array("Q")
    for piece in iter_pieces(finished, table, ["prompt_id", "reference"]):
        ids.extend(as_numbers(piece.column("prompt_id").to_pylist()).tolist())
        references.extend(map(number_of, piece.column("reference").to_pylist()))
    return np.frombuffer(ids, dtype=np.uint64), np.frombuffer(references, dtype=np.uint64)


def number_of(reference: str | None) -> int:
    """64 bits that are equal for equal references, within this process."""
    return hash(reference) % 2**64


def _advice(fates: Fates) -> str:
    """What to do where too few of some rows are left: by what most of them were lost to."""
    lost = drops_of(fates)
    most = max(lost, key=lambda reason: lost[reason], default="")
    if most not in _REMEDIES or lost[most] < int((fates == HELDOUT).sum()):
        return "Lower prompts.heldout_size."
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(lost.items()))
    return f"Of {len(fates):,} rows these were dropped: {counts}. {_REMEDIES[most]}"


def drops_of(fates: Fates) -> dict[str, int]:
    """Reason and number of the dropped rows."""
    counts = np.bincount(fates, minlength=len(REASONS) + 2)
    return {reason: int(counts[code]) for reason, code in _CODES.items() if counts[code]}
