"""Where a model of a recipe answers: at addresses that it gives, at one that `distill serve` left in the run, or a server started here."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill import embedded
from distill.errors import IntegrityError, MissingStageError, ServerDiedError, ServerError, shown, visible
from distill.recipe.models import Adapter, ModelSpec
from distill.recipe.servers import Server
from distill.run.files import digest_json, read_json, write_json
from distill.run.log import say
from distill.run.manifest import read_manifest
from distill.servers.commands import Command, command_for, takes_adapters, without_secrets
from distill.servers.needs import ServerNeeds, within_model
from distill.servers.process import ServerProcess, end_leftover, free_port, is_orphan
from distill.servers.weights import weights_for

__all__ = ["Served", "ServerNeeds", "serving", "started"]

FOLDER = "servers"
"""In a run's folder, where `distill serve` leaves addresses."""
_ASK_S = 5.0
_ENOUGH = 2**20  # bytes of an answer that are read


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
        ServerError: it can't be started or found.
        ServerDiedError: it died meanwhile, with its last lines.
    """
    server, needs = spec.server, needs or ServerNeeds()
    assert server is not None, "only for models that stand behind a server"
    if server.urls:
        yield Served(server.urls, _name_at(server, spec, role))
        return
    end_leftover(place / f"server-{_named(role, part)}.json")
    found = _left_by_hand(spec, role, run, trained, needs)
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
) -> Iterator[tuple[ServerProcess, Command, Served]]:
    """A server that was started here and answers; the arguments are those of `serving`."""
    server = spec.server
    assert server is not None
    name = _named(role, part)
    end_leftover(place / f"server-{name}.json")  # before anything else takes the device's memory
    with weights_for(spec, role, place, trained, adapter, takes_adapters=takes_adapters(server)) as weights:
        command = command_for(spec, role, weights, within_model(needs or ServerNeeds(), spec), free_port())
        log = place / f"server-{name}.log"
        shown_words = without_secrets(command.words)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(shown_words)}\n")
        with ServerProcess(
            command.words, log, place / f"server-{name}.json", f"{role}.server ({server.kind})", command.environment
        ) as process:
            begun_s = time.monotonic()
            process.wait_until(lambda: answers(command.url), server.start_timeout_s)
            record: dict[str, Any] = {"kind": server.kind, "command": shown_words, "started_in_s": round(time.monotonic() - begun_s, 1)}
            record |= {"merged": weights.merged} if weights.merged else {}
            yield process, command, Served([command.url], command.model, "started", record, lambda: process.exit_code is None)


def answers(url: str) -> bool:
    """Whether a server is ready: by `/health`, or, where it has no such page, by its list of models."""
    for path in ("/health", "/v1/models"):
        try:
            with _opener().open(url + path, timeout=_ASK_S) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            if path == "/health" and error.code in (404, 405, 501):
                continue
            return error.code in (401, 403) and path != "/health"  # it is there, and asks for a key
        except (OSError, ValueError):
            return False
    return False


def identity(spec: ModelSpec, trained: Path | None) -> str:
    """What a server holds, as a digest: the model, its settings, and of a trained student what its stage made."""
    made = None
    if trained is not None:
        try:
            made = read_manifest(trained).digest
        except MissingStageError:
            made = None
    plain = spec.identity() | {"server": {"kind": spec.server.kind, "model": spec.server.model} if spec.server else None}
    return digest_json([plain, made])


@contextmanager
def announced(spec: ModelSpec, role: str, run: Path, trained: Path | None, needs: ServerNeeds, command: Command) -> Iterator[None]:
    """Leaves a server's address in the run for as long as the context lasts."""
    file = run / FOLDER / f"{role}.json"
    url = command.url if command.host not in ("0.0.0.0", "::") else f"http://{socket.getfqdn()}:{command.port}"
    assert spec.server is not None
    content = {
        "url": url,
        "model": command.model,
        "kind": spec.server.kind,
        "holds": identity(spec, trained),
        "context": needs.context,
        "logprobs": needs.logprobs,
        "host": socket.gethostname(),
    }
    write_json(file, content)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _left_by_hand(spec: ModelSpec, role: str, run: Path, trained: Path | None, needs: ServerNeeds) -> Served | None:
    """The server that `distill serve` has started for this role, if it lives and can be reached.

    Raises:
        ServerError: it holds something else, or can't do what is needed.
    """
    file, process = run / FOLDER / f"{role}.json", run / FOLDER / f"server-{role}.json"
    try:
        found = read_json(file)
        url, model = found["url"], found["model"]
    except (FileNotFoundError, IntegrityError, KeyError):
        return None
    if is_orphan(process):
        end_leftover(process)
        file.unlink(missing_ok=True)
        return None
    if not answers(url):
        say(f"{file}: names {visible(url, 200)}, where nobody answers; a server is started instead")
        return None
    assert spec.server is not None
    lacks = [
        *(["it holds another model, or one with other settings"] if found.get("holds") != identity(spec, trained) else []),
        *(_less("a context", found.get("context"), needs.context)),
        *(_less("a number of log-probabilities", found.get("logprobs"), needs.logprobs)),
    ]
    if lacks:
        raise ServerError(
            f"{file}: the server that `distill serve` has started can't be used for {role}: {'; '.join(lacks)}. End it with Ctrl-C."
        )
    say(f"{role} is served by `distill serve` at {url}")
    return Served([url], model, "found", {"kind": spec.server.kind})


def _less(what: str, there: int | None, needed: int | None) -> list[str]:
    if there is None or needed is None or there >= needed:
        return []
    return [f"it was started for {what} of {there:,}, and {needed:,} is needed"]


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
        names = _models_at(url, os.environ.get(server.key_variable or "", ""))
        if spec.model not in names and len(names) > 1:
            listed = ", ".join(visible(name, 80) for name in names[:5])
            raise ServerError(f"{role}.server.model: {url} knows no {shown(spec.model)}, but {listed}. Name one of them.")
        if len(names) == 1:
            return names[0]
        if names:
            return spec.model
    return spec.model


def _models_at(url: str, key: str) -> list[str]:
    """The names of a server's models; empty where it can't be asked."""
    try:
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        with _opener().open(request, timeout=_ASK_S) as answer:
            content = json.loads(answer.read(_ENOUGH))
        return [str(model["id"]) for model in content["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _opener() -> urllib.request.OpenerDirector:
    """Asks without the environment's proxies, which know nothing of this machine's own addresses."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _named(role: str, part: str) -> str:
    return "-".join(filter(None, (role, part.replace("/", "-of-"))))
