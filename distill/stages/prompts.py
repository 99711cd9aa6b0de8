"""Stage `prompts`: reads the problems and splits held-out ones off. Writes prompts/.

The sources are read once. Of each row a few bytes stay in memory: its identity, what its reference is, and its fate, which is
known only when all were seen; the rows themselves wait in a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from distill.data.alike import Alike
from distill.data.files import Row
from distill.data.identities import Ids
from distill.data.mapping import PromptMapping
from distill.data.sources import Source, benchmark_source, heldout_problems, problems
from distill.data.split import HELDOUT, REASONS, TRAIN, Before, Fates, Index, drops_of, number_of
from distill.recipe.alike import Benchmark
from distill.recipe.experiment import Recipe
from distill.recipe.prompts import Prompts
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.log import say
from distill.run.manifest import Manifest
from distill.run.plan import NO_LIMIT, Growth, StagePlan
from distill.run.schema import DROPPED_PROMPT, FIELDS, MATCH, PROMPT
from distill.stages import Step, folder, open_stage, plan_of

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
    normals: Ids
    """Their normal forms, as numbers."""
    sample: list[Row]
    """PROMPT rows of some training prompts."""


class _Sources(NamedTuple):
    """Where rows come from."""

    main: Source
    heldout: Source | None
    benchmarks: list[tuple[Benchmark, Source]]

    @classmethod
    def of(cls, prompts: Prompts) -> _Sources:
        """Those that a recipe names."""
        benchmarks = prompts.decontaminate.benchmarks if prompts.decontaminate is not None else []
        return cls(problems(prompts), heldout_problems(prompts), [(each, benchmark_source(each)) for each in benchmarks])

    def digests(self, digest: Callable[[Source], str | None]) -> dict[str, Any]:
        """As a stage's settings have them."""
        of_benchmarks = {each.called: digest(source) for each, source in self.benchmarks}
        return {
            "source_sha256": digest(self.main),
            "heldout_source_sha256": digest(self.heldout) if self.heldout else None,
            **({"benchmarks_sha256": of_benchmarks} if of_benchmarks else {}),
        }

    def records(self) -> list[dict[str, Any]]:
        """What a manifest says of the files."""
        others = [self.heldout] if self.heldout else []
        return [record for each in (self.main, *others, *(source for _, source in self.benchmarks)) for record in each.records()]


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make."""
    path = folder(recipe, "prompts")
    digests = _Sources.of(recipe.prompts).digests(lambda source: source.recall(path))
    settings = {"prompts": recipe.prompts.identity(), "seed": recipe.seed, **digests}
    growth = Growth({"prompts.max_prompts": NO_LIMIT}, free=frozenset({"source_sha256"}), looks_itself=True)
    return plan_of(recipe, Step("prompts"), settings, growth=growth)


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `train`, `heldout` and `dropped`, and `matches` where prompts are compared with others."""
    prompts, sources = recipe.prompts, _Sources.of(recipe.prompts)
    with open_stage(recipe, plan(recipe)) as out:
        if out.manifest:
            return out.manifest
        clock = Clock(out.path)
        with out.in_one_go(), tempfile.TemporaryFile(dir=out.path) as waiting, _compared(prompts, recipe.seed, out.path) as alike:
            index = _read(prompts, sources, alike, waiting)
            fates, twins_kept = index.split(prompts, recipe.seed, Before.read(out.earlier) if out.earlier else None, alike)
            out.grow()
            _write(out, waiting, fates, _schema(prompts))
            if alike is not None:
                out.table("matches", MATCH).extend(alike.rows(index.ids))
        out.settings.update(sources.digests(lambda source: source.sha256))
        counts = np.bincount(fates, minlength=2)
        if twins_kept:
            say(
                f"prompts   {twins_kept:,} prompts that this run trains on are held-out ones in another spelling, from before such were "
                "dropped. They stay; `distill run --redo` makes everything anew without them"
            )
        return out.finish(
            rows_in=len(fates),
            rows_kept=int(counts[TRAIN] + counts[HELDOUT]),
            drops=drops_of(fates),
            facts=clock.facts(
                train=int(counts[TRAIN]),
                heldout=int(counts[HELDOUT]),
                control_tokens_as_text=index.num_controls,
                sources=sources.records(),
                **({"twins_kept": twins_kept} if twins_kept else {}),
                **(alike.facts() if alike is not None else {}),
            ),
        )


