"""The addresses at which a model of a recipe answers: those it gives, one that `distill serve` left in the run, or a server started here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import ServerError
from distill.recipe.models import Adapter, ModelSpec


@dataclass(frozen=True)
class ServerNeeds:
    """What a stage will ask of a server, which one that is started is made for."""

    context: int | None = None
    """Tokens of the longest prompt with its completion; null: as many as the model takes."""
    logprobs: int = 0
    """Most probable tokens asked for beside one, written or read."""


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
        ServerError: it can't be started or found; or it died meanwhile, with its last lines.
    """
    server = spec.server
    assert server is not None, "only for models that stand behind a server"
    if not server.urls:
        raise ServerError(f"{role}.server: a server of kind {server.kind} can't be started yet. Start it, and give its url.")
    yield Served(server.urls, server.model or spec.model)
