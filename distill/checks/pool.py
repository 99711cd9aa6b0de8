"""Checks that may run for ever, in processes that are killed at a hard limit.

A pattern of the user's, a function, or math-verify on an adversarial expression can run without end; limits by signals need the main
thread, and nothing inside a process can interrupt sympy or a regular expression. A process can be killed. Its workers import no torch.
What one of them may hold in memory has a hard limit too, which the system keeps: a check that asks for more is not judged. Its worker
ends with it, since what has filled the memory may still be there; and a call that was not a worker's first is asked once more in one that
is new, since what came before it may have filled the memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from distill.checks import Found

Key = TypeVar("Key")

_TOGETHER = 32  # calls sent to a worker at once: the way there costs a fifth of a check
TIMED_OUT, FAILED, OUT_OF_MEMORY = "checker_timed_out", "checker_failed", "checker_out_of_memory"
MEMORY_BYTES = 4 * 2**30
"""What the checks of one process may hold beyond what it holds when it is ready: several times what any check of the kit needs."""


class Call(NamedTuple):
    """A check that is yet to be done. May never return."""

    function: Callable[..., Found]
    """Of a module, so that a process of its own finds it by its name."""
    arguments: tuple[Any, ...]


Question = Call | Found
"""What is to be found out; or, where that needs no process, what was."""


class Pool:
    """Calls functions in processes that live as long as the `with` block.

    Args:
        timeout_s: Hard limit for one call, in seconds; at it the process is killed and nothing is judged.
        workers: Processes; null means one for each core this process may use.
        prepare: Called once in each new process, outside of any limit: imports and the like.
        name: Of the check, for errors.
        memory_bytes: Hard limit for the data of each process, above what `prepare` has loaded; past it nothing is judged. Linux keeps it.
    """

    def __init__(
        self,
        timeout_s: float,
        workers: int | None = None,
        prepare: Callable[[], object] | None = None,
        name: str = "checks",
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._timeout_s, self._prepare, self._name, self._memory_bytes = timeout_s, prepare, name, memory_bytes
        self.num_workers = workers or _cores()
        """Processes."""
        self._workers: list[_Worker[Any]] = []
        self._alone: deque[tuple[Any, Call]] = deque()  # to be asked of a new worker; for each there is one

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def stream(self, questions: Iterable[tuple[Key, Question]]) -> Generator[tuple[Key, Found], None, None]:
        """Each question's key and what was found, as it comes, so that nothing waits for a slow one.

        Args:
            questions: Taken when there is room: some dozens for each worker are on the way.
        """
        waiting: deque[tuple[Key, Call]] = deque()
        try:
            for key, question in questions:
                if isinstance(question, Call):
                    waiting.append((key, question))
                else:
                    yield key, question
                while len(waiting) >= _TOGETHER * self.num_workers and not self._hand_out(waiting):
                    yield from self._answers(waiting)
            while waiting or self._alone or any(worker.owed for worker in self._workers):
                if not self._hand_out(waiting):
                    yield from self._answers(waiting)
        finally:
            self._alone.clear()
            if any(worker.owed for worker in self._workers):  # nobody listens any more
                self._stop()

    def _hand_out(self, waiting: deque[tuple[Key, Call]]) -> bool:
        """Gives calls to a worker that has none, and says whether there was one."""
        if not self._workers:
            self._workers = [self._new_worker() for _ in range(self.num_workers)]
        idle_ones = [worker for worker in self._workers if worker.ready and not worker.owed]
        new = next((worker for worker in idle_ones if not worker.num_answered), None)
        if new is not None and self._alone:
            new.ask([self._alone.popleft()])
            return True
        idle = next(iter(idle_ones), None)
        if idle is None or not waiting:
            return False
        share = min(_TOGETHER, -(-len(waiting) // self.num_workers))
        idle.ask([waiting.popleft() for _ in range(share)])
        return True

    def _answers(self, waiting: deque[tuple[Key, Call]]) -> Iterator[tuple[Key, Found]]:
        """Waits until a worker has something to say or has reached its limit, and yields what there is."""
        soonest = min((worker.since for worker in self._workers if worker.owed), default=None)
        patience_s = None if soonest is None else max(0.0, soonest + self._timeout_s - time.monotonic())
        wait([worker.pipe for worker in self._workers], patience_s)
        for place, worker in enumerate(self._workers):
            try:
                yield from worker.answers()
                if worker.is_full:
                    worker.stop()
                    self._workers[place] = self._new_worker()
                    if worker.asks_again:
                        self._alone.append(worker.owed.popleft())
                    waiting.extendleft(reversed(worker.owed))
                    continue
                if not worker.owed or time.monotonic() < worker.since + self._timeout_s:
                    continue
                reason = TIMED_OUT
            except (EOFError, OSError):
                reason = FAILED
            exit_code = worker.stop()
            if not worker.ready:
                raise RuntimeError(f"{self._name}: its process can't start, got exit code {exit_code}. Look whether memory is left.")
            self._workers[place] = self._new_worker()
            if worker.owed:
                key, _ = worker.owed.popleft()
                waiting.extendleft(reversed(worker.owed))
                yield key, (None, reason)

    def _new_worker(self) -> _Worker[Any]:
        return _Worker(2 * self._timeout_s, self._prepare, self._memory_bytes)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []


class _Worker(Generic[Key]):
    """A process that does one call after the other, and those that it owes an answer to.

    Args:
        alarm_s: After so long with one call it ends itself.
        prepare: What it does first.
        memory_bytes: What it may hold beyond that.
    """

    def __init__(self, alarm_s: float, prepare: Callable[[], object] | None, memory_bytes: int) -> None:
        # Not forked: a copy of a process with torch's threads in it can hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, alarm_s, prepare, memory_bytes), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.owed: deque[tuple[Key, Call]] = deque()
        self.ready = False
        self.since = 0.0
        """When it began with the first call that it owes."""
        self.num_answered = 0
        self.is_full = False
        """Whether a call has asked for more memory than there is."""
        self.asks_again = False
        """Whether that call is still owed: it was not the first, so that others may be to blame."""

    def ask(self, calls: list[tuple[Key, Call]]) -> None:
        """Sends calls to a worker that owes nothing: it reads, so this cannot hang, whatever their length."""
        self.owed.extend(calls)
        self.since = time.monotonic()
        with contextlib.suppress(OSError):  # it is gone, which `answers` will say
            self.pipe.send([tuple(call) for _, call in calls])

    def answers(self) -> Iterator[tuple[Key, Found]]:
        """What has come, up to a call for which memory was short.

        Raises:
            EOFError, OSError: the process is gone.
        """
        while not self.is_full and self.pipe.poll():
            found: Found | None = self.pipe.recv()
            self.since = time.monotonic()
            if found is None:
                self.ready = True
                continue
            self.is_full = found == (None, OUT_OF_MEMORY)
            self.asks_again = self.is_full and self.num_answered > 0
            if not self.asks_again:
                self.num_answered += 1
                key, _ = self.owed.popleft()
                yield key, found

    def stop(self) -> int | None:
        """Ends the process, whatever it does, and returns its exit code."""
        self._process.kill()
        self._process.join()
        self.pipe.close()
        return self._process.exitcode


def _cores() -> int:
    """Cores this process may use, which in a batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(pipe: Connection, alarm_s: float, prepare: Callable[[], object] | None, memory_bytes: int) -> None:
    """What a worker does: answers calls, one message each, until nobody is left to ask."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):  # of all in a job: the stage stops its workers itself
        signal.signal(number, signal.SIG_IGN)
    if prepare is not None:
        prepare()
    _limit_memory(memory_bytes)
    try:
        pipe.send(None)
        while True:
            for function, arguments in pipe.recv():
                pipe.send(guarded(alarm_s, function, *arguments))
    except (EOFError, OSError):
        return


def _limit_memory(more_bytes: int) -> None:
    """Lets this process hold so much data beyond what it has: its own memory, not the libraries that it only reads."""
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    size = Path("/proc/self/statm")
    pages = int(size.read_text().split()[5]) if size.exists() else 0  # of data and stack
    limit = pages * resource.getpagesize() + more_bytes
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with contextlib.suppress(ValueError, OSError):  # a system that does not keep it
        resource.setrlimit(resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def guarded(alarm_s: float, function: Callable[..., Found], *arguments: Any) -> Found:
    """A call, under an alarm that ends a worker whom nobody is left to kill because the stage itself was killed."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
    try:
        return function(*arguments)
    except MemoryError:
        return None, OUT_OF_MEMORY
    except Exception:  # whatever is raised on strange input, the answer has not been judged
        return None, FAILED
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
