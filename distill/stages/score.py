"""Stage `score`: the teacher reads finished traces. Reads curated/ (in a round its rollouts/), writes targets/.

The rows are dealt out to parts, `targets-00002-of-00008.targets`, each with a journal of what its rows gave. Processes of one
launch, or tasks on several machines, work on different parts; a part goes on behind its last whole row after a kill, on
any number of processes. Whoever finds all parts there compares a sample with the live teacher and writes the manifest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.errors import DataError, IntegrityError, RecipeError, StageConflictError
from distill.models.processes import Processes
from distill.recipe.experiment import Recipe
from distill.run.clock import Clock, is_main_process
from distill.run.folder import StageFolder
from distill.run.log import ledger, nothing_to_do, say
from distill.run.manifest import MANIFEST, Manifest, read_manifest
from distill.run.plan import Growth, StagePlan, binding, input_digests
from distill.stages import Step, folder, open_stage, plan_of, run_dir

if TYPE_CHECKING:
    from distill.engines.work import Work

# Settings that judge the result, and decide no row of it; and what is asked for.
_LIMITS = ("min_aligned", "min_carried_mass")
_PART = re.compile(r"(?:targets|journal)-\d{5}-of-(\d{5})\.")


def run(recipe: Recipe, number: int = 0) -> Manifest:
    """Writes the shards of targets, in as many processes as were launched, and the manifest; round 0 is before the rounds."""
    # Only the main process takes the lock; the others wait until it has looked at the folder.
    with open_stage(recipe, plan(recipe, number), hold=is_main_process()) as out:
        if out.complete and "WORLD_SIZE" not in os.environ:
            return out.manifest or read_manifest(out.path)
        clock, processes = Clock(out.path), Processes()
        processes.wait()
        if not (out.path / MANIFEST).exists():
            with _work(recipe, number, parts_begun(out.path) or processes.count) as work:
                for index in range(processes.rank, work.parts, processes.count):
                    if not work.is_whole(index):
                        with out.part(work.name(index)):
                            work.write(index)
                processes.wait()
                if is_main_process():
                    _complete(work, out, clock)
        processes.wait()
        return out.manifest or read_manifest(out.path)


def run_shard(recipe: Recipe, shard: str, number: int = 0) -> None:
    """Writes one part, and completes the stage if it was the last.

    Args:
        recipe: The recipe.
        shard: `i/n`, counted from 1; every process of a launch takes a part of it.
        number: As in `run`.

    Raises:
        RecipeError: no such part.
        StageConflictError: the stage was begun in another number of parts, or another process works on this one.
    """
    clock = Clock()
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 9999:
        raise RecipeError(f"--shard: expected I/N with 1 <= I <= N <= 9999, got {shard!r}. The third of eight parts is 3/8.")
    processes = Processes()
    index = (int(match[1]) - 1) * processes.count + processes.rank
    parts = int(match[2]) * processes.count
    with open_stage(recipe, plan(recipe, number), f"{index:05d}-of-{parts:05d}") as out:
        if out.manifest:
            say(nothing_to_do(out.manifest, out.path), result=True)
            return
        begun = parts_begun(out.path) or parts
        if begun != parts:
            raise StageConflictError(
                f"{out.path}: was begun in {begun} parts, asked for {parts}. Keep to {begun}, or finish it with `distill score` alone."
            )
        with _work(recipe, number, parts, part=shard) as work:
            if not work.is_whole(index):
                work.write(index)
            processes.wait()
            if is_main_process():
                with out.whole():
                    _complete_or_tell(work, out, clock, shard)


def _complete_or_tell(work: Work, out: StageFolder, clock: Clock, shard: str) -> None:
    missing = [part for part in range(work.parts) if not work.shard(part).exists()]
    missing = missing or [part for part in range(work.parts) if not work.is_whole(part)]  # which reads all there is
    if missing:
        say(f"score     part {shard} is done, {len(missing)} of {work.parts} parts are not yet", result=True)
    elif not out.complete:
        say(ledger(_complete(work, out, clock), unit="traces"), result=True)


def plan(recipe: Recipe, number: int = 0) -> StagePlan:
    """What the stage is asked to make; round 0 is before the rounds.

    Raises:
        DataError: the recipe has no section score.
    """
    teacher, score, student = recipe.teacher, recipe.score, recipe.student
    if teacher is None or score is None:
        raise DataError("score: this recipe has no section score. Add one, with train.method kd or with rounds.")
    source = score.resolved(teacher)
    inputs = [_place(recipe, number)[0], *([folder(recipe, "generate")] if source == "generation" else [])]
    settings = {
        "teacher": teacher.identity_here() if source == "process" else teacher.identity(),
        "score": {key: value for key, value in score.identity(source).items() if key not in _LIMITS},
        "student": {
            "tokenizer": student.tokenizer or student.model,
            **student.tokenizer_identity(),
            "revision": None if student.tokenizer else student.revision,
            "chat_template_kwargs": student.chat_template_kwargs,
        },
        "train": {"max_length": recipe.train.max_length, "overlong": recipe.train.overlong},
    }
    # A longer limit lets traces in that were dropped; where it cuts, it would make others of those that are there.
    growth = Growth({"train.max_length": 0} if recipe.train.overlong == "drop" else {})
    return plan_of(recipe, Step("score", number), settings, inputs, growth)


def parts_missing(path: Path, count: int) -> list[int]:
    """The parts, counted from 0, whose shards are not finished.

    Args:
        path: The folder; it need not be there.
        count: Of all parts.
    """
    there = {file.name for file in path.glob("targets-*.targets")}
    return [index for index in range(count) if f"targets-{index:05d}-of-{count:05d}.targets" not in there]


def _place(recipe: Recipe, number: int) -> tuple[Path, str]:
    return (folder(recipe, "rollouts", number), "traces") if number else (folder(recipe, "curate"), "curated")


def parts_begun(path: Path) -> int | None:
    """The number of parts that a folder was begun in; null where nothing was begun.

    Args:
        path: The folder; it need not be there.

    Raises:
        StageConflictError: there are parts of several numbers.
    """
    found = {int(match[1]) for file in path.glob("*-of-*") if (match := _PART.match(file.name))}
    if len(found) > 1:
        raise StageConflictError(f"{path}: holds parts of {sorted(found)} at once. Delete those of one number, or add --redo.")
    return min(found, default=None)


@contextmanager
def _work(recipe: Recipe, number: int, parts: int, part: str = "") -> Iterator[Work]:
    """The work of the stage; a server that was started for it is ended behind it.

    Args:
        recipe: The recipe.
        number: Of the round.
        parts: How many the work has.
        part: The one that this process was asked for, where others may work beside it.
    """
    from distill.engines.work import Source, Work
    from distill.servers.thinking import open_thoughts

    asked = plan(recipe, number)
    source, path = Source(*_place(recipe, number)), folder(recipe, "score", number)
    with open_thoughts(recipe, path, run_dir(recipe), folder(recipe, "generate"), part) as thoughts:
        yield Work(thoughts, source, path, parts, binding(asked.stage, asked.settings, input_digests(asked)))


def _complete(work: Work, out: StageFolder, clock: Clock) -> Manifest:
    """Checks the parts together, compares a sample with the live teacher, and writes the manifest."""
    from distill.data.licences import licence_of
    from distill.engines.parts import gathered, tell
    from distill.targets.files import TargetReader, key_hash

    thoughts, total = work.thoughts, work.total
    journals = [work.journal(index) for index in range(work.parts)]
    statistics, drops, hashes = gathered(journals)
    if not len(hashes):
        raise DataError(f"train.max_length: none of {total:,} traces fits into {thoughts.recipe.train.max_length:,} tokens. Raise it.")
    shards = [work.shard(index) for index in range(work.parts)]
    reader = TargetReader(shards)
    if reader.header != work.header:
        raise IntegrityError(f"{shards[0]}: belongs to another run. Delete it to have its traces read again, or add --redo.")
    found = np.sort(
        np.fromiter((key_hash(reader.key(row)) for row in range(len(reader))), np.uint64)
    )  # reads them all, and their checksums
    if not np.array_equal(found, hashes) or len(hashes) + sum(drops.values()) != total:
        raise IntegrityError(f"{out.path}: its shards and journals don't hold the {total:,} traces of {work.source.folder}. Add --redo.")
    work.refuse_below(statistics.aligned_share, "min_aligned", thoughts.settings.min_aligned)
    work.refuse_below(statistics.most_carried, "min_carried_mass", thoughts.settings.min_carried_mass)
    measured = statistics.facts(thoughts.teacher_size)
    tell(measured, identical=thoughts.identical)
    size = sum(path.stat().st_size for path in shards)
    facts = clock.facts(
        device=thoughts.device,
        author=thoughts.record,
        licence=licence_of(thoughts.teacher.model, thoughts.teacher.licence),
        bytes=size,
        bytes_per_token=round(size / statistics.positions, 3),
        same_tokenizer=thoughts.identical,
        verification=work.verify(reader),
        **({"unverified": thoughts.unverified} if thoughts.unverified else {}),
        **measured,
        **thoughts.facts(),
        **reader.header.model_dump(exclude={"target", "teacher_model", "teacher_revision"}),
    )
    records = [journal.path for journal in journals]
    # Traces that are no longer among the curated ones stay beside: they were paid for.
    left = work.earlier is not None and not np.isin(work.earlier.hashes, hashes).all()
    return out.finish(rows_in=total, rows_kept=len(hashes), drops=drops, files=shards, records=records, facts=facts, keep_earlier=left)
