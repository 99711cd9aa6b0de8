"""Many requests at once to one model behind one address or several: tried again, spread, bounded.

A thread of its own runs an event loop that knows the network alone. The caller's thread hands requests over and takes answers: what is
handed over and not yet taken is bounded, so neither the number of requests nor a slow caller grows the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Generic, TypeVar

from distill.errors import ServerError
from distill.recipe.servers import Server
from distill.servers import Call, Failure, Usage
from distill.servers.addresses import Address, Addresses
from distill.servers.answers import BrokenAnswerError, spent_in_vain
from distill.servers.faults import Fault
from distill.servers.left import Watch
from distill.servers.pace import Pace
from distill.servers.sending import Sender, UnansweredError, key_of, paused
from distill.servers.spending import Spending

K = TypeVar("K")
T = TypeVar("T")

_AHEAD = 32  # requests beside those in flight that wait for room, so that a slow caller leaves no gap
_GROUPED_S = 0.005  # answers that arrive within this are handed over together
_ALIKE = {"retry": 20, "row": 500}  # failures in a row (of rows: at the start) that say that it is no row's fault


class Client:
    """Requests to one model; use as a context manager. Its thread ends with it.

    Args:
        server: Of the recipe: the key's variable, time limits, how many at once, retries.
        urls: Addresses that share the work.
        spending: Counts what is used; none counts nothing.
        pause_s: First pause before a request is sent again, or a dead address is tried; each further one is twice as long.
        lives: Whether the server's process lives, of one that was started here.
        watch: Where further addresses appear, of servers that `distill serve` starts.

    Raises:
        ServerError: the environment variable with the key is not set.
    """

    def __init__(
        self,
        server: Server,
        urls: Sequence[str],
        spending: Spending | None = None,
        *,
        pause_s: float = 1.0,
        lives: Callable[[], bool] = lambda: True,
        watch: Watch | None = None,
    ) -> None:
        self.server, self.spending, self._pause_s = server, spending, pause_s
        self._urls, self._key = list(urls), key_of(server)
        self._pace = Pace(server, len(urls))
        self._addresses = Addresses(urls, server.timeout_s, pause_s, lives, watch)
        self._runs: list[_Run[Any, Any]] = []
        self._failed: Counter[str] = Counter()
        self._succeeded = False
        self._sender: Sender | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="distill-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is in flight, closes the connections, and ends the thread."""
        if not self._loop.is_closed() and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ended meanwhile
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        if self.spending is not None:
            self.spending.keep()

    @property
    def addresses(self) -> int:
        """How many share the work at this moment."""
        return self._addresses.count

    def run(
        self, calls: Iterable[tuple[K, Call]], read: Callable[[Any, Call], T], usage_of: Callable[[T], Usage]
    ) -> Iterator[tuple[K, T | Failure]]:
        """Answers as they arrive, each with its key; see `groups`."""
        for group in self.groups(calls, read, usage_of):
            yield from group

    def groups(
        self, calls: Iterable[tuple[K, Call]], read: Callable[[Any, Call], T], usage_of: Callable[[T], Usage]
    ) -> Iterator[list[tuple[K, T | Failure]]]:
        """Answers as they arrive, those together that did; a request that failed for good is a `Failure`.

        Args:
            calls: Consumed as room is made, in the caller's thread.
            read: Of the JSON that came (of a stream `Call.streams`) what is wanted; in the client's thread. Where it raises
                `BrokenAnswerError`, the request is sent again.
            usage_of: What an answer used.

        Raises:
            ServerError: something that no row could make right; or no address answers any more.
            BudgetError: a limit of the spending is reached; what was in flight was handed over before.
        """
        run: _Run[K, T] = _Run(self, read, usage_of)
        source, more = iter(calls), True
        try:
            while True:
                more = more and not (self.spending is not None and self.spending.is_exhausted)
                room = self._pace.limit + max(_AHEAD, self._pace.limit) - run.out
                if more and room > 0:
                    pairs = list(islice(source, room))
                    more = len(pairs) == room
                    run.out += len(pairs)
                    run.todo.extend(pairs)
                if run.todo:
                    self._loop.call_soon_threadsafe(run.pump)
                if run.out <= run.held:
                    break
                group = run.take()
                run.out -= len(group)
                if group:
                    yield group
                    run.kept += len(group)
            if self.spending is not None and (run.held or next(source, None) is not None):
                self.spending.check()
        finally:
            self._cancel(run)

    def ask(self, call: Call) -> Any:
        """The JSON (or stream) that one request gets.

        Raises:
            ServerError: it gets none.
        """
        for _, found in self.run([(0, call)], lambda body, _: body, lambda _: Usage()):
            if isinstance(found, Failure):
                raise ServerError(f"{self._urls[0]}{call.path}: {found.reason}: {found.detail}. Look at server.url, and whether it runs.")
            return found
        raise AssertionError("a request without an answer")

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            if self._sender is not None:
                self._loop.run_until_complete(self._sender.close())
        finally:
            self._loop.close()

    def _cancel(self, run: _Run[Any, Any]) -> None:
        """Ends a run's requests, and returns when none is in flight."""
        if self._loop.is_closed():
            return

        async def cancelled() -> None:
            run.ended = True
            run.todo.clear()
            if run in self._runs:
                self._runs.remove(run)
            for task in list(run.tasks):
                task.cancel()
            await asyncio.gather(*run.tasks, return_exceptions=True)

        with contextlib.suppress(RuntimeError, TimeoutError):  # the loop ended
            asyncio.run_coroutine_threadsafe(cancelled(), self._loop).result(timeout=10)

    async def answer(self, call: Call, read: Callable[[Any, Call], T], usage_of: Callable[[T], Usage]) -> T | Failure:
        """One request, sent as often as it takes.

        Raises:
            ServerError: the stage can't go on.
        """
        if self._sender is None:
            self._sender = Sender(self.server, self._key)
        attempt = 0
        while True:
            address = await self._addresses.pick(call)
            self._pace.over(self._addresses.count)
            body: Any = None
            try:
                body = await self._sent(address, call)
                answer = read(body, call)
            except BrokenAnswerError as error:
                self._spend(spent_in_vain(body))
                detail = self._sender.redacted(error.detail)
                fault, rest_s = Fault("row" if error.final else "retry", error.reason, detail), None
            except UnansweredError as error:
                fault, rest_s = error.fault, error.rest_s
                if error.at == "address":  # nothing was sent: that is no try, and `pick` says when it is too much
                    continue
            else:
                self._used(usage_of(answer))
                return answer
            if fault.verdict == "stage":
                raise ServerError(f"{address.url}{call.path}: {fault.reason.replace('_', ' ')}: {fault.detail}. {fault.advice}.")
            if fault.verdict == "row" or attempt >= self.server.max_retries:
                return self._given_up(fault, address, attempt)
            self._spend(Usage(retries=1))
            await paused(attempt, self._pause_s, rest_s)
            attempt += 1

    async def _sent(self, address: Address, call: Call) -> Any:
        """What an address says to a request; what it does not say is noted with it."""
        assert self._sender is not None
        address.in_flight += 1
        try:
            body = await self._sender.send(address.url, call)
        except UnansweredError as error:
            if error.at == "address":
                self._addresses.fell(address, error.fault.detail)
            elif error.at == "server":
                self._addresses.stumbled(address, error.fault.detail)
            elif error.at == "load":
                self._pace.overloaded()
                if error.rest_s:
                    self._addresses.rests(address, error.rest_s)
            else:
                self._addresses.answered(address)
            raise
        finally:
            address.in_flight -= 1
        self._addresses.answered(address)
        return body

    def _used(self, usage: Usage) -> None:
        self._succeeded = True
        if self._failed:
            self._failed.clear()
        if not self._pace.is_fixed:
            self._pace.answered(usage.output_tokens or 1, waiting=any(run.todo for run in self._runs) or not self._runs)
        self._spend(usage)

    def _spend(self, usage: Usage) -> None:
        if self.spending is not None:
            self.spending.add(usage)

    def _given_up(self, fault: Fault, address: Address, attempt: int) -> Failure:
        """A request that failed for good.

        Raises:
            ServerError: so did those before, for the same reason.
        """
        if fault.verdict == "retry" or not self._succeeded:
            self._failed[fault.reason] += 1
            if len(self._failed) == 1 and self._failed[fault.reason] >= _ALIKE[fault.verdict]:
                raise ServerError(
                    f"{address.url}: {_ALIKE[fault.verdict]} requests in a row failed alike, each sent {attempt + 1} times "
                    f"({fault.reason}: {fault.detail}). Look at the server, or run `distill check`; a restart goes on from here."
                )
        return Failure(fault.reason, fault.detail)


