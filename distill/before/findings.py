"""Claims about a recipe, each proved, refuted or left open, and printed as it is found; nothing printed can control a terminal."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rich.console import Console
from rich.text import Text

from distill.errors import DistillError, visible

Item = TypeVar("Item")
_LIBRARY = re.compile(r".*(?:site-packages/|(?=distill/))(.+)")
_LONGEST, _LONGEST_REASON = 2000, 600  # characters that are shown of a detail, and of what a library says


@dataclass
class Findings:
    """What was found so far."""

    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    refuted: list[str] = field(default_factory=list)
    """Claims that do not hold, each with the reason."""
    warnings: list[str] = field(default_factory=list)
    """What holds, but is hardly meant."""

    @property
    def failed(self) -> int:
        """How many claims do not hold."""
        return len(self.refuted)

    def good(self, claim: str, detail: str = "") -> None:
        """A claim that holds."""
        self._print(("  ok    ", "green"), claim, (f"  {detail}" if detail else "", "dim"))

    def warn(self, claim: str, detail: str) -> None:
        """A claim that holds, with something that is hardly meant."""
        self.warnings.append(visible(f"{claim}: {detail}", _LONGEST))
        self._print(("  !     ", "bold yellow"), f"{claim}: {detail}")

    def bad(self, claim: str, reason: str) -> None:
        """A claim that does not hold."""
        self.refuted.append(visible(f"{claim}: {reason}", _LONGEST))
        self._print(("  FAIL  ", "bold red"), f"{claim}: {reason}")

    def unknown(self, claim: str, reason: str) -> None:
        """A claim that can't be checked here, which is not the same as proved."""
        self._print(("  ?     ", "yellow"), f"{claim}: not checked here, {reason}")

    def prove(self, claim: str, attempt: Callable[[], str]) -> bool:
        """Runs an attempt that returns a detail, or raises what refutes the claim: an error of the kit's, or whatever a library raises."""
        try:
            detail = attempt()
        except Exception as error:
            self.bad(claim, str(error) if isinstance(error, DistillError) else _said_by_library(error))
            return False
        self.good(claim, detail)
        return True

    def end(self, proved: str) -> bool:
        """Prints the last line, or the list of what was refuted, and returns whether nothing was."""
        if not self.refuted:
            self.console.print(f"\n{proved}")
            return True
        self.console.print(f"\n{self.failed} of these claims failed:")
        for line in self.refuted:
            self._print(("  FAIL  ", "bold red"), line)
        return False

    def _print(self, mark: tuple[str, str], *parts: str | tuple[str, str]) -> None:
        shown = ((visible(part, _LONGEST), "") if isinstance(part, str) else (visible(part[0], _LONGEST), part[1]) for part in parts)
        self.console.print(Text.assemble(mark, *shown))


def _said_by_library(error: Exception) -> str:
    """What a library says, and which of its files."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    said = visible(" ".join(text.split()), _LONGEST_REASON).rstrip(".") or "no reason is given"
    places = [found[1] for frame in traceback.extract_tb(error.__traceback__) if (found := _LIBRARY.search(frame.filename))]
    return f"{said} ({type(error).__name__}{f' in {places[-1]}' if places else ''}). Correct the keys that it speaks of."


class Even(Generic[Item]):
    """Takes items in one after the other, and keeps some that lie at one distance.

    Args:
        count: So many are kept, or up to twice as many; all, where there are no more.
    """

    def __init__(self, count: int) -> None:
        self.kept: list[Item] = []
        self.total = 0
        """Items seen."""
        self._count, self._step = count, 1

    def add(self, item: Item) -> None:
        """One more."""
        if self.total % self._step == 0:
            self.kept.append(item)
        self.total += 1
        if len(self.kept) > 2 * self._count:
            self.kept, self._step = self.kept[::2], 2 * self._step


def evenly(items: Iterable[Item], count: int) -> tuple[list[Item], int]:
    """`count` items or up to twice as many, evenly drawn (all, where there are no more), and the number of all."""
    drawn: Even[Item] = Even(count)
    for item in items:
        drawn.add(item)
    return drawn.kept, drawn.total
