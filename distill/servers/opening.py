"""Whoever writes for a role of a recipe: a model in this process, or one behind a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.engines.written import Completion, Engine, Failure, Request
from distill.errors import ModelError, RecipeError, ServerError
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.recipe.servers import Server
from distill.run.log import say
from distill.servers.needs import ServerNeeds, needs_of

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat
    from distill.servers.client import Client
    from distill.servers.protocols import Protocol
    from distill.servers.spending import Spending


@dataclass(frozen=True)
class Writer:
    """A model that is ready to write."""

    engine: Engine
    record: dict[str, Any]
    """Name, revision and size of the model, and where it stood, for the manifest."""
    device: str
    """What it computes on: a device of this process, or `server` with its kind and the number of its addresses."""
    chat: ChatFormat | None
    """Its tokenizer and template; null of a hosted model whose tokenizer can't be had."""
    max_failed: float = 0.0
    """Share of requests that may fail for good."""
    spending: Spending | None = None
    """What a server was asked for; null in this process."""
    warnings: list[str] = field(default_factory=list)
    """What can't be as the recipe's defaults say."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What of the answers was not as asked, and in how many."""
    redrawn: Callable[[Sampling, str], Engine] | None = None
    """The same model with another sampling, and a name for it."""

    @property
    def rendering(self) -> dict[str, Any]:
        """Digests of tokenizer and template, as far as they are known here."""
        if self.chat is None:
            return {}
        return {"tokenizer_digest": self.chat.tokenizer_digest, "template_digest": self.chat.template_digest}

    def drawing(self, sampling: Sampling, name: str) -> Engine:
        """The same model, drawing otherwise.

        Args:
            sampling: How.
            name: For what, in letters, digits, `_` and `-`.
        """
        assert self.redrawn is not None, "this writer draws in one way"
        return self.redrawn(sampling, name)

    def spent(self) -> dict[str, Any]:
        """What a server was asked for, and what could not be as asked, for the manifest; empty in this process."""
        found: dict[str, Any] = {} if self.spending is None else {"server": self.spending.facts()}
        found |= {"warnings": self.warnings} if self.warnings else {}
        return found | ({"not_as_asked": dict(self.notes)} if self.notes else {})


@contextmanager
def open_writer(
    recipe: Recipe,
    role: str,
    sampling: Sampling,
    place: Path,
    run: Path,
    *,
    section: str = "generate",
    trained: Path | None = None,
    logprobs: int | None = None,
    needs_ids: bool = False,
    parts: int = 1,
    spec: ModelSpec | None = None,
    needs: ServerNeeds | None = None,
) -> Iterator[Writer]:
    """The model of a role, ready to write for as long as the context lasts; in this process it is then out of memory.

    Args:
        recipe: The recipe.
        role: `teacher`, `student` or `base`, which is the student before training.
        sampling: How tokens are drawn.
        place: The stage's folder, or that of its part.
        run: The run's folder.
        section: Whose keys say how tokens are drawn, for errors and warnings.
        trained: The folder of the train stage whose student writes; null: as it was before training.
        logprobs: Alternatives wanted beside each written token.
        needs_ids: Whether completions without ids are tokenised here.
        parts: Among how many the stage's `max_cost` and `max_tokens` are divided.
        spec: The model, of a role that is none of these three.
        needs: What a server that is started for it must be able to do.

    Raises:
        RecipeError: a key was set that the place can't honour.
        ServerError: a server can't be started or reached.
    """
    spec = spec or (recipe.teacher if role == "teacher" else recipe.student)
    assert spec is not None  # the recipe was validated
    if spec.server is None:
        if logprobs is not None:
            raise RecipeError(
                f"{section}.logprobs: got {logprobs}, but the {role} writes in this process, which keeps none. Leave it out and let "
                f"`score` read the traces, or set {role}.server."
            )
        with _here(recipe, spec, sampling, trained) as writer:
            yield writer
    else:
        needs = needs or needs_of(recipe, role)
        with _behind(recipe, spec, spec.server, role, sampling, place, run, section, trained, logprobs, parts, needs) as writer:
            if needs_ids:
                if writer.chat is None:
                    raise ModelError(f"{spec.model}: its tokenizer is needed here. Make it reachable, or name one with tokenizer.")
                writer = replace(writer, engine=_WithIds(writer.engine, writer.chat))
            yield writer


@contextmanager
def _here(recipe: Recipe, spec: ModelSpec, sampling: Sampling, trained: Path | None) -> Iterator[Writer]:
    """A model in this process: one at a time is in memory."""
    from distill.engines.hf import HFEngine
    from distill.models.loading import free_memory, load_chat_format, load_model, load_trained, model_record, pick_device

    free_memory()
    chat, device = load_chat_format(spec), pick_device()
    model: Any = load_model(spec, device) if trained is None else load_trained(spec, recipe.student.adapter, trained, device)
    engines = [HFEngine(model, chat, sampling)]
    record = model_record(spec, model)
    del model
    try:
        yield Writer(engines[0], record, str(device), chat, redrawn=lambda other, _: engines[0].drawing(other))
    finally:
        engines.clear()
        free_memory()


