r"""Whether an answer equals the reference, by math-verify in processes that are killed at a hard limit.

math-verify can run for ever on an adversarial expression, its own limits are signals that a thread can't use, and
sympy can't be interrupted from outside; a process can. Its workers import no torch.

What counts as the answer: the last box, else the last expression. Boxes close to each other are one answer of several
parts, as math-verify has it, so a row of guesses is not right because one of them is.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from distill.checks import Verdict
from distill.checks.form import answer_of

Pair = tuple[str, str | None]
"""A completion, and the reference or null."""

# Thousands set apart by a space or by LaTeX's thin ones; without this `1 500` is read as 1 + 500.
_THOUSANDS = re.compile(r"(?<=\d)(?: |\\[,!; ]|\{,\})(?=\d{3}(?!\d))")


class MathJudge:
    """Compares answers with references in a pool of processes that lives as long as the `with` block.

    Args:
        timeout_s: Hard limit for one pair, in seconds; at it the process is killed and the pair is not judged.
        workers: Processes; null means one for each core this process may use.
    """

    def __init__(self, timeout_s: float, workers: int | None = None) -> None:
        self._timeout_s = timeout_s
        self._workers = workers or _cores()
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
        # Not `map`: it also gives up on what has only waited so long, behind others and for a new worker.
        limit_s, alarm_s = self._timeout_s, 2 * self._timeout_s
        futures = [self._pool.schedule(_compare_in_worker, args=(alarm_s, *question), timeout=limit_s) for question in questions]
        for future in futures:
            try:
                passed, reason = future.result()
            except TimeoutError:
                passed, reason = None, "checker_timed_out"
            except ProcessExpired:
                passed, reason = None, "checker_failed"
            yield Verdict("math", passed, reason)


def _without_checker(completion: str, reference: str | None) -> Verdict | None:
    """The verdict where there is nothing to compare."""
    if reference is None:
        return Verdict("math", None, "no_reference")
    answer = answer_of(completion)
    return Verdict("math", False, "no_answer") if answer is None or not answer.strip() else None


def _cores() -> int:
    """Cores this process may use, which in a batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare() -> None:
    """Does in a new worker what takes a second the first time: imports, patterns, the grammar. No pair's limit pays for it."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off, which is meant
    compare(r"\boxed{\frac{1}{2}}", "0.5")


def _compare_in_worker(alarm_s: float, answer: str, reference: str) -> tuple[bool | None, str]:
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


def compare(answer: str, reference: str) -> tuple[bool | None, str]:
    """Whether the answer is equal to the reference, or null, and the reason. May never return: see `MathJudge`."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # A box counts before any other number, also one that can't be read: then a number beside it is not the answer.
    mode = "first_match" if "\\boxed" in answer else "any_match"
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    gold = parse(_as_gold(reference), extraction, parsing_timeout=None)
    if not gold:
        return None, "reference_not_understood"
    found = parse(_THOUSANDS.sub("", answer), extraction, parsing_timeout=None, extraction_mode=mode)
    if not found:
        return False, "no_answer"
    right = bool(verify(gold, found, timeout_seconds=None))
    if not right and all(isinstance(expression, str) for expression in gold):
        return None, "reference_not_understood"  # as text alone it equals nothing but itself
    return right, "right" if right else "wrong_answer"


def _as_gold(reference: str) -> str:
    r"""A plain reference in a box, where math-verify reads it whole: outside one, `2\sqrt{3}` is read as 2."""
    reference = _THOUSANDS.sub("", reference)
    return reference if "\\boxed" in reference else f"\\boxed{{{reference.strip().rstrip('.')}}}"
