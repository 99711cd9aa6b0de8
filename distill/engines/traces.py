"""A table of traces, filled a window of prompts at a time; and a few traces at once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill.engines.earlier import EarlierTraces
from distill.engines.windows import Window
from distill.engines.written import Engine, Request, requests_for
from distill.recipe.base import Sampling
from distill.run.journal import Journal
from distill.run.log import progress, say
from distill.run.tables import ROWS_PER_SHARD, TableWriter, rows_of

_TOKENS_PER_WINDOW = 2**24  # at most, of completions: about 150 MB
_LEAST_ROWS = 512  # of a window, however long they may be


class TraceTable:
    """A table of traces, filled a window of prompts at a time, so that a million of them never lie in memory.

    What an engine writes goes to the journal; a whole window goes as shards to the tables: first what was dropped of it, then the
    alternatives, then the traces; and the journal begins anew. After a kill the whole shards count as they are, and the journal is
    that of the window under way, or of the one whose shards are there already: rows of other requests in it are passed over.

    Args:
        table: Opened to resume.
        journal: Of its window.
        sampling: How tokens are drawn, how often, and how many sequences at once.
        seed: Of the stage.
        earlier: Traces that need not be written again, where the stage grows or was written in parts.
        dropped: Of requests that failed for good, opened to resume; null makes each a trace that ended by `error`.
        alternatives: What else might have been written, a row a trace, opened to resume; null keeps none.
        behind: Whether all that is asked for is missing and stands behind the rows there, which are of one author; else these are of the
            first requests.
    """

    def __init__(
        self,
        table: TableWriter,
        journal: Journal,
        sampling: Sampling,
        seed: int,
        earlier: EarlierTraces | None = None,
        *,
        dropped: TableWriter | None = None,
        alternatives: TableWriter | None = None,
        behind: bool = False,
    ) -> None:
        self._table, self._journal, self._sampling, self._seed, self._earlier = table, journal, sampling, seed, earlier
        self._dropped, self._alternatives = dropped, alternatives
        self._others = self._num_done if behind else 0  # rows of requests that are not asked for here
        self._asked = self._others  # rows that belong into the tables so far
        self.tokens = 0
        self.num_unknown = 0
        """Traces of which the tokens are not known."""
        self.finish_reasons: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()
        """Reason and number of requests that failed for good."""
        for piece in table.pieces(["completion_ids", "finish_reason"]):
            self._count(piece)
        for piece in dropped.pieces(["reason"]) if dropped is not None else ():
            self.drops.update(piece["reason"].to_pylist())

    @property
    def num_rows(self) -> int:
        """Traces in the table."""
        return self._table.num_rows

    @property
    def is_new(self) -> bool:
        """Whether nothing was written so far, neither in an earlier piece of the stage nor before it grew."""
        return not self._num_done and self._earlier is None and not any(True for _ in self._journal.rows())

    def knows(self, author: str) -> bool:
        """Whether traces of an author were written before."""
        return self._earlier is not None and self._earlier.count(author) > 0

    def write(
        self,
        engine: Engine | None,
        prompts: Iterable[dict[str, Any]],
        num_prompts: int,
        author: str,
        description: str,
        max_failed: float = 0.0,
        *,
        sampling: Sampling | None = None,
        further: int = 0,
        silent: bool = False,
    ) -> None:
        """Adds a trace for each prompt and sample, in their order, as far as they are not there.

        Args:
            engine: Writes them; null where all have been written before.
            prompts: With `prompt_id`, `messages` and `reference`, and `samples` where another number of them is asked for; the same
                after a restart.
            num_prompts: How many.
            author: Of the traces.
            description: For the progress bar.
            max_failed: Share of the requests that may fail for good.
            sampling: How these are drawn, and how often; null: as all others.
            further: How many requests there are beyond `samples_per_prompt` of each.
            silent: Whether nothing is said of what is known: it is of this making, or was said.

        Raises:
            ServerError: more did.
        """
        sampling = sampling or self._sampling
        samples, at_once = sampling.samples_per_prompt, _prompts_at_once(sampling)
        total, source, begins = num_prompts * samples + further, iter(prompts), self._asked - self._others  # behind other authors' rows
        if self._earlier is not None and self.knows(author) and not silent:
            say(f"{description}: {self._earlier.count(author):,} traces were written before, and are not written again")
        done = min(max(self._num_done - self._asked, 0) + _journalled(self._journal, author), total)
        with progress(total, "traces", description, done=done) as bar:
            while prompts_here := list(itertools.islice(source, at_once)):
                before, size = self._asked, sum(row.get("samples", samples) for row in prompts_here)
                self._asked += size
                there = max(self._num_done - before, 0)  # a kill between two shards of a window leaves the first
                if there >= size:
                    continue
                requests = requests_for(prompts_here, samples, self._seed)
                has_others = self._alternatives is not None
                window = Window(requests, author, self._journal, bar, alternatives=has_others, drops=self._dropped is not None)
                if self._earlier is not None:
                    keys = [(request.prompt_id, request.sample_index) for request in requests]
                    window.take_over(self._earlier.rows(author, keys, alternatives=has_others))
                window.fill(engine, max_failed, before - begins, self.drops.total())
                self._store(window, there)

    def _store(self, window: Window, there: int) -> None:
        """Puts a whole window on disk, behind so many of its rows that are there: the first of dropped, alternatives, traces."""
        lost, kept = window.dropped(), window.traces()
        num_lost = min(there, len(lost))
        num_kept = there - num_lost
        if self._dropped is not None:
            self._end(self._dropped, lost[num_lost:])
            self.drops.update(lost["reason"].to_pylist()[num_lost:])
        if self._alternatives is not None:
            missing = self.num_rows - num_kept + len(kept) - self._alternatives.num_rows
            self._end(self._alternatives, window.others()[len(kept) - missing :])
        for piece in kept[num_kept:].to_batches():
            self._count(piece)
        self._end(self._table, kept[num_kept:])
        self._journal.clear()

    @staticmethod
    def _end(table: TableWriter, rows: pa.Table) -> None:
        for piece in rows.to_batches():
            table.add(piece)
        table.end_shard()

    @property
    def _num_done(self) -> int:
        """Rows in the tables, whatever became of their requests."""
        return self.num_rows + (0 if self._dropped is None else self._dropped.num_rows)

    def _count(self, piece: pa.RecordBatch) -> None:
        self.tokens += pc.sum(pc.list_value_length(piece["completion_ids"])).as_py() or 0
        self.num_unknown += piece["completion_ids"].null_count
        self.finish_reasons.update(piece["finish_reason"].to_pylist())


def _prompts_at_once(sampling: Sampling) -> int:
    """Prompts whose traces are in memory at once: by the tokens that they can have, but enough to sort by length."""
    rows = min(max(_TOKENS_PER_WINDOW // sampling.max_new_tokens, _LEAST_ROWS), ROWS_PER_SHARD)
    return max(1, rows // sampling.samples_per_prompt)


def write_traces(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    journal: Journal,
    author: str,
    description: str,
    max_failed: float = 0.0,
) -> list[dict[str, Any]]:
    """Trace rows for requests that are few, in their order, keeping every finished one in the journal.

    After a restart a sequence has other neighbours, as with another `batch_size`: that changes only the rounding of the logits.
    A request that failed for good is a row that ended by `error`.

    Raises:
        ServerError: more than the share `max_failed` did.
    """
    with progress(len(requests), "traces", description, done=_journalled(journal, author)) as bar:
        window = Window(requests, author, journal, bar)
        window.fill(engine, max_failed)
        return rows_of(window.traces())


def _journalled(journal: Journal, author: str) -> int:
    return sum(row["author"] == author for row in journal.rows())
