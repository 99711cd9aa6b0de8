"""Stage `generate` for traces from elsewhere: maps them onto the run's prompts. Reads prompts/, writes traces/.

A trace for a held-out prompt is dropped: training on it would make the evaluation worthless. Traces pass through some hundred at
a time; of each prompt its identity, its number of traces and the place of its reference in a file are in memory, 28 bytes.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np

from distill.data.completions import Brought, columns_of, traces_of
from distill.data.files import Row
from distill.data.identities import Identities, as_numbers
from distill.data.mapping import Asked, PromptMapping
from distill.data.sources import Source, brought_traces
from distill.data.texts import mentions_controls
from distill.errors import DataError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Traces
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.log import say
from distill.run.manifest import Manifest, read_manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import DROPPED_TRACE, TOLD, TRACE, prompt_id
from distill.run.tables import iter_pieces, iter_rows
from distill.stages import Step, folder, open_stage, plan_of

_ROWS = 512  # matched to their prompts at once
_MENDED = {
    "ends_removed": "the mark that a turn has ended was taken off {:,} of them",
    "thoughts_opened": "{:,} of them had a reasoning without <think> before it, and were given one",
    "thoughts_marked": "{:,} of them had their reasoning between the marks of another family, which became <think> and </think>",
    "control_tokens_as_text": "{:,} of them hold names of control tokens, which are learned as text, in pieces",
}


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make."""
    traces = recipe.traces
    assert traces is not None  # the recipe was validated
    digest = brought_traces(traces).recall(folder(recipe, "generate"))
    settings = {"traces": traces.identity(), "source_sha256": digest}
    growth = Growth(free=frozenset({"source_sha256"}), looks_itself=True)
    return plan_of(recipe, Step("generate"), settings, [folder(recipe, "prompts")], growth)


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `traces` and `dropped`."""
    traces = recipe.traces
    assert traces is not None  # the recipe was validated
    source = brought_traces(traces)
    with open_stage(recipe, plan(recipe)) as out:
        return out.manifest or _import(recipe, traces, source, out)


def _import(recipe: Recipe, traces: Traces, source: Source, out: StageFolder) -> Manifest:
    from distill.data.licences import licence_of

    clock = Clock(out.path)
    drops: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    rows_in = 0
    if out.earlier == out.path:  # it has not begun to grow
        _refuse_what_is_gone(recipe, traces, out)
        out.grow()
    with out.in_one_go(), _Prompts(folder(recipe, "prompts"), out.path) as prompts:
        kept, dropped = out.table("traces", TRACE if traces.verdict is None else TRACE.append(TOLD)), out.table("dropped", DROPPED_TRACE)
        for row, found in _matched(recipe, traces, source, prompts):
            rows_in += 1
            if found.reason is None:
                kept.append(row if traces.verdict is None else row | {TOLD.name: found.verdict})
                mended.update(_mended(found))
            else:
                drops[found.reason] += 1
                dropped.append(row | {"reason": found.reason})
        if not kept.num_rows:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()))
            raise DataError(
                f"{traces.source}: none of {rows_in:,} traces can be used: {counts}. Their prompts must be the same text as "
                "training prompts of this run, system turns and tools included: check traces.columns, and the keys of traces that say "
                "where reasoning and answer are."
            )
    out.settings["source_sha256"] = source.sha256
    author = {"model": traces.author_model, "revision": None, "parameters": None}
    licence = licence_of(traces.author_model, traces.licence)
    facts = clock.facts(author=author, licence=licence, sources=source.records(), **mended)
    for name, count in sorted(mended.items()):
        say(f"traces    {_MENDED[name].format(count)}")
    return out.finish(rows_in=rows_in, rows_kept=kept.num_rows, drops=dict(drops), facts=facts)


def _refuse_what_is_gone(recipe: Recipe, traces: Traces, out: StageFolder) -> None:
    """Looks whether every trace that is there is in the source still, as it was: what was scored of it would be another's else."""
    names = ["prompt_id", "sample_index", "completion"]
    before = read_manifest(out.path).rows("traces")
    there = np.fromiter((_number_of(row) for row in iter_rows(out.path, "traces", columns=names)), np.uint64, before)
    with _Prompts(folder(recipe, "prompts"), out.path) as prompts:
        rows = _matched(recipe, traces, brought_traces(traces), prompts)
        now = np.array(array("Q", (_number_of(row) for row, found in rows if found.reason is None)), np.uint64)
    gone = int((~np.isin(there, now)).sum())
    if gone:
        raise StageConflictError(
            f"{traces.source}: {gone:,} of the run's {before:,} traces are not in it any more, are others now, or stand in another order "
            "among those of their prompt. Traces can be added at the end: put them back, give another run_dir, or make everything that "
            "follows from them anew with `distill run --redo generate`."
        )


