"""A scoring's work: what its parts have in common, a part of it, and whether what came of it can be taken."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.engines.parts import Hashes, first_twice, is_whole, journals_in, score_part, take_over
from distill.engines.reading import COLUMNS, lists_of
from distill.engines.thoughts import Thoughts
from distill.errors import DataError, IntegrityError
from distill.models.vocabulary import AlignedRow
from distill.run.journal import Journal
from distill.run.log import say
from distill.run.manifest import MANIFEST, check_files, read_manifest
from distill.run.owned import EARLIER
from distill.run.schema import trace_key
from distill.run.tables import iter_pieces, iter_rows
from distill.targets.compare import Verification
from distill.targets.files import TargetReader, TargetWriter, key_hash
from distill.targets.spec import TargetHeader

_LIMITS = {
    "min_aligned": "of the student's tokens are tokens of the teacher too",
    "min_carried_mass": "of the teacher's probability lies on tokens that the student has",
}
_SAMPLE = 512  # traces by which min_aligned is judged before anything is spent


class Source(NamedTuple):
    """The traces that are scored."""

    folder: Path
    table: str


class Work:
    """What the parts have in common; whatever takes long is made when first asked for.

    Args:
        thoughts: Where they come from.
        source: The traces.
        path: The stage's folder.
        parts: How many there are.
        belongs_to: What journals are bound to.
    """

    def __init__(self, thoughts: Thoughts, source: Source, path: Path, parts: int, belongs_to: str) -> None:
        self.thoughts, self.source, self.path, self.parts = thoughts, source, path, parts
        self._belongs_to = belongs_to

    def name(self, index: int) -> str:
        """A part as its files are called."""
        return part_name(index, self.parts)

    def shard(self, index: int) -> Path:
        """The finished file of a part."""
        return self.path / f"targets-{self.name(index)}.targets"

    def journal(self, index: int) -> Journal:
        """What the rows of a part gave, and which were left out."""
        return Journal(self.path / f"journal-{self.name(index)}.jsonl", self._belongs_to)

    def is_whole(self, index: int) -> bool:
        """Whether a part is finished."""
        return self.shard(index).exists() and is_whole(self.shard(index), self.journal(index), self._hashes[index :: self.parts])

    @cached_property
    def header(self) -> TargetHeader:
        """What every shard says of itself."""
        return self.thoughts.header(read_manifest(self.source.folder).digest)

    @cached_property
    def earlier(self) -> TargetReader | None:
        """What was scored before, where the stage grows."""
        folder = self.path / EARLIER
        return TargetReader([folder / name for name in sorted(check_files(folder).files)]) if (folder / MANIFEST).exists() else None

    @property
    def total(self) -> int:
        """Number of all traces."""
        return read_manifest(self.source.folder).rows(self.source.table)

    def traces(self, first: int = 0, step: int = 1) -> Iterator[dict[str, Any]]:
        """Every `step`-th trace from `first`, in their order."""
        for traces in lists_of(iter_pieces(self.source.folder, self.source.table, COLUMNS), first, step):
            yield from traces

    def keys(self) -> Iterator[str]:
        """Of all traces."""
        return map(trace_key, iter_rows(self.source.folder, self.source.table, columns=["prompt_id", "sample_index"]))

    @cached_property
    def _hashes(self) -> Hashes:
        """(traces,) of their keys, read once: the last of thousands of parts looks whether all the others are whole."""
        return np.fromiter(map(key_hash, self.keys()), np.uint64)

    def write(self, index: int) -> None:
        """Writes a part, or what is missing of it, and gives it its name.

        Raises:
            DataError: a trace is there twice, or too few tokens would get a target.
        """
        twice = first_twice(self.keys(), self.keys())
        if twice is not None:
            raise DataError(f"{self.source.folder}: trace {twice} is there twice. Give every sample of a prompt its own sample_index.")
        self._refuse_a_sample()
        total = len(range(index, self.total, self.parts))
        with TargetWriter(self.shard(index), self.header) as writer:
            traces, journal, thoughts = self.traces(index, self.parts), self.journal(index), self.thoughts
            self._take_over(index, journal, writer)
            score_part(traces, total, thoughts.reader, thoughts.scorer, journal, writer, thoughts.settings.batch_size)

    def _take_over(self, index: int, journal: Journal, writer: TargetWriter) -> None:
        """Where the stage grows: the rows of a part that were scored before are not read again."""
        if self.earlier is None:
            return
        wanted = np.sort(self._hashes[index :: self.parts])
        taken = take_over(self.earlier, journals_in(self.path / EARLIER), self.header, wanted, journal, writer)
        if taken:
            say(f"score     {taken:,} traces were scored before, and are not read again")

    def _refuse_a_sample(self) -> None:
        """Judges by some traces from all over the table, before anything is spent, what is judged by all of them at the end."""
        if self.thoughts.identical:
            return
        rows = [self.thoughts.reader.row(trace) for trace in self.traces(step=-(-self.total // _SAMPLE))]
        there = [bool(position >= 0) for row in rows if isinstance(row, AlignedRow) for position in row.positions]
        if there:
            self.refuse_below(
                sum(there) / len(there), "min_aligned", self.thoughts.settings.min_aligned, f" in {len(rows):,} traces from all over"
            )

    def refuse_below(self, share: float, name: str, limit: float, where: str = "") -> None:
        """Judges a share by a limit of the section score.

        Args:
            share: What was found.
            name: Of the limit: `min_aligned` or `min_carried_mass`.
            limit: Its value.
            where: It was found.

        Raises:
            DataError: it is below the limit, and teacher and student have other tokens.
        """
        if not self.thoughts.identical and share < limit:
            raise DataError(
                f"score.{name}: only {share:.1%} {_LIMITS[name]}{where}, asked for {limit:.1%}. "
                f"{self.thoughts.advice} What is scored stays."
            )

    def verify(self, stored: TargetReader) -> dict[str, Any] | None:
        """Reads a random sample of traces once more, each alone, and compares it with what is on disk.

        Raises:
            IntegrityError: they differ by more than rounding.
        """
        thoughts = self.thoughts
        count = min(thoughts.settings.verify_rows, len(stored))
        if thoughts.unverified is not None:
            say(f"score     nothing is read once more: {thoughts.unverified}")
            return None
        if not count:
            return None
        chosen = np.random.default_rng(thoughts.recipe.seed).choice(len(stored), count, replace=False)
        keys = {stored.key(int(row)) for row in chosen}
        verification = Verification(thoughts.settings.target, thoughts.scorer.exact)
        for trace in self.traces():
            if trace_key(trace) in keys:
                row = thoughts.reader.row(trace)
                assert isinstance(row, AlignedRow)  # it was scored
                [fresh] = thoughts.scorer.score([row])
                verification.add(stored[stored.find(row.key)], fresh.targets)
        if not verification.holds:
            raise IntegrityError(
                f"{self.path}: what is stored differs from what the teacher thinks now, on {count} traces: {verification}. "
                "Were the model's files or the shards changed? Add --redo."
            )
        say(f"score     read {count} traces once more, each alone: {verification}")
        return verification.facts(count)


def part_name(index: int, parts: int) -> str:
    """A part as its files are called."""
    return f"{index:05d}-of-{parts:05d}"
