"""Whether this machine's CPU gains by bf16: what units it has, and one timed product, recorded for the runs to come.

CPUs without units for bf16 emulate it, many times slower than fp32; how much those with units gain differs. The record,
`distill-kit/cpu-precision.json` in `$XDG_CACHE_HOME` or else `~/.cache`, holds the times for each CPU and version of
torch: all processes of a launch, and a run and its resume, must get one answer. To be asked anew, delete the file.

The environment variable `DISTILL_CPU_DTYPE` (`float32` or `bfloat16`) answers instead, for all that is `auto`: where a
launch spans different CPUs, or in tests.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from distill.errors import ModelError
from distill.run.files import user_cache, write_text

OVERRIDE = "DISTILL_CPU_DTYPE"
WORDS = ("float32", "bfloat16")
_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # as torch calls them; the last two are Arm's
_WORTH_IT = 1.5  # times as fast: fewer digits for less than that would be a bad bargain
_REPEATS = 6
_WAIT_S = 60.0  # for another process to measure


@functools.cache
def cpu_computes_in_bf16() -> bool:
    """Whether `dtype: auto` is bf16 on this CPU: it has units for it, with which a product takes at most two thirds of the time.

    The product is timed once, in half a second or so. Where the answer can't be recorded it is this process's own, and no in
    a launch of several.

    Raises:
        ModelError: `DISTILL_CPU_DTYPE` is neither of its words.
    """
    if chosen := os.environ.get(OVERRIDE):
        if chosen not in WORDS:
            raise ModelError(f"{OVERRIDE}: must be one of {', '.join(WORDS)}, got {chosen!r}. Set it to one of them, or unset it.")
        return chosen == "bfloat16"
    found = capabilities()
    units = [unit for unit in _UNITS if found.get(unit)]
    if not units:
        return False
    cpu = found.get("cpu_name") or platform.processor() or platform.machine()
    try:
        entry = _recorded(f"{cpu} with {', '.join(units)}, torch {torch.__version__}")
    except (OSError, RuntimeError):  # no home, a folder that can't be written, a file system without locks
        # Processes of a launch that each measured might not agree, and would wait for each other for ever.
        if os.environ.get("WORLD_SIZE", "1") != "1":
            return False
        entry = decide(*least_times())
    return bool(entry["dtype"] == "bfloat16")


def decide(float32_s: float, bfloat16_s: float) -> dict[str, Any]:
    """What is recorded: both times, how many times as fast bf16 is, and which to compute in."""
    ratio = float32_s / bfloat16_s
    return {"float32_s": float32_s, "bfloat16_s": bfloat16_s, "ratio": ratio, "dtype": WORDS[ratio >= _WORTH_IT]}


def capabilities() -> Mapping[str, Any]:
    """What torch finds out about the CPU; nothing where it is too old to tell."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def least_times() -> tuple[float, float]:
    """Least seconds of a (512, 2048) by (2048, 2048) product in fp32 and in bf16, taken in turns, so that a busy machine slows both."""
    # Ones, because random numbers would move the seed of the run.
    factors = [(torch.ones(512, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    seconds = []
    for _ in range(_REPEATS):  # the first warms up
        for rows, weight in factors:
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            seconds.append(time.perf_counter() - start)
    return min(seconds[::2]), min(seconds[1::2])


def _recorded(cpu: str) -> dict[str, Any]:
    """The entry of a CPU; measured and written by the first process that asks, while the others wait."""
    file = user_cache() / "cpu-precision.json"
    if (entry := _entries(file).get(cpu)) is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=_WAIT_S):
            entries = _entries(file)
            if cpu not in entries:
                entries[cpu] = decide(*least_times())
                write_text(file, json.dumps(entries, indent=2) + "\n")
            entry = entries[cpu]
    return entry


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    """What is recorded and whole."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {cpu: entry for cpu, entry in items if isinstance(entry, dict) and entry.get("dtype") in WORDS}
