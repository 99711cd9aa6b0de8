"""What a finished stage did, as a file: its manifest, written last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from distill.errors import IntegrityError, MissingStageError
from distill.run.files import digest_file, digest_json, read_json

SCHEMA_VERSION = 1
MANIFEST, PLAN, JOURNAL, SHARDS, CLOCK, LOCK = "manifest.json", "plan.json", "journal.jsonl", "shards.jsonl", "clock.json", ".lock"
PARTS = "parts"
"""In a stage's folder, its parts; gone when it is finished."""
MERGED = "served"
"""In a stage's folder, merged weights for as long as their server lives."""


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
    records: dict[str, str] = {}
    """The same of files that tell how it was made, as a training's metrics: seconds are in them, so no two makings have them alike."""
    sizes: dict[str, int] = {}
    """Bytes of all these files; empty where an earlier kit made them."""
    rows_in: int | None = None
    rows_kept: int | None = None
    drops: dict[str, int] = {}
    """Reason and number of the rows that did not go on."""
    facts: dict[str, Any] = {}
    """What the stage measured: models, digests, tokens, seconds, licence, versions."""
    made_with: dict[str, Any] = {}
    """The whole recipe of the command that made it, keys that decide no row included."""
    grew_from: list[str] = []
    """Digests of what was there before it grew, each of which is a part of it."""

    @property
    def digest(self) -> str:
        """Digest of the content alone: equal rows give equal digests, whenever and wherever they were made."""
        content = {name: [shard.sha256 for shard in shards] for name, shards in self.tables.items()}
        return digest_json([self.stage, content, self.files])

    @property
    def named(self) -> dict[str, str]:
        """Path within the folder and SHA-256 of every file that it vouches for."""
        shards = {shard.file: shard.sha256 for shards in self.tables.values() for shard in shards}
        return shards | self.files | self.records

    def rows(self, table: str) -> int:
        """Number of rows of a table."""
        return sum(shard.rows for shard in self.tables[table])


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
    content = read_json(path)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: has schema version {content.get('schema_version')}, this kit reads {SCHEMA_VERSION}. "
            "Make the stage again with --redo."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{path}: is damaged ({str(error).splitlines()[0]}). Make the stage again with --redo.") from None


def check_files(folder: Path) -> Manifest:
    """The manifest of a finished stage whose non-table files were compared with their digests.

    Raises:
        IntegrityError: a file is gone or altered.
    """
    manifest = read_manifest(folder)
    for name, digest in (manifest.files | manifest.records).items():
        path = folder / name
        if not path.is_file() or digest_file(path) != digest:
            raise IntegrityError(f"{path}: is gone or was altered. Restore it, or make the stage again with --redo.")
    return manifest


def checked_file(folder: Path, name: str) -> Path | None:
    """A file of a finished stage whose digest was compared; null where the stage wrote none.

    Raises:
        IntegrityError: it is gone or altered.
    """
    digest, path = read_manifest(folder).named.get(name), folder / name
    if digest is not None and (not path.is_file() or digest_file(path) != digest):
        raise IntegrityError(f"{path}: is gone or was altered. Restore it, or make the stage again with --redo.")
    return None if digest is None else path


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Looks whether every file that a manifest names is there and has its size; what is in it is looked at when it is read.

    Raises:
        IntegrityError: one is gone or has another size.
    """
    for path, what in _other_sizes(folder, manifest):
        raise IntegrityError(f"{path}: {what}. Restore it, or make the stage again with --redo; `distill verify` lists all there is.")


def _other_sizes(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, str]]:
    for name in manifest.named:
        path, size = folder / name, manifest.sizes.get(name)
        if not path.is_file():
            yield path, "is gone"
        elif size is not None and path.stat().st_size != size:
            yield path, f"has {path.stat().st_size:,} bytes, not {size:,} as it was written"
