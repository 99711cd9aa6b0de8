"""Files that are whole or not there, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from distill.errors import IntegrityError

_SEAL = "sha256"
_DIGEST = re.compile("[0-9a-f]{64}")
_RECORD = "# SHA-256 of the lines above: "


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    commit(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object atomically, with a digest of itself by which `read_json` knows that it is whole."""
    write_text(path, json.dumps(content | {_SEAL: digest_json(content)}, indent=2))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a stage, without its own digest.

    Raises:
        IntegrityError: it is none, or was altered after it was written.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        name, last = next(reversed(content.items()), ("", None))
        if name == _SEAL:
            del content[name]
        # Files that an earlier kit wrote have no digest at their end; one under another name was altered.
        if last != digest_json(content) if name == _SEAL else _DIGEST.fullmatch(str(last)):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise IntegrityError(f"{path}: is damaged. Make the stage again with --redo.") from None
    return content


def write_record(path: Path, text: str) -> None:
    """Writes a text file for people atomically, with a digest of itself in a comment at its end."""
    write_text(path, f"{text}{_RECORD}{hashlib.sha256(text.encode()).hexdigest()}\n")


def is_whole_record(path: Path) -> bool:
    """Whether a file is as `write_record` wrote it."""
    body, _, digest = path.read_bytes().rpartition(_RECORD.encode())
    return digest == hashlib.sha256(body).hexdigest().encode() + b"\n"


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, in hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def user_cache() -> Path:
    """The kit's folder in the user's cache: what can be found out again.

    Raises:
        RuntimeError: there is no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "distill-kit"


def flush(path: Path) -> None:
    """Returns when a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path) -> None:
    """Puts a file that is written whole in its place, on disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes, whole or not at all; of a link those of the file that it leads to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    commit(temporary, target)
