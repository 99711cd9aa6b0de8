"""A server as an engine: completions of a model that runs elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.engines import Completion, Request
from distill.errors import visible
from distill.models.chat import ChatFormat
from distill.recipe.base import Sampling
from distill.run.log import say
from distill.servers import Answer, Call, Failure
from distill.servers.client import Client
from distill.servers.protocols import Prompt, Protocol

Row = tuple[int, Completion | Failure]


class ServerEngine:
    """Writes completions with a model behind a server: a request a sample, each with a seed of its own.

    Args:
        client: Of the server.
        protocol: How it is spoken to.
        chat: Tokenizer and template, which render prompts for servers that take ids; may be null for one that takes messages.
        sampling: How tokens are drawn.
        logprobs: Alternatives wanted beside each written token.
        kwargs: The model's `chat_template_kwargs`, for servers that render messages.
        context: Tokens of prompt and answer together that the server takes, if that is known.
    """

    def __init__(
        self,
        client: Client,
        protocol: Protocol,
        chat: ChatFormat | None,
        sampling: Sampling,
        *,
        logprobs: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> None:
        assert chat is not None or not protocol.facts.takes_ids, "a server that takes ids needs the tokenizer here"
        self._client, self._protocol, self._chat, self._sampling = client, protocol, chat, sampling
        self._logprobs, self._kwargs, self._context = logprobs, dict(kwargs or {}), context
        self.notes: Counter[str] = Counter()
        """What answers differed in from what was asked, and how often."""

    def drawing(self, sampling: Sampling) -> ServerEngine:
        """The same server, drawing otherwise; notes are shared."""
        how: dict[str, Any] = {"logprobs": self._logprobs, "kwargs": self._kwargs, "context": self._context}
        other = ServerEngine(self._client, self._protocol, self._chat, sampling, **how)
        other.notes = self.notes
        return other

    def write(self, requests: Sequence[Request]) -> Iterator[list[Row]]:
        """Completions as they arrive, those together that did, each with its place among the requests; or why one failed for good.

        Raises:
            ServerError: the server can't go on, for no fault of a row.
            BudgetError: a limit of the recipe is reached.
        """
        too_long: list[Row] = []
        groups = self._client.groups(self._calls(requests, too_long), self._protocol.answer, lambda answer: answer.usage)
        for group in groups:
            rows: list[Row] = [(place, self._completion(requests[place], told)) for place, told in group]
            yield rows + too_long
            too_long.clear()
        if too_long:
            yield too_long

    def _calls(self, requests: Sequence[Request], too_long: list[Row]) -> Iterator[tuple[int, Call]]:
        """A request for each sample, made when there is room for it; prompts that leave no room for an answer are put aside."""
        chat, takes_ids = self._chat, self._protocol.facts.takes_ids
        stop_ids = chat.stop_ids if chat is not None and self._protocol.facts.stops_at_ids else ()
        rendered: tuple[str, Prompt, int] | None = None  # samples of one prompt follow each other
        for place, request in enumerate(requests):
            if rendered is None or rendered[0] != request.prompt_id:
                ids = chat.prompt_ids(request.messages) if chat is not None and (takes_ids or self._context is not None) else []
                rendered = request.prompt_id, ids if takes_ids else request.messages, len(ids)
            _, prompt, length = rendered
            if self._context is not None and length + self._sampling.max_new_tokens > self._context:
                room = f"{length:,} tokens, and {self._sampling.max_new_tokens:,} of an answer, in a context of {self._context:,}"
                too_long.append((place, Failure("too_long", room)))
                continue
            yield (
                place,
                self._protocol.writing(
                    prompt, self._sampling, request.seed, stop_ids=stop_ids, logprobs=self._logprobs, kwargs=self._kwargs
                ),
            )

    def _completion(self, request: Request, told: Answer | Failure) -> Completion | Failure:
        if isinstance(told, Failure):
            return told
        for name, what in told.notes.items():
            self._note(name, what)
        text = told.text
        if self._chat is not None and told.completion_ids is not None and self._protocol.facts.takes_ids:
            text = self._chat.text_of(told.completion_ids, self._chat.opening(request.messages))
        return Completion(text, told.prompt_ids, told.completion_ids, told.finish_reason, told.alternatives)

    def _note(self, name: str, what: Any) -> None:
        """Said once of each kind, and counted."""
        if not self.notes[name]:
            say(f"server    {name}: {visible(str(what), 200)}")
        self.notes[name] += 1
