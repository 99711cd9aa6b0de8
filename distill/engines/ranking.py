"""The student reads candidate traces: how it ranks the tokens written in them, and how much they surprise it.

The Rank-Surprisal Ratio of a trace is

    RSR = sum over tokens of min(rank, 100)  /  sum over tokens of surprisal

where `rank` is 1 more than the number of tokens that the student finds more probable there, and `surprisal` is -log q of the written token,
in nats. It is low where a trace tells the student what it did not expect and yet would have thought of. After "Which Reasoning
Trajectories Teach Students to Reason Better?" (arXiv 2601.14249); ties, the limit of 100 and that the end of the turn is not counted are
as in its authors' code (github.com/UmeanNever/RankSurprisalRatio, `rsr_cal.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from distill.engines.answers import num_ids
from distill.engines.comparing import Comparer, Opinion, Row
from distill.errors import ModelError
from distill.models.chat import IGNORE, ChatFormat
from distill.models.loading import free_memory, load_chat_format, load_model, pick_device
from distill.recipe.experiment import Recipe
from distill.run.journal import Journal
from distill.run.log import progress

Trace = dict[str, Any]

RANK_LIMIT = 100
"""Ranks beyond count as this one: that a token is the 50,000th says no more than that it is far from what the student expects."""
_AT_ONCE, _CHARS = 64, 2**18  # traces that are read between two writes to a journal, or fewer long ones


class Ranks(NamedTuple):
    """What a student makes of a trace; sums over its tokens, without the end of the turn."""

    tokens: int
    rank: float
    """Each at most `RANK_LIMIT`."""
    surprisal: float
    """In nats."""

    @property
    def ratio(self) -> float:
        """The Rank-Surprisal Ratio, lower is better; infinite where nothing surprises at all."""
        return self.rank / self.surprisal if self.surprisal > 0 else float("inf")

    @staticmethod
    def entry(ranks: Ranks | None) -> dict[str, Any]:
        """As values of a row, which `of` reads; null of a trace that was not read."""
        return {"tokens": None, "rank": None, "surprisal": None} if ranks is None else ranks._asdict()

    @staticmethod
    def of(row: dict[str, Any]) -> Ranks | None:
        """What `entry` wrote."""
        return None if row["tokens"] is None else Ranks(row["tokens"], row["rank"], row["surprisal"])


class RankReader:
    """Reads traces with a recipe's student, which is loaded into this process when the first one comes.

    Args:
        recipe: Whose student reads, and what of a trace it would train on: `train.max_length`, `train.overlong`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def read_numbered(
        self, traces: Iterable[Trace], total: int, journal: Journal, known: Callable[[Trace], Ranks | None] = lambda trace: None
    ) -> dict[int, Ranks | None]:
        """What was found of each trace, by its number; goes on behind what is in the journal.

        Args:
            traces: With a number under `row`; the same, in the same order, as before a restart.
            total: How many.
            journal: Of the stage; other entries in it are left alone.
            known: What another reading has found of a trace.
        """
        found = {entry["row"]: Ranks.of(entry) for entry in journal.rows() if is_of_reading(entry)}
        with progress(total, "traces", "student reads", done=len(found)) as bar:
            for window in self.read(traces, lambda trace: trace["row"] in found, known):
                journal.append([{"row": trace["row"], **Ranks.entry(ranks)} for trace, ranks in window])
                found.update({trace["row"]: ranks for trace, ranks in window})
                bar.update(len(window))
        return found

    def read(
        self,
        traces: Iterable[Trace],
        done: Callable[[Trace], bool] = lambda trace: False,
        known: Callable[[Trace], Ranks | None] = lambda trace: None,
    ) -> Iterator[list[tuple[Trace, Ranks | None]]]:
        """Some traces after the other, in their order, each with what was found; without windows that are done whole.

        Null of a trace that the student would not train on: it does not go with its template, is too long, or has no token.

        Args:
            traces: The same, in the same order, as before a restart, so that what is read together is the same.
            done: Whether a trace was read before a restart.
            known: What another reading has found of a trace.

        Raises:
            ModelError: the student's logits make no distribution.
        """
        for window in _windows(traces):
            if all(done(trace) for trace in window):
                continue
            found = [known(trace) for trace in window]
            rows = [self._row(trace) if there is None else None for trace, there in zip(window, found, strict=True)]
            to_read = [row for row in rows if row is not None]
            opinions = iter(self._comparer.read(to_read) if to_read else ())
            read = (there if row is None else ranks_of(next(opinions)) for row, there in zip(rows, found, strict=True))
            yield list(zip(window, read, strict=True))

    @cached_property
    def device(self) -> str:
        """What the student computes on."""
        return str(pick_device())

    @cached_property
    def _chat(self) -> ChatFormat:
        return load_chat_format(self._recipe.student)

    @cached_property
    def _comparer(self) -> Comparer:
        free_memory()
        return Comparer(load_model(self._recipe.student, pick_device()), num_ids(self._chat))

    def _row(self, trace: Trace) -> Row | None:
        try:
            ids, labels = self._chat.trace_row(trace)
        except ModelError:
            return None
        train = self._recipe.train
        if len(ids) > train.max_length and train.overlong == "drop":
            return None
        labels_T = np.array(labels, np.int32)
        if labels[-1] in self._chat.stop_ids:
            labels_T[-1] = IGNORE
        row = Row(np.array(ids, np.int32)[: train.max_length], labels_T[: train.max_length])
        return row if (row.labels != IGNORE).any() else None


def is_of_reading(entry: dict[str, Any]) -> bool:
    """Whether an entry of a journal is of a trace that was read."""
    return "surprisal" in entry


def ranks_of(opinion: Opinion) -> Ranks:
    """The sums over the tokens of a trace."""
    return Ranks(len(opinion.ranks), float(np.minimum(opinion.ranks, RANK_LIMIT).sum()), float(-opinion.log_probs.sum()))


def _windows(traces: Iterable[Trace]) -> Iterator[list[Trace]]:
    window: list[Trace] = []
    chars = 0
    for trace in traces:
        window.append(trace)
        chars += len(trace["completion"])
        if len(window) == _AT_ONCE or chars >= _CHARS:
            yield window
            window, chars = [], 0
    if window:
        yield window