def _number_of(row: Row) -> int:
    """64 bits that are equal for equal traces, within this process."""
    return hash((row["prompt_id"], row["sample_index"], row["completion"])) % 2**64


def _matched(recipe: Recipe, traces: Traces, source: Source, prompts: _Prompts) -> Iterator[tuple[Row, Brought]]:
    """TRACE rows in their order, each with what was found of it, the reason to drop it among that."""
    mapping = PromptMapping(recipe.prompts, traces.columns, traces.source, with_fields=False)
    rows = source.rows([*mapping.columns, *columns_of(traces)], "traces")
    each = (trace for where, raw in rows for trace in traces_of(traces, mapping, raw, where))
    number = 0
    while batch := list(islice(each, _ROWS)):
        ids = [prompt_id(asked.messages) for asked, _ in batch]
        for (asked, found), identity, place in zip(batch, ids, prompts.places(ids), strict=True):
            yield _trace(asked, found, identity, place, prompts, number)
            number += 1


def _mended(found: Brought) -> Iterator[str]:
    """The names of what was done to a text, or must be known of it; see `_MENDED`."""
    if found.end_removed:
        yield "ends_removed"
    if found.opened:
        yield "thoughts_opened"
    if found.marked:
        yield "thoughts_marked"
    if mentions_controls(found.text):
        yield "control_tokens_as_text"


def _trace(asked: Asked, found: Brought, identity: str, place: int, prompts: _Prompts, number: int) -> tuple[Row, Brought]:
    if prompts.is_heldout(place):  # before any other reason, so that the count says how much was kept out
        found = found._replace(reason="in_heldout")
    elif place < 0:
        found = found._replace(reason=asked.reason or "no_such_prompt")
    row = {
        "prompt_id": identity,
        # Of a prompt that nobody knows the number of traces is not counted; the trace's own is as good to tell them apart.
        "sample_index": prompts.count(place) if place >= 0 else number,
        "author": "teacher",
        "messages": asked.messages,
        "reference": prompts.reference(place) if place >= 0 else None,
        "completion": found.text,
        "finish_reason": found.finish_reason,
    }
    return row, found


class _Prompts:
    """The run's prompts, those to train on before the held-out ones: which there are, what their references are.

    Use as a context manager.

    Args:
        prompts: Folder of the stage.
        place: Where a file without a name may be made.
    """

    def __init__(self, prompts: Path, place: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 (closed by __exit__)
        self._ends = array("q", [0])
        self._without = bytearray()
        ids = array("Q")
        for table in ("train", "heldout"):
            for piece in iter_pieces(prompts, table, ["prompt_id", "reference"]):
                ids.extend(as_numbers(piece.column("prompt_id").to_pylist()).tolist())
                self._add_references(piece.column("reference").to_pylist() if table == "train" else [])
            if table == "train":
                self._num_train = len(ids)
        self._file.flush()
        self._identities = Identities(np.frombuffer(ids, dtype=np.uint64))
        self._seen = np.zeros(len(ids), dtype=np.int32)

    def __enter__(self) -> _Prompts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _add_references(self, references: list[str | None]) -> None:
        for reference in references:
            written = (reference or "").encode()
            self._file.write(written)
            self._ends.append(self._ends[-1] + len(written))
            self._without.append(reference is None)

    def places(self, ids: list[str]) -> list[int]:
        """For each id the place of its prompt, -1 where there is none."""
        found: list[int] = self._identities.places(as_numbers(ids)).tolist()
        return found

    def is_heldout(self, place: int) -> bool:
        """Whether a prompt is held out."""
        return place >= self._num_train

    def count(self, place: int) -> int:
        """How many traces of the prompt came before this one."""
        seen = int(self._seen[place])
        self._seen[place] = seen + 1
        return seen

    def reference(self, place: int) -> str | None:
        """The reference of a training prompt; null where it has none, or is held out."""
        if self.is_heldout(place) or self._without[place]:
            return None
        start, end = self._ends[place : place + 2]
        return os.pread(self._file.fileno(), end - start, start).decode()
