"""Time limits of requests in flight: how long a server may be silent, and how long it may take in all.

One timer looks over all of them. A timer for each request, as `asyncio.timeout` and aiohttp's own limits have it, costs a tenth of a
request that is answered at once (`scripts/bench_client.md`): the event loop keeps hundreds in order, most of them cancelled.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

_LOOKS = 20  # within a silence: a limit ends a request at most a twentieth of it late
_RAREST_S = 1.0  # between two looks


class Deadlines:
    """The limits of one event loop's requests; made in it.

    Args:
        silence_s: That a server may say nothing.
    """

    def __init__(self, silence_s: float) -> None:
        self.silence_s = silence_s
        self.loop = asyncio.get_running_loop()
        self._open: set[Deadline] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, deadline: Deadline) -> None:
        """Looks at it from now on."""
        self._open.add(deadline)
        if self._timer is None:
            self._look_later()

    def end(self, deadline: Deadline) -> None:
        """Looks at it no more."""
        self._open.discard(deadline)

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(min(self.silence_s / _LOOKS, _RAREST_S), self._look)

    def _look(self) -> None:
        now, self._timer = self.loop.time(), None
        for deadline in self._open:
            if deadline.until_s < now:
                deadline.expire()
        if self._open:
            self._look_later()


class Deadline:
    """The limits of one request, as a context of its task.

    Args:
        among: All of them.
        silences: So many times the longest silence is what the answer may take in all.

    Raises:
        TimeoutError: a limit is over; where the context ends, as `asyncio.timeout` raises it.
    """

    __slots__ = ("_among", "_cancelling", "_is_over", "_latest_s", "_task", "until_s")

    def __init__(self, among: Deadlines, silences: int = 1) -> None:
        task, now = asyncio.current_task(among.loop), among.loop.time()
        assert task is not None
        self._among, self._task, self._cancelling, self._is_over = among, task, task.cancelling(), False
        self.until_s, self._latest_s = now + among.silence_s, now + silences * among.silence_s

    def __enter__(self) -> Deadline:
        self._among.begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._among.end(self)
        if self._is_over and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error  # a cancellation by anybody else goes on

    def heard(self) -> None:
        """The server has said something."""
        self.until_s = min(self._among.loop.time() + self._among.silence_s, self._latest_s)

    def expire(self) -> None:
        """Cancels the task, once."""
        if not self._is_over:
            self._is_over = True
            self._task.cancel()
