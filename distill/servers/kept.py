"""Targets from log-probabilities that came while the teacher wrote: nothing is loaded, and nothing is read a second time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.engines.reading import LeftOut, Reader
from distill.engines.scored import ScoredRow
from distill.engines.thoughts import Thoughts
from distill.errors import DataError, MissingStageError, ModelError
from distill.models.chat import IGNORE, ChatFormat
from distill.models.vocabulary import NONE, AlignedRow, VocabularyMap, ids_by_text, matching, vocabulary_map
from distill.recipe.experiment import Recipe
from distill.run.manifest import read_manifest
from distill.run.schema import THINK_OPEN, trace_key
from distill.run.tables import RandomRows, iter_rows
from distill.servers.told import Told, scored_row
from distill.targets.spec import TargetSpec

TABLE = "alternatives"
"""In the folder of the traces."""
_LARGE = 2**31 - 1  # in place of the size of a vocabulary that is not known


class Kept:
    """The table of alternatives, a row found by the trace's key.

    Args:
        folder: Of the traces.

    Raises:
        MissingStageError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        if TABLE not in read_manifest(folder).tables:
            raise MissingStageError(
                f"{folder}: holds no log-probabilities of what was written. Write the traces anew with generate.logprobs, or set "
                "score.source: server or process."
            )
        self._folder, self._rows = folder, RandomRows(folder, TABLE)
        self._places = {trace_key(row): n for n, row in enumerate(iter_rows(folder, TABLE, columns=["prompt_id", "sample_index"]))}

    def rows(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What was kept of some traces; of one that is not there, nothing."""
        found = {key: self._rows.row(self._places[key]) for key in keys if key in self._places}
        return {key: row for key, row in found.items() if row["token_logprobs"] is not None}

    @cached_property
    def has_ids(self) -> bool:
        """Whether candidates are told by their ids, which only the teacher's tokenizer explains."""
        return any(row["token_ids"] is not None for row in iter_rows(self._folder, TABLE, columns=["token_ids"]))


@dataclass(frozen=True)
class KeptReader(Reader):
    """Aligns a student's tokens with those that were written: by what both write."""

    kept: Kept | None = None
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is kept of the traces that are aligned now."""

    def row(self, trace: dict[str, Any]) -> AlignedRow | LeftOut:
        """The student's row, whose `positions` are one above the place of the same token among the written ones."""
        assert self.kept is not None
        input_ids, labels = self.student.trace_row(trace)
        key = trace_key(trace)
        if self.train.overlong == "drop" and len(input_ids) > self.train.max_length:
            return LeftOut(key, "too_long")
        told = self.kept.rows([key]).get(key)
        written = [label for label in labels if label != IGNORE]
        number = len(told["token_logprobs"]) if told is not None else 0
        places = self._places(trace, told, written) if told is not None else np.full(len(written), NONE)
        positions = np.where(places >= 0, places + 1, NONE).astype(np.int32)
        row = AlignedRow(key, np.array(input_ids, np.int32), np.array(labels, np.int32), np.zeros(number + 1, np.int32), positions)
        row = row.cut(self.train.max_length)
        return row if len(row.positions) else LeftOut(key, "no_supervised_token")

    def _places(self, trace: dict[str, Any], told: dict[str, Any], written: list[int]) -> NDArray[np.int64]:
        """For each of the student's tokens, which of the written ones it is, or -1."""
        pieces, ends = self._pieces(trace, told)
        theirs = pieces[:-1] if ends else pieces
        finished = bool(written) and written[-1] in (self.student.end_of_turn_id, self.student.calls.end_id)
        ours = [self.vocabulary.student.texts[index] for index in (written[:-1] if finished else written)]
        text, thinks = trace["completion"].encode(), trace["completion"].lstrip().startswith(THINK_OPEN)
        lead = self.student.opening(trace["messages"]).encode() if thinks else b""
        joined = b"".join(theirs)
        their_lead = text[: len(text) - len(joined)] if joined and text.endswith(joined) else b""
        places = np.full(len(written), NONE)
        places[: len(ours)] = matching(their_lead, theirs, lead, ours)
        if finished and ends:
            places[-1] = len(theirs)
        return places

    def _pieces(self, trace: dict[str, Any], told: dict[str, Any]) -> tuple[list[bytes], bool]:
        """What each written token writes, and whether the last one ends the turn."""
        number, ids = len(told["token_logprobs"]), trace["completion_ids"]
        if told["token_ids"] is not None and ids is not None and len(ids) == number:
            return [self.vocabulary.teacher.texts[index] for index in ids], bool(ids) and ids[-1] in self.teacher.stop_ids
        pieces = told["written_bytes"]
        if pieces is None or len(pieces) != number:
            return [b"\xff"] * number, False  # nothing is known of them, and nothing matches
        text = trace["completion"].encode()
        ends = bool(pieces) and trace["finish_reason"] == "stop" and (not pieces[-1] or not text.endswith(b"".join(pieces)[-len(text) :]))
        return pieces, ends


class KeptScorer:
    """Makes targets of what was kept.

    Args:
        kept: The table.
        target: What is kept of a distribution.
        vocabulary: The teacher's tokens as the student's.
        student: Its tokenizer.
        asked: Alternatives that were asked for.
        by_ids: Whether candidates are told by their ids in the teacher's vocabulary; else by what they write.
    """

    exact = False

    def __init__(self, kept: Kept, target: TargetSpec, vocabulary: VocabularyMap, student: ChatFormat, asked: int, *, by_ids: bool) -> None:
        self._kept, self.target, self._vocabulary, self._asked, self._by_ids = kept, target, vocabulary, asked, by_ids
        self._all_shared = by_ids and bool((vocabulary.student_ids != NONE).all())
        self._by_text = ids_by_text(vocabulary.student, student.end_of_turn_id)

    def read(self, batches: Iterable[Sequence[AlignedRow]]) -> Iterator[list[ScoredRow]]:
        """The rows of each batch."""
        return (self.score(batch) for batch in batches)

    def score(self, rows: Sequence[AlignedRow]) -> list[ScoredRow]:
        """Some rows, in their order."""
        found = self._kept.rows(row.key for row in rows)
        size = self._vocabulary.teacher_size if self._by_ids else _LARGE
        return [
            scored_row(row, self.target, self._told(row, found.get(row.key)), all_shared=self._all_shared, vocab_size=size, tokens=0)
            for row in rows
        ]

    def _told(self, row: AlignedRow, kept: dict[str, Any] | None) -> Told:
        places = (row.positions[row.positions >= 0] - 1).tolist()
        shape = (len(places), self._asked + 1)
        ids, log_probs, written = np.full(shape, NONE, np.int32), np.full(shape, -np.inf), np.empty(len(places))
        for number, place in enumerate(places):
            assert kept is not None  # else nothing is aligned
            values = [float("nan") if value is None else value for value in kept["logprobs"][place]][: shape[1]]
            log_probs[number, : len(values)] = values
            ids[number, : len(values)] = self._ids(kept, place)[: shape[1]]
            written[number] = kept["token_logprobs"][place]
        return Told(ids, log_probs, written, self._asked)

    def _ids(self, kept: dict[str, Any], place: int) -> list[int]:
        """The candidates in the student's ids; of several that are one there, the most probable, which comes first."""
        if kept["token_ids"] is not None:
            known = self._vocabulary.student_ids
            found = [int(known[index]) if 0 <= index < len(known) else NONE for index in kept["token_ids"][place]]
        else:
            found = [self._by_text.get(text, NONE) for text in kept["token_bytes"][place]]
        seen: set[int] = set()
        for number, index in enumerate(found):
            if index in seen:
                found[number] = NONE
            seen.add(index)
        return found


class KeptThoughts(Thoughts):
    """What a teacher thought while it wrote.

    Args:
        recipe: With `generate.logprobs`.
        traces: The folder of what it wrote.
    """

    unverified = "log-probabilities that came while the teacher wrote are all there is of them"

    def __init__(self, recipe: Recipe, traces: Path) -> None:
        super().__init__(recipe)
        self._traces = traces

    @cached_property
    def _kept(self) -> Kept:
        return Kept(self._traces)

    @cached_property
    def vocabulary(self) -> VocabularyMap:
        """The teacher's tokens as the student's; where candidates come as text, the student's own, because no others are needed."""
        teacher = self.teacher_chat if self._kept.has_ids else self.student_chat
        found = vocabulary_map(teacher, self.student_chat)
        self.recipe.train.kd.check_size(self.settings.target, found.student_size)
        return found

    @property
    def identical(self) -> bool:
        """Never: whether written tokens are the student's is found for each."""
        return False

    @property
    def advice(self) -> str:
        """What can be done where too few tokens get a target."""
        return (
            "Lower score.min_aligned, and the rest is learned without targets; or let the teacher read the traces (score.source: process)."
        )

    @cached_property
    def reader(self) -> KeptReader:
        """Aligns by what was written."""
        teacher = self.teacher_chat if self._kept.has_ids else self.student_chat
        return KeptReader(teacher, self.student_chat, self.vocabulary, self.recipe.train, self._kept)

    @cached_property
    def scorer(self) -> KeptScorer:
        """Makes targets of what is kept."""
        assert self.recipe.generate is not None and self.recipe.generate.logprobs is not None  # the recipe was validated
        asked, by_ids = self.recipe.generate.logprobs, self._kept.has_ids
        return KeptScorer(self._kept, self.settings.target, self.vocabulary, self.student_chat, asked, by_ids=by_ids)

    @property
    def device(self) -> str:
        """Nothing computes."""
        return "none"

    @property
    def record(self) -> dict[str, Any]:
        """The teacher as the traces have it."""
        author = read_manifest(self._traces).facts.get("author")
        if not isinstance(author, dict) or "model" not in author:
            raise DataError(f"{self._traces}: does not say who wrote its traces. Make it anew with --redo.")
        return {"revision": None, **author}

    def facts(self) -> dict[str, Any]:
        """Where the thoughts come from."""
        return {"source": "generation", "candidates_by": "id" if self._kept.has_ids else "text"}

    def _teacher_digests(self) -> tuple[str, str]:
        try:
            return self.teacher_chat.tokenizer_digest, self.teacher_chat.template_digest
        except ModelError:  # a host's, which nothing here depends on
            return "unknown", "unknown"
