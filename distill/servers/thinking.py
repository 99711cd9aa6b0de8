"""Where a recipe's teacher thinks: in this process, behind a server, or while it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.engines.thoughts import Thoughts
from distill.recipe.experiment import Recipe


@contextmanager
def open_thoughts(recipe: Recipe, place: Path, run: Path, traces: Path, part: str = "") -> Iterator[Thoughts]:
    """The source of a teacher's thoughts; a server that is started for it is ended behind the context.

    Args:
        recipe: With a teacher and a section score.
        place: The stage's folder.
        run: The run's folder.
        traces: The folder of the traces, where what came with them is kept.
        part: Of the stage, where several processes share its folder.
    """
    assert recipe.score is not None
    source = recipe.score.resolved(recipe.teacher)
    if source == "process":
        yield Thoughts(recipe)
    elif source == "generation":
        from distill.servers.kept import KeptThoughts

        yield KeptThoughts(recipe, traces)
    else:
        from distill.servers.reading import ServedThoughts

        with ServedThoughts(recipe, place, run, part) as thoughts:
            yield thoughts
