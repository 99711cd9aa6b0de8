"""`distill submit`: gives what is not done of a run to Slurm, as a chain of jobs, and keeps in the run what was given."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.before import quick
from distill.before.findings import Findings
from distill.before.outlook import refuse_what_cannot_end
from distill.cluster import sbatch
from distill.cluster.chain import Wanted, jobs_of, processes_of
from distill.cluster.handed import Submission, dependency, hand_over
from distill.cluster.parts import most_parts
from distill.cluster.place import scripts
from distill.cluster.served import serving_jobs
from distill.cluster.site import Site, read_site, site_file
from distill.cluster.sweep import Variant, before_training, jobs_of_sweep, links_of, variants_of
from distill.cluster.tasks import JOBS
from distill.errors import ClusterError
from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.recipe.steps import step_size
from distill.run.log import say
from distill.servers.commands import gpus_of
from distill.stages import SCRATCH, Step, folder, run_dir, stop_before
from distill.stages.links import take
from distill.trainers.launches import refuse_launch

Load = Callable[[Sequence[str]], Recipe]
"""Reads a recipe with further overrides."""


def submit(
    recipes: Sequence[Recipe], asked: Submission, wanted: Wanted, site: Site, *, dry_run: bool = False, beside: bool = False
) -> bool:
    """Submits what is not done of a run; true if nothing spoke against it.

    Args:
        recipes: The recipe, or those of a sweep.
        asked: Its jobs.
        wanted: On which nodes, in how many parts.
        site: The cluster.
        dry_run: Only check, and say what would be submitted.
        beside: Submit although jobs of this run are queued or running.

    Raises:
        ClusterError: the scheduler refuses, or jobs of the run are under way.
        StageConflictError: what is there was made with other settings, or in another number of parts.
    """
    if not asked.jobs:
        say(f"submit    nothing to do: all of {asked.run} is done", result=True)
        return True
    if not check(recipes, asked, wanted, site, dry_run=dry_run):
        return False
    if dry_run:
        show(asked, site)
    else:
        hand_over(asked, site, beside=beside)
    return True


def prepare(recipe: Recipe, wanted: Wanted, site: Site) -> Submission:
    """The jobs of all that is not done of a run.

    Raises:
        StageConflictError: a step would be refused, was begun in another number of parts, or can't go on in so many processes.
    """
    run = run_dir(recipe).absolute()
    recipe = recipe.model_copy(update={"run_dir": str(run)})
    file = run / JOBS / f"recipe-{_stamp()}.yaml"
    steps = [step for step in refuse_what_cannot_end(recipe) if not step.number or stop_before(recipe, step) is None]
    _refuse_going_back(recipe, steps)
    for step in steps:
        if step.stage == "train":
            place, train = folder(recipe, *step) / SCRATCH["train"], recipe.train_in_rounds if step.number else recipe.train
            refuse_launch(place, train, processes_of(wanted, site), on_cpu=not wanted.gpus)
    return Submission(run, jobs_of(recipe, file, steps, wanted, site, serving_jobs(recipe, steps)), {file: recipe_text(recipe)})


def _refuse_going_back(recipe: Recipe, steps: Sequence[Step]) -> None:
    """Refuses a chain of jobs where curate may go back to generate."""
    if recipe.generate is not None and recipe.generate.unsolved is not None and Step("generate") in steps:
        raise ClusterError(
            "generate.unsolved: goes from curate back to generate, which a chain of jobs can't. Let one job do both first, `distill run "
            "... --until curate`, or `distill generate --shard I/N` and `distill curate` by turns; then submit what follows from them."
        )


def prepare_sweep(recipe: Recipe, variants: Sequence[Variant], wanted: Wanted, site: Site) -> Submission:
    """The jobs of a sweep: what all its trainings share, as far as it is to do, the trainings, their evaluations, the comparison.

    Args:
        recipe: The recipe without what is swept.
        variants: As `variants_of` says.
        wanted: As in `submit`.
        site: The cluster.

    Raises:
        RecipeError: there are more trainings than an array can have.
        StageConflictError: as `prepare`.
    """
    run, stamp = run_dir(recipe).absolute(), _stamp()
    recipe = recipe.model_copy(update={"run_dir": str(run)})
    file, listing = run / JOBS / f"recipe-{stamp}.yaml", run / JOBS / f"sweep-{stamp}.txt"
    files = {variant.name: run_dir(variant.recipe) / JOBS / file.name for variant in variants}
    steps = refuse_what_cannot_end(recipe, last=before_training(recipe)[-1].stage)
    _refuse_going_back(recipe, steps)
    shared = jobs_of(recipe, file, steps, wanted, site, serving_jobs(recipe, steps))
    jobs = [*shared, *jobs_of_sweep(recipe, variants, files, listing, shared, wanted, site)]
    texts = {file: recipe_text(recipe), **{files[variant.name]: recipe_text(variant.recipe) for variant in variants}}
    texts[listing] = "".join(f"{path}\n" for path in files.values())
    return Submission(run, jobs, texts, dict(link for variant in variants for link in links_of(variant, recipe)))


def _stamp() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def check(recipes: Sequence[Recipe], asked: Submission, wanted: Wanted, site: Site, *, dry_run: bool = False) -> bool:
    """Says whether processes, rows of a step, parts, arrays and servers go together; true if they do."""
    found, file = Findings(), site_file()
    if file.is_file():
        found.good("site", str(file))
    else:
        found.warn("site", f"there is no file {file}, so Slurm's defaults hold, and nodes have {wanted.gpus or 'no'} GPUs")
    if any(job.script == "train.sbatch" for job in asked.jobs):
        found.prove("processes that train", lambda: "; ".join(dict.fromkeys(_step(recipe, wanted, site) for recipe in recipes)))
    asked_of = {"evaluate": recipes[0].evaluate, "benchmark": recipes[0].benchmarks}
    for stage, section in asked_of.items():
        if section is not None and Step(stage) in {step for job in asked.jobs for step in job.steps}:
            found.prove(f"GPUs of {stage}", lambda stage=stage, roles=section.models: _own_servers(recipes[0], stage, roles, wanted))  # type: ignore[misc]
    if wanted.shards is not None:
        found.prove("parts", lambda: _parts(recipes[0], asked, wanted.shards or 1))
    arrays = [job for job in asked.jobs if job.tasks]
    if arrays:
        limit = f"at most {site.max_at_once:,} of a step at once" if site.max_at_once else "as many at once as there is room for"
        tasks = sum(len(job.tasks) for job in arrays)
        found.good("arrays", f"{tasks:,} tasks in {len(arrays):,} arrays, {limit}, ids up to {site.max_array:,}")
    return found.end("these jobs would be submitted:" if dry_run else "these jobs are submitted:")


def _own_servers(recipe: Recipe, stage: str, roles: Sequence[str], wanted: Wanted) -> str:
    """The servers that a stage starts itself must find room on the GPUs of a task.

    Raises:
        ClusterError: one is told to take more.
    """
    own = {"teacher": recipe.teacher, "student": recipe.student, "base": recipe.student}
    for role in roles:
        spec = own[role]
        if spec is None or spec.server is None or not spec.server.is_started:
            continue
        needed = gpus_of(spec.server.args)
        if wanted.gpus and needed > min(wanted.gpus, wanted.gpus_per_task):
            section = "teacher" if role == "teacher" else "student"
            raise ClusterError(
                f"{section}.server.args: {stage} starts this server itself, on {needed:,} GPUs, and a task of it has "
                f"{min(wanted.gpus, wanted.gpus_per_task):,}. Add --gpus-per-task {needed}, or leave {role} out of its models."
            )
    return f"{min(wanted.gpus, wanted.gpus_per_task):,} a task"


def _step(recipe: Recipe, wanted: Wanted, site: Site) -> str:
    if wanted.gpus and wanted.gpus_per_task > wanted.gpus:
        raise ClusterError(f"--gpus-per-task: {wanted.gpus_per_task:,}, and a node has {wanted.gpus:,}. Give at most those.")
    if wanted.gpus and (wanted.processes or 0) > wanted.gpus:
        raise ClusterError(f"--processes: {wanted.processes:,} on a node of {wanted.gpus:,} GPUs. Give at most as many as there are GPUs.")
    processes, on_cpu = processes_of(wanted, site), not wanted.gpus
    trains = [recipe.train] if recipe.trains_on_traces or recipe.train.is_live else []
    trains += [recipe.train_in_rounds] if recipe.rounds else []
    size = [step_size(train.global_batch_size, train.trainer_args, processes, on_cpu, whole=train.is_live) for train in trains][-1]
    told = f"{processes:,} on {wanted.nodes:,} nodes; {size.rows:,} rows a step, {size.at_once:,} at once in {size.passes:,} passes"
    if size.rows < processes:
        raise ClusterError(
            f"train.global_batch_size: {size.rows:,} rows a step leave {processes - size.rows:,} of {processes:,} processes without any. "
            f"Set it to {processes:,} or more, or take fewer nodes."
        )
    return told


def _parts(recipe: Recipe, asked: Submission, shards: int) -> str:
    most = most_parts(recipe, Step("generate"))
    to_do = {step for job in asked.jobs for step in job.steps}
    if Step("generate") in to_do and most is not None and shards > most:
        raise ClusterError(f"--shards: {shards:,} parts of {most:,} prompts would leave some without any. Give at most {most:,}.")
    fewer = [f"{step} {most:,}" for step in sorted(to_do) if (most := most_parts(recipe, step)) is not None and most < shards]
    return f"{shards:,}" + (f"; of fewer prompts fewer: {', '.join(fewer)}" if fewer else "")


def show(asked: Submission, site: Site) -> None:
    """Says every job: how it would be submitted, and for each task its command and what that writes."""
    for job in asked.jobs:
        waits = dependency(job, {other.name: [f"<{other.name}>"] for other in asked.jobs})
        more = f", and {job.follow_ups} more behind it that go on" if job.follow_ups and not site.requeue else ""
        say(f"\n{job.name}{f', {len(job.tasks):,} tasks' if job.tasks else ''}{more}", result=True)
        words = [*(f"{name}={value}" for name, value in job.environment.items()), *sbatch.words_of(job, asked.run, site, waits)]
        say(f"  {shlex.join(words if not job.ends else [*words, '--wrap', f'scancel <{job.ends}>'])}", result=True)
        for place, (command, files) in enumerate(zip(job.commands, job.writes, strict=True)):
            task = f"{job.tasks[place]:>6}  " if job.tasks else "  "
            say(f"{task}{command}  ->  {files}", result=True)
    going_on = sum(job.follow_ups for job in asked.jobs) if not site.requeue else 0
    say(f"\n{len(asked.jobs):,} jobs{f', and {going_on:,} that go on' if going_on else ''}; nothing was submitted", result=True)


def wanted_from(site: Site, **asked: Any) -> Wanted:
    """What the command line asks for, and where it says nothing what the site has."""
    given = {name: value for name, value in asked.items() if value is not None}
    return Wanted(**{"gpus": site.gpus_per_node, "follow_ups": site.follow_ups} | given)


def run(load: Load, sweep: Sequence[str], *, dry_run: bool, beside: bool, **asked: Any) -> bool:
    """What the command does; true if nothing spoke against it.

    Args:
        load: Reads the recipe, with further overrides if some are given.
        sweep: `KEY=VALUE,VALUE,...`, a text a key; none submits the run itself.
        dry_run: As in `submit`.
        beside: As in `submit`.
        asked: Fields of `Wanted`, null where nothing was asked for.

    Raises:
        DistillError: as `submit`, `prepare` and `prepare_sweep`, and where the site's file can't be used.
    """
    site, recipe = read_site(), load(())
    asked["launch"] = launch_file(asked["launch"]) if asked["launch"] else None
    wanted = wanted_from(site, **asked)
    if not dry_run and wanted.gpus == 0 and asked["gpus"] is None and not site_file().is_file():
        raise ClusterError(
            f"{site_file()}: there is no such file, so nothing says whether nodes have GPUs. Copy {scripts() / 'site.env.example'} "
            "there and adapt it, or give --gpus-per-node (0 trains on CPUs)."
        )
    if not quick.run(recipe, wanted.launch):
        return False
    if not dry_run:
        take(recipe)
    variants = variants_of(sweep, recipe.model_copy(update={"run_dir": str(run_dir(recipe).absolute())}), load) if sweep else []
    jobs = prepare_sweep(recipe, variants, wanted, site) if sweep else prepare(recipe, wanted, site)
    recipes = [variant.recipe for variant in variants] or [recipe]
    return submit(recipes, jobs, wanted, site, dry_run=dry_run, beside=beside)


def launch_file(given: Path) -> Path:
    """A file for accelerate, or one of `slurm/launch/` by its name.

    Raises:
        ClusterError: there is none.
    """
    kept = scripts() / "launch" / f"{given}.yaml"
    found = next((path for path in (given, kept) if path.is_file()), None)
    if found is None:
        names = ", ".join(sorted(path.stem for path in kept.parent.glob("*.yaml")))
        raise ClusterError(f"--launch: there is no file {given}. Give the path of one, or a name of slurm/launch/: {names}.")
    return found.absolute()
