"""Every error a user can cause or meet, each naming where, what is wrong, and what to do.

One root exception, so that an entry point catches one class; each child is also the standard class it refines.
"""

import errno
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CONTROLS = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs"})
"""Categories of Unicode that can move a cursor, hide or turn around what follows."""
_JOINERS = "\u200c\u200d"  # of category Cf, but letters of Persian, Hindi and emoji hang on them


EARLY = 75
"""Exit code of a stage that was told by a signal to end: all that is finished is on disk, and there is more to do (EX_TEMPFAIL)."""


class DistillError(Exception):
    """Root of all errors that are reported to the user without a traceback."""

    tells_for_all = False
    """Whether this process was the first of its launch to meet an error, and the others say nothing."""


class RecipeError(DistillError, ValueError):
    """A recipe, or an override of it on the command line, can't be used."""


class DataError(DistillError, ValueError):
    """Rows brought by the user, or a whole input, can't be used as asked."""


class StageConflictError(DistillError, RuntimeError):
    """A stage folder was made with other settings or inputs, or another process is writing it."""


class MissingStageError(DistillError, FileNotFoundError):
    """A stage needs the output of an earlier one that is absent or unfinished."""


class IntegrityError(DistillError, ValueError):
    """A stored file is not what its manifest says: half-written, altered or gone."""


class ModelError(DistillError, RuntimeError):
    """A model, tokenizer or chat template can't be used for what the recipe asks of it."""


class ServerError(DistillError, RuntimeError):
    """A server can't be started or reached, or refuses what no single row could make right."""


class ServerDiedError(ServerError):
    """A server that was started here, and had answered, is gone; started again it may go on."""


class LicenceError(DistillError, PermissionError):
    """The terms of a model or data set do not allow what the recipe asks for."""


class BudgetError(DistillError, RuntimeError):
    """A stage has spent what the recipe allows it of a server; it goes on when that is raised."""


class ClusterError(DistillError, RuntimeError):
    """The scheduler of a cluster, or the file that describes the cluster, can't be used as asked."""


class StorageError(DistillError, OSError):
    """The operating system refused a file or folder: the disk is full, it is read-only, something else is in the place."""


def visible(text: str, limit: int | None = None) -> str:
    r"""Foreign text as it may be shown: control characters (ESC, C1, bidi marks, half surrogates) as escapes, line ends and tabs kept.

    Args:
        text: From a prompt, a trace, a key, a file's name.
        limit: Characters of it that are shown; what was cut is counted behind them.
    """
    shown = text if limit is None or len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _CONTROLS and character not in "\n\t" + _JOINERS
        else character
        for character in shown
    )


def shown(value: Any, limit: int = 80) -> str:
    """A foreign value as an error names it: as Python writes it, without controls, and no longer than so many characters."""
    return visible(repr(value), limit)


_ADVICE = {
    errno.ENOSPC: "Free some space there, or set run_dir to another disk; run this again, and it goes on",
    errno.EDQUOT: "Free some of your quota, or set run_dir to another disk; run this again, and it goes on",
    errno.EFBIG: "Raise the limit (`ulimit -f`), or take another file system",
    errno.EROFS: "Set run_dir to a place that can be written",
    errno.EACCES: "Change its permissions, or name another place",
    errno.EPERM: "Change its permissions, or name another place",
    errno.EEXIST: "Something else is in the place of a folder: move it away, or name another place",
    errno.ENOTDIR: "A part of this path is a file where a folder should be: move it away, or name another place",
    errno.EISDIR: "A folder is in the place of a file: move it away, or name another place",
    errno.ENAMETOOLONG: "Give a shorter name",
    errno.ELOOP: "A link in this path leads back to itself: remove it, or name another place",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
    errno.ENOENT: "It was there before, or its folder was: put it back, or correct the path",
    errno.ESTALE: "The network file system lost it: look whether it is mounted, and run this again",
    errno.EIO: "The disk or the network file system fails: look into the system's log, and run this again",
}


def of_system(error: OSError, place: str = "a file") -> str | None:
    """What the operating system refused, as one message; null where the error is none of the system's, but a library's.

    Args:
        error: The error.
        place: What is named where the system names no file, as it does when a write fails.
    """
    if error.errno is None or error.strerror is None:
        return None
    is_relative = error.filename is None or not os.path.isabs(error.filename)  # noqa: PTH117 (it may be bytes)
    if is_relative and error.errno == errno.ENOENT and not _has_working_folder():
        return "the folder this command is run in was deleted. Change into another one."
    names = [os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in (error.filename, error.filename2) if name is not None]
    where = visible(" -> ".join(names), 300) or place
    advice = _ADVICE.get(error.errno, "Look into it, and run this again")
    return f"{where}: {visible(error.strerror, 200)[:1].lower()}{visible(error.strerror, 200)[1:].rstrip('.')}. {advice}."


def _has_working_folder() -> bool:
    try:
        os.getcwd()  # noqa: PTH109 (Path.cwd is the same)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def plain_storage_errors() -> Iterator[None]:
    """Inside, or in a function that it decorates, what the operating system refuses becomes an error of the kit.

    Raises:
        StorageError: naming the file, what is wrong with it, and what to do.
    """
    try:
        yield
    except DistillError:
        raise
    except OSError as error:
        message = of_system(error)
        if message is None:
            raise
        raise StorageError(message) from error
