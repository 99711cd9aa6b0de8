"""What a stage cost and where it ran: seconds over all its pieces, versions, revision. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill import __version__
from distill.run.files import read_json, write_json
from distill.run.manifest import CLOCK

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
_KEEP_EVERY_S = 5.0  # so much is lost of a piece that is killed


def is_main_process() -> bool:
    """Whether this process speaks and writes: rank 0 of a launch, or a process of its own."""
    return os.environ.get("RANK", "0") == "0"


class Clock:
    """Wall seconds of a stage, and the record of the environment that goes into its manifest.

    With a folder, seconds are kept there whenever the work shows progress, and a stage that goes on after a kill counts those of
    all its pieces; the time between the pieces is nobody's.

    Args:
        folder: Of the stage.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._start = self._kept = time.perf_counter()
        self._file = folder / CLOCK if folder is not None and is_main_process() else None
        self._before_s = _seconds_in(self._file) if self._file else 0.0
        if self._file:
            _running.add(self)

    @property
    def wall_s(self) -> float:
        """Seconds since the clock was made, and those of the pieces before."""
        return self._before_s + time.perf_counter() - self._start

    def keep(self, doing: dict[str, Any], *, at_once: bool = False) -> None:
        """Writes the seconds down, and how far the work is, if it was long ago that they were, or at once."""
        if self._file and (at_once or time.perf_counter() - self._kept >= _KEEP_EVERY_S) and self._file.parent.is_dir():
            self._kept = time.perf_counter()
            write_json(self._file, {"wall_s": round(self.wall_s, 2), "doing": doing})

    def facts(self, **more: Any) -> dict[str, Any]:
        """Wall seconds, date, versions and machine, with what else the stage measured; the clock stops being kept."""
        _running.discard(self)
        return {
            "kit_version": __version__,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": round(self.wall_s, 2),
            "git_revision": git_revision(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "packages": versions(_PACKAGES),
            **_gpu(),
            **more,
        }


_running: weakref.WeakSet[Clock] = weakref.WeakSet()
"""Clocks of stages at work. Progress is shown far from where a stage has its clock, and only there time is known to pass."""


def keep_running_clocks(doing: dict[str, Any], *, at_once: bool = False) -> None:
    """Called wherever work moves on, and at once where it ends early.

    Args:
        doing: How far it is: `what` is done, `done` and `of` how many, in which `unit`; `begun_at` how many and the `seconds` since.
        at_once: However short a time ago they were written.
    """
    for clock in list(_running):
        clock.keep(doing, at_once=at_once)


def _gpu() -> dict[str, str]:
    """What the GPU is called that this process has worked on, by which `distill costs` knows its price; nothing where it used none."""
    torch = sys.modules.get("torch")
    return {"gpu": str(torch.cuda.get_device_name())} if torch is not None and torch.cuda.is_initialized() else {}


def _seconds_in(file: Path) -> float:
    try:
        return float(read_json(file)["wall_s"])
    except (OSError, ValueError, KeyError, TypeError):  # no piece before, or its note is lost: nothing that rows depend on
        return 0.0


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions, read without importing anything."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the kit's checkout, with `-dirty` where files differ from it; null outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
