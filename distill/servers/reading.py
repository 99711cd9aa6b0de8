"""A scorer whose teacher stands behind a server: it is sent the row's ids, and tells what it thinks of each of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from distill.engines.scored import ScoredRow
from distill.engines.thoughts import Thoughts
from distill.errors import IntegrityError, RecipeError, ServerError
from distill.models.vocabulary import NONE, AlignedRow, VocabularyMap
from distill.recipe.experiment import Recipe
from distill.servers import Call, Failure, Usage
from distill.servers.answers import BrokenAnswerError
from distill.servers.client import Client
from distill.servers.left import patience_s
from distill.servers.needs import needs_of
from distill.servers.protocols import protocol_of
from distill.servers.serving import Served, serving
from distill.servers.spending import Spending, shared
from distill.servers.told import Told, scored_row
from distill.servers.wire import Protocol
from distill.targets.spec import TargetSpec, TopK

Read = Callable[[Sequence[AlignedRow], TargetSpec], list[ScoredRow]]
"""What a model thinks of rows, in their order."""
TOKENS_IN_FLIGHT = 32_768
"""Of prompts, at one address: log-probabilities of a prompt take memory that a server has not planned for."""
_JUDGED = 20  # candidates by which it is judged whether the student has the teacher's tokens, where one alone is stored


class Place(NamedTuple):
    """What a server tells of a token of the prompt."""

    written: float
    """Log-probability of the token itself."""
    best: list[tuple[int, float]]
    """Ids and log-probabilities of the most probable ones, in any order; the token itself may be among them in addition."""


class ServerScorer:
    """Reads rows through a server.

    Args:
        client: Open.
        protocol: Of the server.
        target: What is kept of a distribution.
        vocabulary: The teacher's tokens as the student's.
    """

    exact = False

    def __init__(self, client: Client, protocol: Protocol, target: TargetSpec, vocabulary: VocabularyMap) -> None:
        self._client, self._protocol, self.target, self._vocabulary = client, protocol, target, vocabulary
        self._all_shared = bool((vocabulary.student_ids != NONE).all())
        wanted = target.k if isinstance(target, TopK) else (1 if self._all_shared else _JUDGED)
        self._k = min(wanted, vocabulary.teacher_size)

    def read(self, batches: Iterable[Sequence[AlignedRow]]) -> Iterator[list[ScoredRow]]:
        """What the teacher thinks of the rows of all batches; so many together as may be in flight.

        Raises:
            ServerError: the server is gone, or refuses a row.
            IntegrityError: what it tells is of other tokens than were sent.
        """
        group: list[AlignedRow] = []
        tokens = 0
        for row in (row for batch in batches for row in batch):
            if group and tokens + len(row.teacher_ids) > TOKENS_IN_FLIGHT * self._client.addresses:
                yield self.score(group)
                group, tokens = [], 0
            group.append(row)
            tokens += len(row.teacher_ids)
        if group:
            yield self.score(group)

    def score(self, rows: Sequence[AlignedRow]) -> list[ScoredRow]:
        """What the teacher thinks of some rows, in their order; all are in flight together."""
        start = time.perf_counter()
        calls = ((place, self._call(row)) for place, row in enumerate(rows) if (row.positions >= 0).any())
        told: dict[int, dict[str, Any]] = {}
        try:
            for place, answer in self._client.run(calls, lambda body, call: _checked(body), _usage):
                if isinstance(answer, Failure):
                    raise ServerError(self._refused(rows[place], answer))
                told[place] = answer
        except ServerError as error:
            if "prompt logprobs" in str(error) and "--max-logprobs" not in str(error):
                raise ServerError(f"{error} {self._more}") from None
            raise
        scored = [self._row(row, told.get(place)) for place, row in enumerate(rows)]
        for row in scored:
            row.statistics.device_s = (time.perf_counter() - start) / len(scored)
        return scored

    def _call(self, row: AlignedRow) -> Call:
        return self._protocol.reading(row.teacher_ids.tolist(), self._k, _first(row))

    def _row(self, row: AlignedRow, body: dict[str, Any] | None) -> ScoredRow:
        wanted = row.positions[row.positions >= 0]
        if body is None:
            nothing = Told(np.empty((0, self._k), np.int32), np.empty((0, self._k)), np.empty(0), self._k)
            return self._scored(row, nothing, 0)
        places = _places(body, row.teacher_ids.tolist(), _first(row), row.key)
        width = self._k + 1
        ids, log_probs, written = (
            np.full((len(wanted), width), NONE, np.int32),
            np.full((len(wanted), width), -np.inf),
            np.empty(len(wanted)),
        )
        for number, position in enumerate(wanted.tolist()):
            place = places[position]
            written[number] = place.written
            best = place.best[:width]
            ids[number, : len(best)] = [index for index, _ in best]
            log_probs[number, : len(best)] = [value for _, value in best]
        outside = ids >= self._vocabulary.teacher_size  # rows that pad the head
        known = (ids >= 0) & ~outside
        mapped = np.where(known, self._vocabulary.student_ids[np.where(known, ids, 0)], NONE).astype(np.int32)
        return self._scored(row, Told(mapped, log_probs, written, self._k), len(row.teacher_ids))

    def _scored(self, row: AlignedRow, told: Told, tokens: int) -> ScoredRow:
        size = self._vocabulary.teacher_size
        return scored_row(row, self.target, told, all_shared=self._all_shared, vocab_size=size, tokens=tokens)

    @property
    def _more(self) -> str:
        return f"Start it with --max-logprobs {self._k} (one that the stage starts: teacher.server.args), or lower score.target.k."

    def _refused(self, row: AlignedRow, failure: Failure) -> str:
        advice = "What is scored stays; run this again, and it goes on."
        if "logprobs" in failure.detail.lower():
            advice = self._more
        elif failure.reason == "too_long":
            advice = "Start it with a longer context (vLLM: --max-model-len), or lower train.max_length."
        return (
            f"teacher.server: could not read trace {row.key} ({len(row.teacher_ids):,} tokens): {failure.reason} {failure.detail}".rstrip()
            + f". {advice}"
        )


class ServedThoughts(Thoughts):
    """Thoughts of a teacher behind a server, which is found or started when it is first asked, and ended with the context.

    Args:
        recipe: The recipe.
        place: The stage's folder.
        run: The run's folder.
        part: Of the stage, where several processes share its folder.
    """

    def __init__(self, recipe: Recipe, place: Path, run: Path, part: str = "") -> None:
        super().__init__(recipe)
        self._place, self._run, self._part, self._stack = place, run, part, ExitStack()
        self._spending: Spending | None = None

    def __enter__(self) -> ServedThoughts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    @cached_property
    def scorer(self) -> ServerScorer:
        """The server, ready to read."""
        served, server = self._served, self.teacher.server
        assert server is not None
        part, parts = _piece(self._part)
        self._spending = Spending(self._place, "teacher", shared(server, parts), part)
        client = self._stack.enter_context(Client(server, served.urls, self._spending, lives=served.lives, watch=served.watch))
        protocol = protocol_of(server, served.model)
        return ServerScorer(client, protocol, self.settings.target, self.vocabulary)

    @cached_property
    def _served(self) -> Served:
        server = self.teacher.server
        assert server is not None
        if server.is_started and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not patience_s():
            raise RecipeError(
                "teacher.server: each of several processes would start a server of its own. Run `distill score` in one process, or start "
                "the server by hand (`distill serve`) and give its url."
            )
        needs = needs_of(self.recipe, "teacher")
        return self._stack.enter_context(serving(self.teacher, "teacher", self._place, self._run, needs=needs, part=self._part))

    @property
    def device(self) -> str:
        """The kind of server."""
        assert self.teacher.server is not None
        return f"server ({self.teacher.server.kind})"

    @property
    def record(self) -> dict[str, Any]:
        """Name and revision of the teacher; a server tells no size, and no address belongs into a run."""
        server, spec = self.teacher.server, self.teacher
        assert server is not None
        files = spec.identity()["files"]
        known = {"model": spec.model, "revision": spec.revision, "parameters": None} | ({"files": files} if files else {})
        return known | {"server": {"kind": server.kind, "model": server.model or spec.model}}

    def facts(self) -> dict[str, Any]:
        """What the server was asked for."""
        return {"source": "server"} | ({"server": self._spending.facts_of_all()} if self._spending is not None else {})


@contextmanager
def open_reader(recipe: Recipe, place: Path, run: Path, vocabulary: VocabularyMap, k: int) -> Iterator[Read]:
    """The recipe's teacher behind its server, to read a few rows; one that is started for it is ended with the context.

    Args:
        recipe: With a teacher whose server tells log-probabilities of a prompt.
        place: Where its log and what it used are put.
        run: The run's folder.
        vocabulary: The teacher's tokens as the student's.
        k: Candidates that will be asked for at most.
    """
    spec = recipe.teacher
    assert spec is not None and spec.server is not None
    needs = needs_of(recipe, "teacher")
    needs = replace(needs, logprobs=max(needs.logprobs, k))
    with (
        serving(spec, "teacher", place, run, needs=needs) as served,
        Client(spec.server, served.urls, Spending(place, "teacher", spec.server), lives=served.lives, watch=served.watch) as client,
    ):
        protocol = protocol_of(spec.server, served.model)

        def read(rows: Sequence[AlignedRow], target: TargetSpec) -> list[ScoredRow]:
            scorer = ServerScorer(client, protocol, target, vocabulary)
            return [row for scored in scorer.read([rows]) for row in scored]

        yield read


def _piece(shard: str) -> tuple[str, int]:
    """A name for this process among those that may share the stage's folder, and how many these are: its part, its rank in a launch."""
    index, _, count = shard.partition("/")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    names = [f"{index}-of-{count}"] if shard else []
    names += [f"rank-{os.environ.get('RANK', '0')}"] if size > 1 else []
    return "-".join(names), int(count or 1) * size


