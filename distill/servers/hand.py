"""`distill serve`: the server of a role, started by hand as a stage would start it, until Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path

from filelock import FileLock, Timeout

from distill.errors import ServerError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run import early
from distill.run.log import say
from distill.servers.needs import ServerNeeds, needs_of
from distill.servers.serving import FOLDER, announced, started


def spec_of(recipe: Recipe, role: str) -> ModelSpec:
    """The section of a role, which must stand behind a server that can be started.

    Raises:
        ServerError: it has none, or one that is there already.
    """
    section = "teacher" if role == "teacher" else "student"
    spec: ModelSpec | None = getattr(recipe, section)
    if spec is None or spec.server is None:
        raise ServerError(
            f"{section}.server: the recipe names none, so there is nothing to start. Add e.g. --{section}.server '{{kind: vllm}}'."
        )
    if spec.server.urls:
        raise ServerError(f"{section}.server: is at {', '.join(spec.server.urls)} already. Leave url out, to have one started.")
    return spec


def serve(recipe: Recipe, role: str, run: Path, trained: Path | None) -> None:
    """Starts the server of a role and leaves its address in the run, until it is interrupted or the server dies.

    Args:
        recipe: The recipe.
        role: `teacher`, `student` or `base`.
        run: Folder of the run.
        trained: Folder of the train stage, for role `student`.

    Raises:
        ServerError: it can't be started, or died, with its last lines.
        StageConflictError: another `distill serve` does the same.
    """
    spec, needs, place = spec_of(recipe, role), needs_of(recipe, role), run / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / f".lock-{role}", timeout=0):
            _serve(recipe, spec, role, run, trained, needs)
    except Timeout:
        raise StageConflictError(f"{place}: another `distill serve` runs for role {role}. End that one first.") from None


def _serve(recipe: Recipe, spec: ModelSpec, role: str, run: Path, trained: Path | None, needs: ServerNeeds) -> None:
    adapter = recipe.student.adapter if trained is not None else None
    with started(spec, role, run / FOLDER, trained=trained, adapter=adapter, needs=needs) as (process, command, served):
        with announced(spec, role, run, trained, needs, command):
            say(f"{role}: {served.model} at {command.url}, log {process.log}", result=True)
            say(f"stages of {run} find it by {run / FOLDER / f'{role}.json'}; Ctrl-C ends it", result=True)
            try:
                while True:
                    process.raise_if_dead()
                    early.check()
                    time.sleep(0.5)
            except KeyboardInterrupt:
                pass
        process.end()
    say(f"the server of {role} is ended", result=True)