def _compared(prompts: Prompts, seed: int, place: Path | None = None) -> AbstractContextManager[Alike | None]:
    """What compares prompts with others; nothing where that is not asked for."""
    asked = prompts.near_duplicates is not None or prompts.decontaminate is not None
    return Alike(prompts, seed, place) if asked else nullcontext()


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
    sources = _Sources.of(prompts)
    with _compared(prompts, seed) as alike:
        index = _read(prompts, sources, alike)
        fates = index.split(prompts, seed, alike=alike).fates
    chosen = np.flatnonzero(fates == TRAIN)
    ids, references = index.ids[chosen], index.references[chosen]
    mapping = PromptMapping(prompts, prompts.columns, sources.main.name)
    rows = (row for where, raw in sources.main.rows(mapping.columns, "sample") for row, _ in mapping.prompt_rows(raw, where))
    wanted = set(chosen[:: -(-len(chosen) // sample) if spread else 1][:sample].tolist())
    last = max(wanted)
    found = [row for number, row in zip(range(last + 1), rows) if number in wanted]
    return Survey(
        train=len(chosen),
        heldout=int((fates == HELDOUT).sum()),
        drops=drops_of(fates),
        with_reference=int((references != number_of(None)).sum()),
        ids=ids,
        normals=index.normals[chosen],
        sample=found,
    )


def _read(prompts: Prompts, sources: _Sources, alike: Alike | None, waiting: IO[bytes] | None = None) -> Index:
    """The index of all rows; the rows themselves go into a file, if one is given."""
    index = Index()
    schema = _schema(prompts)
    writer = pa.ipc.new_stream(waiting, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) if waiting else None
    for each in (sources.main, sources.heldout) if sources.heldout else (sources.main,):
        mapping = PromptMapping(prompts, prompts.columns, each.name)
        for rows, reasons, numbers in _mapped(each, mapping):
            index.add(rows, reasons)
            if alike is not None:
                alike.add(rows, numbers)
            if writer:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        if each is sources.main:
            index.num_main = len(index.ids)
    if writer:
        writer.close()
    if alike is not None:
        for benchmark, source in sources.benchmarks:
            alike.add_questions(benchmark, source)
    return index


def _mapped(source: Source, mapping: PromptMapping) -> Iterator[tuple[list[Row], list[str | None], list[int]]]:
    """Some hundred rows at a time, and for each the reason to drop it or null, and its number in the source, from 1."""
    placed = enumerate(source.rows(mapping.columns, "prompts"), start=1)
    while batch := list(islice(placed, _ROWS)):
        found = [(row, reason, number) for number, (where, raw) in batch for row, reason in mapping.prompt_rows(raw, where)]
        yield [row for row, _, _ in found], [reason for _, reason, _ in found], [number for _, _, number in found]


def _schema(prompts: Prompts) -> pa.Schema:
    """Of the rows: with further columns of the source where checks look at some."""
    return PROMPT.append(FIELDS) if prompts.fields else PROMPT


def _write(out: StageFolder, waiting: IO[bytes], fates: Fates, schema: pa.Schema) -> None:
    """The rows that wait, dealt out to the tables in their order."""
    lost = schema.append(DROPPED_PROMPT.field("reason"))
    train, heldout, dropped = out.table("train", schema), out.table("heldout", schema), out.table("dropped", lost)
    reasons = pa.array([None, None, *REASONS], pa.string())
    waiting.seek(0)
    place = 0
    for piece in pa.ipc.open_stream(waiting):
        fate = fates[place : place + len(piece)]
        place += len(piece)
        train.add(piece.filter(pa.array(fate == TRAIN)))
        heldout.add(piece.filter(pa.array(fate == HELDOUT)))
        gone = fate > HELDOUT
        columns = [*piece.filter(pa.array(gone)).columns, reasons.take(pa.array(fate[gone]))]
        dropped.add(pa.RecordBatch.from_arrays(columns, schema=lost))
