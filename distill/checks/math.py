"""Whether answers equal their references, in processes that are killed at a hard limit; what is equal is said in `answers`.

sympy can run for ever on an adversarial expression and can't be interrupted from outside; a process can. Its workers import no torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from distill.checks import Verdict
from distill.checks.answers import compare, prepare
from distill.checks.form import answer_of

__all__ = ["MathJudge", "Pair", "compare", "guarded", "prepare"]

Pair = tuple[str, str | None]
"""A completion, and the reference or null."""

_Question = tuple[int, str, str]  # number, answer, reference
_Found = tuple[bool | None, str]  # passed, reason
_TOGETHER = 32  # questions sent to a worker at once: the way there costs a fifth of a check


class MathJudge:
    """Compares answers with references in processes that live as long as the `with` block.

    Args:
        timeout_s: Hard limit for one pair, in seconds; at it the process is killed and the pair is not judged.
        workers: Processes; null means one for each core this process may use.
    """

    def __init__(self, timeout_s: float, workers: int | None = None) -> None:
        self._timeout_s = timeout_s
        self._num_workers = workers or _cores()
        self._workers: list[_Worker] = []

    def __enter__(self) -> MathJudge:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def judge(self, pairs: Iterable[Pair], on_done: Callable[[], Any] = lambda: None) -> list[Verdict]:
        """A verdict for each pair, in order.

        Args:
            pairs: Completions with their references.
            on_done: Called after each verdict, for a progress bar.
        """
        found: dict[int, Verdict] = {}
        for number, verdict in self.stream(enumerate(pairs)):
            found[number] = verdict
            on_done()
        return [found[number] for number in range(len(found))]

    def stream(self, pairs: Iterable[tuple[int, Pair]]) -> Iterator[tuple[int, Verdict]]:
        """Each pair's number and verdict, as they come, so that nothing waits for a slow one.

        Args:
            pairs: Numbered completions with their references, taken when there is room: some dozens for each worker are on the way.
        """
        waiting: deque[_Question] = deque()
        try:
            for number, (completion, reference) in pairs:
                answer = answer_of(completion)
                if reference is None:
                    yield number, Verdict("math", None, "no_reference")
                elif answer is None or not answer.strip():
                    yield number, Verdict("math", False, "no_answer")
                else:
                    waiting.append((number, answer, reference))
                while len(waiting) >= _TOGETHER * self._num_workers and not self._hand_out(waiting):
                    yield from self._answers(waiting)
            while waiting or any(worker.owed for worker in self._workers):
                if not self._hand_out(waiting):
                    yield from self._answers(waiting)
        finally:
            if any(worker.owed for worker in self._workers):  # nobody listens any more
                self._stop()

    def _hand_out(self, waiting: deque[_Question]) -> bool:
        """Gives questions to a worker that has none, and says whether there was one."""
        if not self._workers:
            self._workers = [_Worker(2 * self._timeout_s) for _ in range(self._num_workers)]
        idle = next((worker for worker in self._workers if worker.ready and not worker.owed), None)
        if idle is None or not waiting:
            return False
        share = min(_TOGETHER, -(-len(waiting) // self._num_workers))
        idle.ask([waiting.popleft() for _ in range(share)])
        return True

    def _answers(self, waiting: deque[_Question]) -> Iterator[tuple[int, Verdict]]:
        """Waits until a worker has something to say or has reached its limit, and yields what there is."""
        soonest = min((worker.since for worker in self._workers if worker.owed), default=None)
        patience_s = None if soonest is None else max(0.0, soonest + self._timeout_s - time.monotonic())
        wait([worker.pipe for worker in self._workers], patience_s)
        for place, worker in enumerate(self._workers):
            try:
                yield from worker.answers()
                if not worker.owed or time.monotonic() < worker.since + self._timeout_s:
                    continue
                reason = "checker_timed_out"
            except (EOFError, OSError):
                reason = "checker_failed"
            exit_code = worker.stop()
            if not worker.ready:
                raise RuntimeError(f"math check: its process can't start, got exit code {exit_code}. Look whether memory is left.")
            self._workers[place] = _Worker(2 * self._timeout_s)
            if worker.owed:
                number, *_ = worker.owed.popleft()
                waiting.extendleft(reversed(worker.owed))
                yield number, Verdict("math", None, reason)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []


class _Worker:
    """A process that answers questions one after the other, and those that it owes an answer to.

    Args:
        alarm_s: After so long with one question it ends itself.
    """

    def __init__(self, alarm_s: float) -> None:
        # Not forked: a copy of a process with torch's threads in it can hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, alarm_s), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.owed: deque[_Question] = deque()
        self.ready = False
        self.since = 0.0
        """When it began with the first question that it owes."""

    def ask(self, questions: list[_Question]) -> None:
        """Sends questions to a worker that owes nothing: it reads, so this cannot hang, whatever their length."""
        self.owed.extend(questions)
        self.since = time.monotonic()
        with contextlib.suppress(OSError):  # it is gone, which `answers` will say
            self.pipe.send(questions)

    def answers(self) -> Iterator[tuple[int, Verdict]]:
        """What has come.

        Raises:
            EOFError, OSError: the process is gone.
        """
        while self.pipe.poll():
            found: _Found | None = self.pipe.recv()
            self.since = time.monotonic()
            if found is None:
                self.ready = True
                continue
            number, *_ = self.owed.popleft()
            yield number, Verdict("math", *found)

    def stop(self) -> int | None:
        """Ends the process, whatever it does, and returns its exit code."""
        self._process.kill()
        self._process.join()
        self.pipe.close()
        return self._process.exitcode


def _cores() -> int:
    """Cores this process may use, which in a batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(pipe: Connection, alarm_s: float) -> None:
    """What a worker does: answers questions, one message each, until nobody is left to ask."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):  # of all in a job: the stage stops its workers itself
        signal.signal(number, signal.SIG_IGN)
    prepare()
    try:
        pipe.send(None)
        while True:
            for _, answer, reference in pipe.recv():
                pipe.send(guarded(alarm_s, answer, reference))
    except (EOFError, OSError):
        return


def guarded(alarm_s: float, answer: str, reference: str) -> _Found:
    """`compare`, under an alarm that ends a worker whom nobody is left to kill because the stage itself was killed."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
    try:
        return compare(answer, reference)
    except Exception:  # whatever sympy raises on strange input, the answer has not been judged
        return None, "checker_failed"
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
