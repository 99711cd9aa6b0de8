"""A run is a folder; a stage is a folder in it.

    <stage>/plan.json          settings and inputs, written first: a restart must match it
    <stage>/journal.jsonl      finished pieces of a stage that is under way, one batch a line
    <stage>/<table>-00000.parquet
    <stage>/manifest.json      written last and atomically: its presence means "complete"

Every file is written under a temporary name, flushed to disk and renamed, so a killed process leaves either the whole
file or none. Digests in the manifest are checked whenever a table is read.
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

from distill.errors import IntegrityError, StageConflictError
from distill.run.files import digest_file, write_text
from distill.run.journal import Journal
from distill.run.manifest import JOURNAL, LOCK, MANIFEST, PLAN, SCHEMA_VERSION, Manifest, read_manifest
from distill.run.tables import TableWriter

_WAIT_S = 60.0  # for another part of the same stage to read or write the plan


class StageFolder:
    """A stage's folder, open for writing by one process, resumable and refused to other settings.

    Use as a context manager. Inside, `complete` says that all work is already done. With `part` several processes, on
    several machines, hold one part of the folder each, and `whole` gives the folder to one of them.

    Args:
        path: The folder; made if absent.
        stage: Name of the stage.
        settings: Everything that decides the rows, as JSON values.
        inputs: Folders of the stages read, which must be complete.
        part: Hold this part alone.

    Raises:
        StageConflictError: the folder was made with other settings or inputs, or another process holds it, or the part.
        MissingStageError: an input is absent or unfinished.
    """

    def __init__(self, path: Path, stage: str, settings: dict[str, Any], inputs: Sequence[Path] = (), part: str | None = None) -> None:
        self.path = path
        self._part = part
        self.stage = stage
        self.settings = json.loads(json.dumps(settings))
        self.inputs = {_name_in_run(folder): read_manifest(folder).digest for folder in inputs}
        self.manifest: Manifest | None = None
        self._writers: dict[str, TableWriter] = {}

    @property
    def complete(self) -> bool:
        """Whether the stage was finished by an earlier run with the same settings and inputs."""
        return self.manifest is not None

    def __enter__(self) -> StageFolder:
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
        plan = {"schema_version": SCHEMA_VERSION, "stage": self.stage, "settings": self.settings, "inputs": self.inputs}
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            self._refuse_other_plan(manifest.model_dump(include=set(plan)), plan)
            self.manifest = manifest
        elif (self.path / PLAN).exists() and (self._part or any(file.name not in (PLAN, LOCK) for file in self.path.iterdir())):
            self._refuse_other_plan(_read_json(self.path / PLAN), plan)
        else:  # nothing is there yet, or only the plan of a run that failed before it made anything
            write_text(self.path / PLAN, json.dumps(plan, indent=2))

    def _refuse_other_plan(self, found: dict[str, Any], asked: dict[str, Any]) -> None:
        changes = list(_differences(found, asked))
        if changes:
            raise StageConflictError(
                f"{self.path}: made with other settings or inputs: {'; '.join(changes[:5])}. "
                f"Choose another run_dir, or add --redo to delete this stage's folder and make it again."
            )

    def journal(self) -> Journal:
        """Batches already finished by a killed run, and the place to add more."""
        return Journal(self.path / JOURNAL)

    def table(self, name: str, schema: pa.Schema) -> TableWriter:
        """A table of the result, to be given its rows one by one; `finish` ends it."""
        self._writers[name] = TableWriter(self.path, name, schema)
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
        facts: dict[str, Any] | None = None,
    ) -> Manifest:
        """Writes the manifest, which makes the stage complete, and removes what only a restart needed.

        Args:
            rows_in: Rows read.
            rows_kept: Rows that go on.
            drops: Reason and number of the others.
            files: Files of the result besides the tables, inside the folder.
            facts: What was measured.
        """
        self.manifest = Manifest(
            stage=self.stage,
            settings=self.settings,
            inputs=self.inputs,
            tables={name: writer.close() for name, writer in self._writers.items()},
            files={str(file.relative_to(self.path)): digest_file(file) for file in sorted(files)},
            rows_in=rows_in,
            rows_kept=rows_kept,
            drops=drops or {},
            facts=facts or {},
        )
        write_text(self.path / MANIFEST, self.manifest.model_dump_json(indent=2))
        for leftover in (self.path / PLAN, self.path / JOURNAL, *self.path.glob(f"{LOCK}-*")):
            leftover.unlink(missing_ok=True)
        return self.manifest


def delete_stage(folder: Path) -> None:
    """Deletes a stage's folder, refusing one that this kit did not make."""
    if not folder.exists():
        return
    if not any((folder / name).exists() for name in (MANIFEST, PLAN, LOCK)):
        raise StageConflictError(f"{folder}: holds no stage of a run, so it is not deleted. Move it away yourself.")
    shutil.rmtree(folder)


def _name_in_run(folder: Path) -> str:
    """A stage's folder as its run names it: `curated`, or `rounds/01/targets`."""
    *_, grandparent, parent, name = ("", "", *folder.parts)
    return f"{grandparent}/{parent}/{name}" if grandparent == "rounds" else name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise IntegrityError(f"{path}: is damaged. Make the stage again with --redo.") from None
    return dict(value)


def _differences(found: Any, asked: Any, key: str = "") -> Iterator[str]:
    """Dotted keys at which two JSON values differ, with both values."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in sorted(set(found) | set(asked)):
            yield from _differences(found.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif found != asked:
        yield f"{key} is {found!r} there and {asked!r} here"
