"""How many requests are in flight at once: as many as asked, or more while throughput rises and fewer on overload."""

from __future__ import annotations

import time

from distill.recipe.servers import Server
from distill.servers.facts import FACTS

_FIRST, _MOST = 16, 512
_FEWER = 0.7
_RISES = 1.05  # of the best rate so far; less is noise
_FORGETS = 0.98  # of the best rate at each window that brought no more, so that a server that gained room is found out


class Pace:
    """The number of requests that may be in flight, over all addresses.

    Additive increase and multiplicative decrease: it doubles until a window of answers is no faster than the one before, then
    grows by an eighth whenever one is, and falls by a third when the server says that it is overloaded, or says nothing in time.

    Args:
        server: With `concurrency`, which fixes the number.
        addresses: How many share the work.
    """

    def __init__(self, server: Server, addresses: int) -> None:
        self._at_once, self._addresses = FACTS[server.kind].at_once, addresses
        self.is_fixed = server.concurrency is not None
        self._most = _MOST if self._at_once is None else self._at_once * addresses
        self.limit = server.concurrency or min(_FIRST * addresses, self._most)
        self._climbs, self._best = True, 0.0
        self._lowered = False
        self._begin()

    def over(self, addresses: int) -> None:
        """So many share the work from now on: one that is new gets as much as the first ones got."""
        if addresses == self._addresses:
            return
        more, self._addresses = addresses - self._addresses, addresses
        if self.is_fixed:
            return
        self._most = _MOST if self._at_once is None else self._at_once * addresses
        self.limit = max(1, min(self.limit + max(more, 0) * _FIRST, self._most))
        self._climbs, self._best = True, 0.0
        self._begin()

    def answered(self, work: int, *, waiting: bool) -> None:
        """Counts an answer.

        Args:
            work: Of it, in tokens, or 1 where they are not told.
            waiting: Whether further requests wait for room: else the limit is not what holds throughput down.
        """
        if self.is_fixed:
            return
        self._work += work
        self._answers += 1
        if self._answers < self.limit or not waiting:
            return
        rate = self._work / max(time.monotonic() - self._since_s, 1e-9)
        if rate > self._best * _RISES:
            self._best = rate
            self.limit = min(self.limit + (self.limit if self._climbs else max(1, self.limit // 8)), self._most)
        else:
            self._climbs, self._best = False, self._best * _FORGETS
        self._begin()

    def overloaded(self) -> None:
        """The server is: fewer from now on, once a window, because all that are in flight will say so."""
        if not self.is_fixed and (self._answers or not self._lowered):
            self.limit = max(1, int(self.limit * _FEWER))
            self._climbs, self._best = False, 0.0
            self._begin()
            self._lowered = True

    def _begin(self) -> None:
        self._work = self._answers = 0
        self._lowered = False
        self._since_s = time.monotonic()
