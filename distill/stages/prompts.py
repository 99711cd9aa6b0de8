"""Stage `prompts`: reads the problems and splits held-out ones off. Writes prompts/.

The sources are read once. Of each row a few bytes stay in memory: its identity, what its reference is, and its fate, which is
known only when all were seen; the rows themselves wait in a file.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill.data.calls import UNUSABLE
from distill.data.files import Row
from distill.data.identities import Identities, Ids, Places, as_numbers, rank
from distill.data.mapping import PromptMapping
from distill.data.sources import Source, heldout_problems, problems
from distill.data.texts import mentions_controls
from distill.errors import DataError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.prompts import Prompts
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.manifest import Manifest
from distill.run.plan import NO_LIMIT, Growth, StagePlan
from distill.run.schema import DROPPED_PROMPT, FIELDS, PROMPT
from distill.run.tables import iter_pieces
from distill.stages import Step, folder, open_stage, plan_of

_TRAIN, _HELDOUT = 0, 1  # fates; those from 2 on are reasons to drop a row
_REASONS = ["empty_prompt", "no_answer_match", "duplicate", "duplicate_other_reference", "in_heldout_source", "not_drawn", *UNUSABLE]
_CODES = {reason: code for code, reason in enumerate(_REASONS, start=2)}
_REMEDIES = {
    "empty_prompt": "Name the column of the prompts in prompts.columns.",
    "no_answer_match": "Correct prompts.answer_pattern, or leave it out where the reference is the answer alone.",
    "in_heldout_source": "Give a prompts.source with other prompts than prompts.heldout_source.",
}
_ROWS = 512  # that wait together


class Survey(NamedTuple):
    """What a recipe's prompts come to, without their being written."""

    train: int
    """Prompts to train on."""
    heldout: int
    drops: dict[str, int]
    """Reason and number of the other rows."""
    with_reference: int
    """Training prompts that have a reference."""
    ids: Ids
    """Identities of the training prompts, as numbers."""
    sample: list[Row]
    """PROMPT rows of some training prompts."""


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make."""
    prompts, path = recipe.prompts, folder(recipe, "prompts")
    source, heldout_source = problems(prompts), heldout_problems(prompts)
    settings = {
        "prompts": prompts.identity(),
        "seed": recipe.seed,
        "source_sha256": source.recall(path),
        "heldout_source_sha256": heldout_source.recall(path) if heldout_source else None,
    }
    growth = Growth({"prompts.max_prompts": NO_LIMIT}, free=frozenset({"source_sha256"}), looks_itself=True)
    return plan_of(recipe, Step("prompts"), settings, growth=growth)


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `train`, `heldout` and `dropped`."""
    prompts = recipe.prompts
    source, heldout_source = problems(prompts), heldout_problems(prompts)
    with open_stage(recipe, plan(recipe)) as out:
        if out.manifest:
            return out.manifest
        clock = Clock(out.path)
        with out.in_one_go(), tempfile.TemporaryFile(dir=out.path) as waiting:
            index = _read(prompts, source, heldout_source, waiting)
            fates = index.fates(prompts, recipe.seed, _Before.read(out.earlier) if out.earlier else None)
            out.grow()
            _write(out, waiting, fates, _schema(prompts))
        out.settings["source_sha256"] = source.sha256
        out.settings["heldout_source_sha256"] = heldout_source.sha256 if heldout_source else None
        counts = np.bincount(fates, minlength=2)
        return out.finish(
            rows_in=len(fates),
            rows_kept=int(counts[_TRAIN] + counts[_HELDOUT]),
            drops=_drops(fates),
            facts=clock.facts(
                train=int(counts[_TRAIN]),
                heldout=int(counts[_HELDOUT]),
                control_tokens_as_text=index.num_controls,
                sources=source.records() + (heldout_source.records() if heldout_source else []),
            ),
        )


