"""How many rows of a stage under way are on disk, counted without understanding them: for whoever looks on while others write.

Nothing is locked and no digest is compared, so a count may be a batch behind or, after a kill, be of rows that are made again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distill.run.manifest import CLOCK, JOURNAL, LOCK, MANIFEST, SHARDS

_AT_MOST = 2**26
"""Bytes of journals that are read; of longer ones the beginning tells how long a row is."""
_LEAST = 2**16
_ROW = re.compile(rb'\{"(?:prompt_id|key)": "(?:[^"\\]|\\.)*"(?:, "sample_index": \d+, "author": "(?:[^"\\]|\\.)*")?')
"""How a row begins, of a trace or of what one gave: inside a text its quotes would be escaped."""


class Count(NamedTuple):
    """Rows on disk."""

    rows: int
    exact: bool = True
    """False where the journals were too long to be read whole."""


@dataclass(frozen=True)
class Files:
    """What a folder holds, by one look."""

    path: Path
    changed: dict[str, float]
    """Name, and Unix time at which it was last written, of every file in the folder itself."""

    def has(self, name: str) -> bool:
        """Whether a file of this name is there."""
        return name in self.changed

    @property
    def written_at(self) -> float | None:
        """When a file of the stage was last written; null for none."""
        return max((at for name, at in self.changed.items() if not name.startswith(LOCK)), default=None)

    @property
    def is_done(self) -> bool:
        """Whether it has a manifest; of a part that is enough to know its rows."""
        return self.has(MANIFEST)


def files_in(folder: Path) -> Files:
    """What a folder holds; nothing where it is not there."""
    changed = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # gone since, as a file under its temporary name
                if entry.is_file():
                    changed[entry.name] = entry.stat().st_mtime
    return Files(folder, changed)


def rows_in_shards(files: Files, tables: Collection[str]) -> int:
    """Rows of the whole shards of some tables that a stage under way has noted."""
    lines = _lines(files.path / SHARDS) if files.has(SHARDS) else ()
    noted = {shard["file"]: shard["rows"] for line in lines for shard in line}
    return sum(rows for name, rows in noted.items() if files.has(name) and name.rpartition("-")[0] in tables)


def _lines(journal: Path) -> Iterable[list[dict[str, Any]]]:
    """The batches of a short journal that can be read."""
    found: list[list[dict[str, Any]]] = []
    with suppress(OSError):
        for line in journal.read_bytes().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line.partition(b" ")[2]))
    return found


def has_open_journal(files: Files) -> bool:
    """Whether the journal holds a window that is in no shard yet: a kill may have left one whose shards are there."""
    return files.has(JOURNAL) and files.changed[JOURNAL] >= files.changed.get(SHARDS, 0.0)


def rows_in_journals(journals: Sequence[Path]) -> list[Count]:
    """Rows of each journal, a row that is there twice counted once."""
    each = max(_AT_MOST // max(len(journals), 1), _LEAST)
    return [_rows_in(journal, each) for journal in journals]


def _rows_in(journal: Path, most: int) -> Count:
    try:
        with journal.open("rb") as file:
            content, size = file.read(most), os.fstat(file.fileno()).st_size
    except OSError:  # it has become a shard meanwhile
        return Count(0)
    whole = content.rfind(b"\n") + 1  # behind it another process may be writing
    if size > most:
        whole = whole or len(content)
    rows = len(set(_ROW.findall(content[:whole])))
    return Count(rows) if size <= most else Count(round(rows * size / whole), exact=False)


def clock_of(files: Files) -> dict[str, Any]:
    """What a stage at work has noted of its seconds and how far it is (see `run/clock`); empty where it has not."""
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        found = dict(json.loads((files.path / CLOCK).read_text(encoding="utf-8"))) if files.has(CLOCK) else {}
    return found


def is_held(files: Files, held: Collection[tuple[int, int, int]], lock: str = LOCK) -> bool:
    """Whether a process of this machine holds the lock of a folder, or of a part.

    Args:
        files: Of the folder.
        held: As `held_here` gives it.
        lock: Name of the lock's file.
    """
    if not held or not files.has(lock):
        return False
    try:
        found = (files.path / lock).stat()
    except OSError:
        return False
    return (os.major(found.st_dev), os.minor(found.st_dev), found.st_ino) in held


def held_here() -> set[tuple[int, int, int]]:
    """Device (major, minor) and inode of every file that a process of this machine has locked; empty where the system doesn't tell."""
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return set()
    found = set()
    for line in lines:
        match = re.search(r" ([0-9a-f]+):([0-9a-f]+):(\d+) ", line)
        if match and "->" not in line:  # else it waits for one
            found.add((int(match[1], 16), int(match[2], 16), int(match[3])))
    return found