class _Run(Generic[K, T]):
    """The requests of one `run`: what waits for room, what is in flight, what came."""

    def __init__(self, client: Client, read: Callable[[Any, Call], T], usage_of: Callable[[T], Usage]) -> None:
        self._client, self._read, self._usage_of = client, read, usage_of
        self.todo: deque[tuple[K, Call]] = deque()
        self.tasks: set[asyncio.Task[None]] = set()
        self.active, self.ended = 0, False
        self.out = 0
        """Handed over and not taken yet; counted in the caller's thread."""
        self.held = 0
        """Of those, never sent, because a limit was reached."""
        self.kept = 0
        """Answers behind which the caller has asked for more, so that they are on disk, say; counted in the caller's thread."""
        self._answered = 0
        self._done: deque[tuple[K, T | Failure]] = deque()
        self._error: BaseException | None = None
        self._arrived = threading.Event()
        self._told = False

    def take(self) -> list[tuple[K, T | Failure]]:
        """What has arrived, once something has; in the caller's thread."""
        self._arrived.wait()
        self._arrived.clear()
        group = [self._done.popleft() for _ in range(len(self._done))]
        if self._error is not None and not group:
            raise self._error
        if self._error is not None:
            self._arrived.set()
        return group

    def pump(self) -> None:
        """Puts as many in flight as there is room for; in the client's loop."""
        runs, loop = self._client._runs, asyncio.get_running_loop()
        if self.ended or self._holds_back():
            return
        if self not in runs:
            runs.append(self)
        limit = self._client._pace.limit
        for _ in range(min(len(self.todo), limit - sum(run.active for run in runs), 2 * limit - self._pending)):
            self.active += 1
            task = loop.create_task(self._work())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _work(self) -> None:
        """One request after another, as long as there is room: a task for each place, and not for each request."""
        client = self._client
        try:
            while self.todo and self._has_room() and self._error is None and not self._holds_back():
                key, call = self.todo.popleft()
                found = await client.answer(call, self._read, self._usage_of)
                self._answered += 1
                self._done.append((key, found))
                if not self._told:
                    self._tell()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._error = self._error or error
            self._tell()
        finally:
            self.active -= 1
            for run in [run for run in client._runs if run is not self]:  # the place may be another's now
                run.pump()

    @property
    def _pending(self) -> int:
        """What a kill would have asked again: requests in flight, and answers that the caller is not done with.

        At most twice as many as may be in flight. Less would cost throughput: a place would wait for the caller behind each answer.
        """
        return self.active + self._answered - self.kept

    def _has_room(self) -> bool:
        limit = self._client._pace.limit
        return self.active <= limit and self._pending <= 2 * limit

    def _holds_back(self) -> bool:
        """Whether a limit is reached; what waits is then never sent."""
        spending = self._client.spending
        if spending is None or not spending.is_exhausted:
            return False
        self.held += len(self.todo)
        self.todo.clear()
        self._tell()
        return True

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            asyncio.get_running_loop().call_later(_GROUPED_S, self._wake)

    def _wake(self) -> None:
        self._told = False
        self._arrived.set()
