"""The GPU entry, for any number of processes.

usage: accelerate launch distill/train.py --config RECIPE [--round N] [--section.key value ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Run by its path, Python puts this file's folder first on sys.path, where the kit's modules would hide others of
# the same name in the whole process. The folder above is the right one, and lets an uninstalled clone run too.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.errors import DistillError
from distill.models.processes import leave
from distill.pipeline import run_stage
from distill.recipe.reading import load_recipe


def main(arguments: list[str]) -> None:
    """Trains the student of a recipe.

    Args:
        arguments: `--config RECIPE`, `--round N` for the training of an on-policy round, then overrides.
    """
    match arguments:
        case ["--config", recipe, "--round", number, *overrides] if number.isdigit():
            pass
        case ["--config", recipe, *overrides] if overrides[:1] != ["--round"]:
            number = "0"
        case _:
            print(__doc__)
            sys.exit(0 if {"-h", "--help"} & set(arguments) else 2)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run_stage("train", load_recipe(recipe, overrides), number=int(number))
        leave()
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
