"""What a finished stage did, as a file: its manifest, written last."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from distill.errors import IntegrityError, MissingStageError
from distill.run.files import digest_file

SCHEMA_VERSION = 1
MANIFEST, PLAN, JOURNAL, CLOCK, LOCK = "manifest.json", "plan.json", "journal.jsonl", "clock.json", ".lock"


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
    made_with: dict[str, Any] = {}
    """The whole recipe of the command that made it, keys that decide no row included."""
    grew_from: list[str] = []
    """Digests of what was there before it grew, each of which is a part of it."""

    @property
    def digest(self) -> str:
        """Digest of the content alone: equal rows give equal digests, whenever and wherever they were made."""
        content = {name: [shard.sha256 for shard in shards] for name, shards in self.tables.items()}
        return _digest_json([self.stage, content, self.files])

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
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: is damaged ({str(error).splitlines()[0]}). Make the stage again with --redo.") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path}: has schema version {manifest.schema_version}, this kit reads {SCHEMA_VERSION}. Make the stage again with --redo."
        )
    return manifest


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


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
