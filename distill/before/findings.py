"""Claims about a recipe, each proved, refuted or left open, and printed as it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from distill.errors import DistillError

Item = TypeVar("Item")


@dataclass
class Findings:
    """What was found so far."""

    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    failed: int = 0

    def good(self, claim: str, detail: str = "") -> None:
        """A claim that holds."""
        self.console.print(Text.assemble(("  ok    ", "green"), claim, (f"  {detail}" if detail else "", "dim")))

    def bad(self, claim: str, reason: str) -> None:
        """A claim that does not hold."""
        self.failed += 1
        self.console.print(Text.assemble(("  FAIL  ", "bold red"), f"{claim}: {reason}"))

    def unknown(self, claim: str, reason: str) -> None:
        """A claim that can't be checked here, which is not the same as proved."""
        self.console.print(Text.assemble(("  ?     ", "yellow"), f"{claim}: not checked, {reason}"))

    def prove(self, claim: str, attempt: Callable[[], str]) -> bool:
        """Runs an attempt that returns a detail, or raises what refutes the claim."""
        try:
            self.good(claim, attempt())
        except DistillError as error:
            self.bad(claim, str(error))
            return False
        return True

    def end(self, proved: str) -> bool:
        """Prints the last line, and returns whether nothing was refuted."""
        self.console.print(f"\n{self.failed} of these claims failed" if self.failed else f"\n{proved}")
        return not self.failed


def evenly(items: Iterable[Item], count: int) -> tuple[list[Item], int]:
    """`count` items or up to twice as many, evenly drawn (all, where there are no more), and the number of all."""
    kept: list[Item] = []
    total, step = 0, 1
    for item in items:
        if total % step == 0:
            kept.append(item)
        total += 1
        if len(kept) > 2 * count:
            kept, step = kept[::2], 2 * step
    return kept, total
