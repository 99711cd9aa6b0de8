"""Where things are, for batch scripts: `python -m distill.cluster.place RECIPE [words of a stage's command]` prints the run's folder.

The scripts themselves lie in `slurm/` beside the package in a checkout, and inside it, as `distill/slurm/`, in a wheel.
`python -m distill.cluster.place` without a recipe prints their folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distill.errors import ClusterError
from distill.recipe.reading import load_recipe
from distill.run.failures import one_message
from distill.stages import run_dir

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "slurm", _PACKAGE.parent / "slurm")
_WITH_VALUE = ("--round", "--shard", "--processes")  # options of the commands of stages, which are no keys of the recipe
_FLAGS = ("--redo", "--quiet")


def scripts() -> Path:
    """The folder of the batch scripts.

    Raises:
        ClusterError: it is neither beside the package nor in it.
    """
    found = next((place for place in _PLACES if (place / "common.sh").is_file()), None)
    if found is None:
        raise ClusterError(f"{_PLACES[1]}: the batch scripts are not there. Install the kit anew, or take its checkout.")
    return found


def overrides_in(words: Sequence[str]) -> list[str]:
    """The overrides of a recipe among the words behind it in a stage's command."""
    found, left = [], list(words)
    while left:
        word = left.pop(0)
        if word in _WITH_VALUE and left:
            left.pop(0)
        elif word not in _FLAGS and word.partition("=")[0] not in _WITH_VALUE:
            found.append(word)
    return found


def main(words: Sequence[str]) -> None:
    """Prints the folder of the scripts, or of a recipe's run."""
    with one_message():
        print(run_dir(load_recipe(words[0], overrides_in(words[1:]))).absolute() if words else scripts())


if __name__ == "__main__":
    main(sys.argv[1:])
