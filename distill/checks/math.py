"""Whether answers equal their references, which `answers` says, in processes that are killed at a hard limit; see `pool`.

sympy can run for ever on an adversarial expression and can't be interrupted from outside; a process can. Its workers import no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Any

from distill.checks import Verdict
from distill.checks.answers import compare, prepare
from distill.checks.form import answer_of
from distill.checks.pool import Call, Pool, Question, guarded

__all__ = ["MathJudge", "Pair", "compare", "guarded", "prepare", "question"]

Pair = tuple[str, str | None]
"""A completion, and the reference or null."""


class MathJudge:
    """Compares answers with references in processes that live as long as the `with` block.

    Args:
        timeout_s: Hard limit for one pair, in seconds; at it the process is killed and the pair is not judged.
        workers: Processes; null means one for each core this process may use.
    """

    def __init__(self, timeout_s: float, workers: int | None = None) -> None:
        self._pool = Pool(timeout_s, workers, prepare, "math check")

    def __enter__(self) -> MathJudge:
        self._pool.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, trace)

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
        questions = ((number, question(*pair)) for number, pair in pairs)
        with closing(self._pool.stream(questions)) as answers:
            for number, found in answers:
                yield number, Verdict("math", *found)


def question(completion: str, reference: str | None) -> Question:
    """What is to be found out of a pair; or what there is to say without comparing anything."""
    answer = answer_of(completion)
    if reference is None:
        return None, "no_reference"
    if answer is None or not answer.strip():
        return False, "no_answer"
    return Call(compare, (answer, reference))
