"""What engines are asked for, and what they give."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
class Failure:
    """Why a request failed for good: it could not be answered, however often it was sent."""

    reason: str
    """In one word, for counting: `content_filter`, `too_long`, `timeout`, `broken_answer`, `http_400`, ..."""
    detail: str = ""
    """The server's own words, cut."""


@dataclass(frozen=True)
class Alternatives:
    """The most probable tokens beside each one that was written; lists of one length, an entry a written token."""

    token_logprobs: list[float]
    """Of the written token, in nats."""
    logprobs: list[list[float]]
    """Of the alternatives, the written one among them only if it is one of the best; in nats."""
    token_ids: list[list[int]] | None = None
    """Their ids, where the server tells them."""
    token_bytes: list[list[bytes]] | None = None
    """Else what they write."""
    written_bytes: list[bytes] | None = None
    """What the written tokens write, where it is told."""


@dataclass(frozen=True)
class Completion:
    """What an engine wrote."""

    text: str
    """Whole answer, reasoning included, end of turn not."""
    prompt_ids: list[int] | None
    """Null where a server doesn't tell what it read."""
    completion_ids: list[int] | None
    """With the token that ended it, if one did; null where a server doesn't tell what it drew: the text counts then."""
    finish_reason: str
    """`stop`, `length`, or `error` for anything else."""
    alternatives: Alternatives | None = None
    """What else might have been written, where that was asked for."""


class Engine(Protocol):
    """Something that writes completions."""

    def write(self, requests: Sequence[Request]) -> Iterator[Sequence[tuple[int, Completion | Failure]]]:
        """Completions as they end, in any order, each with its place among the requests; or why one failed for good.

        A request's random numbers depend on its seed alone, its tokens also on rounding.
        """
        ...


def requests_for(prompts: Sequence[dict[str, Any]], samples_per_prompt: int, seed: int) -> list[Request]:
    """`samples_per_prompt` requests for each prompt row, or as many as it says under `samples`, each with a seed of its own."""
    return [
        Request(row["prompt_id"], index, row["messages"], row["reference"], request_seed(seed, row["prompt_id"], index))
        for row in prompts
        for index in range(row.get("samples", samples_per_prompt))
    ]


def request_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """64-bit seed of one request: independent of batch, order and restart."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
