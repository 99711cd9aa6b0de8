"""Commands of the kit in forked processes, so that none of them pays for the imports; killed where that is asked for.

The process that forks imports everything and computes nothing, because a copy of one with threads at work may hang.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "DISTILL_CPU_DTYPE": "float32",
    "PYTHONWARNINGS": "ignore",
}
"""Of every command: the same numbers on all CPUs, and no network."""

_TRACEBACK = "Traceback (most recent call last)"
_UNFORESEEN = re.compile(r"failed-\d{8}-\d{6}-\d+\.log")  # where the kit writes what it did not foresee
_LIMIT_S = 300.0  # no command takes nearly as long
_POLL_S = 0.002
_HEAVY = ("torch", "transformers.models.qwen3.modeling_qwen3", "trl", "peft", "accelerate", "datasets", "matplotlib.pyplot", "rich.table")


class Kill(NamedTuple):
    """When a command is killed: after so many seconds, or at an event of the interpreter that touches a file."""

    after_s: float | None = None
    event: str = ""
    """`os.rename`, `open`, `os.mkdir`, ..."""
    path: str = ""
    """Pattern that the file must match; its first match kills."""
    done: bool = False
    """Whether what is about to happen is let happen first."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Exit code; of a killed one the negative signal."""
    said: str
    seconds: float

    @property
    def broke(self) -> str:
        """The last line of a traceback, or of an error that nobody foresaw; nothing where it ended as it should."""
        if _TRACEBACK in self.said or _UNFORESEEN.search(self.said) or (self.code not in (0, 1) and not self.killed):
            return self.said.strip().splitlines()[-1][-200:] if self.said.strip() else f"exit code {self.code}"
        return ""

    @property
    def error(self) -> str:
        """What it said was wrong."""
        return self.said[self.said.find("error:") :].strip() if "error:" in self.said else ""

    @property
    def killed(self) -> bool:
        """Whether it was."""
        return self.code == -signal.SIGKILL


def prepare() -> None:
    """Imports all that a command needs. To be called once, before anything else."""
    os.environ |= ENVIRONMENT
    import distill
    from distill.run.log import calm_libraries

    calm_libraries()
    for name in _HEAVY:
        importlib.import_module(name)
    from trl import SFTTrainer  # noqa: F401  # loads what TRL loads late

    for module in pkgutil.walk_packages(distill.__path__, "distill."):
        if not module.name.endswith(("__main__", ".shelf", "kernels")):
            importlib.import_module(module.name)


def command(*words: str | Path, kill: Kill | None = None, processes: int = 1) -> Outcome:
    """Runs a `distill` command, in several processes as a launcher starts them, and says how it ended.

    Args:
        words: Behind `distill`.
        kill: When to kill it, and all that were started with it.
        processes: How many.
    """
    arguments = [str(word) for word in words]
    launch: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launch = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        children = []
        for rank in range(processes):
            place = {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} if launch else {}
            children.append(_fork(lambda: _main(arguments), output.fileno(), place, kill if rank == 0 else None))
        code = _wait(children, kill.after_s if kill else None)
        output.seek(0)
        return Outcome(code, output.read().decode(errors="replace"), time.monotonic() - start)


def _main(arguments: list[str]) -> None:
    sys.argv = ["distill", *arguments]
    from distill.cli import main

    main()


def _fork(work: Callable[[], None], output: int, environment: dict[str, str], kill: Kill | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _live(work, output, environment, kill)
    return child


def _live(work: Callable[[], None], output: int, environment: dict[str, str], kill: Kill | None) -> NoReturn:
    """What a forked process does, to its end."""
    code = 70
    try:
        with Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= environment
        if kill is not None and kill.event:
            sys.addaudithook(_killer(kill))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _killer(kill: Kill) -> Callable[[str, tuple[object, ...]], None]:
    """A hook that kills its process at an event. A renaming is known by where it leads to."""
    wanted, due = re.compile(kill.path), False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal due
        if due and event != "os.kill":  # which the line below is
            os.kill(os.getpid(), signal.SIGKILL)
        if event != kill.event:
            return
        place = arguments[1] if event == "os.rename" else arguments[0]
        if isinstance(place, str | os.PathLike) and wanted.search(str(place)):
            if not kill.done:
                os.kill(os.getpid(), signal.SIGKILL)
            due = True

    return hook


def _wait(children: Sequence[int], after_s: float | None) -> int:
    """The exit code of the first that ended badly, else 0; the others are killed with it, as a launcher does."""
    start, codes = time.monotonic(), dict[int, int]()
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
        since_s = time.monotonic() - start
        if any(codes.values()) or since_s > min(after_s or _LIMIT_S, _LIMIT_S):
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if since_s > _LIMIT_S:
                raise RuntimeError(f"a command took over {_LIMIT_S:g} s")
        time.sleep(_POLL_S)
    killed = -signal.SIGKILL
    bad = [code for code in codes.values() if code]
    return killed if killed in bad and len({*bad}) == 1 else next((code for code in bad if code != killed), bad[0] if bad else 0)
