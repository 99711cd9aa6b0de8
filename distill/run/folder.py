"""A run is a folder; a stage is a folder in it.

    <stage>/plan.json          settings and inputs, written first: a restart must match it
    <stage>/journal.jsonl      finished batches of a stage that is under way and that are in no shard yet, one a line
    <stage>/shards.jsonl       digests of the shards that such a stage has finished
    <stage>/<table>-00000.parquet
    <stage>/manifest.json      written last and atomically: its presence means "complete"
    <stage>/earlier/           the finished stage that this one grows from, while it grows; of a student also afterwards

Every file is written under a temporary name, flushed to disk and renamed, so a killed process leaves either the whole
file or none. Digests in the manifest are checked whenever a table is read. Files that are not the stage's are left alone, and a
folder that holds only such is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from distill.errors import StageConflictError
from distill.run.files import digest_file, read_json, write_json
from distill.run.journal import Journal
from distill.run.manifest import CLOCK, JOURNAL, LOCK, MANIFEST, PARTS, PLAN, SCHEMA_VERSION, SHARDS, Manifest, read_manifest
from distill.run.owned import EARLIER, is_of_server, is_of_system, listed, names_in, parts_at_work, remove, strangers
from distill.run.plan import HOLDS, NO_GROWTH, Growth, StagePlan, binding, in_the_way, input_digests, linked, refusal, relation
from distill.run.tables import TableWriter, whole_shards

_WAIT_S = 60.0  # for another part of the same stage to read or write the plan


class StageFolder:
    """A stage's folder, open for writing by one process, resumable and refused to other settings.

    Use as a context manager. Inside, `complete` says that all work is already done, and `earlier` where the rows are from which it
    is to grow. With `part` several processes, on several machines, hold one part of the folder each, and `whole` gives the folder
    to one of them.

    Args:
        path: The folder; made if absent.
        stage: Name of the stage.
        settings: Everything that decides the rows, as JSON values; a digest that is known only after reading may be set until `finish`.
        inputs: Folders of the stages read, which must be complete.
        growth: Which changes only add to what is there.
        made_with: The whole recipe, for the record.
        writes: Patterns of the files it may write.
        scratch: A folder in it that goes when the stage is finished.
        part: Hold this part alone.

    Raises:
        StageConflictError: the folder was made with other settings or inputs, holds what no stage made, or another process holds it,
            or the part.
        MissingStageError: an input is absent or unfinished.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        settings: dict[str, Any],
        inputs: Sequence[Path] = (),
        growth: Growth = NO_GROWTH,
        made_with: dict[str, Any] | None = None,
        writes: Sequence[str] = StagePlan._field_defaults["writes"],
        scratch: str | None = None,
        *,
        part: str | None = None,
    ) -> None:
        self.path = path
        self.stage = stage
        self.settings = json.loads(json.dumps(settings))
        self.manifest: Manifest | None = None
        self._plan = StagePlan(path, stage, self.settings, inputs, growth, made_with or {}, writes, scratch)
        self._inputs = input_digests(self._plan)
        self._binding = binding(stage, self.settings, self._inputs)
        self._part = part
        self._writers: dict[str, TableWriter] = {}
        self._optional: set[str] = set()

    @property
    def complete(self) -> bool:
        """Whether the stage was finished by an earlier run with the same settings and inputs."""
        return self.manifest is not None

    @property
    def earlier(self) -> Path | None:
        """The finished stage that this one grows from; null where it starts from nothing."""
        there = (folder for folder in (self.path, self.path / EARLIER) if (folder / MANIFEST).exists())
        return next(there, None) if self.manifest is None else None

    def __enter__(self) -> StageFolder:
        self.manifest = linked(self._plan)
        if self.manifest is not None:
            self._lock = FileLock(self.path / LOCK)  # which is not held: nothing is written there
            return self
        if others := in_the_way(self.path):  # no lock is put among them
            raise StageConflictError(refusal(self._plan, [f"{HOLDS} {listed(others)}"]))
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire(LOCK, "this stage", _WAIT_S if self._part else 0)
        try:
            self._resume()
            if self._part:
                # Taken while the folder is held, so that no other settings can come in between.
                folder_lock, self._lock = self._lock, self._acquire(f"{LOCK}-{self._part}", f"part {self._part} of this stage")
                folder_lock.release()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def _acquire(self, name: str, what: str, timeout_s: float = 0) -> FileLock:
        lock = FileLock(self.path / name)
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            raise StageConflictError(
                f"{self.path}: another process is working on {what}. Wait for it, or stop it and run this again."
            ) from None
        return lock

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Holds a part of a folder that is open as a whole, against processes that work on that part alone.

        Raises:
            StageConflictError: one does.
        """
        lock = self._acquire(f"{LOCK}-{name}", f"part {name} of this stage")
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Holds the folder of a part, after waiting for whoever holds it; `complete` is true if that one finished it."""
        lock = self._acquire(LOCK, "this stage", -1)
        try:
            self.manifest = read_manifest(self.path) if (self.path / MANIFEST).exists() else None
            yield
        finally:
            lock.release()

    def _resume(self) -> None:
        self._go_back()
        found = relation(self._plan, shared=self._part is not None)
        if found.kind in ("refused", "new") and (self.path / PLAN).exists():  # a plan by which nothing was made binds whoever works by it
            found = relation(self._plan, shared=parts_at_work(self.path))
        if found.kind == "refused":
            raise StageConflictError(refusal(self._plan, found.changes))
        if found.kind == "complete":
            self.manifest = read_manifest(self.path)
            self._tidy()  # a kill may have come in between
            return
        if found.kind == "grows":  # by a plan of its own, not by one that a kill left behind
            (self.path / PLAN).unlink(missing_ok=True)
        if found.kind == "new":
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
            self._write_plan()
            (self.path / CLOCK).unlink(missing_ok=True)  # of a run with other settings that made nothing
        if (self.path / PLAN).exists() or not self._plan.growth.looks_itself:
            self.grow()

    def _go_back(self) -> None:
        """Puts what was there into its place again, where that is asked for and the growth has made nothing yet."""
        earlier = self.path / EARLIER
        if (self.path / MANIFEST).exists() or not (earlier / MANIFEST).exists():
            return
        before, plan = read_manifest(earlier), read_json(self.path / PLAN) if (self.path / PLAN).exists() else {}
        asked = relation(self._plan._replace(path=earlier), files=False).kind == "complete"  # a kill may have moved some already
        # The lock of a part counts, on which another process may be working.
        own = {PLAN, CLOCK, EARLIER, LOCK, *self._strangers()}
        others = [
            file for file in self.path.iterdir() if file.name not in own and not is_of_system(file.name) and not is_of_server(file.name)
        ]
        if not asked or (others and not plan.get("goes_back")):
            return
        # The plan says so first, so that a restart goes on with it; the manifest comes last.
        write_json(self.path / PLAN, {"settings": before.settings, "inputs": before.inputs, "goes_back": True})
        for file in sorted(earlier.iterdir(), key=lambda file: file.name == MANIFEST):
            if file.name != EARLIER:
                file.rename(self.path / file.name)
        (self.path / PLAN).unlink()
        if (earlier / EARLIER).is_dir():  # a student before the one before
            (earlier / EARLIER).rename(self.path / f"{EARLIER}.tmp")
            earlier.rmdir()
            (self.path / f"{EARLIER}.tmp").rename(earlier)
        else:
            earlier.rmdir()

    def _write_plan(self, grows_from: str | None = None) -> None:
        plan = {"schema_version": SCHEMA_VERSION, "stage": self.stage, "settings": self.settings, "inputs": self._inputs}
        more = {"grows_from": grows_from, "made_with": self._plan.made_with}
        write_json(self.path / PLAN, plan | more)

    def grow(self) -> None:
        """Puts a finished stage that is there into `earlier`, the manifest last: until then, a restart moves the rest."""
        if not (self.path / MANIFEST).exists():
            return
        if not (self.path / PLAN).exists():
            self._write_plan(read_manifest(self.path).digest)
        earlier = self.path / EARLIER
        if not earlier.is_dir() or (earlier / MANIFEST).exists():  # the stage grew before, and kept what it grew from
            aside = self.path / f"{EARLIER}.tmp"
            aside.mkdir(exist_ok=True)
            if earlier.is_dir():
                earlier.rename(aside / EARLIER)
            aside.rename(earlier)
        others = self._strangers()
        for file in sorted(self.path.iterdir(), key=lambda file: file.name == MANIFEST):
            if file.name not in (PLAN, CLOCK, EARLIER, *others) and not file.name.startswith(LOCK):
                file.rename(earlier / file.name)

    def _strangers(self) -> set[str]:
        """What stands in the folder itself and is not the stage's: files, and folders with nothing of it inside."""
        others = set(strangers(self.path, self._plan.writes))
        own = {name.partition("/")[0] for name in names_in(self.path) if name not in others and not is_of_system(name)}
        return {name.partition("/")[0] for name in others} - own

    def journal(self, name: str = JOURNAL) -> Journal:
        """Batches already finished by a killed run, and the place to add more.

        Args:
            name: Of its file.
        """
        return Journal(self.path / name, self._binding)

    @contextmanager
    def in_one_go(self) -> Iterator[None]:
        """Tables made inside are all made or none: pieces that a killed or a failed attempt left are removed, before and after."""
        try:
            self._remove_pieces()
            yield
        except BaseException:
            for writer in self._writers.values():
                writer.stop()
            self._remove_pieces()
            raise

    def _remove_pieces(self) -> None:
        if (self.path / MANIFEST).exists():  # a stage that looks itself has not begun to grow: they are whole
            return
        for pattern in self._plan.writes:
            for piece in self.path.glob(f"{pattern}*") if pattern.endswith(".parquet") else ():
                piece.unlink()

    def _tidy(self) -> None:
        """Removes what only a restart needed."""
        for name in (PLAN, JOURNAL, SHARDS, CLOCK):
            (self.path / name).unlink(missing_ok=True)
        for spent in self.path.glob("server-spending-*.json"):  # it is in the manifest now
            spent.unlink(missing_ok=True)
        if self._plan.scratch is not None:
            shutil.rmtree(self.path / self._plan.scratch, ignore_errors=True)

    def table(self, name: str, schema: pa.Schema, *, resume: bool = False, optional: bool = False) -> TableWriter:
        """A table of the result, to be given its rows one by one; `finish` ends it.

        Args:
            name: Of the table.
            schema: Of its rows.
            resume: Go on behind the whole shards that a killed run has left.
            optional: Leave the table out where it gets no row.
        """
        record = self.journal(SHARDS) if resume else None
        if optional:
            self._optional.add(name)
        self._writers[name] = TableWriter(self.path, name, schema, whole_shards(self.path, name, record) if record else (), record)
        return self._writers[name]

    def write_table(self, name: str, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
        """Writes a whole table."""
        self.table(name, schema).extend(rows)

    def finish(
        self,
        *,
        rows_in: int | None = None,
        rows_kept: int | None = None,
        drops: dict[str, int] | None = None,
        files: Sequence[Path] = (),
        records: Sequence[Path] = (),
        facts: dict[str, Any] | None = None,
        keep_earlier: bool = False,
    ) -> Manifest:
        """Writes the manifest, which makes the stage complete, and removes what only a restart needed.

        Args:
            rows_in: Rows read.
            rows_kept: Rows that go on.
            drops: Reason and number of the others.
            files: Files of the result besides the tables, inside the folder.
            records: Files that tell how it was made, and differ with every making.
            facts: What was measured.
            keep_earlier: Leave what it grew from beside it, because not all of that was taken over.
        """
        for name in [name for name in self._optional if not self._writers[name].num_rows]:
            self._writers.pop(name).stop()
        tables = {name: writer.close() for name, writer in self._writers.items()}
        paths = [*files, *records, *(self.path / shard.file for shards in tables.values() for shard in shards)]
        self.manifest = Manifest(
            stage=self.stage,
            settings=self.settings,
            inputs=self._inputs,
            tables=tables,
            files={str(file.relative_to(self.path)): digest_file(file) for file in sorted(files)},
            records={str(file.relative_to(self.path)): digest_file(file) for file in sorted(records)},
            sizes={str(file.relative_to(self.path)): file.stat().st_size for file in sorted(paths)},
            rows_in=rows_in,
            rows_kept=rows_kept,
            drops=drops or {},
            facts=self._with_earlier_cost(facts or {}),
            made_with=self._plan.made_with,
            grew_from=self._grew_from(),
        )
        write_json(self.path / MANIFEST, json.loads(self.manifest.model_dump_json()))
        self._tidy()
        for lock in self.path.glob(f"{LOCK}-*"):
            lock.unlink(missing_ok=True)
        if self._plan.growth.adds and not keep_earlier and (self.path / EARLIER).is_dir():  # it is a part of what is there now
            remove(self.path / EARLIER, self._plan.writes)
        return self.manifest

    def _with_earlier_cost(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Facts whose seconds are those of what was taken over, too."""
        growth = self._plan.growth
        if self.earlier is None or "wall_s" not in facts or not growth.adds or growth.anything:
            return facts
        return facts | {"wall_s": round(facts["wall_s"] + read_manifest(self.earlier).facts.get("wall_s", 0), 2)}

    def _grew_from(self) -> list[str]:
        if self.earlier is None or not self._plan.growth.adds:
            return []
        before = read_manifest(self.earlier)
        return [before.digest, *before.grew_from]


def refuse_to_delete(folder: Path, writes: Sequence[str]) -> None:
    """Refuses to delete a folder that holds what its stage hasn't written.

    Raises:
        StageConflictError: naming it.
    """
    if folder.is_symlink():
        raise StageConflictError(f"{folder}: is not deleted, because it is a link to {folder.resolve()}, of another run. Delete it there.")
    others = strangers(folder, writes) if folder.exists() else []
    if others:
        raise StageConflictError(
            f"{folder}: is not deleted, because it holds what no stage wrote: {listed(others)}. Move that away, or delete it yourself."
        )


def delete_stage(folder: Path, writes: Sequence[str] = StagePlan._field_defaults["writes"]) -> None:
    """Deletes a stage's folder, the manifest last.

    Args:
        folder: Of the stage; it need not be there.
        writes: Patterns of the files it may write.

    Raises:
        StageConflictError: it holds what the stage hasn't written, or another process is working on it.
    """
    if not folder.exists():
        return
    refuse_to_delete(folder, writes)
    try:
        with FileLock(folder / LOCK, timeout=0):
            remove(folder, writes)
    except Timeout:
        raise StageConflictError(f"{folder}: another process is working on this stage. Wait for it, or stop it; then delete it.") from None