def survey(prompts: Prompts, seed: int, sample: int, *, spread: bool = False) -> Survey:
    """What the stage would do, and some training prompts it would write; in memory are these and a few bytes a row.

    Args:
        prompts: The recipe's section.
        seed: The recipe's.
        sample: Number of training prompts wanted.
        spread: Whether they are drawn evenly from all, or are the first.

    Raises:
        DataError: a source can't be read, or there are fewer prompts than asked for, or none is left to train on.
    """
    source, heldout_source = problems(prompts), heldout_problems(prompts)
    index = _read(prompts, source, heldout_source)
    fates = index.fates(prompts, seed)
    chosen = np.flatnonzero(fates == _TRAIN)
    ids, references = index.ids[chosen], index.references[chosen]
    mapping = PromptMapping(prompts, prompts.columns, source.name)
    rows = (row for where, raw in source.rows(mapping.columns, "sample") for row, _ in mapping.prompt_rows(raw, where))
    wanted = set(chosen[:: -(-len(chosen) // sample) if spread else 1][:sample].tolist())
    last = max(wanted)
    found = [row for number, row in zip(range(last + 1), rows) if number in wanted]
    return Survey(
        train=len(chosen),
        heldout=int((fates == _HELDOUT).sum()),
        drops=_drops(fates),
        with_reference=int((references != _number_of(None)).sum()),
        ids=ids,
        sample=found,
    )


class _Index:
    """What is kept of every row read: 17 bytes. Rows of the held-out source come behind the others."""

    def __init__(self) -> None:
        self._ids, self._references, self._codes = array("Q"), array("Q"), array("B")
        self.num_main = 0
        """Rows of the first source."""
        self.num_controls = 0
        """Rows that hold names of control tokens; they are read as text, in pieces."""

    def add(self, rows: list[Row], reasons: list[str | None]) -> None:
        """Takes rows in, each with the reason to drop it or null."""
        self._ids.extend(as_numbers([row["prompt_id"] for row in rows]).tolist())
        self._references.extend(_number_of(row["reference"]) for row in rows)
        self._codes.extend(_CODES[reason] if reason else _TRAIN for reason in reasons)
        self.num_controls += sum(any(mentions_controls(turn["content"]) for turn in row["messages"]) for row in rows)

    @property
    def ids(self) -> Ids:
        """Of all rows."""
        return np.frombuffer(self._ids, dtype=np.uint64)

    @property
    def references(self) -> Ids:
        """A number for each row's reference; equal references have equal ones."""
        return np.frombuffer(self._references, dtype=np.uint64)

    def fates(self, prompts: Prompts, seed: int, before: _Before | None = None) -> npt.NDArray[np.uint8]:
        """What becomes of each row. Which prompts are held out depends on their content and the seed, not on their order.

        Args:
            prompts: The recipe's section.
            seed: The recipe's.
            before: The prompts that were there, where there are to be more: they stay what they are.

        Raises:
            DataError: there are fewer prompts than asked for, or none is left to train on.
            StageConflictError: prompts that were there are gone, or are others now.
        """
        fates = np.frombuffer(self._codes, dtype=np.uint8).copy()
        main, others = slice(0, self.num_main), slice(self.num_main, None)
        self._drop_duplicates(fates, main)
        heldout_from, name = main, prompts.source
        if prompts.heldout_source is not None:
            self._drop_duplicates(fates, others)
            heldout_from, name = others, prompts.heldout_source
            known = Identities(self.ids[others][fates[others] == _TRAIN]).places(self.ids[main])
            fates[main][(known >= 0) & (fates[main] == _TRAIN)] = _CODES["in_heldout_source"]
        if before is not None and prompts.heldout_source is None:
            fates[before.places(self, fates, before.heldout, prompts.source)] = _HELDOUT
        else:
            drawn, rest = self._draw(fates, heldout_from, prompts.heldout_size, f"heldout/{seed}", name)
            fates[drawn] = _HELDOUT
            if prompts.heldout_source is not None:
                fates[rest] = _CODES["not_drawn"]
        kept = before.places(self, fates, before.train, prompts.source) if before else None
        if prompts.max_prompts is not None and prompts.max_prompts < (fates[main] == _TRAIN).sum():
            _, rest = self._draw(fates, main, prompts.max_prompts, f"train/{seed}", prompts.source, kept)
            fates[rest] = _CODES["not_drawn"]
        if not (fates == _TRAIN).any():
            raise DataError(f"{prompts.source}: no prompt is left to train on. {_advice(fates[main])}")
        return fates

    def _drop_duplicates(self, fates: npt.NDArray[np.uint8], rows: slice) -> None:
        """Of the rows of one prompt the first stays."""
        places = np.flatnonzero(fates[rows] == _TRAIN) + (rows.start or 0)
        order = places[np.argsort(self.ids[places], kind="stable")]
        ids = self.ids[order]
        again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
        first = np.searchsorted(ids, ids[again])
        same = self.references[order[again]] == self.references[order[first]]
        fates[order[again]] = np.where(same, _CODES["duplicate"], _CODES["duplicate_other_reference"])

    def _draw(
        self, fates: npt.NDArray[np.uint8], rows: slice, count: int, salt: str, name: str, first: Places | None = None
    ) -> tuple[Places, Places]:
        """The places of `count` rows, those of `first` and then of the lowest hash, and of the others."""
        places = np.flatnonzero(fates[rows] == _TRAIN) + (rows.start or 0)
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


class _Before(NamedTuple):
    """The prompts of a stage that is to grow: ids, and a number for the reference of each."""

    train: tuple[Ids, Ids]
    heldout: tuple[Ids, Ids]

    @classmethod
    def read(cls, finished: Path) -> _Before:
        """Those of a finished stage."""
        return cls(*(_numbered(finished, table) for table in ("train", "heldout")))

    @staticmethod
    def places(index: _Index, fates: npt.NDArray[np.uint8], before: tuple[Ids, Ids], source: str) -> Places:
        """Where these prompts are now.

        Raises:
            StageConflictError: some are gone, or have other references.
        """
        free = np.flatnonzero(fates[: index.num_main] == _TRAIN)
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
        references.extend(map(_number_of, piece.column("reference").to_pylist()))
    return np.frombuffer(ids, dtype=np.uint64), np.frombuffer(references, dtype=np.uint64)


def _number_of(reference: str | None) -> int:
    """64 bits that are equal for equal references, within this process."""
    return hash(reference) % 2**64


def _advice(fates: npt.NDArray[np.uint8]) -> str:
    """What to do where too few of some rows are left: by what most of them were lost to."""
    lost = _drops(fates)
    most = max(lost, key=lambda reason: lost[reason], default="")
    if most not in _REMEDIES or lost[most] < int((fates == _HELDOUT).sum()):
        return "Lower prompts.heldout_size."
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(lost.items()))
    return f"Of {len(fates):,} rows these were dropped: {counts}. {_REMEDIES[most]}"


def _drops(fates: npt.NDArray[np.uint8]) -> dict[str, int]:
    counts = np.bincount(fates, minlength=len(_REASONS) + 2)
    return {reason: int(counts[code]) for reason, code in _CODES.items() if counts[code]}


def _read(prompts: Prompts, source: Source, heldout_source: Source | None, waiting: IO[bytes] | None = None) -> _Index:
    """The index of all rows; the rows themselves go into a file, if one is given."""
    index = _Index()
    schema = _schema(prompts)
    writer = pa.ipc.new_stream(waiting, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) if waiting else None
    for each in (source, heldout_source) if heldout_source else (source,):
        mapping = PromptMapping(prompts, prompts.columns, each.name)
        rows: list[Row] = []
        reasons: list[str | None] = []
        for rows, reasons in _mapped(each, mapping):
            index.add(rows, reasons)
            if writer:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        if each is source:
            index.num_main = len(index.ids)
    if writer:
        writer.close()
    return index


def _mapped(source: Source, mapping: PromptMapping) -> Iterator[tuple[list[Row], list[str | None]]]:
    """Some hundred rows at a time, and for each the reason to drop it or null."""
    rows: list[Row] = []
    reasons: list[str | None] = []
    for where, raw in source.rows(mapping.columns, "prompts"):
        for row, reason in mapping.prompt_rows(raw, where):
            rows.append(row)
            reasons.append(reason)
        if len(rows) >= _ROWS:
            yield rows, reasons
            rows, reasons = [], []
    if rows:
        yield rows, reasons


def _schema(prompts: Prompts) -> pa.Schema:
    """Of the rows: with further columns of the source where checks look at some."""
    return PROMPT.append(FIELDS) if prompts.fields else PROMPT


def _write(out: StageFolder, waiting: IO[bytes], fates: npt.NDArray[np.uint8], schema: pa.Schema) -> None:
    """The rows that wait, dealt out to the tables in their order."""
    lost = schema.append(DROPPED_PROMPT.field("reason"))
    train, heldout, dropped = out.table("train", schema), out.table("heldout", schema), out.table("dropped", lost)
    reasons = pa.array([None, None, *_REASONS], pa.string())
    waiting.seek(0)
    place = 0
    for piece in pa.ipc.open_stream(waiting):
        fate = fates[place : place + len(piece)]
        place += len(piece)
        train.add(piece.filter(pa.array(fate == _TRAIN)))
        heldout.add(piece.filter(pa.array(fate == _HELDOUT)))
        gone = fate > _HELDOUT
        columns = [*piece.filter(pa.array(gone)).columns, reasons.take(pa.array(fate[gone]))]
        dropped.add(pa.RecordBatch.from_arrays(columns, schema=lost))
