"""What a run says while it works: notes, results, and how far it is; on a terminal, in a log, or quietly. Imports no torch.

| | terminal | elsewhere (a batch job, CI, nohup) | quiet |
| --- | --- | --- | --- |
| progress | a bar | a line now and then, with the time of day | nothing |
| notes | a line | a line | nothing |
| results (a stage's closing line, the table) and errors | a line | a line | a line |

Quiet is the environment variable DISTILL_QUIET, so that processes started by this one are it too; `--quiet` sets it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from distill.errors import visible
from distill.run import early
from distill.run.clock import is_main_process, keep_running_clocks
from distill.run.manifest import Manifest

_QUIET, _SILENT = "DISTILL_QUIET", "silent"
_LINE_EVERY_S, _LINE_AT_LEAST_EVERY_S, _LINE_EVERY_SHARE = 30.0, 300.0, 0.1
_PASSING_S = 2.0  # work that is done sooner need not be seen


def is_quiet() -> bool:
    """Whether only results and errors are to be said."""
    return os.environ.get(_QUIET, "0") not in ("", "0")


@contextmanager
def silence() -> Iterator[None]:
    """Inside, nothing is said at all, results neither: for whoever calls the kit from a program of theirs."""
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = _SILENT
    try:
        yield
    finally:
        os.environ.pop(_QUIET)
        if before is not None:
            os.environ[_QUIET] = before


def be_quiet() -> None:
    """From here on, in this process and those it starts, only results and errors are said."""
    os.environ[_QUIET] = "1"


def calm_libraries() -> None:
    """Tells the libraries what goes for the kit: no bars where nobody watches. To be called before they are imported.

    And a GPU's memory is taken in segments that can grow, which leaves fewer gaps: a row a fifth longer fits.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the setting's older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if is_quiet() or not _is_watched():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def say(text: str, *, result: bool = False) -> None:
    """One line for the user, on stdout at once, above any progress bar; from the main process alone.

    Args:
        text: The line.
        result: It is what was asked for, and is said even quietly.
    """
    if not is_main_process() or (is_quiet() and not result) or os.environ.get(_QUIET) == _SILENT:
        return
    text = visible(text)
    if Progress.bars_shown:
        from tqdm.auto import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    else:
        print(text, flush=True)


