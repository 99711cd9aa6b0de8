"""A run as a chain of jobs: what is to do, in which parts, and what waits for what. Looks at the run's folder, and changes nothing.

```
prompts ─▶ generate [1-8] ─▶ curate ─▶ score [1-8] ─▶ train ─▶ evaluate [1-8] ─▶ report ─▶ export      ([ ]: an array, a part a task)
```
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from distill.cluster.parts import Parts, files_of, parts_of
from distill.cluster.site import Site
from distill.errors import ClusterError
from distill.recipe.experiment import Recipe
from distill.servers.commands import gpus_of
from distill.stages import Step

WITHOUT_GPU = frozenset({"prompts", "curate", "report"})


class Wanted(NamedTuple):
    """What was asked for on the command line."""

    nodes: int = 1
    """That train."""
    gpus: int = 0
    """Of a node."""
    shards: int | None = None
    """Parts of generate, score, rollouts and evaluate; null: one a GPU of all nodes."""
    gpus_per_task: int = 1
    """Of a task that writes or scores."""
    follow_ups: int = 0
    processes: int | None = None
    """That train on a node; null: one a GPU."""
    launch: Path | None = None
    """The file for accelerate; null: DDP."""
    servers: int = 1
    """That share the work of a served model."""
    serve_nodes: int = 1
    """Of each."""

    @property
    def parts(self) -> int:
        """Of steps that are dealt out, where the number was not given."""
        return max(1, self.nodes * (self.gpus // max(1, self.gpus_per_task))) if self.shards is None else self.shards


@dataclass(frozen=True)
class Job:
    """What is given to the scheduler at once: a job, or an array of them."""

    name: str
    """Unlike all others of the run: `generate-2`, `round-01-train`."""
    script: str
    """A batch script of `slurm/`, or nothing for a job that only ends others."""
    words: tuple[str, ...]
    """Behind the script."""
    steps: tuple[Step, ...] = ()
    """Which it does, or serves."""
    nodes: int = 1
    gpus: int = 0
    """Of a node."""
    tasks: tuple[int, ...] = ()
    """Task ids of an array; none of a plain job."""
    at_once: int | None = None
    """Tasks that may run at once."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the script is told besides."""
    after: tuple[str, ...] = ()
    """Jobs that must have ended well."""
    beside: str | None = None
    """The job whose server it uses: it begins once that, or the first of an array, has begun."""
    servers: int = 1
    """Tasks of that."""
    task_by_task: tuple[str, ...] = ()
    """Arrays of the same tasks: each task waits for that of its number to end well."""
    behind: tuple[str, ...] = ()
    """Jobs that must have ended, however that was."""
    ends: str | None = None
    """The serving job that it ends; it does nothing else."""
    serves: str | None = None
    """The role whose model it holds."""
    follow_ups: int = 0
    """Further jobs of the same that go on, each behind the one before."""
    commands: tuple[str, ...] = ()
    """What it runs, as one would type it: one, or one a task."""
    writes: tuple[str, ...] = ()
    """What that writes: one text a command."""


def label(step: Step) -> str:
    """A step as its jobs are called."""
    return f"round-{step.number:02d}-{step.stage}" if step.number else step.stage


def jobs_of(recipe: Recipe, file: Path, steps: Sequence[Step], wanted: Wanted, site: Site, served: Mapping[Step, str]) -> list[Job]:
    """The jobs of all that is to do, each behind those that it waits for.

    Args:
        recipe: The recipe.
        file: Where the jobs will read it.
        steps: To be done, in order.
        wanted: On which nodes, in how many parts.
        site: Its limits.
        served: Steps whose model is behind a job of its own, and its role.

    Raises:
        StageConflictError: a step was begun in another number of parts than is asked for.
        ClusterError: more arrays than tasks may run at once, or a server that finds no room on its nodes.
    """
    found: list[Job] = []
    before: tuple[str, ...] = ()
    for step in steps:
        jobs = list(_jobs(recipe, file, step, wanted, site, before, served.get(step)))
        clients = tuple(job.name for job in jobs if job.serves is None)
        found += jobs
        if step in served:
            found.append(Job(f"{label(step)}-end", "", (), (step,), behind=clients, ends=jobs[0].name))
        before = clients
    return found


def _jobs(recipe: Recipe, file: Path, step: Step, wanted: Wanted, site: Site, before: tuple[str, ...], role: str | None) -> Iterator[Job]:
    server = f"{label(step)}-serve" if role else None
    if role and server:
        yield _serving(recipe, server, file, step, role, wanted, before)
    for job in _work(recipe, file, step, wanted, site, is_served=role is not None):
        wait = {"DISTILL_WAIT_FOR_SERVER_S": str(_WAIT_S), "DISTILL_SERVERS": str(wanted.servers)} if server else {}
        yield _with(job, before, server, wait, wanted)


def _serving(recipe: Recipe, name: str, file: Path, step: Step, role: str, wanted: Wanted, before: tuple[str, ...]) -> Job:
    """The job, or the array of as many as share the work, that holds the model of a step, on as many GPUs as its arguments say."""
    spec = recipe.student if role == "student" else recipe.teacher
    assert spec is not None and spec.server is not None
    needed = gpus_of(spec.server.args)
    if wanted.gpus and needed > wanted.gpus * wanted.serve_nodes:
        raise ClusterError(
            f"{'student' if role == 'student' else 'teacher'}.server.args: they deal the model out to {needed:,} GPUs, and a server has "
            f"{wanted.gpus * wanted.serve_nodes:,}. Add --serve-nodes {-(-needed // wanted.gpus)}."
        )
    takes_all = wanted.serve_nodes > 1 or spec.server.command is not None  # a program of the user's, which says nothing of its GPUs
    words = (str(file), role, *(("--round", str(step.number)) if role == "student" and step.number else ()))
    tasks = tuple(range(1, wanted.servers + 1)) if wanted.servers > 1 else ()
    command = shlex.join(["distill", "serve", words[0], "--role", *words[1:]])
    return Job(
        name,
        "serve.sbatch",
        words,
        (step,),
        wanted.serve_nodes,
        wanted.gpus if takes_all else min(wanted.gpus, needed),
        tasks=tasks,
        after=before,
        serves=role,
        follow_ups=wanted.follow_ups,
        commands=(command,) * max(1, len(tasks)),
        writes=("servers/",) * max(1, len(tasks)),
    )


