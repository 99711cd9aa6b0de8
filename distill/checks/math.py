r"""Whether an answer equals the reference, by math-verify in processes that are killed at a hard limit.

math-verify can run for ever on an adversarial expression, its own limits are signals that a thread can't use, and
sympy can't be interrupted from outside; a process can. Its workers import no torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as CheckTimeout
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from distill.checks import Verdict
from distill.checks.form import answer_of

Pair = tuple[str, str | None]
"""A completion, and the reference or null."""


class MathJudge:
    """Compares answers with references in a pool of processes that lives as long as the `with` block.

    Args:
        timeout_s: Hard limit for one pair, in seconds; at it the process is killed and the pair is not judged.
        workers: Processes; null means one for each core this process may use.
    """

    def __init__(self, timeout_s: float, workers: int | None = None) -> None:
        self._timeout_s = timeout_s
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPool | None = None

    def __enter__(self) -> MathJudge:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()

    def judge(self, pairs: Sequence[Pair], on_done: Callable[[], Any] = lambda: None) -> list[Verdict]:
        """A verdict for each pair, in order.

        Args:
            pairs: Completions with their references.
            on_done: Called after each verdict, for a progress bar.
        """
        verdicts: list[Verdict] = []
        compared = self._compare([(answer_of(text), reference) for text, reference in pairs if _without_checker(text, reference) is None])
        for pair in pairs:
            verdicts.append(_without_checker(*pair) or next(compared))
            on_done()
        return verdicts

    def _compare(self, questions: list[Any]) -> Iterator[Verdict]:
        if not questions:
            return
        if self._pool is None:
            # Not forked: a copy of a process with torch's threads in it can hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(max_workers=self._workers, context=context, initializer=_prepare)
        results = self._pool.map(_compare, questions, timeout=self._timeout_s, chunksize=1).result()
        for _ in questions:
            try:
                passed, reason = next(results)
            except CheckTimeout:
                passed, reason = None, "checker_timed_out"
            except ProcessExpired:
                passed, reason = None, "checker_died"
            yield Verdict("math", passed, reason)


def _without_checker(completion: str, reference: str | None) -> Verdict | None:
    """The verdict where there is nothing to compare."""
    if reference is None:
        return Verdict("math", None, "no_reference")
    answer = answer_of(completion)
    return Verdict("math", False, "no_answer") if answer is None or not answer.strip() else None


def _prepare() -> None:
    """Imports in a new worker what takes a second, so that the first pair's limit does not pay for it."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off, which is meant


def _compare(question: tuple[str, str]) -> tuple[bool | None, str]:
    """Runs in a worker: whether the answer holds an expression equal to the reference."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    answer, reference = question
    # What stands in a box counts before any other number; without a box, the last expression does.
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold = parse(_as_gold(reference), extraction, parsing_timeout=None)
    if not gold:
        return None, "reference_not_understood"
    found = parse(answer, extraction, parsing_timeout=None)
    if not found:
        return False, "no_answer"
    right = bool(verify(gold, found, timeout_seconds=None))
    return right, "right" if right else "wrong_answer"


def _as_gold(reference: str) -> str:
    r"""A plain reference in a box, where math-verify reads it whole: outside one, `2\sqrt{3}` is read as 2."""
    return reference if "\\boxed" in reference else f"\\boxed{{{reference.strip().rstrip('.')}}}"
