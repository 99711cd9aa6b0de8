"""A run is a folder; a stage is a folder in it. The only module that opens stage files.

    <stage>/plan.json          settings and inputs, written first: a restart must match it
    <stage>/journal.jsonl      finished pieces of a stage that is under way, one batch a line
    <stage>/<table>-00000.parquet
    <stage>/manifest.json      written last and atomically: its presence means "complete"

Every file is written under a temporary name, flushed to disk and renamed, so a killed process leaves either the whole
file or none. Digests in the manifest are checked whenever a table is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from distill.errors import IntegrityError, MissingStageError, StageConflictError
from distill.run.schema import table_of

SCHEMA_VERSION = 1
MANIFEST, PLAN, JOURNAL, LOCK = "manifest.json", "plan.json", "journal.jsonl", ".lock"
ROWS_PER_SHARD = 4096
_WAIT_S = 60.0  # for another part of the same stage to read or write the plan


class Shard(BaseModel):
    """One Parquet file of a table."""

    file: str
    rows: int
    sha256: str


class Manifest(BaseModel):
    """What a finished stage did: enough to trust, repeat and account for it."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Name of each stage read, and the digest of its content then."""
    tables: dict[str, list[Shard]] = {}
    files: dict[str, str] = {}
    """Path within the folder and SHA-256 of every other file that belongs to the result."""
    rows_in: int | None = None
    rows_kept: int | None = None
    drops: dict[str, int] = {}
    """Reason and number of the rows that did not go on."""
    facts: dict[str, Any] = {}
    """What the stage measured: models, digests, tokens, seconds, licence, versions."""

    @property
    def digest(self) -> str:
        """Digest of the content alone: equal rows give equal digests, whenever and wherever they were made."""
        content = {name: [shard.sha256 for shard in shards] for name, shards in self.tables.items()}
        return _digest_json([self.stage, content, self.files])

    def rows(self, table: str) -> int:
        """Number of rows of a table."""
        return sum(shard.rows for shard in self.tables[table])


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
        self._tables: dict[str, list[Shard]] = {}

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

    def write_table(self, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        """Writes a table as shards of `ROWS_PER_SHARD` rows; an empty one keeps a shard with its schema."""
        shards = []
        for index, start in enumerate(range(0, max(len(rows), 1), ROWS_PER_SHARD)):
            file = f"{name}-{index:05d}.parquet"
            part = rows[start : start + ROWS_PER_SHARD]
            temporary = self.path / (file + ".tmp")
            pq.write_table(table_of(part, schema), temporary, compression="zstd")
            _commit(temporary, self.path / file)
            shards.append(Shard(file=file, rows=len(part), sha256=digest_file(self.path / file)))
        self._tables[name] = shards

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
            tables=self._tables,
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


class Journal:
    """Append-only record of finished batches: a batch is on disk whole, or will be done again.

    A line torn by a kill can only be the last one; it is cut off. Any other damage is an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[list[dict[str, Any]]] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            digest, _, body = line.partition(b" ")
            if hashlib.sha256(body).hexdigest()[:16].encode() != digest:
                raise IntegrityError(
                    f"{self.path}:{number}: this line was altered after it was written. "
                    "Delete the line to have its batch made again, or add --redo to start the stage over."
                )
            self.batches.append(json.loads(body))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds one batch and returns when it is on disk."""
        body = json.dumps(rows, ensure_ascii=False).encode()
        line = hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.batches.append(rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of all batches, in the order of writing."""
        for batch in self.batches:
            yield from batch


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished stage.

    Raises:
        MissingStageError: there is none.
        IntegrityError: it can't be read, or is of another schema version.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = "is not finished" if (folder / PLAN).exists() else "is not there"
        raise MissingStageError(f"{folder}: this stage {state}. Run it first, or `distill run` for all stages.")
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: is damaged ({str(error).splitlines()[0]}). Make the stage again with --redo.") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: has schema version {manifest.schema_version}, this kit reads {SCHEMA_VERSION}. Make the stage again with --redo."
        )
    return manifest


def read_rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a finished stage's table, after its digests were checked."""
    return list(iter_rows(folder, table))


def iter_rows(folder: Path, table: str, first: int = 0, step: int = 1) -> Iterator[dict[str, Any]]:
    """Every `step`-th row of a finished stage's table, from `first`; one shard at a time is in memory."""
    before = 0
    for path in table_files(folder, table):
        shard = pq.read_table(path)
        wanted = pa.array(range((first - before) % step, len(shard), step), pa.int64())
        yield from shard.take(wanted).to_pylist() if step > 1 else shard.to_pylist()
        before += len(shard)


def table_files(folder: Path, table: str) -> list[Path]:
    """The Parquet files of a finished stage's table, in order, after their digests were checked.

    Raises:
        MissingStageError: the stage is not finished.
        IntegrityError: a shard is gone or not what the manifest says.
    """
    manifest = read_manifest(folder)
    if table not in manifest.tables:
        raise MissingStageError(f"{folder}: has no table {table!r}, only {sorted(manifest.tables)}.")
    for shard in manifest.tables[table]:
        path = folder / shard.file
        if not path.exists() or digest_file(path) != shard.sha256:
            what = "is gone" if not path.exists() else "was altered after it was written"
            raise IntegrityError(f"{path}: {what}. Restore it, or make the stage again with --redo.")
    return [folder / shard.file for shard in manifest.tables[table]]


def check_files(folder: Path) -> Manifest:
    """The manifest of a finished stage whose non-table files were compared with their digests.

    Raises:
        IntegrityError: a file is gone or altered.
    """
    manifest = read_manifest(folder)
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.exists() or digest_file(path) != digest:
            raise IntegrityError(f"{path}: is gone or was altered. Restore it, or make the stage again with --redo.")
    return manifest


def delete_stage(folder: Path) -> None:
    """Deletes a stage's folder, refusing one that this kit did not make."""
    if not folder.exists():
        return
    if not any((folder / name).exists() for name in (MANIFEST, PLAN, LOCK)):
        raise StageConflictError(f"{folder}: holds no stage of a run, so it is not deleted. Move it away yourself.")
    shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _commit(temporary, path)


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_in_run(folder: Path) -> str:
    """A stage's folder as its run names it: `curated`, or `rounds/01/targets`."""
    *_, grandparent, parent, name = ("", "", *folder.parts)
    return f"{grandparent}/{parent}/{name}" if grandparent == "rounds" else name


def _commit(temporary: Path, final: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
