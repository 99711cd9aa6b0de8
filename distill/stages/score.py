"""Stage `score`: the teacher reads finished traces. Reads curated/ (in a round its rollouts/), writes targets/.

The rows are dealt out to parts, `targets-00002-of-00008.targets`, each with a journal of what its rows gave. Processes of one
launch, or tasks on several machines, work on different parts; a part goes on behind its last whole row after a kill, on
any number of processes. Whoever finds all parts there compares a sample with the live teacher and writes the manifest.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distill.errors import DataError, IntegrityError, RecipeError, StageConflictError
from distill.models.processes import Processes
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Score
from distill.recipe.models import ModelSpec
from distill.run.clock import Clock, is_main_process
from distill.run.folder import StageFolder
from distill.run.journal import Journal
from distill.run.log import ledger, nothing_to_do, say
from distill.run.manifest import MANIFEST, Manifest, check_files, read_manifest
from distill.run.owned import EARLIER
from distill.run.plan import Growth, StagePlan, binding, input_digests
from distill.run.schema import trace_key
from distill.run.tables import iter_pieces, iter_rows
from distill.stages import Step, folder, open_stage, plan_of

if TYPE_CHECKING:
    from distill.engines.reading import Reader
    from distill.engines.scoring import TeacherScorer
    from distill.models.vocabulary import VocabularyMap
    from distill.targets.files import TargetReader, TargetWriter
    from distill.targets.spec import TargetHeader

# Settings that judge the result, and decide no row of it; and what is asked for.
_LIMITS = {
    "min_aligned": "of the student's tokens are tokens of the teacher too",
    "min_carried_mass": "of the teacher's probability lies on tokens that the student has",
}
_SAMPLE = 512  # traces by which min_aligned is judged before anything is spent
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
            work = _Work(recipe, number, _parts_of(out.path) or processes.count)
            for index in range(processes.rank, work.parts, processes.count):
                if not work.is_whole(index):
                    with out.part(work.name(index)):
                        _score_part(work, index)
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
    work = _Work(recipe, number, int(match[2]) * processes.count)
    with open_stage(recipe, plan(recipe, number), work.name(index)) as out:
        if out.manifest:
            say(nothing_to_do(out.manifest, out.path), result=True)
            return
        begun = _parts_of(out.path) or work.parts
        if begun != work.parts:
            raise StageConflictError(
                f"{out.path}: was begun in {begun} parts, asked for {work.parts}. Keep to {begun}, or finish it with `distill score` alone."
            )
        if not work.is_whole(index):
            _score_part(work, index)
        processes.wait()
        if is_main_process():
            with out.whole():
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
    settings = {
        "teacher": teacher.identity(),
        "score": {key: value for key, value in score.identity().items() if key not in _LIMITS},
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
    return plan_of(recipe, Step("score", number), settings, [_source(recipe, number).folder], growth)


class _Source(NamedTuple):
    folder: Path
    table: str


def _source(recipe: Recipe, number: int) -> _Source:
    return _Source(folder(recipe, "rollouts", number), "traces") if number else _Source(folder(recipe, "curate"), "curated")


def _parts_of(path: Path) -> int | None:
    """The number of parts that a folder was begun in; null where nothing was begun."""
    found = {int(match[1]) for file in path.iterdir() if (match := _PART.match(file.name))}
    if len(found) > 1:
        raise StageConflictError(f"{path}: holds parts of {sorted(found)} at once. Delete those of one number, or add --redo.")
    return min(found, default=None)


class _Work:
    """What the parts have in common; whatever takes long is made when first asked for."""

    def __init__(self, recipe: Recipe, number: int, parts: int) -> None:
        assert recipe.teacher is not None and recipe.score is not None  # `plan` has looked
        self.recipe = recipe
        self.teacher: ModelSpec = recipe.teacher
        self.score: Score = recipe.score
        self.number = number
        self.parts = parts
        self.path = folder(recipe, "score", number)
        self.source = _source(recipe, number)

    def name(self, index: int) -> str:
        """A part as its files are called."""
        return f"{index:05d}-of-{self.parts:05d}"

    def shard(self, index: int) -> Path:
        """The finished file of a part."""
        return self.path / f"targets-{self.name(index)}.targets"

    def journal(self, index: int) -> Journal:
        """What the rows of a part gave, and which were left out."""
        return Journal(self.path / f"journal-{self.name(index)}.jsonl", self._binding)

    @cached_property
    def _binding(self) -> str:
        asked = plan(self.recipe, self.number)
        return binding(asked.stage, asked.settings, input_digests(asked))

    def is_whole(self, index: int) -> bool:
        """Whether a part is finished."""
        from distill.engines.parts import is_whole

        keys = itertools.islice(self.keys(), index, None, self.parts)
        return self.shard(index).exists() and is_whole(self.shard(index), self.journal(index), keys)

    @cached_property
    def chats(self) -> tuple[Any, Any]:
        """Tokenizer and template of teacher and student."""
        from distill.models.loading import load_chat_format

        return load_chat_format(self.teacher), load_chat_format(self.recipe.student)

    @cached_property
    def vocabulary(self) -> VocabularyMap:
        """The teacher's tokens as the student's."""
        from distill.models.vocabulary import vocabulary_map

        found = vocabulary_map(*self.chats)
        self.recipe.train.kd.check_size(self.score.target, found.student_size)
        return found

    @cached_property
    def model(self) -> Any:
        """The teacher, alone in memory."""
        from distill.models.loading import free_memory, load_model, pick_device

        free_memory()
        return load_model(self.teacher, pick_device())

    @cached_property
    def scorer(self) -> TeacherScorer:
        """The teacher, ready to read."""
        from distill.engines.scoring import TeacherScorer

        return TeacherScorer(self.model, self.score.target, self.vocabulary)

    @cached_property
    def record(self) -> dict[str, Any]:
        """Name, revision and size of the teacher."""
        from distill.models.loading import model_record

        return model_record(self.teacher, self.model)

    @cached_property
    def header(self) -> TargetHeader:
        """What every shard says of itself."""
        from distill.targets.spec import TargetHeader

        teacher, student = self.chats
        return TargetHeader(
            target=self.score.target,
            vocab_size=self.vocabulary.student_size,
            tokenizer_digest=student.tokenizer_digest,
            template_digest=student.template_digest,
            teacher_model=self.teacher.model,
            teacher_revision=self.record["revision"],
            teacher_tokenizer_digest=teacher.tokenizer_digest,
            teacher_template_digest=teacher.template_digest,
            traces_digest=read_manifest(self.source.folder).digest,
        )

    @cached_property
    def reader(self) -> Reader:
        """How traces are put to the teacher."""
        from distill.engines.reading import Reader

        return Reader(*self.chats, self.vocabulary, self.recipe.train)

    @cached_property
    def earlier(self) -> TargetReader | None:
        """What was scored before, where the stage grows."""
        from distill.targets.files import TargetReader

        folder = self.path / EARLIER
        return TargetReader([folder / name for name in sorted(check_files(folder).files)]) if (folder / MANIFEST).exists() else None

    @property
    def total(self) -> int:
        """Number of all traces."""
        return read_manifest(self.source.folder).rows(self.source.table)

    def traces(self, first: int = 0, step: int = 1) -> Iterator[dict[str, Any]]:
        """Every `step`-th trace from `first`, in their order."""
        from distill.engines.reading import COLUMNS, lists_of

        for traces in lists_of(iter_pieces(self.source.folder, self.source.table, COLUMNS), first, step):
            yield from traces

    def keys(self) -> Iterator[str]:
        """Of all traces."""
        return map(trace_key, iter_rows(self.source.folder, self.source.table, columns=["prompt_id", "sample_index"]))


def _score_part(work: _Work, index: int) -> None:
    """Writes a part, or what is missing of it, and gives it its name."""
    from distill.engines.parts import first_twice, score_part
    from distill.targets.files import TargetWriter

    twice = first_twice(work.keys(), work.keys())
    if twice is not None:
        raise DataError(f"{work.source.folder}: trace {twice} is there twice. Give every sample of a prompt its own sample_index.")
    _refuse_a_sample(work)
    total = len(range(index, work.total, work.parts))
    with TargetWriter(work.shard(index), work.header) as writer:
        traces, journal = work.traces(index, work.parts), work.journal(index)
        _take_over(work, index, journal, writer)
        score_part(traces, total, work.reader, work.scorer, journal, writer, work.score.batch_size)


def _take_over(work: _Work, index: int, journal: Journal, writer: TargetWriter) -> None:
    """Where the stage grows: the rows of a part that were scored before are not read again."""
    from distill.engines.parts import journals_in, take_over
    from distill.targets.files import key_hash

    if work.earlier is None:
        return
    wanted = np.sort(np.array([key_hash(key) for key in itertools.islice(work.keys(), index, None, work.parts)], np.uint64))
    taken = take_over(work.earlier, journals_in(work.path / EARLIER), work.header, wanted, journal, writer)
    if taken:
        say(f"score     {taken:,} traces were scored before, and are not read again")


def _refuse_a_sample(work: _Work) -> None:
    """Judges by some traces from all over the table, before anything is spent, what `_complete` judges by all of them."""
    from distill.models.vocabulary import AlignedRow

    if work.vocabulary.identical:
        return
    rows = [work.reader.row(trace) for trace in work.traces(step=-(-work.total // _SAMPLE))]
    there = [bool(position >= 0) for row in rows if isinstance(row, AlignedRow) for position in row.positions]
    if there:
        _refuse_below(work, sum(there) / len(there), "min_aligned", work.score.min_aligned, f" in {len(rows):,} traces from all over")


def _complete(work: _Work, out: StageFolder, clock: Clock) -> Manifest:
    """Checks the parts together, compares a sample with the live teacher, and writes the manifest."""
    from distill.data.licences import licence_of
    from distill.engines.parts import gathered, tell
    from distill.models.loading import pick_device
    from distill.targets.files import TargetReader, key_hash

    total = work.total
    journals = [work.journal(index) for index in range(work.parts)]
    statistics, drops, hashes = gathered(journals)
    if not len(hashes):
        raise DataError(f"train.max_length: none of {total:,} traces fits into {work.recipe.train.max_length:,} tokens. Raise it.")
    shards = [work.shard(index) for index in range(work.parts)]
    reader = TargetReader(shards)
    if reader.header != work.header:
        raise IntegrityError(f"{shards[0]}: belongs to another run. Delete it to have its traces read again, or add --redo.")
    found = np.sort(
        np.fromiter((key_hash(reader.key(row)) for row in range(len(reader))), np.uint64)
    )  # reads them all, and their checksums
    if not np.array_equal(found, hashes) or len(hashes) + sum(drops.values()) != total:
        raise IntegrityError(f"{out.path}: its shards and journals don't hold the {total:,} traces of {work.source.folder}. Add --redo.")
    _refuse_below(work, statistics.aligned_share, "min_aligned", work.score.min_aligned)
    _refuse_below(work, statistics.carried_mass, "min_carried_mass", work.score.min_carried_mass)
    measured = statistics.facts(work.vocabulary.teacher_size)
    tell(measured, identical=work.vocabulary.identical)
    size = sum(path.stat().st_size for path in shards)
    facts = clock.facts(
        device=str(pick_device()),
        author=work.record,
        licence=licence_of(work.teacher.model, work.teacher.licence),
        bytes=size,
        bytes_per_token=round(size / statistics.positions, 3),
        same_tokenizer=work.vocabulary.identical,
        verification=_verify(work, reader),
        **measured,
        **reader.header.model_dump(exclude={"target", "teacher_model", "teacher_revision"}),
    )
    records = [journal.path for journal in journals]
    # Traces that are no longer among the curated ones stay beside: they were paid for.
    left = work.earlier is not None and not np.isin(work.earlier.hashes, hashes).all()
    return out.finish(rows_in=total, rows_kept=len(hashes), drops=drops, files=shards, records=records, facts=facts, keep_earlier=left)


def _refuse_below(work: _Work, share: float, name: str, limit: float, where: str = "") -> None:
    if not work.vocabulary.identical and share < limit:
        raise DataError(
            f"score.{name}: only {share:.1%} {_LIMITS[name]}{where}, asked for {limit:.1%}. {work.vocabulary.advice} What is scored stays."
        )


def _verify(work: _Work, reader: TargetReader) -> dict[str, Any] | None:
    """Reads a random sample of traces once more, each alone, and compares it with what is on disk.

    Raises:
        IntegrityError: they differ by more than rounding.
    """
    from distill.models.vocabulary import AlignedRow
    from distill.targets.compare import Verification

    count = min(work.score.verify_rows, len(reader))
    if not count:
        return None
    chosen = np.random.default_rng(work.recipe.seed).choice(len(reader), count, replace=False)
    keys = {reader.key(int(row)) for row in chosen}
    verification = Verification(work.score.target, work.scorer.exact)
    for trace in work.traces():
        if trace_key(trace) in keys:
            row = work.reader.row(trace)
            assert isinstance(row, AlignedRow)  # it was scored
            [fresh] = work.scorer.score([row])
            verification.add(reader[reader.find(row.key)], fresh.targets)
    if not verification.holds:
        raise IntegrityError(
            f"{work.path}: what is stored differs from what the teacher thinks now, on {count} traces: {verification}. "
            "Were the model's files or the shards changed? Add --redo."
        )
    say(f"score     read {count} traces once more, each alone: {verification}")
    return verification.facts(count)
