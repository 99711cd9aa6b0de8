r"""Answers judged a second by the math check, against the loop it had before: batches of 64, each waited for. Prints Markdown.

    python scripts/bench_checks.py                        # a quarter of an hour on two cores, nearly all of it slow answers
    python scripts/bench_checks.py --alone                # a minute: against math-verify alone, no processes

Answers are like those to GSM8K (reasoning, then a box with a number); but for the first mix, one in four is an expression. Among
them, evenly, stand slow ones: half need one to three seconds (a golden power, a binomial of high degree), half run for ever and are killed
at the limit (a power tower, the factorial of ten million). Both loops judge the same answers with the same number of
processes, which are started and warm before the clock runs. `cores` is processor time of all processes over wall time.
The old loop stands on pebble.

With `--alone`, `compare` and math-verify by itself judge the same answers in this process, in turn, kind by kind; the rate is of processor
time, so that others on the machine do not count, and of the faster of the repeats. Both are warm, and no answer comes twice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import psutil
from pebble import ProcessExpired, ProcessPool

from distill.checks import math as checks
from distill.checks.form import answer_of
from distill.checks.math import MathJudge, Pair

SLOW: list[Pair] = [
    (r"\boxed{9^{9^{9^{9}}}}", "5"),
    (r"\boxed{\left(\frac{1+\sqrt{5}}{2}\right)^{3000}}", "7"),
    (r"\boxed{10000000!}", "3"),
    (r"\boxed{(x+1)^{400}}", "(x-1)^{400}"),
]
OLD_BATCH = 64


def expression(index: int) -> Pair:
    """A boxed expression and its reference, none twice: sympy remembers what it has simplified."""
    kinds = [
        (f"\\frac{{{index}}}{{2}}", f"{index / 2}"),
        (f"\\sqrt{{{4 * index}}}", f"2\\sqrt{{{index}}}"),
        (f"({index},2)", f"({index},2)"),
        (f"x^2+{2 * index}x+{index**2}", f"(x+{index})^2"),
        (f"\\{{2,{index}\\}}", f"\\{{{index},2\\}}"),
        (f"\\frac{{{index}\\pi}}{{6}}", f"\\frac{{{index}\\pi}}{{6}}"),
        (f"{index:,}", f"{index}"),
        (f"{index}\\%", f"{index}%"),
    ]
    inside, reference = kinds[index // 4 % len(kinds)]
    return f"\\boxed{{{inside}}}", reference


def answers(count: int, expression_every: int | None, slow_every: int | None) -> Iterator[Pair]:
    """The answers to judge, the same for every call.

    Args:
        count: Of answers.
        expression_every: One in so many is an expression, the others are numbers; None for none.
        slow_every: One in so many is slow; None for none.
    """
    for index in range(count):
        if slow_every and index % slow_every == slow_every // 2:
            answer, reference = SLOW[index // slow_every % len(SLOW)]
        elif expression_every and index % expression_every == 3:
            answer, reference = expression(index)
        else:
            answer, reference = f"They have {index} in all, so the answer is \\boxed{{{index}}}.", str(index + (index % 20 == 0))
        yield f"<think>\nFirst there are {index} of them. {'Then we count once more. ' * 20}\n</think>\n\n{answer}", reference


class OldJudge:
    """The loop as it was: every answer a message of its own, the next 64 sent when the last of these is back."""

    def __init__(self, timeout_s: float, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._timeout_s = timeout_s
        self._pool = ProcessPool(max_workers=workers, context=context, initializer=checks.prepare)

    def __enter__(self) -> OldJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def judge(self, pairs: list[Pair]) -> list[str]:
        """The reason of each verdict."""
        return [reason for start in range(0, len(pairs), OLD_BATCH) for reason in self._batch(pairs[start : start + OLD_BATCH])]

    def _batch(self, pairs: list[Pair]) -> Iterator[str]:
        futures: list[Future[tuple[bool | None, str]]] = [
            self._pool.schedule(
                checks.guarded, args=(2 * self._timeout_s, checks.compare, answer_of(completion), reference), timeout=self._timeout_s
            )
            for completion, reference in pairs
        ]  # fmt: skip
        for future in futures:
            try:
                yield future.result()[1]
            except TimeoutError:
                yield "checker_timed_out"
            except ProcessExpired:
                yield "checker_failed"


def new_reasons(judge: MathJudge, pairs: list[Pair]) -> list[str]:
    """The reason of each verdict."""
    return [verdict.reason for verdict in judge.judge(pairs)]


def measure(make: Callable[[], Any], judge: Callable[[Any, list[Pair]], list[str]], pairs: list[Pair]) -> tuple[float, float, list[str]]:
    """Wall seconds, cores kept busy, and what was found; the start of the processes is in neither."""
    with make() as judging:
        judge(judging, list(answers(512, 4, None)))
        before, start = _processor_s(), time.perf_counter()
        found = judge(judging, pairs)
        wall_s = time.perf_counter() - start
        return wall_s, (_processor_s() - before) / wall_s, found


def _processor_s() -> float:
    """Processor seconds of this process and its children, those that are gone among them."""
    gone, own = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    alive = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(usage.ru_utime + usage.ru_stime for usage in (gone, own)) + float(sum(times.user + times.system for times in alive))


KINDS: dict[str, Callable[[int], Pair]] = {
    "equal integers": lambda index: (f"They have {index} in all, so the answer is \\boxed{{{index}}}.", str(index)),
    "other integers": lambda index: (f"They have {index} in all, so the answer is \\boxed{{{index}}}.", str(index + 1)),
    "decimals and fractions": lambda index: (f"\\boxed{{\\frac{{{index}}}{{4}}}}", f"{index / 4}"),
    "units": lambda index: (f"\\boxed{{{index} \\text{{ km}}}}", f"{index} km"),
    "words": lambda index: (f"The answer is **option number {index}**.", f"option number {index + index % 2}"),
    "expressions": lambda index: expression(index * 4),
}


def by_math_verify(pairs: list[Pair]) -> list[bool]:
    """What math-verify says by itself, as its documentation has it; without its limit of time, which needs the main thread's alarm."""
    from math_verify import parse, verify

    return [
        bool(verify(parse(f"${reference}$", parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None))
        for answer, reference in pairs
    ]


def by_compare(pairs: list[Pair]) -> list[bool]:
    """What the kit says."""
    return [bool(checks.compare(answer, str(reference))[0]) for answer, reference in pairs]


def beside_math_verify(count: int, repeats: int) -> None:
    """Prints the table of both, kind by kind."""
    checks.prepare()
    by_math_verify([("\\boxed{\\frac{1}{2}}", "0.5")])
    print("| answers | `compare`, answers/s | math-verify alone, answers/s | ratio | verdicts that differ |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, make in KINDS.items():
        times: dict[str, list[float]] = {"own": [], "theirs": []}
        differ = 0
        for repeat in range(repeats):
            pairs = [make(1000 + repeat * count + index) for index in range(count)]
            start = time.process_time()
            own = by_compare(pairs)
            middle = time.process_time()
            theirs = by_math_verify(pairs)
            times["own"].append(middle - start)
            times["theirs"].append(time.process_time() - middle)
            differ += sum(one != other for one, other in zip(own, theirs, strict=True))
        own_s, their_s = min(times["own"]), min(times["theirs"])
        print(
            f"| {kind} | {count / own_s:,.0f} | {count / their_s:,.0f} | {their_s / own_s:.1f} | {differ} of {count * repeats} |",
            flush=True,
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="answers of each mix")
    parser.add_argument("--repeats", type=int, default=3, help="of the mixes without slow answers; the fastest counts")
    parser.add_argument("--timeout_s", type=float, default=10.0)
    parser.add_argument("--alone", action="store_true", help="against math-verify alone, in this process")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if arguments.alone:
        print(f"{datetime.now(UTC):%Y-%m-%d}, one process, Python {platform.python_version()}, math-verify {version('math-verify')}\n")
        beside_math_verify(min(arguments.count, 400), arguments.repeats)
        return
    timeout_s, workers = arguments.timeout_s, arguments.workers
    print(f"{datetime.now(UTC):%Y-%m-%d}, {len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}; ", end="")
    print(f"{arguments.count:,} answers a mix, {workers} processes, limit {timeout_s:g} s\n")
    print("| expressions | slow answers | killed at the limit | batches of 64, answers/s | cores ", end="")
    print("| stream, answers/s | cores | stream / batches |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for expression_every, slow_every in ((None, None), (4, None), (4, 1000), (4, 200)):
        pairs = list(answers(arguments.count, expression_every, slow_every))
        old_runs, new_runs = [], []
        for _ in range(1 if slow_every else arguments.repeats):  # in turn, so that what else the machine does hits both
            old_runs.append(measure(lambda: OldJudge(timeout_s, workers), lambda judge, given: judge.judge(given), pairs))
            new_runs.append(measure(lambda: MathJudge(timeout_s, workers), new_reasons, pairs))
        (old_s, old_cores, old), (new_s, new_cores, new) = min(old_runs), min(new_runs)
        if old != new:
            print(f"  the verdicts differ: {Counter(zip(old, new, strict=True))}")
        expressions, slow = (arguments.count // every if every else 0 for every in (expression_every, slow_every))
        killed = sum(reason == "checker_timed_out" for reason in new)
        print(f"| {expressions:,} | {slow} | {killed} | {len(pairs) / old_s:,.0f} | {old_cores:.2f} ", end="")
        print(f"| {len(pairs) / new_s:,.0f} | {new_cores:.2f} | {old_s / new_s:.2f} |", flush=True)


if __name__ == "__main__":
    main()
