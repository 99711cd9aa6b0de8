"""The GPU entry: `accelerate launch distill/train.py --config RECIPE [--section.key value ...]`, any number of processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Run by its path, Python puts this file's folder first on sys.path, where the kit's modules would hide others of
# the same name in the whole process. The folder above is the right one, and lets an uninstalled clone run too.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.errors import DistillError
from distill.pipeline import run_stage
from distill.recipe_io import load_recipe


def main(arguments: list[str]) -> None:
    """Trains the student of a recipe.

    Args:
        arguments: `--config RECIPE`, then overrides.
    """
    if len(arguments) < 2 or arguments[0] != "--config":
        print(f"usage: accelerate launch distill/train.py --config RECIPE [--section.key value ...]\n\n{__doc__}")
        sys.exit(0 if {"-h", "--help"} & set(arguments) else 2)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run_stage("train", load_recipe(arguments[1], arguments[2:]))
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
