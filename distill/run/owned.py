"""Which files in a stage's folder are the stage's. Others are the user's: they are never deleted, moved or written over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock, Timeout

from distill.errors import IntegrityError, MissingStageError, StageConflictError, visible
from distill.run.files import write_text
from distill.run.manifest import CLOCK, JOURNAL, LOCK, MANIFEST, MERGED, PARTS, PLAN, SHARDS, read_manifest

EARLIER = "earlier"
RECIPE = "recipe.yaml"
"""In a run's folder, the recipe that its stages were made with."""
JOBS = "jobs"
"""In a run's folder, what was given to a cluster, and how its tasks went: of no stage."""
LOGS = "logs"
"""In a run's folder, what its jobs said: of no stage."""
_BOOKKEEPING = frozenset({PLAN, CLOCK, JOURNAL, SHARDS, MANIFEST})
_LAST = (PLAN, MANIFEST, LOCK)  # deleted behind all else, so that what a kill leaves is still known for a stage
_CACHE_TAG = "CACHEDIR.TAG"
_CACHE_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n"
_UNMARKED = ("rows-*.arrow*", "rows-*.parquet*", "rows-*.json*", "cache-*.arrow*")  # what an earlier kit left in one
_TEMPORARY = ".tmp"
_OF_THE_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # what looking into a folder leaves there; and:
_NETWORK = (".nfs", "._")  # a deleted file that is still open; what macOS puts beside a file
_OF_SERVERS = ("server-*.log", "server-*.json", MERGED, f"{MERGED}/*")  # that stages started: logs, which process, merged weights
_SHOWN, _LONGEST = 5, 100  # names, and characters of one


def is_bookkeeping(name: str) -> bool:
    """Whether a file ties its folder to no settings and no result: a stage that has nothing else has made nothing yet."""
    return name.removesuffix(_TEMPORARY) in (PLAN, CLOCK) or name.startswith(LOCK) or is_of_system(name) or is_of_server(name)


def has_made(folder: Path) -> bool:
    """Whether a stage's folder holds more than bookkeeping, the folders of its parts among it."""
    parts = folder / PARTS
    own = [file for place in (folder, *(parts.iterdir() if parts.is_dir() else ())) if place.is_dir() for file in place.iterdir()]
    return any(not is_bookkeeping(file.name) for file in own if file != parts)


def is_of_another_run(folder: Path) -> bool:
    """Whether a stage's folder is a link into another run; not where its files only lie elsewhere, say on another disk."""
    return folder.is_symlink() and (folder.resolve().parent / RECIPE).exists()


def parts_at_work(folder: Path) -> bool:
    """Whether another process works on a part of a stage."""
    for file in folder.glob(f"{LOCK}-*"):
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
    return False


def is_of_server(name: str) -> bool:
    """Whether a file, by its path in a stage's folder, is of a server that the stage started: no result, named by no manifest."""
    plain = name.removesuffix(_TEMPORARY)
    return any(fnmatchcase(plain, pattern) for pattern in _OF_SERVERS)


def is_of_system(name: str) -> bool:
    """Whether nobody wrote a file but the operating system, by its path."""
    last = name.rpartition("/")[2]
    return last in _OF_THE_SYSTEM or last.startswith(_NETWORK)


def strangers(folder: Path, writes: Sequence[str], *, inside: bool = False) -> list[str]:
    """Files in a folder that are not its stage's, by their path within it; of a folder that holds no stage nearly all.

    Of a finished stage those are its own that the manifest names; of one under way, with a damaged manifest, or with one of an earlier
    kit, which named not all, those that it may write.

    Args:
        folder: Of the stage.
        writes: Patterns of what it may write.
        inside: Whether the folder is inside a stage's, which a kill may have left on its way there.
    """
    if not inside and not any((folder / name).exists() for name in (PLAN, MANIFEST, f"{EARLIER}/{MANIFEST}")):
        return sorted(name for name in names_in(folder) if not is_bookkeeping(name))
    named: frozenset[str] | None = None
    if not (folder / PLAN).exists():
        with contextlib.suppress(IntegrityError, MissingStageError):
            made = read_manifest(folder)
            named = frozenset(made.named) if made.sizes else None
    found = [f"{EARLIER}/{name}" for name in strangers(folder / EARLIER, writes, inside=True)] if (folder / EARLIER).is_dir() else []
    for name in names_in(folder):
        plain = name.removesuffix(_TEMPORARY)
        if (
            name.startswith((LOCK, f"{EARLIER}/", f"{EARLIER}{_TEMPORARY}/"))
            or plain in _BOOKKEEPING
            or is_of_system(name)
            or is_of_server(name)
        ):
            continue
        if plain not in named if named is not None else not any(fnmatchcase(plain, pattern) for pattern in writes):
            found.append(name)
    return sorted(found)


def names_in(folder: Path) -> Iterator[str]:
    """The files in a folder and in those inside it, by their path within it; a link to a folder is one of them."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (str((Path(place) / name).relative_to(folder)) for name in (*files, *links))


def remove(folder: Path, writes: Sequence[str]) -> None:
    """Deletes the files of a stage, and the folders that are empty then; what is not the stage's stays."""
    others = set(strangers(folder, writes, inside=True))
    own = [name for name in names_in(folder) if name not in others]
    for name in sorted(own, key=lambda name: _LAST.index(name) if name in _LAST else -1):
        (folder / name).unlink(missing_ok=True)
    for place, *_ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # it holds what is not the stage's
            Path(place).rmdir()


def own_cache(folder: Path, *, make: bool = True) -> Path:
    """The folder, for what can be made anew: marked as such (bford.info/cachedir), so that nothing is ever deleted from one that isn't.

    Args:
        folder: It need not be there.
        make: Whether it is made, or only looked at.

    Raises:
        StageConflictError: it holds files, and has no mark.
    """
    others = [name for name in names_in(folder) if not any(fnmatchcase(name, pattern) for pattern in _UNMARKED)]
    if others and not (folder / _CACHE_TAG).exists():
        raise StageConflictError(
            f"{folder}: is where rows are kept as tokens, but it holds {listed(sorted(others))}, and no {_CACHE_TAG}. Move the folder "
            "away, or give another run_dir."
        )
    if make and not (folder / _CACHE_TAG).exists():  # the processes of a launch ask all at once
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _CACHE_TAG, _CACHE_SIGNATURE)
    return folder


def listed(names: Sequence[str]) -> str:
    """The first of some files, for people."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(visible(name, _LONGEST) for name in names[:_SHOWN]) + more
