"""`distill serve`: the server of a role, started by hand as a stage would start it, until Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path

from filelock import FileLock, Timeout

from distill.errors import ServerError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run.log import say
from distill.servers.commands import ServerNeeds
from distill.servers.serving import FOLDER, announced, started

_ROOM_FOR_A_PROMPT = 1024


def needs_of(recipe: Recipe, role: str) -> ServerNeeds:
    """What the recipe's stages together will ask of a role's server.

    Its context is that of the longest row to train on, or of the longest answer with room for a prompt. Who has longer prompts gives
    `--max-model-len` or its like in `server.args`.
    """
    written, logprobs = [], [0]
    if recipe.evaluate is not None and role in recipe.evaluate.models:
        written.append(recipe.evaluate.max_new_tokens)
    if role == "teacher" and recipe.generate is not None:
        written.append(recipe.generate.max_new_tokens)
        logprobs.append(recipe.generate.logprobs or 0)
    if role in ("student", "base") and recipe.rollouts is not None:
        written.append(recipe.rollouts.max_new_tokens)
    if role == "teacher" and recipe.score is not None and recipe.score.source in ("auto", "server"):
        logprobs.append(getattr(recipe.score.target, "k", 1))
    return ServerNeeds(max([recipe.train.max_length, *(tokens + _ROOM_FOR_A_PROMPT for tokens in written)]), max(logprobs))


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
                    time.sleep(0.5)
            except KeyboardInterrupt:
                pass
        process.end()
    say(f"the server of {role} is ended", result=True)
