"""A part of a scoring: its rows go into a shard, what they gave into a journal beside it, and all journals together into one sum."""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.engines.reading import Reader, batches_of
from distill.engines.scored import ScoredRow, Statistics
from distill.engines.thoughts import Scorer
from distill.errors import StageConflictError
from distill.models.vocabulary import AlignedRow
from distill.run.clock import is_main_process
from distill.run.journal import Journal
from distill.run.log import progress, say
from distill.run.manifest import read_manifest
from distill.run.plan import binding
from distill.targets.files import TargetReader, TargetWriter, key_hash, reopen
from distill.targets.spec import TargetHeader

Hashes = NDArray[np.uint64]
_TAKEN_AT_ONCE = 64  # rows of a finished scoring


def score_part(
    traces: Iterable[dict[str, Any]], total: int, reader: Reader, scorer: Scorer, journal: Journal, writer: TargetWriter, size: int
) -> None:
    """Writes what is missing of a part, and closes its shard.

    Args:
        traces: All of the part, in their order.
        total: How many.
        reader: Aligns them.
        scorer: The teacher.
        journal: What the rows gave, and which were left out.
        writer: The shard.
        size: Of a batch.
    """
    left_out: set[str] = set()
    noted: set[str] = set()
    for entry in journal.rows():
        (left_out if "skipped" in entry else noted).add(entry["key"])

    def known(key: str) -> bool:
        return key in left_out or (key in noted and key in writer)

    with ThreadPoolExecutor(1) as disk, contextlib.ExitStack() as stack:
        bar = None
        if is_main_process():
            bar = stack.enter_context(progress(total, "traces", "score", done=len(writer) + len(left_out)))
        pending: Future[None] = disk.submit(lambda: None)

        def batches() -> Iterator[list[AlignedRow]]:
            nonlocal pending
            for window in reader.windows(traces, known):
                new = [{"key": row.key, "skipped": row.reason} for row in window.left_out if row.key not in left_out]
                if new:
                    pending.result()
                    pending = disk.submit(journal.append, new)
                    if bar is not None:
                        bar.update(len(new))
                yield from batches_of(window, size, known)

        dealt, tokens = batches(), 0
        first = list(itertools.islice(dealt, 1))  # its window is aligned before the teacher's time is taken
        for scored in scorer.read(itertools.chain(first, dealt)):
            pending.result()
            tokens += sum(row.statistics.tokens for row in scored)
            count = sum(row.key not in writer for row in scored)
            pending = disk.submit(_store, scored, journal, writer)  # while the next batch is read
            if bar is not None:
                bar.set_postfix_str(f"{tokens / max(bar.elapsed_s, 1e-9):,.0f} tokens/s")
                bar.update(count)
        pending.result()
        writer.close()


def take_over(
    earlier: TargetReader, journals: Iterable[Journal], header: TargetHeader, wanted: Hashes, journal: Journal, writer: TargetWriter
) -> int:
    """Puts rows of a finished scoring into a part, as they are, and what they gave into its journal; returns their number.

    Args:
        earlier: The finished scoring.
        journals: What its rows gave.
        header: Of the part.
        wanted: (rows,) `key_hash` of the part's traces, rising.
        journal: Of the part.
        writer: Its shard; what it holds is not taken again.

    Raises:
        StageConflictError: the finished scoring is of another teacher, tokenizer or template.
    """
    own, before = (each.model_dump(mode="json", exclude={"traces_digest"}) for each in (header, earlier.header))
    other = sorted(name for name in own if own[name] != before[name])
    if other:
        raise StageConflictError(
            f"{writer.path.parent}: what was scored before can't be added to, because {', '.join(other)} is not what it was then. Was a "
            "model's folder changed? Set it back, or make everything that follows from it anew with `distill run --redo score`."
        )
    taken = 0
    entries = (entry for each in journals for entry in each.rows() if "skipped" not in entry)
    for batch in iter(lambda: list(itertools.islice(entries, _TAKEN_AT_ONCE)), []):
        hashes = np.array([key_hash(entry["key"]) for entry in batch], np.uint64)
        new = {
            entry["key"]: entry for entry, known in zip(batch, np.isin(hashes, wanted), strict=True) if known and entry["key"] not in writer
        }
        if not new:
            continue
        journal.append(list(new.values()))
        for key in new:
            writer.append(key, earlier[earlier.find(key)])
        taken += len(new)
    return taken


