"""Files that are whole or not there, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from distill.errors import IntegrityError


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    commit(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a stage.

    Raises:
        IntegrityError: it is none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, UnicodeDecodeError):
        raise IntegrityError(f"{path}: is damaged. Make the stage again with --redo.") from None


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit(temporary: Path, final: Path) -> None:
    """Puts a file that is written whole in its place, on disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
