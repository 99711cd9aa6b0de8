"""Which recipes were proved, in which environment: a run whose recipe was proved already does not prove it again.

A file in `distill-kit/proved` in `$XDG_CACHE_HOME` or else `~/.cache`, named by a digest of all that the proof depends on: the recipe,
size and time of the local files that it names, the installed packages, the kit itself and the device. What a server answered is no part of
it: stages compare what they asked for with what comes. Deleted without harm.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distill
from distill.before.machine import describe_device
from distill.recipe.experiment import Recipe

_KEPT = 500  # records; older ones go
_DEEPEST = 10_000  # files of a folder that are looked at


def note(recipe: Recipe) -> None:
    """Records that a recipe was proved here; where nothing can be recorded, it will be proved again."""
    with contextlib.suppress(OSError, RuntimeError):  # no home, or a folder that can't be written
        file = _file(recipe)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{recipe.name}\n", encoding="utf-8")
        for old in sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
            old.unlink()


def is_noted(recipe: Recipe) -> bool:
    """Whether a recipe was proved in this environment, and nothing has changed since."""
    with contextlib.suppress(OSError, RuntimeError):
        return _file(recipe).exists()
    return False


def _file(recipe: Recipe) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "distill-kit" / "proved" / _digest(recipe)


def _digest(recipe: Recipe) -> str:
    asked = recipe.model_dump(mode="json")
    sources = [path for text in _texts(asked | {"run_dir": None, "inputs": None}) for path in (text, *glob.glob(text))]  # noqa: PTH207 (absolute ones, too)
    packages = sorted(f"{found.name} {found.version}" for found in importlib.metadata.distributions())
    kit = Path(distill.__file__).parent
    parts = [asked, list(map(_state, sources)), packages, [_state(str(path)) for path in sorted(kit.rglob("*.py"))], describe_device()]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "backslashreplace")).hexdigest()


def _texts(value: Any) -> Iterator[str]:
    """Every text in the values of a recipe: any may be a path."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _state(name: str) -> list[Any]:
    """Size and time of a file, or of those in a folder; nothing where there is none."""
    with contextlib.suppress(OSError, ValueError):
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.iterdir())[:_DEEPEST] if path.is_dir() else []
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return []
