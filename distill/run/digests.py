"""SHA-256 of large files that others made, as a model's weights: read once, and again only where size or times say that they changed.

What was read is remembered in `distill-kit/digests.json` in `$XDG_CACHE_HOME`, or else in `~/.cache`. To have all read anew, delete it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from distill.run.files import digest_file, user_cache, write_text
from distill.run.log import progress

_SETTLED_S = 2.0  # a file written sooner before could be written again without its times showing it
_THREADS = 4
_WAIT_S = 600.0  # for another process to read the same files

Entry = tuple[list[int], str]
"""Size, times and number of a file, and its digest then."""

_known: dict[str, Entry] = {}


def digests_of(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, in hex.

    Raises:
        OSError: one can't be read.
    """
    files = [str(path.resolve()) for path in paths]
    if not all(_is_known(file) for file in files):
        _known.update(_recorded())
    if not all(_is_known(file) for file in files):
        try:
            with FileLock(_place().with_suffix(".lock"), timeout=_WAIT_S):  # the processes of a launch ask all at once
                _known.update(_recorded())
                _read([file for file in files if not _is_known(file)])
        except (Timeout, OSError, RuntimeError):  # no home, or a folder that can't be written: nothing is remembered
            _read([file for file in files if not _is_known(file)], keep=False)
    return [_known[file][1] for file in files]


def _read(files: Sequence[str], *, keep: bool = True) -> None:
    total = sum(Path(file).stat().st_size for file in files)
    with progress(total, "bytes", "read the model's files once", passing=True) as bar, ThreadPoolExecutor(_THREADS) as threads:
        for file, (seen, digest) in zip(files, threads.map(_look_and_digest, files), strict=True):
            _known[file] = seen, digest
            bar.update(seen[0])
    settled = {file: entry for file, entry in _known.items() if time.time() - max(entry[0][1:3]) / 1e9 > _SETTLED_S and Path(file).exists()}
    if keep and files:
        write_text(_place(), json.dumps(settled, indent=1) + "\n")


def _look_and_digest(file: str) -> Entry:
    return _look(file), digest_file(Path(file))


def _look(file: str) -> list[int]:
    found = os.stat(file)  # noqa: PTH116
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _is_known(file: str) -> bool:
    return file in _known and list(_known[file][0]) == _look(file)


def _place() -> Path:
    folder = user_cache()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "digests.json"


def _recorded() -> dict[str, Entry]:
    """What is remembered and whole."""
    try:
        found = json.loads(_place().read_text(encoding="utf-8"))
        return {file: ([int(number) for number in seen], str(digest)) for file, (seen, digest) in found.items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}