def journals_in(folder: Path) -> list[Journal]:
    """What the rows of a finished scoring gave.

    Args:
        folder: Of the stage.
    """
    made = read_manifest(folder)
    belongs_to = binding(made.stage, made.settings, made.inputs) if made.records else ""  # an earlier kit bound none
    return [Journal(path, belongs_to) for path in sorted(folder.glob("journal-*.jsonl"))]


def _store(scored: list[ScoredRow], journal: Journal, writer: TargetWriter) -> None:
    """Puts a batch on disk: first what it gave, so that no row of a shard is without it."""
    journal.append([{"key": row.key, **asdict(row.statistics)} for row in scored])
    for row in scored:
        if row.key not in writer:
            writer.append(row.key, row.targets)


class Gathered(NamedTuple):
    """What all parts gave together."""

    statistics: Statistics
    drops: dict[str, int]
    """Reason and number of the traces that were left out."""
    hashes: Hashes
    """(rows,) `key_hash` of the others, rising."""


def is_whole(shard: Path, journal: Journal, hashes: Hashes) -> bool:
    """Whether the journal of a finished shard says of every trace what it gave, or why it was left out.

    Else the shard is opened again: the traces of which that is lost are read once more. 8 bytes of a key are in memory.

    Args:
        shard: Under its own name.
        journal: Beside it.
        hashes: `key_hash` of the part's traces.
    """
    noted = np.array(array("Q", (key_hash(entry["key"]) for entry in journal.rows())), np.uint64)
    found = bool(np.isin(hashes, noted).all())
    if not found:
        reopen(shard)
    return found


def gathered(journals: list[Journal]) -> Gathered:
    """What the rows of all parts gave; twice read, so that 17 bytes of a row are in memory.

    A batch that was cut off by a kill is there twice; the later one counts.
    """

    def entries() -> Iterator[dict[str, Any]]:
        return (entry for journal in journals for entry in journal.rows())

    hashes = np.array(array("Q", (key_hash(entry["key"]) for entry in entries())), np.uint64)
    _, from_behind = np.unique(hashes[::-1], return_index=True)
    counts = np.zeros(len(hashes), np.bool_)
    counts[len(hashes) - 1 - from_behind] = True
    total, drops, scored = Statistics(), Counter[str](), np.zeros(len(hashes), np.bool_)
    for place, entry in enumerate(entries()):
        if counts[place] and "skipped" in entry:
            drops[entry["skipped"]] += 1
        elif counts[place]:
            scored[place] = True
            total.add(Statistics(**{name: value for name, value in entry.items() if name != "key"}))
    return Gathered(total, dict(drops), np.sort(hashes[scored]))


def first_twice(keys: Iterable[str], again: Iterable[str]) -> str | None:
    """A key that is there twice, or null; 8 bytes of a key are in memory.

    Args:
        keys: All of them.
        again: The same once more.
    """
    hashes, counts = np.unique(np.array(array("Q", map(key_hash, keys)), np.uint64), return_counts=True)
    suspects = set(hashes[counts > 1].tolist())
    found = Counter(key for key in again if key_hash(key) in suspects) if suspects else Counter[str]()
    return next((key for key, count in found.items() if count > 1), None)


def tell(measured: dict[str, Any], *, identical: bool) -> None:
    """Says by which lines k and the teacher are chosen.

    Args:
        measured: `Statistics.facts`.
        identical: Whether both models have one vocabulary.
    """
    if measured["captured_mass"]:
        held = " · ".join(f"{k}: {mass:.3f}" for k, mass in measured["captured_mass"].items())
        seen = ", ".join(f"{draws} draws see {number:.1f} tokens" for draws, number in measured["distinct_ids"].items())
        say(f"score     probability in the k most probable tokens, by k: {held}" + (f"; {seen}" if seen else ""))
    if not identical:
        low, high = measured.get("carried_mass_between") or (measured["carried_mass"], None)
        carried = f"{low:.2%}" if high is None else f"{low:.2%} to {high:.2%}"
        say(
            f"score     other tokenizers: {measured['aligned_share']:.1%} of the tokens have a target, "
            f"{carried} of the teacher's probability lies on tokens that the student has"
        )
