"""What a run takes from another one instead of making it. Knows nothing of torch."""

from __future__ import annotations

from typing import Literal

from distill.recipe.base import PathOrName, Section

BeforeTraining = Literal["prompts", "generate", "curate", "score"]
"""The stages that several trainings can share, in the order of the pipeline."""


class Inputs(Section):
    """Stages of another run in place of this one's own; nothing is written there, and the sections they were made with must be the same."""

    run: PathOrName
    """Folder of the run they are taken from, e.g. `runs/quickstart`."""
    until: BeforeTraining | None = None
    """The last stage taken; this run makes all behind it. Null takes all that stand before the training."""
