"""Commands of the kit, each in a process of its own that is forked from one which has imported torch and TRL already.

A command imports for longer than most tests compute. What is tested here is what it does; that it starts from nothing, and how fast, is
tested with plain processes.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_IMPORTED = ["trl.trainer.sft_trainer", "distill.trainers.building", "distill.stages.evaluate", "distill.stages.export", "distill.cli"]
_CALM = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # as commands set them first

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


def run(
    words: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, timeout_s: float = 600
) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` does, in the project's folder: a module's name behind `-m`, or a program's path, and its arguments.

    Args:
        words: Of the command line behind `python`.
        environment: Instead of this process's.
        timeout_s: Then it is ended, and that is an error.
    """
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        before = dict(os.environ)
        os.environ.update(_CALM)  # the first call starts the process that imports
        try:
            process = _context.Process(target=_command, args=(words, dict(environment or before), *said))
            process.start()
        finally:
            for name in _CALM.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout_s)
        stdout, stderr = (path.read_text(encoding="utf-8") if path.exists() else "" for path in said)
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


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