@contextmanager
def _behind(
    recipe: Recipe,
    spec: ModelSpec,
    server: Server,
    role: str,
    sampling: Sampling,
    place: Path,
    run: Path,
    section: str,
    trained: Path | None,
    logprobs: int | None,
    parts: int,
    needs: ServerNeeds,
) -> Iterator[Writer]:
    """A model behind a server, which is found, or started and ended."""
    from distill.servers.batches import BatchEngine
    from distill.servers.client import Client
    from distill.servers.protocols import protocol_of
    from distill.servers.serving import serving
    from distill.servers.spending import Spending, shared
    from distill.servers.writing import ServerEngine

    warnings: list[str] = []

    def refuse(drawn: Sampling, where: str) -> None:
        found = _refuse_unhonoured(recipe, spec, server, role, drawn, where, logprobs)
        warnings.extend(warning for warning in found if warning not in warnings)

    refuse(sampling, section)
    chat = _chat_format(spec, server)
    adapter = recipe.student.adapter if trained is not None else None
    with serving(spec, role, place, run, trained=trained, adapter=adapter, needs=needs) as served:
        protocol = protocol_of(server, served.model)
        spending = Spending(place, role, shared(server, parts))
        record = model_at(spec, server, served.model, served.record)
        how: dict[str, Any] = {"logprobs": logprobs, "kwargs": spec.chat_template_kwargs}
        device = f"server ({server.kind}, {len(served.urls)})"
        if server.batch:

            def in_batches(drawn: Sampling, state: str) -> BatchEngine:
                return BatchEngine(server, protocol, drawn, place / f"batches-{state}.json", spent=spending.add, **how)

            def batches_of(other: Sampling, name: str) -> BatchEngine:
                refuse(other, f"{section}.sets.{name}")
                return in_batches(other, f"{role}-{name}")

            first = in_batches(sampling, role)
            yield Writer(first, record, f"{device}, in batches", chat, server.max_failed, spending, warnings, redrawn=batches_of)
            return
        with Client(server, served.urls, spending, lives=served.lives, watch=served.watch) as client:
            engine = ServerEngine(client, protocol, chat, sampling, context=_context(client, protocol, served.model), **how)

            def other_of(other: Sampling, name: str) -> ServerEngine:
                refuse(other, f"{section}.sets.{name}")
                return engine.drawing(other)

            yield Writer(engine, record, device, chat, server.max_failed, spending, warnings, engine.notes, other_of)


def _context(client: Client, protocol: Protocol, model: str) -> int | None:
    """Tokens that a server takes together, where it tells: a prompt that leaves no room is then dropped before anything is sent."""
    if not protocol.facts.takes_ids:  # the length of a prompt that it renders itself is its own to judge
        return None
    try:
        return protocol.context_of(client.ask(protocol.context()), model)
    except ServerError:  # it tells nothing of itself; whether it writes shows next
        return None


def model_at(spec: ModelSpec, server: Server, name: str, started: dict[str, Any]) -> dict[str, Any]:
    """What a model behind a server is known by: its size is not told, its addresses don't belong to it, nor do paths of this machine."""
    files = spec.identity()["files"]
    record: dict[str, Any] = {"model": spec.model, "revision": spec.revision, "parameters": None}
    record |= {"files": files} if files else {}
    how = {key: value for key, value in started.items() if key in ("merged",)}
    return record | {"server": {"kind": server.kind, "model": None if Path(name).is_absolute() else name, **how}}


def _refuse_unhonoured(
    recipe: Recipe, spec: ModelSpec, server: Server, role: str, sampling: Sampling, section: str, logprobs: int | None
) -> list[str]:
    """Says what of the defaults a server can't honour, and returns it; a key that was set is refused."""
    from distill.servers.honouring import unhonoured

    given = getattr(recipe, section, None)
    fields = given.model_fields_set if given is not None else sampling.model_fields_set
    name = "student" if role == "base" else role
    found = unhonoured(
        server,
        sampling,
        role=name,
        section=section,
        fields=fields,
        model=server.model or spec.model,
        kwargs=spec.chat_template_kwargs,
        logprobs=logprobs,
    )
    if found.errors:
        raise RecipeError("\n".join(found.errors))
    for warning in found.warnings:
        _say_once(f"note      {warning}")
    return found.warnings


@cache
def _say_once(text: str) -> None:
    """Several roles and rounds of a run share a server, and what can't be had of it."""
    say(text)


def _chat_format(spec: ModelSpec, server: Server) -> ChatFormat | None:
    """Tokenizer and template; of a hosted model, to which messages are sent, only where they can be had."""
    from distill.models.loading import load_chat_format

    try:
        return load_chat_format(spec)
    except ModelError:
        if not server.is_hosted:
            raise
        say(f"note      {spec.model}: its tokenizer can't be had here, so its answers are kept as text, and tokens are the host's count")
        return None


class _WithIds:
    """An engine whose completions all have ids: where a server tells none, those of the text."""

    def __init__(self, engine: Engine, chat: ChatFormat) -> None:
        self._engine, self._chat = engine, chat

    def write(self, requests: Sequence[Request]) -> Iterator[Sequence[tuple[int, Completion | Failure]]]:
        """As the engine's own."""
        for ended in self._engine.write(requests):
            yield [(place, self._with_ids(requests[place], result)) for place, result in ended]

    def _with_ids(self, request: Request, result: Completion | Failure) -> Completion | Failure:
        if isinstance(result, Failure) or (result.completion_ids is not None and result.prompt_ids is not None):
            return result
        prompt_ids, opening = self._chat.prompt_ids(request.messages), self._chat.opening(request.messages)
        written = self._chat.completion_ids(result.text, opening, finished=result.finish_reason == "stop")
        return replace(result, prompt_ids=prompt_ids, completion_ids=written)
