"""The `distill` command. Imports neither torch nor a stage before one is asked for."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill import __version__, reference

if TYPE_CHECKING:
    from distill.recipe.experiment import Recipe

_EPILOG = (
    "Any key of the recipe can be overridden: --generate.samples_per_prompt 8. `distill keys` lists them all. "
    "--quiet says only results and errors."
)
_CANT_TEACH = 3  # exit code of `distill pair` for its verdict: 1 is an error, 2 a wrong call
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="Distil a large model's reasoning into a small one: prompts, generate, curate, train, evaluate, report, export.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="The recipe: a YAML file, or the name of one that `distill recipes` lists.",
        autocompletion=reference.recipe_files,
    ),
]
Redo = Annotated[bool, typer.Option("--redo", help="Delete this stage's folder first, and make it again.")]
Round = Annotated[int, typer.Option("--round", min=0, help="The on-policy round, from 1; 0 is the training on traces before them.")]
Shard = Annotated[str, typer.Option("--shard", metavar="I/N", help="Only the I-th of N parts, from 1, e.g. of a Slurm array.")]


def main() -> None:
    """Entry point: whatever goes wrong becomes one message on stderr and exit code 1, without a traceback."""
    from distill.models.processes import refuse_several
    from distill.run.failures import one_message

    with one_message():
        # An option of the program itself, which is found wherever it stands; behind a command it would be taken for a key.
        words = sorted(sys.argv[1:], key=lambda word: word != "--quiet")
        if command := next((word for word in words if not word.startswith("-")), ""):
            refuse_several(command)
        app(args=_with_stage_to_redo(words))


def _with_stage_to_redo(words: list[str]) -> list[str]:
    """Makes `--redo` without a stage, which `run` takes for all of them, an option with a value as the parser knows it."""
    if "--redo" not in words or next((word for word in words if not word.startswith("-")), "") != "run":
        return words
    from distill.stages import FOLDERS

    place = words.index("--redo")
    named = words[place + 1 : place + 2]
    return words if named and named[0] in FOLDERS else [*words[:place], "--redo=all", *words[place + 1 :]]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"distill {__version__}")
        raise typer.Exit


def _be_quiet(asked: bool) -> None:
    if asked:
        from distill.run.log import be_quiet

        be_quiet()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", callback=_be_quiet, help="Say only results and errors; anywhere in the line.")] = False,
) -> None:
    pass


@app.command("run", context_settings=_OVERRIDES, epilog=_EPILOG)
def run_all(
    context: typer.Context,
    recipe: RecipePath,
    redo: Annotated[str, typer.Option("--redo", metavar="[STAGE]", help="Delete a stage and all after it first; alone: all.")] = "",
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start with this stage.")] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, kept and made anew, and why; do nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before --redo deletes what cost something.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Begin without what `distill check` proves.")] = False,
) -> None:
    """All stages of a recipe, once `distill check` holds: goes on with what was begun, skips what is done, adds where more is asked for."""
    from distill.before import check, outlook, quick
    from distill.errors import RecipeError
    from distill.pipeline import delete_from, run_pipeline

    loaded = _load(recipe, context)
    if dry_run:
        proved = quick.run(loaded, there=False)  # which the outlook says step by step
        if not (outlook.dry_run(loaded, first, last, redo) and proved):
            raise typer.Exit(1)
        return
    if redo and first is not None:
        raise RecipeError("--redo and --from exclude each other: what is deleted is made anew from there on. Leave --from out.")
    to_do = outlook.refuse_what_cannot_end(loaded, first, last, redo)
    if not no_check:
        check.before_run(loaded, to_do)
    if redo:
        if not outlook.agree_to_redo(loaded, redo, yes=yes):
            raise typer.Exit(1)
        delete_from(loaded, redo)
    run_pipeline(loaded, first, last)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def rounds(context: typer.Context, recipe: RecipePath) -> None:
    """The on-policy rounds: the student writes, the teacher scores, the student trains, and again."""
    from distill.pipeline import run_rounds

    run_rounds(_load(recipe, context))


def _run_one(name: str, recipe: Recipe, *, number: int = 0, redo: bool = False, shard: str = "") -> None:
    """Runs a stage alone, unless what was made from it would be lost by that."""
    from distill.before.outlook import refuse_what_follows
    from distill.errors import RecipeError
    from distill.models.processes import leave
    from distill.pipeline import rounds_are_over, run_score_shard, run_shard, run_stage
    from distill.run.clock import is_main_process
    from distill.stages import Step

    if shard and redo:
        raise RecipeError(f"--redo with --shard would delete the other parts too. Run `distill {name}` with --redo, or delete the folder.")
    if not redo and rounds_are_over(recipe, Step(name, number)):
        return
    if is_main_process() and not redo:
        refuse_what_follows(recipe, Step(name, number))
    if shard and name == "score":
        run_score_shard(recipe, shard, number=number)
    elif shard:
        run_shard(name, recipe, shard, number=number)
    else:
        run_stage(name, recipe, number=number, redo=redo)
    leave()


def _stage_command(name: str, help_text: str) -> None:
    def command(context: typer.Context, recipe: RecipePath, redo: Redo = False) -> None:
        _run_one(name, _load(recipe, context), redo=redo)

    app.command(name, help=help_text, context_settings=_OVERRIDES, epilog=_EPILOG)(command)


_stage_command("prompts", "Read the problems, and split held-out ones off.")


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def generate(context: typer.Context, recipe: RecipePath, redo: Redo = False, shard: Shard = "") -> None:
    """Let the teacher write traces, or bring finished ones in; on several GPUs: accelerate launch -m distill generate."""
    _run_one("generate", _load(recipe, context), redo=redo, shard=shard)


_stage_command("curate", "Check the traces, and choose those to learn from.")


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def score(context: typer.Context, recipe: RecipePath, redo: Redo = False, number: Round = 0, shard: Shard = "") -> None:
    """Let the teacher read finished traces, and store its distributions; on several GPUs: accelerate launch -m distill score."""
    _run_one("score", _load(recipe, context), number=number, redo=redo, shard=shard)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def train(context: typer.Context, recipe: RecipePath, redo: Redo = False, number: Round = 0) -> None:
    """Train the student, in this process; for several: accelerate launch -m distill.train --config RECIPE [--round N]."""
    _run_one("train", _load(recipe, context), number=number, redo=redo)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def rollouts(context: typer.Context, recipe: RecipePath, redo: Redo = False, number: Round = 1, shard: Shard = "") -> None:
    """Let the current student write the traces of a round; on several GPUs: accelerate launch -m distill rollouts."""
    _run_one("rollouts", _load(recipe, context), number=number, redo=redo, shard=shard)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def evaluate(context: typer.Context, recipe: RecipePath, redo: Redo = False, shard: Shard = "") -> None:
    """Measure base, student and teacher on the held-out prompts; on several GPUs: accelerate launch -m distill evaluate."""
    _run_one("evaluate", _load(recipe, context), redo=redo, shard=shard)


_stage_command("benchmark", "Measure base, student and teacher on public benchmarks through lm-eval (the optional extra benchmarks).")
_stage_command("report", "Make report.md and report.html from the run's files.")
_stage_command("export", "Write the merged student, its adapter and a model card.")


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def check(
    context: typer.Context,
    recipe: RecipePath,
    quick: Annotated[bool, typer.Option("--quick", help="A second, without torch: keys, folders, terms, the first rows.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=1, help="That will train, where they are launched by accelerate.")] = 1,
    launch: Annotated[Path | None, typer.Option("--launch", metavar="FILE", help="By which they are: accelerate's config file.")] = None,
) -> None:
    """Prove a recipe before anything is spent: keys, files, packages, tokens, lengths; and rehearse it with miniature models."""
    from distill.before import check as whole
    from distill.before import quick as short
    from distill.cluster.submit import launch_file

    loaded, launch = _load(recipe, context), launch_file(launch) if launch else None
    if not (short.run(loaded, launch) if quick else whole.run(loaded, processes, launch)):
        raise typer.Exit(1)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def plan(
    context: typer.Context,
    recipe: RecipePath,
    gpu: Annotated[str, typer.Option("--gpu", metavar="CARD", help="Its name or memory, 'RTX 4090', 24GiB; cpu; left out: any.")] = "",
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Of a node; a process each.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="That train.")] = 1,
    launch: Annotated[Path | None, typer.Option("--launch", metavar="FILE", help="What is dealt out among them; left out: DDP.")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Of a prompt; no data are read.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, sizes in bytes.")] = False,
) -> None:
    """Reckon the memory of every stage from configs alone: what fits a card, and what to change if it does not. No GPU, no weights."""
    from distill.cluster.submit import launch_file
    from distill.planning import shown

    loaded = _load(recipe, context)
    found = shown.make(loaded, shown.place_of(loaded, gpu, gpus, nodes, launch_file(launch) if launch else None, prompt_tokens))
    typer.echo(shown.as_json(found)) if as_json else shown.show(found)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def submit(
    context: typer.Context,
    recipe: RecipePath,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Of each; left out: the site's.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="That train on a node; left out: one a GPU.")] = None,
    launch: Annotated[Path | None, typer.Option(help="What is dealt out among them, e.g. slurm/launch/fsdp2.yaml; left out: DDP.")] = None,
    shards: Annotated[int | None, typer.Option(min=1, max=9999, help="Parts of what is written and scored; left out: one a GPU.")] = None,
    gpus_per_task: Annotated[int, typer.Option(min=1, help="Of such a part.")] = 1,
    servers: Annotated[int, typer.Option(min=1, help="Jobs that serve a model and share its work.")] = 1,
    serve_nodes: Annotated[int, typer.Option(min=1, help="Of each of them.")] = 1,
    follow_ups: Annotated[int | None, typer.Option(min=0, help="Jobs that go on where one ended early; left out: the site's.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="Train with each value, on the same traces; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print every job, command and file; submit nothing.")] = False,
    beside: Annotated[bool, typer.Option("--beside", help="Although jobs of this run are queued or running.")] = False,
) -> None:
    """Give what is not done of a run to Slurm, as a chain of jobs; needs ~/.config/distill/site.env (slurm/README.md)."""
    asked = {"nodes": nodes, "gpus": gpus_per_node, "processes": processes, "launch": launch, "shards": shards}
    asked |= {"gpus_per_task": gpus_per_task, "servers": servers, "serve_nodes": serve_nodes, "follow_ups": follow_ups}
    from distill.cluster.submit import run

    if not run(lambda more: _load(recipe, context, more), sweep or [], dry_run=dry_run, beside=beside, **asked):
        raise typer.Exit(1)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def serve(
    context: typer.Context,
    recipe: RecipePath,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="teacher, student (the last one trained) or base.")] = "teacher",
    number: Annotated[int, typer.Option("--round", min=0, help="With role student: the one that writes in this on-policy round.")] = 0,
) -> None:
    """Start the server of a model by hand, as its stages would, until Ctrl-C; stages of the run find it and use it meanwhile."""
    from distill.pipeline import serve as serve_role

    serve_role(_load(recipe, context), role, number)


def _run_folder(given: Path) -> Path:
    """The folder of a run: as given, or where the recipe of that file or name has it."""
    from distill.errors import RecipeError
    from distill.recipe.reading import load_recipe
    from distill.stages import run_dir

    if given.is_dir():
        return given
    try:
        return run_dir(load_recipe(given))
    except RecipeError:
        return given


RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a run, e.g. runs/quickstart, or its recipe.", callback=_run_folder)
]


@app.command()
def verify(run: RunPath) -> None:
    """Compare every file of a run with the digest it was written with, and list what is missing, altered, extra or outdated."""
    from distill.pipeline import verify_run

    if not verify_run(run):
        raise typer.Exit(1)


Prices = Annotated[Path | None, typer.Option(metavar="FILE", help="Prices of your own, in the form of the kit's reporting/prices.yaml.")]
GpuHour = Annotated[float | None, typer.Option(metavar="USD", min=0, help="What an hour of each GPU costs, whatever the prices say.")]
CpuHour = Annotated[float | None, typer.Option(metavar="USD", min=0, help="The same of a machine whose CPU alone worked.")]
Gpu = Annotated[str | None, typer.Option(metavar="NAME", help="Which GPU it was, or is to be priced as, e.g. 'RTX 4090'.")]


@app.command()
def costs(
    run: RunPath,
    prices: Prices = None,
    gpu: Gpu = None,
    gpu_hour: GpuHour = None,
    cpu_hour: CpuHour = None,
    server_gpus: Annotated[int | None, typer.Option(min=1, help="GPUs behind each server that its stages started.")] = None,
    api: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="A host's model to compare with, e.g. gpt-5.4-mini.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """What a run cost, by its manifests: a stage, an accepted trace, a point of accuracy, 1,000 answers; and when it pays."""
    from distill.pipeline import costs_of
    from distill.reporting.prices import rates_of

    rates = rates_of(prices, gpu=gpu, gpu_hour=gpu_hour, cpu_hour=cpu_hour, server_gpus=server_gpus)
    typer.echo(costs_of(run, rates, api or (), width=shutil.get_terminal_size((140, 24)).columns, as_json=as_json))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or one of a sweep, runs/x/sweep.")],
    prices: Prices = None,
    gpu: Gpu = None,
    gpu_hour: GpuHour = None,
    cpu_hour: CpuHour = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Compare finished runs: students on the held-out prompts they share, teachers, methods, terms, costs, and where recipes differ."""
    from distill.cluster.compare import compare_folders
    from distill.reporting.prices import rates_of

    compare_folders(runs, rates_of(prices, gpu=gpu, gpu_hour=gpu_hour, cpu_hour=cpu_hour), as_json=as_json)