def _first(row: AlignedRow) -> int:
    return int(row.positions[row.positions >= 0].min())


def _checked(body: Any) -> dict[str, Any]:
    """An answer that has log-probabilities of the prompt.

    Raises:
        BrokenAnswerError: it has none.
    """
    try:
        if "choices" in body:
            told = body["choices"][0]["prompt_logprobs"]
        else:
            told = body["meta_info"]["input_top_logprobs"] and body["meta_info"]["input_token_logprobs"]
    except (KeyError, IndexError, TypeError):
        told = None
    if not isinstance(told, list):
        raise BrokenAnswerError("broken_answer", "no log-probabilities of the prompt")
    return dict(body)


def _usage(body: dict[str, Any]) -> Usage:
    usage = body.get("usage") or body.get("meta_info") or {}
    return Usage(input_tokens=int(usage.get("prompt_tokens") or 0), output_tokens=int(usage.get("completion_tokens") or 0), requests=1)


def _places(body: dict[str, Any], ids: list[int], first: int, key: str) -> dict[int, Place]:
    """What is told of each token of the prompt from `first` on, by its place.

    Raises:
        IntegrityError: it is of other tokens than were sent.
    """
    try:
        return _of_vllm(body, ids) if "choices" in body else _of_sglang(body["meta_info"], ids, first)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise IntegrityError(
            f"teacher.server: what it tells of trace {key} is not of the {len(ids):,} tokens that were sent "
            f"({type(error).__name__}: {error}). Is it a server of the kind that the recipe names, with the teacher's tokenizer?"
        ) from None


