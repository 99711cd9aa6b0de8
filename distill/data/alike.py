"""Training prompts that are too much like held-out ones, benchmarks' questions or one another: which, like which, and in what.

Compared are the normal forms of what is a conversation's own: its turns without those of the system, the last of the user's without the
template, but with what further columns have put into it. So what the recipe puts around every prompt makes none of them alike. With
questions of benchmarks, which stand alone, what stands in the place of `{prompt}` is compared by itself, too. The texts wait in a file;
of each 20 bytes are in memory, with what `data/near` and `data/ngrams` say where these are asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from distill.data.files import Row
from distill.data.identities import Identities, Ids, Places
from distill.data.kept import Texts, around, own_text
from distill.data.mapping import BEGINNING, OWN, PromptMapping
from distill.data.matches import Match, Matches
from distill.data.near import Near
from distill.data.ngrams import Search
from distill.data.sources import Source
from distill.errors import DataError
from distill.recipe.alike import Benchmark, NearDuplicates
from distill.recipe.prompts import Columns, Prompts
from distill.run.schema import Message

EXACT, SIMILAR = "exact", "similar"
_TOGETHER = 512  # questions
_PLAIN: dict[str, Any] = {
    "system_prompt": None,
    "template": "{prompt}",
    "fields": None,
    "json_reference": False,
    "answer_pattern": None,
    "turns": "last",
    "answer_as_reference": False,
}


class Alike:
    """The texts of all prompts, and behind them the questions of benchmarks. Use as a context manager.

    Args:
        prompts: The recipe's section, which asks for something to be compared.
        seed: The recipe's.
        place: Folder where a file without a name may be made; null means the system's.
    """

    def __init__(self, prompts: Prompts, seed: int, place: Path | None = None) -> None:
        self._prompts, self._around = prompts, around(prompts.template)
        limits = [limit for limit in (_heldout_limit(prompts), _question_limit(prompts)) if limit is not None]
        self._texts = Texts(place)
        self._near = Near(min(limits), seed, self._texts) if limits else None
        self._numbers, self._rows = array("Q"), array("I")
        self._alone = array("Q")  # of what stands in the place of {prompt} alone, where rows have more
        self._talks = array("Q")  # which conversation each is of, where one gives several prompts
        self._benchmarks: list[tuple[int, str]] = []  # where each begins, and its name
        self._matches = Matches(place)
        self.boilerplate = 0
        """Runs of words, of the smallest length, that were in too many prompts to be a sign of anything."""

    def __enter__(self) -> Alike:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._texts.close()
        self._matches.close()

    def add(self, rows: list[Row], numbers: Sequence[int]) -> None:
        """Takes prompts in.

        Args:
            rows: PROMPT rows.
            numbers: Of the rows in their source, from 1.
        """
        self._talks.extend(row[BEGINNING] for row in rows if BEGINNING in row)
        self._add([self._own(row) for row in rows], numbers)
        if any(OWN in row for row in rows):  # else in none so far, or of these each was dropped
            self._alone.extend(0 for _ in range(len(self._texts) - len(rows) - len(self._alone)))
            self._alone.extend(_number_of(own_text(_asking(row, row[OWN].question))) if OWN in row else 0 for row in rows)

    def add_questions(self, benchmark: Benchmark, source: Source) -> None:
        """Takes the questions of a benchmark in, behind all prompts.

        Raises:
            DataError: it can't be read, or has no question in its column.
        """
        mapping = question_mapping(self._prompts, benchmark)
        begin = len(self._texts)
        self._benchmarks.append((begin, benchmark.called))
        placed = enumerate(source.rows(mapping.columns, f"read {benchmark.called}"), start=1)
        try:
            while batch := list(islice(placed, _TOGETHER)):
                talks = [question_rows(mapping, benchmark, raw, where)[-1][0]["messages"] for _, (where, raw) in batch]
                self._add([own_text(messages) for messages in talks], [number for number, _ in batch])
        except DataError as error:
            raise DataError(f"prompts.decontaminate: {error}") from None
        if not any(self._numbers[begin:]):
            raise DataError(f"prompts.decontaminate: {benchmark.called} has no question. Name the column that has them, by `column`.")

    def _own(self, row: Row) -> str:
        return own_text(_asking(row, row[OWN].values)) if OWN in row else own_text(row["messages"], self._around)

    def _add(self, texts: list[str], numbers: Sequence[int]) -> None:
        self._texts.add(texts)
        self._rows.extend(numbers)
        self._numbers.extend(_number_of(text) if text else 0 for text in texts)
        if self._near is not None:
            self._near.add(texts)

    def judged(self, train: Places, heldout: Places, kept: Places) -> Iterator[tuple[int, str]]:
        """The training prompts to drop, by their places, each with the reason.

        Args:
            train: Places of the training prompts.
            heldout: Of what is kept apart from them.
            kept: Of the training prompts that a run has already, which stay whatever they are like.
        """
        questions = np.arange(self._first_question, len(self._texts))
        questions = questions[self._number_of_each[questions] > 0]
        left = np.setdiff1d(train, kept)
        for look in (self._equal, self._sharing_runs, self._similar_to_questions, self._similar_to_heldout):
            begin = len(self._matches)
            for match in look(train, left, questions, heldout):
                yield self._noted(match, "in_benchmark" if match.other >= self._first_question else "near_heldout")
            left = np.setdiff1d(left, self._matches.places(begin))
        if self._prompts.near_duplicates is not None:
            yield from (self._noted(match, "near_duplicate") for match in self._near_duplicates(kept, left, self._prompts.near_duplicates))

    def _equal(self, train: Places, left: Places, questions: Places, heldout: Places) -> Iterator[Match]:
        asked = self._prompts.decontaminate
        if asked is None or not asked.exact:
            return
        others = np.concatenate([questions, heldout]) if asked.heldout else questions
        numbers, first = np.unique(self._number_of_each[others], return_index=True)
        known = Identities(numbers)
        places = known.places(self._number_of_each[left])
        if self._alone:
            alone = np.zeros(len(self._texts), np.uint64)
            alone[: len(self._alone)] = self._alone
            at = known.places(alone[left])
            is_question = (at >= 0) & (others[first[at]] >= self._first_question)
            places = np.where((places < 0) & is_question, at, places)
        for place, at in zip(left[places >= 0].tolist(), places[places >= 0].tolist(), strict=True):
            yield Match(place, int(others[first[at]]), EXACT)

    def _sharing_runs(self, train: Places, left: Places, questions: Places, heldout: Places) -> Iterator[Match]:
        asked = self._prompts.decontaminate
        if asked is None or not asked.ngrams:
            return
        others = np.concatenate([questions, heldout]) if asked.heldout else questions
        talks = np.frombuffer(self._talks, np.uint64) if self._talks else None
        search = Search(self._texts, others.tolist(), asked.ngrams)
        for each in search.find(train, asked.boilerplate, talks):
            if _holds(left, each.place):
                yield Match(each.place, each.other, f"{each.words}-gram", each.run)
        self.boilerplate = search.num_common

    def _similar_to_questions(self, train: Places, left: Places, questions: Places, heldout: Places) -> Iterator[Match]:
        return self._similar(left, questions, _question_limit(self._prompts))

    def _similar_to_heldout(self, train: Places, left: Places, questions: Places, heldout: Places) -> Iterator[Match]:
        return self._similar(left, heldout, _heldout_limit(self._prompts))

    def _similar(self, left: Places, others: Places, least: float | None) -> Iterator[Match]:
        if least is not None and len(others):
            assert self._near is not None
            for place, other, similarity in self._near.against(others, left, least):
                yield Match(place, other, SIMILAR, None, similarity)

    def _near_duplicates(self, kept: Places, left: Places, asked: NearDuplicates) -> Iterator[Match]:
        assert self._near is not None
        for place, other, similarity in self._near.among(np.concatenate([kept, left]), len(kept), asked.similarity):
            yield Match(place, other, SIMILAR, None, similarity)

    def _noted(self, match: Match, reason: str) -> tuple[int, str]:
        self._matches.add(match, reason)
        return match.place, reason

    def facts(self) -> dict[str, Any]:
        """What a manifest says: how many were found, by reason and kind, and how many runs of words were passed over."""
        return {"alike": self._matches.counts(), **({"boilerplate_runs": self.boilerplate} if self.boilerplate else {})}

    def rows(self, ids: Ids) -> Iterator[Row]:
        """MATCH rows, in the order of the prompts.

        Args:
            ids: Of all prompts.
        """
        for match, reason in self._matches.sorted():
            yield {
                "prompt_id": f"{int(ids[match.place]):016x}",
                "reason": reason,
                "kind": match.kind,
                "set": {"near_heldout": "heldout", "near_duplicate": "train"}.get(reason) or self._benchmark_at(match.other),
                "row": self._rows[match.other],
                "text": self._texts[match.place],
                "other_text": self._texts[match.other],
                "shared": match.run,
                "similarity": match.similarity,
            }

    def _benchmark_at(self, place: int) -> str:
        return next(name for begin, name in reversed(self._benchmarks) if begin <= place)

    @property
    def _first_question(self) -> int:
        return self._benchmarks[0][0] if self._benchmarks else len(self._texts)

    @property
    def _number_of_each(self) -> Ids:
        return np.frombuffer(self._numbers, np.uint64)


def question_mapping(prompts: Prompts, benchmark: Benchmark) -> PromptMapping:
    """Reads the questions of a benchmark as prompts with nothing around them.

    Args:
        prompts: The recipe's section.
        benchmark: One that it names.
    """
    columns = prompts.columns.model_copy(update={"reference": None, "tags": None, "system": None, "tools": None})
    columns = columns if benchmark.column is None else Columns(prompt=benchmark.column)
    return PromptMapping(prompts.model_copy(update=_PLAIN), columns, benchmark.source)


def question_rows(mapping: PromptMapping, benchmark: Benchmark, row: Row, where: str) -> list[tuple[Row, str | None]]:
    """What a row of a benchmark asks; see `PromptMapping.prompt_rows`.

    Raises:
        DataError: it has no such column; says how its own is named.
    """
    try:
        return mapping.prompt_rows(row, where)
    except DataError as error:
        own = "" if benchmark.column is not None else f" A benchmark's own is named so: {{source: {benchmark.source}, column: ...}}."
        raise DataError(f"{error}{own}") from None


def _question_limit(prompts: Prompts) -> float | None:
    """From which similarity on a prompt is one of a benchmark's questions; null where that is not asked."""
    return prompts.decontaminate.similarity if prompts.decontaminate is not None and prompts.decontaminate.benchmarks else None


def _heldout_limit(prompts: Prompts) -> float | None:
    """From which similarity on a prompt is a held-out one; null where that is not asked."""
    near, other = prompts.near_duplicates, prompts.decontaminate
    limits = [near.similarity] if near is not None else []
    limits += [other.similarity] if other is not None and other.heldout and other.similarity is not None else []
    return min(limits, default=None)


def _asking(row: Row, text: str) -> list[Message]:
    """A row's conversation with a text in place of the last turn of the user's."""
    messages: list[Message] = row["messages"]
    last = max(place for place, turn in enumerate(messages) if turn["role"] == "user")
    return [turn | {"content": text} if place == last else turn for place, turn in enumerate(messages)]


def _number_of(text: str) -> int:
    """64 bits for a text, of which none is 0."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") | 1


def _holds(places: Places, place: int) -> bool:
    at = int(np.searchsorted(places, place))
    return at < len(places) and int(places[at]) == place