@app.command()
def status(
    run: RunPath,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every few seconds, on a terminal, until all is done or Ctrl-C.")] = False,
) -> None:
    """How far a run is: steps, parts, jobs, rows, time left; of what failed the last lines. Exit code 1 where something failed for good."""
    from distill.cluster.status import show

    if not show(run, as_json=as_json, watch=watch):
        raise typer.Exit(1)


@app.command(context_settings=_OVERRIDES, epilog=_EPILOG)
def pair(
    context: typer.Context,
    recipe: RecipePath,
    prompts: Annotated[int | None, typer.Option(min=1, help="Training prompts to look at; 32, or 200 of each teacher's traces.")] = None,
    traces: Annotated[list[str] | None, typer.Option(help="Compare teachers by their traces instead: a run or file; for each.")] = None,
    redo: Redo = False,
) -> None:
    """Measure on a few prompts whether this teacher can teach this student, before anything is spent; exit code 3 says it can't."""
    if not importlib.import_module("distill.before.pair").run(_load(recipe, context), prompts, traces or (), redo=redo):
        raise typer.Exit(_CANT_TEACH)


app.add_typer(reference.app)


def _load(path: Path, context: typer.Context, more: Sequence[str] = ()) -> Recipe:
    from distill.recipe.reading import load_recipe
    from distill.run.failures import works_on
    from distill.run.log import calm_libraries
    from distill.stages import run_dir

    calm_libraries()
    recipe = load_recipe(path, [*context.args, *more])
    works_on(run_dir(recipe))
    return recipe


if __name__ == "__main__":
    main()
