"""Engines write completions. One protocol, and the loop that every stage runs them in.

The loop knows nothing of how tokens are made: it puts requests in batches, keeps every finished batch on disk, asks
only for what is missing after a restart, and returns rows in the order of the requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distill.engines.batching import by_length
from distill.recipe.base import Sampling
from distill.run.journal import Journal
from distill.run.log import progress
from distill.run.schema import Message


@dataclass(frozen=True)
class Request:
    """One completion to be written."""

    prompt_id: str
    sample_index: int
    messages: list[Message]
    reference: str | None
    seed: int


@dataclass(frozen=True)
class Completion:
    """What an engine wrote."""

    text: str
    """Whole answer, reasoning included, end of turn not."""
    prompt_ids: list[int]
    completion_ids: list[int]
    """With the token that ended it, if one did."""
    finish_reason: str
    """`stop` or `length`."""


class Engine(Protocol):
    """Something that writes completions."""

    def prompt_length(self, request: Request) -> int:
        """Tokens of the rendered prompt."""
        ...

    def complete(self, batch: list[Request]) -> list[Completion]:
        """One completion for each request, in order; a request's random numbers depend on its seed alone, its tokens also on rounding."""
        ...


def requests_for(prompts: Sequence[dict[str, Any]], samples_per_prompt: int, seed: int) -> list[Request]:
    """`samples_per_prompt` requests for each prompt row, each with a seed of its own."""
    return [
        Request(row["prompt_id"], index, row["messages"], row["reference"], request_seed(seed, row["prompt_id"], index))
        for row in prompts
        for index in range(samples_per_prompt)
    ]


def request_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """64-bit seed of one request: independent of batch, order and restart."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def write_traces(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, journal: Journal, author: str, description: str
) -> list[dict[str, Any]]:
    """Trace rows for all requests, in their order, keeping every finished batch in the journal.

    Batches are the same after a restart, so its rows are too, to the last bit; another `batch_size` changes only the
    rounding of the logits.
    """
    done = {_key(row): row for row in journal.rows() if row["author"] == author}
    todo = by_length([r for r in requests if (r.prompt_id, r.sample_index) not in done], engine.prompt_length, sampling.batch_size)
    bar = progress(len(requests), "traces", description, done=len(done))
    tokens = 0
    with bar:
        for batch in todo:
            rows = [_row(request, completion, author) for request, completion in zip(batch, engine.complete(batch), strict=True)]
            journal.append(rows)
            done |= {_key(row): row for row in rows}
            tokens += sum(len(row["completion_ids"]) for row in rows)
            bar.update(len(rows))
            bar.set_postfix_str(f"{tokens / max(bar.elapsed_s, 1e-9):,.0f} tokens/s")
    return [done[request.prompt_id, request.sample_index] for request in requests]


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["prompt_id"], row["sample_index"]


def _row(request: Request, completion: Completion, author: str) -> dict[str, Any]:
    return {
        "prompt_id": request.prompt_id,
        "sample_index": request.sample_index,
        "author": author,
        "messages": request.messages,
        "reference": request.reference,
        "completion": completion.text,
        "prompt_ids": completion.prompt_ids,
        "completion_ids": completion.completion_ids,
        "finish_reason": completion.finish_reason,
        "seed": request.seed,
    }
