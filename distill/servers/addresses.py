"""Which of several addresses a request goes to: the least loaded one, one that is dead left out and tried again later.

Servers that `distill serve` has started in jobs of a cluster come and go: new ones are looked for, and where all are dead, awaited.
"""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distill.errors import ServerError
from distill.run.log import say
from distill.servers import Call

if TYPE_CHECKING:
    from distill.servers.left import Watch

_LONGEST_PAUSE_S = 60.0
_SLACK = 4  # requests that the address with a prompt's prefix may have more than another
_IN_A_ROW = 10  # cut connections or 5xx with no answer between them, after which an address counts as dead
_NEVER_ANSWERED_S = 30.0  # of patience with addresses of which none was ever reached
_LOOK_S, _LOOK_DEAD_S = 30.0, 2.0  # between two looks for new addresses: while some live, while none does


class Address:
    """One address, and what is known of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.in_flight = 0
        self.failed = 0
        """Times in a row that it broke off, or had an error of its own."""
        self.trials = 0
        """Times in a row that it was dead."""
        self.until_s = 0.0
        """When it may be asked again (monotonic)."""
        self.is_dead = False


class Addresses:
    """The addresses of one model.

    Args:
        urls: One or more.
        patience_s: How long all may be dead before that is an error.
        pause_s: The first pause before a dead one is tried again; the following ones double.
        lives: Whether the server's process still lives, where that can be known: if not, nobody waits for it.
        watch: Where further ones appear; its patience then counts.
    """

    def __init__(
        self,
        urls: Sequence[str],
        patience_s: float,
        pause_s: float = 1.0,
        lives: Callable[[], bool] = lambda: True,
        watch: Watch | None = None,
    ) -> None:
        self._lives, self._watch, self._looked_at_s = lives, watch, time.monotonic()
        self._all = [Address(url) for url in urls]
        self._pause_s, self._patience_s = pause_s, patience_s
        self._all_well = True
        """Whether none is dead or wants to be left alone, so that there is nothing to look at before a request."""
        self._dead_since_s: float | None = None
        self._ever_answered, self._last_words = False, ""
        self._said = False

    async def pick(self, call: Call) -> Address:
        """An address for a request, waiting while all are dead or want to be left alone; its `in_flight` is counted by the caller.

        Of a dead one whose pause is over, one request at a time tries whether it lives.

        Raises:
            ServerError: all have been dead for too long, or the server that was started has ended.
        """
        if self._watch is not None:
            await self._look()
        while not self._all_well:
            await self._look()
            if any(address.is_dead for address in self._all) and not self._lives():
                raise ServerError(f"{self._all[0].url}: the server that was started for this has ended ({self._last_words}).")
            now = time.monotonic()
            free = [address for address in self._all if not address.is_dead and address.until_s <= now]
            self._all_well = len(free) == len(self._all)
            trial = next((address for address in self._all if address.is_dead and address.until_s <= now), None)
            if trial is not None:
                trial.until_s = now + self._pause(trial)
                return trial
            if free:
                return self._best(free, call)
            self._check_patience(now)
            wait = min(address.until_s for address in self._all) - now
            await asyncio.sleep(min(max(wait, 0.001), self._pause_s))
        return self._best(self._all, call)

    @property
    def count(self) -> int:
        """How many there are, dead ones included."""
        return len(self._all)

    async def _look(self) -> None:
        """Takes in addresses that are new, and leaves out those that are gone; now and then, and soon where none answers."""
        now, every_s = time.monotonic(), _LOOK_S if self._dead_since_s is None else _LOOK_DEAD_S
        if self._watch is None or now < self._looked_at_s + every_s:
            return
        self._looked_at_s = float("inf")  # one look at a time: an address that is silent takes its while
        try:
            urls = await asyncio.to_thread(self._watch.urls)
        finally:
            self._looked_at_s = time.monotonic()
        if not urls:  # nobody else is there: those that were may come back
            return
        known = {address.url: address for address in self._all}
        self._all = [known.get(url) or Address(url) for url in urls]
        self._all_well = False  # which is looked into next
        for address in self._all:
            if address.is_dead:  # it has just answered
                address.until_s = 0.0
        if any(not address.is_dead for address in self._all):
            self._dead_since_s, self._said = None, False

    def answered(self, address: Address) -> None:
        """It said something that is no failure of its own."""
        address.failed = address.trials = 0
        if address.is_dead:
            address.is_dead, address.until_s = False, 0.0
        self._ever_answered, self._dead_since_s = True, None

    def rests(self, address: Address, seconds: float) -> None:
        """It asked to be left alone for so long."""
        address.until_s = max(address.until_s, time.monotonic() + seconds)
        self._all_well = False

    def stumbled(self, address: Address, words: str) -> None:
        """It cut a connection, or had an error of its own: often in a row, and with others alive, it is as good as dead."""
        address.failed += 1
        if address.failed >= _IN_A_ROW and any(not one.is_dead for one in self._all if one is not address):
            self.fell(address, words)

    def fell(self, address: Address, words: str) -> None:
        """It can't be reached."""
        self._last_words = words
        if not address.is_dead:
            address.is_dead, address.until_s = True, time.monotonic() + self._pause(address)
            self._all_well = False
        if self._dead_since_s is None and all(one.is_dead for one in self._all):
            self._dead_since_s = time.monotonic()
            if self._watch is not None and not self._said:
                self._said = True
                say(f"no server of {self._watch.role} answers any more ({words}); one is waited for")

    def _pause(self, address: Address) -> float:
        """Seconds until it is tried, with jitter; each is twice as long as the one before."""
        address.trials += 1
        longest: float = min(self._pause_s * 2 ** min(address.trials - 1, 10), _LONGEST_PAUSE_S)
        return longest * random.uniform(0.5, 1.0)

    def _best(self, free: list[Address], call: Call) -> Address:
        """Samples of one prompt go to one address, which then has its prefix in its cache, unless another has less to do."""
        if len(self._all) == 1:
            return free[0]
        least = min(free, key=lambda address: address.in_flight)
        if call.body is None:
            return least
        mark = _mark(call.body)
        usual = max(free, key=lambda address: zlib.crc32(address.url.encode(), mark))
        return usual if usual.in_flight <= least.in_flight + _SLACK else least

    def _check_patience(self, now: float) -> None:
        patience_s = self._patience_s if self._ever_answered else min(_NEVER_ANSWERED_S, self._patience_s)
        if self._watch is not None and self._watch.wait_s:
            patience_s = self._watch.wait_s
        if any(address.in_flight for address in self._all):  # one may be writing a long answer at this moment
            return
        if self._dead_since_s is not None and self._watch is not None:
            self._watch.refuse_to_wait()
        if self._dead_since_s is not None and now - self._dead_since_s > patience_s:
            urls = ", ".join(address.url for address in self._all)
            advice = "Start it, or correct server.url" if self._watch is None else f"{self._watch.last_words()}\nStart it again"
            raise ServerError(
                f"{urls}: no server answers, for {now - self._dead_since_s:.0f} s: {self._last_words}. {advice}; "
                "what was written is kept, and a restart goes on from there."
            )


def _mark(body: dict[str, Any]) -> int:
    """A number that requests with the same prompt share."""
    prompt = next((body[name] for name in ("prompt", "input_ids", "messages") if name in body), None)
    return zlib.crc32(str(prompt).encode())
