"""What a run says while it works, and the record of what it cost and where it ran. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from distill import __version__
from distill.run.manifest import Manifest

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


def is_main_process() -> bool:
    """Whether this process speaks and writes: rank 0 of a launch, or a process of its own."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line for the user, on stdout at once, above any progress bar; from the main process alone."""
    if not is_main_process():
        return
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)


def progress(total: int, unit: str, description: str, done: int = 0, *, passing: bool = False) -> tqdm[Any]:
    """A bar with rate and time left, on stderr; `done` is what an earlier run had finished.

    One that is `passing` counts in thousands and millions, and is seen only where the work takes seconds, until it ends.
    """
    more = {"unit_scale": True, "leave": False, "delay": 2.0} if passing else {}
    return tqdm(total=total, initial=done, unit=f" {unit}", desc=description, dynamic_ncols=True, smoothing=0.1, **more)


class Clock:
    """Wall seconds of a stage, and the record of the environment that goes into its manifest."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start

    def facts(self, **more: Any) -> dict[str, Any]:
        """Wall seconds, date, versions and machine, with what else the stage measured."""
        return {
            "kit_version": __version__,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": round(self.wall_s, 2),
            "git_revision": git_revision(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "packages": versions(_PACKAGES),
            **more,
        }


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


def ledger(manifest: Manifest, *, unit: str = "rows") -> str:
    """The line a stage ends with: in, kept, dropped by reason, seconds."""
    facts = manifest.facts
    parts = []
    if manifest.rows_in is not None:
        parts.append(f"{manifest.rows_in:,} in")
    if manifest.rows_kept is not None:
        parts.append(f"{manifest.rows_kept:,} {unit} kept")
        drops = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.drops.items()))
        parts.append(f"{sum(manifest.drops.values()):,} dropped" + (f" ({drops})" if drops else ""))
    if "tokens" in facts:
        parts.append(f"{facts['tokens']:,} tokens")
    if "wall_s" in facts:
        parts.append(f"{facts['wall_s']:.1f} s")
    return f"{manifest.stage:<9} " + " · ".join(parts)


def nothing_to_do(manifest: Manifest, folder: Path) -> str:
    """The line of a stage that was already complete."""
    return f"{manifest.stage:<9} nothing to do: {folder} is complete, made {manifest.facts.get('finished_at', 'earlier')}"
