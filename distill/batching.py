"""Length-sorted batches, and what to do when one does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from distill.runlog import say

Item = TypeVar("Item")
Result = TypeVar("Result")

# 128 MiB of float32: on a CPU the products with a head don't get faster above some hundred positions.
_BUFFER_ELEMENTS = 2**25
# On a GPU they do, and a chunk costs its processor some dozens of launches. A 64th of its memory is the same on an 8 GiB card.
_BUFFER_SHARE = 64


def buffer_elements(device: torch.device, most: int) -> int:
    """Number of logits that go through a head together: positions times vocabulary. A few copies may exist at a time.

    Args:
        device: Where.
        most: However large the device is.
    """
    if device.type != "cuda":
        return _BUFFER_ELEMENTS
    allowed = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.get_device_properties(device).total_memory
    of_memory = int(allowed) // (4 * _BUFFER_SHARE)
    return min(max(of_memory, _BUFFER_ELEMENTS), most)


def by_length(items: Sequence[Item], length: Callable[[Item], int], batch_size: int) -> list[list[Item]]:
    """Batches of items of similar length, the longest first, so that a batch too big for memory is met at once.

    The order is a function of the items alone (ties keep their order), so a restart makes the same batches.
    """
    ordered = sorted(items, key=length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


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
