"""Where a model of a recipe answers: at addresses that it gives, at one that `distill serve` left in the run, or a server started here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill import embedded
from distill.errors import ServerDiedError, ServerError, shown, visible
from distill.recipe.models import Adapter, ModelSpec
from distill.recipe.servers import Server
from distill.run.log import say
from distill.run.manifest import MERGED
from distill.servers.alive import answers, models_at
from distill.servers.commands import Command, command_for, takes_adapters, without_secrets
from distill.servers.left import Watch
from distill.servers.needs import ServerNeeds, within_model
from distill.servers.nodes import ONE_NODE, Nodes
from distill.servers.process import ServerProcess, end_leftover, free_port
from distill.servers.spread import spread
from distill.servers.weights import Weights, weights_for

__all__ = ["Served", "ServerNeeds", "serving", "started"]


@dataclass(frozen=True)
class Served:
    """Where a model answers."""

    urls: list[str]
    """Addresses, without a trailing slash."""
    model: str
    """Name that the server knows it by."""
    how: str = "given"
    """`given` by the recipe, `found` (of `distill serve`), or `started` by this process."""
    record: dict[str, Any] = field(default_factory=dict)
    """For the manifest: what was started, without anything secret."""
    lives: Callable[[], bool] = lambda: True
    """Whether its process lives, of one that was started here."""
    watch: Watch | None = None
    """Where further addresses appear, of one that was found."""


@contextmanager
def serving(
    spec: ModelSpec,
    role: str,
    place: Path,
    run: Path,
    *,
    trained: Path | None = None,
    adapter: Adapter | None = None,
    needs: ServerNeeds | None = None,
    part: str = "",
) -> Iterator[Served]:
    """A server with a model of the recipe, for as long as the context lasts; one that was started here is ended with all its children.

    Args:
        spec: The model, with `server`.
        role: `teacher`, `student` or `base`.
        place: The stage's folder: a log, and what is known of the process, are put there.
        run: The run's folder, where `distill serve` leaves addresses.
        trained: The folder of the train stage, for a student that was trained.
        adapter: What was trained of it.
        needs: What will be asked.
        part: Of the stage, where several processes share its folder.

    Raises:
        ServerError: it can't be started or found, or one is waited for and doesn't come.
        ServerDiedError: it died meanwhile, with its last lines.
    """
    server, needs = spec.server, needs or ServerNeeds()
    assert server is not None, "only for models that stand behind a server"
    if server.urls:
        yield Served(server.urls, _name_at(server, spec, role))
        return
    end_leftover(place / f"server-{_named(role, part)}.json")
    found = _found(Watch(spec, role, run, trained, needs), server)
    if found is not None:
        yield found
        return
    with started(spec, role, place, trained=trained, adapter=adapter, needs=needs, part=part) as (process, command, served):
        say(f"{role} is served by {server.kind} at {command.url} (log: {process.log})")
        try:
            yield served
        except Exception as error:
            try:
                process.raise_if_dead(wait_s=1.0)  # which says more than a request that it didn't answer
            except ServerError as died:
                raise ServerDiedError(str(died)) from error
            raise


def _found(watch: Watch, server: Server) -> Served | None:
    """The servers that `distill serve` has started for a role, awaited where that is asked for; null where there are none.

    Raises:
        ServerError: they hold something else, or can't do what is needed; or none came in time.
    """
    urls = watch.wait() if watch.wait_s else watch.urls()
    if not urls:
        watch.refuse_unfit()
        for file in watch.silent:
            say(f"{file}: nobody answers there; a server is started instead")
        return None
    say(f"{watch.role} is served by `distill serve` at {', '.join(urls)}")
    return Served(urls, watch.model, "found", {"kind": server.kind}, watch=watch)


@contextmanager
def started(
    spec: ModelSpec,
    role: str,
    place: Path,
    *,
    trained: Path | None = None,
    adapter: Adapter | None = None,
    needs: ServerNeeds | None = None,
    part: str = "",
    host: str = "127.0.0.1",
    nodes: Nodes = ONE_NODE,
) -> Iterator[tuple[ServerProcess, Command, Served]]:
    """A server that was started here and answers; of the nodes of one that is spread, the first answers.

    Args:
        spec: As in `serving`.
        role: Likewise.
        place: Likewise.
        trained: Likewise.
        adapter: Likewise.
        needs: Likewise.
        part: Likewise.
        host: That it listens on.
        nodes: That it is spread over.
    """
    server = spec.server
    assert server is not None
    name = _named(role, part)
    end_leftover(place / f"server-{name}.json")  # before anything else takes the device's memory
    merged = f"{MERGED}-{part}" if part else MERGED
    with weights_for(spec, role, place, trained, adapter, takes_adapters=takes_adapters(server), folder=merged) as weights:
        command = command_for(spec, role, weights, within_model(needs or ServerNeeds(), spec), free_port(host), host)
        command = spread(command, server, role, nodes)
        log = place / f"server-{name}.log"
        shown_words = without_secrets(command.words)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(shown_words)}\n")
        with ServerProcess(
            command.words, log, place / f"server-{name}.json", f"{role}.server ({server.kind})", command.environment
        ) as process:
            begun_s = time.monotonic()
            if not nodes.rank:
                process.wait_until(lambda: answers(command.url), server.start_timeout_s)
            record = _record(server, shown_words, time.monotonic() - begun_s, weights)
            yield process, command, Served([command.url], command.model, "started", record, lambda: process.exit_code is None)


def _record(server: Server, words: list[str], seconds: float, weights: Weights) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": server.kind, "command": words, "started_in_s": round(seconds, 1)}
    return record | ({"merged": weights.merged} if weights.merged else {})


def _name_at(server: Server, spec: ModelSpec, role: str) -> str:
    """The name that a server which is there knows a model by: what is given, the model's own, or the only one that it has.

    Raises:
        ServerError: it has several others.
    """
    if server.model is not None:
        return server.model
    if server.is_hosted:
        return spec.model
    if server.kind == "transformers":  # which lists what a cache has, and not what it holds
        return embedded.resolve(spec.model)
    for url in server.urls:
        names = models_at(url, os.environ.get(server.key_variable or "", ""))
        if spec.model not in names and len(names) > 1:
            listed = ", ".join(visible(name, 80) for name in names[:5])
            raise ServerError(f"{role}.server.model: {url} knows no {shown(spec.model)}, but {listed}. Name one of them.")
        if len(names) == 1:
            return names[0]
        if names:
            return spec.model
    return spec.model


def _named(role: str, part: str) -> str:
    return "-".join(filter(None, (role, part.replace("/", "-of-"))))
