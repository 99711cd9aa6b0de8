"""Cases, the time each section may take, and the loop that runs them: a failure is a row, and so is what was cut."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from distill.run.clock import git_revision, versions
from distill.run.log import say

Figures = dict[str, float]
"""What a case found, by a name that ends in its unit: `step_ms`, `peak_gib`, `tokens_per_s`; ratios name their peer: `step_of_trl`."""
ITSELF = "the section itself"
"""The case of a row that says why a section broke off between its cases."""
CUT = "cut: its section's time was used up"
"""The problem of a case that there was no time for."""
_PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger-kernel", "flash-attn")


_SHORT_S = 0.05


class Skipped(Exception):
    """Raised by a case that can't be measured here, with what is missing."""


class Allowance:
    """The seconds a section has; what it leaves over goes to those behind it."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left; negative once they are used up."""
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Bench:
    """Where the sections run."""

    device: torch.device
    rehearse: bool
    """Tiny shapes on a CPU: whether everything runs, not how fast."""
    allowance: Allowance = field(default_factory=lambda: Allowance(3600))


class Case(NamedTuple):
    """Something to be measured."""

    name: str
    """Unique within its section."""
    measure: Callable[[], Figures]


Cases = Generator[Case, Figures | None, None]
"""A section yields cases and is sent what each found, None where it failed, so that a later one can be set against it."""


class Section(NamedTuple):
    """One question, and its share of the time."""

    name: str
    title: str
    share: float
    cases: Callable[[Bench], Cases]


@dataclass(frozen=True)
class Row:
    """A case that was measured, or why it was not."""

    section: str
    case: str
    figures: Figures
    seconds: float
    problem: str | None = None
    """Why there are no figures; None where there are."""

    @property
    def failed(self) -> bool:
        """Whether there should be figures: neither where there are, nor where something that is not installed was skipped."""
        return self.problem is not None and not self.problem.startswith("skipped: ")


@dataclass
class Run:
    """One run of the program on one card."""

    card: str
    memory_gib: float
    driver: str
    versions: dict[str, str]
    git_revision: str | None
    date: str
    rows: list[Row] = field(default_factory=list)


def new_run(device: torch.device) -> Run:
    """A run of today on this card, without rows."""
    cuda = device.type == "cuda"
    return Run(
        card=torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        memory_gib=round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if cuda else 0.0,
        driver=_driver() if cuda else "",
        versions={**versions(_PACKAGES), "cuda": str(torch.version.cuda), "python": platform.python_version()},
        git_revision=git_revision(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
    )


def load_runs(path: Path) -> list[Run]:
    """The runs in a file; none where there is no file."""
    if not path.exists():
        return []
    return [Run(**{**run, "rows": [Row(**row) for row in run["rows"]]}) for run in json.loads(path.read_text(encoding="utf-8"))]


def save_runs(path: Path, runs: Sequence[Run]) -> None:
    """Writes all runs, in one move, so that a kill leaves the rows before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(run) for run in runs], indent=1)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def run_sections(sections: Sequence[Section], device: torch.device, rehearse: bool, minutes: float, keep: Callable[[Row], None]) -> None:
    """Runs sections in their order, each within its share of what is left of the time.

    Args:
        sections: What to run.
        device: Where.
        rehearse: See `Bench`.
        minutes: For all of them.
        keep: Called with every row as soon as there is one.
    """
    whole = Allowance(60 * minutes)
    for place, section in enumerate(sections):
        share = section.share / sum(other.share for other in sections[place:])
        bench = Bench(device, rehearse, Allowance(share * whole.left_s))
        say(f"{section.name}: {section.title}, {bench.allowance.left_s:.0f} s")
        _run_section(section, bench, keep)


def _run_section(section: Section, bench: Bench, keep: Callable[[Row], None]) -> None:
    cases = section.cases(bench)
    found: Figures | None = None
    while True:
        start = time.monotonic()
        case = ITSELF
        try:
            case, measure = cases.send(found)
            problem, found = (CUT, None) if bench.allowance.left_s <= 0 else (None, measure())
        except Skipped as missing:
            problem, found = f"skipped: {missing}", None
        except Exception as error:  # whatever a library raises is a row, and the next case is tried
            if case == ITSELF and isinstance(error, StopIteration):
                return
            problem, found = _in_a_line(error), None
        seconds = time.monotonic() - start
        if seconds > _SHORT_S:  # a case that held models took longer
            _give_memory_back()
        row = Row(section.name, case, _rounded(found or {}), round(seconds, 1), problem)
        keep(row)
        say(f"  {row.case}: {problem or ', '.join(f'{name} {value:g}' for name, value in row.figures.items())} ({row.seconds} s)")
        if case == ITSELF:
            return


def ratio(figures: Figures | None, peer: Figures | None, name: str) -> float | None:
    """One figure as a multiple of a peer's; None where either is missing."""
    if figures is None or peer is None or name not in figures or not peer.get(name):
        return None
    return figures[name] / peer[name]


def against(figures: Figures, peer: Figures | None, name: str) -> Figures:
    """The figures, and beside them each as a multiple of a peer's: `step_ms` gives `step_of_trl`, `peak_gib` gives `peak_of_trl`."""
    found = {f"{key.rpartition('_')[0]}_of_{name}": ratio(figures, peer, key) for key in figures if key.endswith(("_ms", "_gib"))}
    return figures | {key: value for key, value in found.items() if value is not None}


def _rounded(figures: Figures) -> Figures:
    return {name: value if isinstance(value, int) else float(f"{value:.4g}") for name, value in figures.items()}


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"


def _give_memory_back() -> None:
    gc.collect()
    # A kernel that failed may have broken the device for this process: then that, too, is said by the rows that follow.
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
