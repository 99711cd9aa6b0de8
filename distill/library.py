"""The kit from Python: `import distill`. LIBRARY.md beside this file shows each function at work.

Errors are those of `distill.errors`. Nothing is printed unless `talk` is set; then what the command would say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import RecipeError, plain_storage_errors
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.recipe.reading import load_recipe as load_recipe
from distill.run.log import calm_libraries, silence
from distill.run.manifest import Manifest
from distill.stages import FOLDERS

if TYPE_CHECKING:
    from distill.targets.codec import Targets
    from distill.targets.spec import TargetSpec


@plain_storage_errors()
def run_stage(name: str, recipe: Recipe, *, number: int = 0, redo: bool = False, talk: bool = False) -> Manifest:
    """Runs one stage, goes on with it, or finds it done; returns its manifest, with rows, drops and facts.

    Args:
        name: `prompts`, `generate`, `curate`, `score`, `train`, `rollouts`, `evaluate`, `benchmark`, `report` or `export`.
        recipe: Of `load_recipe`.
        number: Of the on-policy round, from 1; 0 outside the rounds.
        redo: Delete first what is there of this stage.
        talk: Print notes, progress and the closing line.
    """
    from distill import pipeline

    if name not in FOLDERS:
        raise RecipeError(f"run_stage: there is no stage {name!r}. Give one of {', '.join(FOLDERS)}.")
    with _voice(talk):
        return pipeline.run_stage(name, recipe, number=number, redo=redo)


@plain_storage_errors()
def run_all(recipe: Recipe, *, talk: bool = False, check: bool = True) -> None:
    """Runs all stages of a recipe, going on where an earlier run stopped.

    Args:
        recipe: Of `load_recipe`.
        talk: As in `run_stage`.
        check: Whether what `distill check` proves comes first, where something that costs is still to do.
    """
    from distill import pipeline
    from distill.before.check import before_run
    from distill.before.outlook import refuse_what_cannot_end

    to_do = refuse_what_cannot_end(recipe)
    with _voice(talk):
        if check:
            before_run(recipe, to_do)
        pipeline.run_pipeline(recipe)


@plain_storage_errors()
def read_table(folder: str | Path, table: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a finished stage's table, after its digests were checked.

    Args:
        folder: Of the stage, e.g. `runs/quickstart/curated`.
        table: `train`, `heldout`, `traces`, `curated`, `dropped`, `verdicts`, `answers`, `scores`, `confusion`.
        columns: Only these; null reads all.

    Raises:
        MissingStageError: the stage is not finished.
        DataError: it has no such table.
        IntegrityError: a shard was altered.
    """
    from distill.errors import DataError
    from distill.run.manifest import read_manifest
    from distill.run.tables import read_rows

    folder = Path(folder).absolute()  # a relative `exp:1/` would be a URI to Arrow
    known = read_manifest(folder).tables
    if table not in known:
        raise DataError(f"{folder}: has no table {table!r}, only {', '.join(known) or 'other files'}.")
    return read_rows(folder, table, columns)


@plain_storage_errors()
def score_rows(
    rows: Sequence[dict[str, Any]],
    teacher: str | ModelSpec,
    student: str | ModelSpec | None = None,
    *,
    target: TargetSpec | None = None,
    batch_size: int = 8,
) -> list[Targets]:
    """What a teacher thinks of traces, in the student's ids: for each row one entry a supervised token; nothing is written.

    The teacher is loaded for the call, on the best device there is.

    Args:
        rows: Each with `messages`, `completion` and, as traces have it, `prompt_id` and `sample_index`.
        teacher: Who reads; a name or folder, or a section like the recipe's.
        student: Whose tokens are meant; null takes the teacher's own.
        target: What is kept: `TopK(k=64)`, the default, `Sampled(...)` or `ChosenToken()`, of `distill.targets.spec`.
        batch_size: Rows at once; halved by itself when memory runs out.

    Raises:
        ModelError: a model, tokenizer or template can't be used.
    """
    calm_libraries()
    from distill.engines import scoring
    from distill.models.loading import load_chat_format, load_model, pick_device
    from distill.models.vocabulary import align, vocabulary_map
    from distill.targets.spec import TopK

    reader, learner = (ModelSpec(model=spec) if isinstance(spec, str) else spec for spec in (teacher, student or teacher))
    theirs, ours = load_chat_format(reader), load_chat_format(learner)
    vocabulary = vocabulary_map(theirs, ours)
    aligned = [align(row, theirs, ours, vocabulary) for row in rows]
    scored = scoring.score_rows(load_model(reader, pick_device()), aligned, target or TopK(), vocabulary, batch_size)
    return [row.targets for row in scored]


def _voice(talk: bool) -> contextlib.AbstractContextManager[None]:
    if talk:
        calm_libraries()
        return contextlib.nullcontext()
    return _silently()


@contextlib.contextmanager
def _silently() -> Any:
    with silence():
        calm_libraries()
        yield