# For a server of another job, whose follow-up may be queued for days; it is given up before, where that job has failed for good, and a
# client's own time limit ends the waiting, too.
_WAIT_S = 7 * 24 * 3600


def _with(job: Job, before: tuple[str, ...], server: str | None, more: Mapping[str, str], wanted: Wanted) -> Job:
    values = {**vars(job), "after": before, "environment": {**job.environment, **more}, "follow_ups": wanted.follow_ups}
    return Job(**values | ({"beside": server, "servers": wanted.servers} if server else {}))


def _work(recipe: Recipe, file: Path, step: Step, wanted: Wanted, site: Site, *, is_served: bool) -> Iterator[Job]:
    """The jobs of one step, without what they wait for."""
    numbered = ("--round", str(step.number)) if step.number else ()
    if step.stage == "train":
        yield _training(recipe, file, step, wanted, numbered)
        return
    gpus = 0 if is_served or _asks_elsewhere(recipe, step) else min(wanted.gpus, wanted.gpus_per_task)
    words = (step.stage, str(file), *numbered)
    parts = parts_of(recipe, step, wanted.parts, asked=wanted.shards)
    if parts is None:
        command = shlex.join(["distill", *words])
        yield Job(label(step), "stage.sbatch", words, (step,), gpus=gpus, commands=(command,), writes=(files_of(recipe, step),))
        return
    chunks = list(_chunks(parts, site.max_array))
    if site.max_at_once is not None and len(chunks) > site.max_at_once:
        raise ClusterError(
            f"--shards: {parts.number:,} parts of {step} are {len(chunks):,} arrays (SITE_MAX_ARRAY={site.max_array:,}), of each of which "
            f"one task runs at least, and SITE_MAX_AT_ONCE is {site.max_at_once:,}. Take fewer parts."
        )
    at_once = max(1, site.max_at_once // len(chunks)) if site.max_at_once is not None else None
    for number, (offset, tasks) in enumerate(chunks, start=1):
        shards = [offset + task for task in tasks]
        yield Job(
            label(step) + (f"-{number}" if len(chunks) > 1 else ""),
            "array.sbatch",
            words,
            (step,),
            gpus=gpus,
            tasks=tuple(tasks),
            at_once=at_once if at_once is not None and at_once < len(tasks) else None,
            environment={"DISTILL_SHARDS": str(parts.number), "DISTILL_SHARD_OFFSET": str(offset)},
            commands=tuple(shlex.join(["distill", *words, "--shard", f"{shard}/{parts.number}"]) for shard in shards),
            writes=tuple(files_of(recipe, step, shard, parts.number) for shard in shards),
        )


def _asks_elsewhere(recipe: Recipe, step: Step) -> bool:
    """Whether a step needs no GPU: it has no model, or its model is a host's, or behind a server that is there."""
    if step.stage == "curate" and recipe.curate.prefer == "rank_surprisal":  # the student reads
        return False
    if step.stage in WITHOUT_GPU or (step.stage == "generate" and recipe.traces is not None):
        return True
    spec = recipe.student if step.stage == "rollouts" else recipe.teacher
    is_there = spec is not None and spec.server is not None and not spec.server.is_started
    if step.stage == "score":
        assert recipe.score is not None
        source = recipe.score.resolved(recipe.teacher)
        return source == "generation" or (source == "server" and is_there)
    return step.stage in ("generate", "rollouts") and is_there


def _training(recipe: Recipe, file: Path, step: Step, wanted: Wanted, numbered: tuple[str, ...]) -> Job:
    options = [*(["--launch", str(wanted.launch)] if wanted.launch else [])]
    options += ["--processes", str(wanted.processes)] if wanted.processes else []
    return Job(
        label(step),
        "train.sbatch",
        (*options, str(file), *numbered),
        (step,),
        wanted.nodes,
        wanted.gpus,
        commands=(f"{launch_command(wanted)} --config {shlex.join([str(file), *numbered])}",),
        writes=(files_of(recipe, step),),
    )


def processes_of(wanted: Wanted, site: Site) -> int:
    """That train, over all nodes."""
    return wanted.nodes * (wanted.processes or wanted.gpus or site.cpu_processes)


def launch_command(wanted: Wanted) -> str:
    """How the processes of a training are launched on each node, as one would type it."""
    each = wanted.processes or wanted.gpus
    number = f" --num_processes {wanted.nodes * each}" if each else ""
    return f"accelerate launch{number} --num_machines {wanted.nodes} -m distill.train"


def _chunks(parts: Parts, limit: int) -> Iterator[tuple[int, list[int]]]:
    """What is missing as arrays whose ids, from 1, stay within a limit: what is to be added to an id, and the ids."""
    for offset in range(0, parts.number, limit):
        ids = [shard - offset for shard in parts.missing if offset < shard <= offset + limit]
        if ids:
            yield offset, ids


def as_ranges(ids: Sequence[int]) -> str:
    """Rising task ids as Slurm writes them: `1-3,5`."""
    runs: list[list[int]] = []
    for each in ids:
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
