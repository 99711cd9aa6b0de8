"""Length-sorted batches, what to do when one does not fit into memory, and work done one ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from distill.run.log import say

Item = TypeVar("Item")
Result = TypeVar("Result")


def by_length(items: Sequence[Item], length: Callable[[Item], int], batch_size: int) -> list[list[Item]]:
    """Batches of items of similar length, the longest first, so that a batch too big for memory is met at once.

    The order is a function of the items alone (ties keep their order), so a restart makes the same batches.
    """
    ordered = sorted(items, key=length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order, each made in a thread while the one before it is in use."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc]  # it is not the end


class MemoryGuard(Generic[Item, Result]):
    """Runs batches, halving any that does not fit, and remembers the size that did.

    Args:
        work: Turns a batch into results, the first into the first ones; a failure of memory must show in this call.
        free: Called after a failure, to give cached memory back.
    """

    def __init__(self, work: Callable[[list[Item]], list[Result]], free: Callable[[], None]) -> None:
        self._work = work
        self._free = free
        self._largest: int | None = None

    def run(self, batch: list[Item]) -> Iterator[Result]:
        """Results of a batch and of what was left of it, in its order.

        Raises:
            torch.OutOfMemoryError: a single item does not fit.
        """
        size = min(len(batch), self._largest or len(batch))
        start = 0
        while start < len(batch):
            part = batch[start : start + size]
            try:
                results = self._work(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                size = self._largest = max(1, len(part) // 2)
                self._free()
                say(f"out of memory: going on with {size} sequences at once")
                continue
            yield from results
            start += len(part)
