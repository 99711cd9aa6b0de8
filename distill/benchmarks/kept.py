"""Answers that a model gave lm-eval before a stop: on disk as they come, counted, and not asked for again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import hash_args

from distill.benchmarks.tasks import is_drawn
from distill.run.journal import Journal
from distill.run.log import Progress, progress

_KEEP_EVERY_S = 5.0  # so much is lost of a piece that is killed


class Kept:
    """The answers of one model, by what was asked. It is lm-eval's cache hook, and is told of each answer as it comes.

    What is drawn at random is kept nowhere: the same question may be asked several times, and is to be answered anew each time.

    Args:
        journal: Of this model, with these settings.
        label: What is shown of the work.
    """

    def __init__(self, journal: Journal, label: str = "") -> None:
        self._journal, self.label = journal, label
        self._bar: Progress | None = None
        self._found = {row["asked"]: row["answer"] for row in journal.rows()}
        self._new: list[dict[str, Any]] = []
        self._written_at_s = time.monotonic()

    def add_partial(self, kind: str, asked: Sequence[Any], answer: Any) -> None:
        """One more answer, as lm-eval tells it."""
        if not _is_drawn(kind, asked):
            key = hash_args(kind, asked)
            if key not in self._found:
                self._found[key] = answer
                self._new.append({"asked": key, "answer": answer})
        if time.monotonic() - self._written_at_s >= _KEEP_EVERY_S:
            self.write()
        self.advance()

    def advance(self) -> None:
        """Shows that one more request is done, of which nothing may be kept."""
        if self._bar is not None:
            self._bar.update()

    def write(self) -> None:
        """Returns when all that came is on disk."""
        if self._new:
            self._journal.append(self._new)
            self._new = []
        self._written_at_s = time.monotonic()

    def answer(self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """The answer to each request, in order: what is known, and what is asked for now.

        Args:
            kind: lm-eval's name of what is asked.
            requests: lm-eval's.
            ask: The model's own method.
        """
        keys = [None if _is_drawn(kind, request.args) else hash_args(kind, request.args) for request in requests]
        todo = [place for place, key in enumerate(keys) if key is None or key not in self._found]
        try:
            with progress(len(requests), "requests", self.label, len(requests) - len(todo)) as self._bar:
                given = dict(zip(todo, ask([requests[place] for place in todo]) if todo else [], strict=True))
        finally:  # too many have failed, or a signal has asked for the end
            self._bar = None
            self.write()
        return [given[place] if place in given else _as_given(kind, self._found[str(key)]) for place, key in enumerate(keys)]


def _is_drawn(kind: str, asked: Sequence[Any]) -> bool:
    return kind == "generate_until" and is_drawn(asked[1])


def _as_given(kind: str, answer: Any) -> Any:
    """An answer that was read from a file as the model gave it."""
    return tuple(answer) if kind == "loglikelihood" else answer
