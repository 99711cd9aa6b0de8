"""Trains the student of a recipe, in any number of processes.

usage: accelerate launch -m distill.train --config RECIPE [--round N] [--redo] [--quiet] [--section.key value ...]
       (in a checkout also distill/train.py by its path)

  --config RECIPE   the recipe: a YAML file, or the name of one that `distill recipes` lists
  --round N         the on-policy round, from 1; 0, the default, is the training on traces before them
  --redo            delete this stage's folder first, and train again
  --quiet           say only results and errors
  -h, --help        show this

Options and overrides may stand in any order, `--name value` or `--name=value`. `distill keys` lists what can be overridden.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

# Run by its path, Python puts this file's folder first on sys.path, where the kit's modules would hide others of
# the same name in the whole process. The folder above is the right one, and lets an uninstalled clone run too.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.errors import RecipeError, shown
from distill.run.failures import one_message, works_on


class Asked(NamedTuple):
    """What the command line asks for."""

    recipe: str
    number: int
    redo: bool
    quiet: bool
    overrides: list[str]


def parse(arguments: list[str]) -> Asked:
    """Takes this program's own options out of the words, and leaves the rest as overrides of the recipe.

    Raises:
        RecipeError: no recipe is named, an option lacks its value, or a value isn't one.
    """
    found: dict[str, str] = {"--config": "", "--round": "0"}
    flags, overrides = {"--redo": False, "--quiet": False}, []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in flags:
            flags[word] = True
        elif name in found:
            if not equals and not words:
                raise RecipeError(f"command line: {name} has no value. Write {name} VALUE.")
            found[name] = value if equals else words.pop(0)
        else:
            overrides.append(word)
    if not found["--config"]:
        raise RecipeError("command line: no recipe is named. Write --config RECIPE; --help says more.")
    if not found["--round"].isdecimal():
        raise RecipeError(
            f"command line: --round must be a whole number ≥ 0, got {shown(found['--round'])}. Leave it out outside the rounds."
        )
    return Asked(found["--config"], int(found["--round"]), flags["--redo"], flags["--quiet"], overrides)


def main(arguments: list[str]) -> None:
    """Trains as the words of a command line ask for."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    with one_message():
        asked = parse(arguments)
        # Imported here, so that a wrong command line is answered at once.
        from distill.before.outlook import refuse_what_follows
        from distill.models.processes import leave
        from distill.pipeline import rounds_are_over, run_stage
        from distill.recipe.reading import load_recipe
        from distill.run.clock import is_main_process
        from distill.run.log import be_quiet, calm_libraries
        from distill.stages import Step, run_dir

        if asked.quiet:
            be_quiet()
        calm_libraries()
        recipe = load_recipe(asked.recipe, asked.overrides)
        works_on(run_dir(recipe))
        if not asked.redo and rounds_are_over(recipe, Step("train", asked.number)):
            return
        if is_main_process() and not asked.redo:
            refuse_what_follows(recipe, Step("train", asked.number))
        run_stage("train", recipe, number=asked.number, redo=asked.redo)
        leave()


if __name__ == "__main__":
    main(sys.argv[1:])
