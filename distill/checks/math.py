r"""Whether an answer equals the reference, by math-verify in processes that are killed at a hard limit; see `pool`.

What counts as the answer: the last box, else the last expression. Boxes close to each other are one answer of several
parts, as math-verify has it, so a row of guesses is not right because one of them is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import Any

from distill.checks import Verdict
from distill.checks.form import answer_of
from distill.checks.pool import Call, Pool, Question, guarded

__all__ = ["MathJudge", "Pair", "compare", "guarded", "prepare", "question"]

Pair = tuple[str, str | None]
"""A completion, and the reference or null."""

# Thousands set apart by a space or by LaTeX's thin ones; without this `1 500` is read as 1 + 500.
_THOUSANDS = re.compile(r"(?<=\d)(?: |\\[,!; ]|\{,\})(?=\d{3}(?!\d))")


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


def prepare() -> None:
    """Does in a new worker what takes a second the first time: imports, patterns, the grammar. No pair's limit pays for it."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off, which is meant
    compare(r"\boxed{\frac{1}{2}}", "0.5")


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