def _of_vllm(body: dict[str, Any], ids: list[int]) -> dict[int, Place]:
    entries = body["choices"][0]["prompt_logprobs"]
    if len(entries) != len(ids):
        raise ValueError(f"{len(entries)} entries")
    read = body["choices"][0].get("prompt_token_ids")
    if read is not None and read != ids:
        raise ValueError("it says that it read others")
    places = {}
    for place, (index, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), start=1):
        if str(index) not in entry:
            raise ValueError(f"token {index} is not at place {place}")
        found = sorted(((value.get("rank") or 2**31, int(name), _number(value["logprob"])) for name, value in entry.items()))
        places[place] = Place(_number(entry[str(index)]["logprob"]), [(name, value) for _, name, value in found])
    return places


def _of_sglang(meta: dict[str, Any], ids: list[int], first: int) -> dict[int, Place]:
    begin = max(first - 1, 0)
    written, best = meta["input_token_logprobs"], meta["input_top_logprobs"]
    if len(written) != len(ids) - begin or len(best) != len(written):
        raise ValueError(f"{len(written)} entries from place {begin}")
    places = {}
    for place in range(first, len(ids)):
        value, index = written[place - begin][:2]
        if index != ids[place]:
            raise ValueError(f"token {index} at place {place}")
        places[place] = Place(_number(value), [(int(name), _number(other)) for other, name, *_ in best[place - begin]])
    return places


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
