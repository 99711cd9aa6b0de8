"""Commands of the kit, each in a process of its own that is forked from one which has imported torch and TRL already.

A command imports for longer than most tests compute. What is tested here is what it does; that it starts from nothing, and how fast, is
tested with plain processes, and so is a launch (tests/test_train.py, test_gsm8k.py, test_sweep.py).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_IMPORTED = ["trl.trainer.sft_trainer", "distill.trainers.building", "distill.stages.evaluate", "distill.stages.export", "distill.cli"]
_CALM = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # as commands set them first
_FORKS = {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}  # of torchrun: that its processes are forks of it
_OF_FORKS = re.compile(r"^[EW]\d{4} .*/torch/(distributed/elastic/multiprocessing/api|multiprocessing/spawn)\.py:\d+\] .*\n", re.M)
"""Lines in which torchrun says of a fork that has failed what it doesn't say of other processes."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


class Command:
    """A command that runs; in a `with` it is killed at the end, if it has not ended.

    Args:
        words: Of the command line behind `python`: a module's name behind `-m`, or a program's path, and its arguments.
        environment: Instead of this process's.
    """

    def __init__(self, words: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self._words, self._folder = [str(word) for word in words], tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        before = dict(os.environ)
        os.environ.update(_CALM)  # the first call starts the process that imports
        try:
            self._process = _context.Process(target=_command, args=(self._words, dict(environment or before), *self._said))
            self._process.start()
        finally:
            for name in _CALM.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> int | None:
        """Ends it, as SIGKILL does; returns its exit code."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode

    def runs(self, wait_s: float = 0.01) -> bool:
        """Whether it has not ended, once it has or so long is over."""
        self._process.join(wait_s)
        return self._process.exitcode is None

    def until(self, reached: Callable[[], bool], timeout_s: float = 300) -> None:
        """Returns once that is so; that the command ends before, or takes too long, is an error."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.runs(), self._ended()
            assert time.monotonic() < deadline, self._words

    def wait(self, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """What it said, once it has ended; one that takes too long is ended, and that is an error."""
        if self.runs(timeout_s):
            self.kill()
            raise subprocess.TimeoutExpired(self._words, timeout_s)
        return self._ended()

    def _ended(self) -> subprocess.CompletedProcess[str]:
        said = [path.read_text(encoding="utf-8") if path.exists() else "" for path in self._said]
        return subprocess.CompletedProcess(self._words, self._process.exitcode, *said)


def run(
    words: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, timeout_s: float = 600
) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` does, in the project's folder; see `Command`."""
    with Command(words, environment) as command:
        return command.wait(timeout_s)


def launch(
    words: Sequence[str | Path],
    processes: int,
    *options: str | Path,
    launcher: str = "accelerate.commands.launch",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` does in several processes: the launcher and torchrun as they are, and its processes are forks of it.

    Args:
        words: As of `run`.
        processes: How many.
        options: Of the launcher; without any it is `--multi_gpu`.
        launcher: A module.
        environment: Instead of this process's.
    """
    file, *rest = words
    if file == "-m":  # torchrun forks for files alone
        name, *rest = rest
        found = find_spec(name)
        file = find_spec(f"{name}.__main__").origin if found.submodule_search_locations else found.origin
    how = options or ("--multi_gpu",)
    # Port 0 is one that is free.
    plain = ["-m", launcher, *how, "--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0", file, *rest]
    result = run(plain, environment={**(environment or os.environ), **_FORKS}, timeout_s=900)
    result.stderr = _OF_FORKS.sub("", result.stderr)
    return result


def _command(words: list[str], environment: dict[str, str], *said: Path) -> None:
    """In the new process: becomes the command."""
    for number, path in enumerate(said, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    name = words.pop(0)
    if name == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name, *words]
        runpy.run_path(name, run_name="__main__")