class Progress:
    """Work that is counted: a bar on a terminal, elsewhere a line now and then, on stderr; from the main process alone.

    Use as a context manager, or call `close`.

    Args:
        total: What there is to do.
        unit: Of what, in the plural.
        description: What is done with it.
        done: What an earlier run had finished.
        passing: Shown only where the work takes seconds, and on a terminal until it ends; counted in thousands and millions.
    """

    bars_shown = 0
    """Bars on the terminal at this moment."""

    def __init__(self, total: int, unit: str, description: str, done: int = 0, *, passing: bool = False) -> None:
        self.total, self.done = total, done
        self._unit, self._description, self._begun_at, self._passing = unit, description, done, passing
        self._start = self._said_at_s = time.perf_counter()
        self._said_done, self._postfix, self._open, self._bar = done, "", True, None
        self._says = is_main_process() and not is_quiet()
        if self._says and _is_watched():
            self._bar = _bar(total, unit, description, done, passing)
            Progress.bars_shown += 1
        elif self._says and not passing:
            going_on = f", going on from {done:,}" if done else ""
            self._line(f"{total:,} {unit}{going_on}")

    @property
    def elapsed_s(self) -> float:
        """Seconds since this work began, without those of an earlier run."""
        return time.perf_counter() - self._start

    def update(self, count: int = 1) -> None:
        """So much more is done, and on disk: here the work ends where a signal asked for that."""
        self.done += count
        keep_running_clocks(
            {
                "what": self._description,
                "done": self.done,
                "of": self.total,
                "unit": self._unit,
                "begun_at": self._begun_at,
                "seconds": round(self.elapsed_s, 2),
            },
            at_once=early.asked() is not None,
        )
        if self._bar is not None:
            self._bar.update(count)
        elif self._says and self._is_due():
            self._line(self._state())
        early.check()

    def set_postfix_str(self, text: str) -> None:
        """What is shown behind the count, e.g. a loss, from the next line on."""
        self._postfix = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Ends the bar, or says how it ended."""
        if not self._open:
            return
        self._open = False
        if self._bar is not None:
            self._bar.close()
            Progress.bars_shown -= 1
        elif self._says and (not self._passing or self.elapsed_s >= _PASSING_S):
            self._line(self._state())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _is_due(self) -> bool:
        """A line at most every half minute; between those a tenth of the work, or five minutes if that takes longer."""
        since_s = time.perf_counter() - self._said_at_s
        moved = self.done - self._said_done >= _LINE_EVERY_SHARE * self.total
        return self.done < self.total and since_s >= _LINE_EVERY_S and (moved or since_s >= _LINE_AT_LEAST_EVERY_S)

    def _state(self) -> str:
        rate = (self.done - self._begun_at) / max(self.elapsed_s, 1e-9)
        parts = [
            f"{self._counted(self.done)} of {self._counted(self.total)} {self._unit}"
            + (f" ({self.done / self.total:.0%})" if self.total else "")
        ]
        if rate > 0:
            parts.append(f"{self._counted(round(rate, 1))} {self._unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s each")
            left = f"{duration_text((self.total - self.done) / rate)} left" if self.done < self.total else ""
            parts.append(left or f"took {duration_text(self.elapsed_s)}")
        return ", ".join([*parts, *([self._postfix] if self._postfix else [])])

    def _counted(self, number: float) -> str:
        return f"{number / 1e6:,.1f} M" if self._passing and self.total >= 1e6 else f"{number:,}"

    def _line(self, text: str) -> None:
        self._said_at_s, self._said_done = time.perf_counter(), self.done
        print(f"{time.strftime('%H:%M:%S')} {visible(f'{self._description}: {text}')}", file=sys.stderr, flush=True)


def progress(total: int, unit: str, description: str, done: int = 0, *, passing: bool = False) -> Progress:
    """Shows how far work is; see `Progress`."""
    return Progress(total, unit, description, done, passing=passing)


def _bar(total: int, unit: str, description: str, done: int, passing: bool) -> Any:
    from tqdm.auto import tqdm

    more = {"unit_scale": True, "leave": False, "delay": _PASSING_S} if passing else {}
    return tqdm(total=total, initial=done, unit=f" {unit}", desc=description, dynamic_ncols=True, smoothing=0.1, disable=False, **more)


def _is_watched() -> bool:
    return sys.stderr.isatty()


def duration_text(seconds: float) -> str:
    """Seconds as people read them: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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
    if facts.get("server"):
        parts.append(spent_text(facts["server"]))
    if "wall_s" in facts:
        parts.append(f"{facts['wall_s']:.1f} s")
    return f"{manifest.stage:<9} " + " · ".join(parts)


def spent_text(spent: dict[str, Any]) -> str:
    """What a stage had of servers, for people: requests, tokens read and written, money.

    Args:
        spent: The fact `server` of its manifest.
    """
    cached = f", {spent['cached_tokens']:,} of them cached" if spent.get("cached_tokens") else ""
    again = f", {spent['retries']:,} sent again" if spent.get("retries") else ""
    text = f"{spent['requests']:,} requests{again}: {spent['input_tokens']:,} tokens in{cached}, {spent['output_tokens']:,} out"
    return text + ("" if spent.get("cost_usd") is None else f", {money_text(spent['cost_usd'])}")


def money_text(dollars: float) -> str:
    """US dollars, to the cent from ten cents on."""
    return f"${dollars:,.2f}" if dollars >= 0.1 or not dollars else f"${dollars:.4f}"


def nothing_to_do(manifest: Manifest, folder: Path) -> str:
    """The line of a stage that was already complete."""
    return f"{manifest.stage:<9} nothing to do: {folder} is complete, made {manifest.facts.get('finished_at', 'earlier')}"
