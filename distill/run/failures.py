"""How a command ends when something is wrong: one message on stderr and exit code 1, never a traceback. Imports no torch.

What the kit did not foresee is written into a file, in the run's folder where there is one: a traceback says little to whoever
started the run, and all to whoever mends the kit.
"""

from __future__ import annotations

import codecs
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill import __version__
from distill.errors import EARLY, DistillError, RecipeError, ServerError, of_system, visible
from distill.run import early

_LONGEST = 4000  # characters of a message
_LONGEST_REASON = 300  # of what a library says
_FULL_BYTES = 2**24  # so little space left may be what went wrong
_LAST_WORD_S = 15.0
"""How long a process waits for another one's message."""
_SECRET = re.compile(r"(?i)(--\S*(?:token|key|secret|password))(=|\s+)\S+")
"""A word of a command line that gives a secret, and its value."""
_ASCII = dict(zip("─━│→▶≥≤±·…»«", ["-", "-", "|", "->", ">", ">=", "<=", "+-", "-", "...", ">", "<"]))

_runs: list[Path] = []
"""Folders of the runs that this process works on."""


def works_on(run: Path) -> None:
    """Says which run's folder this process works on, so that an error can say how to go on, and leave its record there."""
    _runs.append(run)


@contextmanager
def one_message() -> Iterator[None]:
    """Inside, whatever goes wrong ends the program with one message on stderr; stdout takes any text, whatever its encoding.

    A signal that asks for an end is one, too (see `run.early`): exit code 75, where there is more to do.
    """
    speak_any_text()
    with early.ends_on_signals(), _errors_in_one_message(), _early_ends():
        yield


@contextmanager
def _early_ends() -> Iterator[None]:
    """What a signal ended, with exit code 75: also where it went to all of a job, and what this process needs has gone first."""
    try:
        yield
    except early.EndedEarly as end:
        what = str(end)
    except Exception as error:
        foreseen = isinstance(error, DistillError) and not isinstance(error, ServerError)
        if not early.asked() or foreseen or (isinstance(error, OSError) and not isinstance(error, ConnectionError)):
            raise
        what = f"ended early by {early.asked()}, in whose course {_in_short(error)}"
    else:
        return
    early.ignore_signals()
    if os.environ.get("RANK", "0") == "0":
        print(visible(f"{what}. {_going_on()}", _LONGEST), file=sys.stderr, flush=True)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Others may have gone, and at an ordinary exit the threads of their group would abort this process.
        sys.stdout.flush()
        os._exit(EARLY)
    sys.exit(EARLY)


@contextmanager
def _errors_in_one_message() -> Iterator[None]:
    try:
        yield
    except DistillError as error:
        if isinstance(error, RecipeError) and not error.tells_for_all and os.environ.get("LOCAL_RANK", "0") != "0":
            # The first process of this machine has read the same recipe, and says so. Whoever ends first has the launcher end the others.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_LAST_WORD_S)
            sys.exit(1)
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = f"stopped by the keyboard. {_going_on()}", 130
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        message, code = of_system(error, _some_file()) or _unforeseen(error), 1
    except Exception as error:  # the last place where one can be caught
        message, code = _unforeseen(error), 1
    else:
        return
    print(f"error: {visible(message, _LONGEST)}", file=sys.stderr, flush=True)
    sys.exit(code)


def speak_any_text() -> None:
    """Lets stdout and stderr take any text: what their encoding lacks is written in plain characters, or as an escape."""
    codecs.register_error("distill-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").replace("-", "").lower() != "utf8":
            stream.reconfigure(errors="distill-plain")
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ASCII.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in lacking), error.end


def _unforeseen(error: Exception) -> str:
    """Of an error that nobody foresaw: what it is, how to go on, and what to send in a report."""
    what = _in_short(error)
    record = _record(error)
    report = f"report it with {record} (look through it first, it may quote your data)" if record else "report it with this message"
    where = f"{_place_of(error)}: something that was not foreseen, {what.rstrip('.')}."
    return " ".join(filter(None, (where, _cause(error), _going_on(), f"If it comes again, {report}.")))


def _in_short(error: Exception) -> str:
    said = next(iter(str(error).strip().splitlines()), "")
    return visible(f"{type(error).__name__}{': ' * bool(said)}{said}", _LONGEST_REASON)


def _cause(error: Exception) -> str:
    """What is known to lie behind errors of libraries that say it badly."""
    if isinstance(error, MemoryError):
        return "The machine's memory was not enough."
    if type(error).__name__ == "OutOfMemoryError":
        lower = "lower the batch (train.trainer_args.per_device_train_batch_size, ...batch_size)"
        return f"The GPU's memory was not enough: {lower}."
    for place in _places():
        if shutil.disk_usage(place).free < _FULL_BYTES:
            return f"The disk of {place} is full, which may be the cause."
    return ""


def _going_on() -> str:
    there = [run for run in _places() if run in _runs]
    return f"What is finished in {there[0]} is kept: the same command goes on from there." if there else "No run was begun."


def _places() -> list[Path]:
    """Folders that are there: the runs' own, the last first, and the one for temporary files."""
    found = []
    for place in (*reversed(_runs), Path(tempfile.gettempdir())):
        with suppress(OSError):
            found += [place] * place.is_dir()
    return found


def _some_file() -> str:
    return f"a file of {_runs[-1]}" if _runs else "a file"


def _place_of(error: Exception) -> str:
    """Where in the kit it happened."""
    package = Path(__file__).resolve().parents[1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(package)]
    if not frames:
        return "distill"
    return f"distill/{Path(frames[-1].filename).relative_to(package)}:{frames[-1].lineno}"


def _record(error: Exception) -> Path | None:
    """Writes traceback, versions and command to a file, and returns it; null where nothing can be written."""
    from distill.run.clock import git_revision, versions

    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "pydantic")
    facts = {
        "command": _SECRET.sub(r"\1\2...", shlex.join(sys.argv)),
        "folder": os.environ.get("PWD", ""),
        "distill-kit": f"{__version__} {git_revision() or ''}",
        "machine": f"{platform.platform()}, python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions(packages).items()),
        "process": f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}",
    }
    text = "".join(f"{name}: {fact}\n" for name, fact in facts.items()) + "\n" + "".join(traceback.format_exception(error))
    name = f"failed-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for place in _places():
        with suppress(OSError):
            (place / name).write_text(visible(text), encoding="utf-8")
            return place / name
    return None
