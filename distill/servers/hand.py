"""`distill serve`: the server of a role, started by hand or as a job of a cluster, as a stage would start it, until it is told to end."""

from __future__ import annotations

import time
from pathlib import Path

from filelock import FileLock, Timeout

from distill.errors import ModelError, ServerError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.models import Adapter, ModelSpec
from distill.run import early
from distill.run.log import say
from distill.servers.commands import takes_adapters
from distill.servers.left import FOLDER, announced, failing_told, name_of
from distill.servers.needs import ServerNeeds, needs_of
from distill.servers.nodes import Nodes, nodes, replica
from distill.servers.process import ServerProcess
from distill.servers.serving import started
from distill.servers.weights import why_merged

_LOOK_S = 0.5


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

    In a job of a cluster it listens on all of its node's addresses, since clients run on other nodes; several jobs may serve a role.

    Args:
        recipe: The recipe.
        role: `teacher`, `student` or `base`.
        run: Folder of the run.
        trained: Folder of the train stage, for role `student`.

    Raises:
        ServerError: it can't be started, or died, with its last lines.
        ModelError: several jobs would have to merge the same adapter.
        StageConflictError: another `distill serve` does the same.
        EndedEarly: on SIGUSR1 or SIGTERM: it is ended, and may be started again.
    """
    spec, needs, place, spread_over = spec_of(recipe, role), needs_of(recipe, role), run / FOLDER, nodes()
    adapter = recipe.student.adapter if trained is not None else None
    if trained is not None and adapter is not None:
        _refuse_to_merge_twice(spec, trained, adapter, spread_over)
    place.mkdir(parents=True, exist_ok=True)
    node = f"-node-{spread_over.rank}" if spread_over.rank else ""
    try:
        with FileLock(place / f".lock-{name_of(role)}{node}", timeout=0), failing_told(run, role):
            _serve(spec, role, run, trained, adapter, needs, spread_over)
    except Timeout:
        raise StageConflictError(f"{place}: another `distill serve` runs for role {role}. End that one first.") from None


def _serve(
    spec: ModelSpec, role: str, run: Path, trained: Path | None, adapter: Adapter | None, needs: ServerNeeds, spread_over: Nodes
) -> None:
    job = replica()
    part = "-".join(filter(None, (job, f"node-{spread_over.rank}" if spread_over.rank else "")))
    host = "0.0.0.0" if job else "127.0.0.1"
    how = {"trained": trained, "adapter": adapter, "needs": needs, "part": part, "host": host, "nodes": spread_over}
    with started(spec, role, run / FOLDER, **how) as (process, command, served):  # type: ignore[arg-type]
        if spread_over.rank:
            say(f"{role}: node {spread_over.rank} of {spread_over.size} computes, log {process.log}", result=True)
            _until_told_to_end(process)
        else:
            with announced(spec, role, run, trained, needs, command) as url:
                say(f"{role}: {served.model} at {url}, log {process.log}", result=True)
                say(f"stages of {run} find it by {run / FOLDER / f'{name_of(role)}.json'}; {_ends(job)}", result=True)
                _until_told_to_end(process)
        process.end()
    say(f"the server of {role} is ended", result=True)


def _until_told_to_end(process: ServerProcess) -> None:
    try:
        while True:
            process.raise_if_dead()
            early.check()
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        pass


def _ends(job: str) -> str:
    return f"scancel {job} ends it" if job else "Ctrl-C ends it"


def _refuse_to_merge_twice(spec: ModelSpec, trained: Path, adapter: Adapter, spread_over: Nodes) -> None:
    """Refuses several processes that would each write merged weights, and know them by another name.

    Raises:
        ModelError: they would.
    """
    if adapter.type == "full" or ("_" not in replica() and spread_over.size == 1):
        return
    assert spec.server is not None
    reason = why_merged(trained / "adapter") if takes_adapters(spec.server) else "this kind of server takes none"
    if reason is not None:
        raise ModelError(
            f"student.server: the adapter would have to be merged ({reason}), which several jobs or nodes can't share. Serve it by one job "
            "on one node, or by vllm with an adapter that it takes."
        )
