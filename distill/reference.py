"""Commands that look something up in what ships with the kit: keys of a recipe, the recipes, the catalogue of models. No run is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


def _recipe_names(incomplete: str) -> list[str]:
    """For the shell: recipes of the kit whose names begin so."""
    from distill.recipe.shelf import shipped

    return [recipe.name for recipe in shipped() if recipe.name.startswith(incomplete)]


def recipe_files(incomplete: str) -> list[str]:
    """For the shell: recipes and folders here, and the names of those of the kit."""
    here = [f"{path}/" if path.is_dir() else str(path) for path in sorted(Path().glob(f"{incomplete}*"))] if incomplete[:1] != "/" else []
    return [*(path for path in here if path.endswith(("/", ".yaml", ".yml"))), *_recipe_names(incomplete)]


def _model_names(incomplete: str) -> list[str]:
    """For the shell: families of the catalogue whose names begin so."""
    from distill.data.catalogue import catalogue

    return [name for name in catalogue().families if name.lower().startswith(incomplete.lower())]


@app.command()
def keys(
    section: Annotated[str, typer.Argument(metavar="[KEY]", help="How the keys begin, e.g. train or student.adapter.")] = "",
    search: Annotated[str, typer.Option(metavar="WORD", help="Only keys with this in their name or meaning.")] = "",
    method: Annotated[str, typer.Option(help="The train.method whose trainer_args are meant.")] = "sft",
) -> None:
    """Every key a recipe can have: what it takes, its default, its meaning. `distill keys train.trainer_args` has the trainer's own."""
    from distill.recipe.keys import find_keys

    for info in find_keys(section, search, method):
        default = "required" if info.default == "required" else info.default and f"default {info.default}"
        typer.echo(f"{typer.style(info.key, bold=True)}  ({'; '.join(filter(None, (info.kind, default)))})")
        if info.help:
            typer.echo(f"    {' '.join(info.help.split())}")


@app.command()
def models(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="A model, in any spelling; its entry whole.", autocompletion=_model_names)
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Models that may teach, or may not: terms and what these ask of students, advised sampling, templates, sizes; sources and dates."""
    from distill.data.listing import as_text

    typer.echo(as_text(name, shutil.get_terminal_size((140, 24)).columns, as_json=as_json))


recipes_app = typer.Typer(help="The recipes that come with the kit.", context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """The recipes that come with the kit, and what was measured of each; any command takes one by its name."""
    if context.invoked_subcommand is None:
        from distill.recipe.shelf import shipped, table

        typer.echo(table(shipped(), shutil.get_terminal_size((140, 24)).columns))
        typer.echo("\nTo change one: distill recipes cp NAME. Its header has the memory and the time.")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a recipe that `distill recipes` lists.", autocompletion=_recipe_names)],
    target: Annotated[Path | None, typer.Argument(metavar="[TARGET]", help="File or folder; this folder if left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Copy a recipe of the kit, to change it."""
    from distill.errors import visible
    from distill.recipe.shelf import copy_recipe

    typer.echo(visible(f"{copy_recipe(name, target, force=force)}: a copy of {name}"))
