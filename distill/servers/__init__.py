"""Models behind servers: what is asked of one, what comes back, and what that used.

protocols   a request as the server's kind takes it, and its answer as ours      (knows no network)
answers     one reader of answers for all of them                                 (knows no network)
client      many requests at once, tried again, spread, bounded                    (knows no models)
writing     an engine: completions of a model behind a server
reading     a scorer: what a teacher behind a server thinks of rows
kept        a scorer: what a teacher thought while it wrote
thinking    whose thoughts are scored: here, behind a server, kept
process     a server's process: started, healthy, ended with its children
commands    the command line that starts a server of each kind
needs       what a server that is started must be able to do
serving     the addresses of a role's model: given, found, or started for it
left        addresses that `distill serve` leaves in a run: announced, read, awaited
alive       whether a server answers, and which models it names
nodes       where a job of a cluster runs, and how other nodes reach it
spread      the commands of one server over several nodes
opening     whoever writes or reads for a role of the recipe, here or behind a server
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from distill.engines.written import Alternatives, Failure

__all__ = ["Alternatives", "Answer", "Call", "Failure", "Stream", "Usage"]


@runtime_checkable
class Stream(Protocol):
    """An answer that comes in events, as far as it has come."""

    def add(self, event: Any) -> None:
        """One more event, as parsed JSON."""

    def whole(self) -> dict[str, Any]:
        """The one body that it would have been.

        Raises:
            BrokenAnswerError: it stopped before its end.
        """


@dataclass(frozen=True)
class Call:
    """One HTTP request."""

    path: str
    """Behind the server's address: `/v1/completions`."""
    body: dict[str, Any] | None = None
    """JSON that is posted; null is a GET."""
    streams: Callable[[], Stream] | None = None
    """What puts the events of a stream together; null where the answer comes whole."""


@dataclass(frozen=True)
class Usage:
    """What a request used; sums of usages are usages."""

    input_tokens: int = 0
    """Read, cached ones included."""
    cached_tokens: int = 0
    """Of those, what the server had in its cache."""
    output_tokens: int = 0
    """Written, reasoning included."""
    reasoning_tokens: int = 0
    """Of those, reasoning, where the server says so."""
    requests: int = 0
    """That were answered."""
    retries: int = 0
    """Times that one was sent again."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.requests + other.requests,
            self.retries + other.retries,
        )


@dataclass(frozen=True)
class Answer:
    """What a server wrote, whatever its kind."""

    text: str
    """Whole answer, reasoning between think tags included, end of turn not."""
    finish_reason: str
    """`stop`, `length`, or `error` for anything else that ended it (a refused content, a tool that was called); what the server itself
    ended is no answer."""
    usage: Usage
    prompt_ids: list[int] | None = None
    """As the server read them; null where it doesn't tell."""
    completion_ids: list[int] | None = None
    """As it drew them, with the token that ended it; null where it doesn't tell."""
    alternatives: Alternatives | None = None
    model: str | None = None
    """Name of the model that answered, by the server."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What differs from what was asked for, by name: shown once, and recorded."""
