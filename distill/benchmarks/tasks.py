"""lm-eval's tasks that a recipe names: found, with their data, before a model is loaded. Knows nothing of models."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import DataError, RecipeError, visible
from distill.recipe.benchmarks import Benchmarks
from distill.recipe.experiment import Recipe
from distill.run.digests import digests_of
from distill.run.files import digest_json

INSTALL = "`pip install 'distill-kit[benchmarks]'`"
GENERATIVE = "generate_until"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, another one in each process
_OF_TASKS = frozenset({".yaml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet"})


class Leaf(NamedTuple):
    """A task without tasks of its own."""

    name: str
    output_type: str
    """`generate_until`, `multiple_choice`, `loglikelihood` or `loglikelihood_rolling`."""
    runs_code: bool
    """Whether its metric runs what models write."""
    documents: int
    is_drawn: bool
    """Whether it has answers drawn at random."""
    digest: str
    """Of its settings (prompts, metrics) and its documents."""


class Tasks(NamedTuple):
    """What a recipe's tasks are."""

    leaves: dict[str, list[Leaf]]
    """By the names that the recipe gives: of a group or tag all that is in it."""
    manager: Any
    """lm-eval's own, which knows them."""


def version() -> str:
    """Of lm-eval.

    Raises:
        RecipeError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(f"benchmarks: needs the package lm_eval, which is not installed. {INSTALL}, or set benchmarks: null.")
    return importlib.metadata.version("lm-eval")


def own_digest(section: Benchmarks) -> str | None:
    """SHA-256 of the names and contents of the task files of the user's own; null where there are none.

    Raises:
        RecipeError: there is no such folder.
    """
    if section.include_path is None:
        return None
    place = Path(section.include_path)
    if not place.is_dir():
        raise RecipeError(f"benchmarks.include_path: there is no folder {visible(str(place), 200)}. Correct the path.")
    files = sorted(file for file in place.rglob("*") if file.suffix in _OF_TASKS and file.is_file())
    return digest_json([[str(file.relative_to(place)), digest] for file, digest in zip(files, digests_of(files), strict=True)])


def find_tasks(recipe: Recipe) -> Tasks:
    """The tasks of a recipe with their data, all of which can be run with the models that it names.

    Raises:
        RecipeError: lm-eval is not installed, there is no such task, or one can't be run so.
        DataError: a task's data can't be had here.
    """
    section = recipe.benchmarks
    assert section is not None
    version()
    own_digest(section)
    with calm():
        manager = _manager(section)
        leaves = {name: _leaves(manager, name) for name in section.all_tasks}
    _refuse_twice(leaves)
    _refuse_impossible(recipe, [leaf for found in leaves.values() for leaf in found])
    return Tasks(leaves, manager)


@contextmanager
def calm() -> Iterator[None]:
    """Inside, lm-eval and the library of data sets log nothing below an error."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _manager(section: Benchmarks) -> Any:
    """lm-eval's manager; where all tasks are the user's own it looks at none of its own, which takes it seconds."""
    from lm_eval.tasks import TaskManager

    if section.include_path is not None:
        own = TaskManager(include_path=section.include_path, include_defaults=False)
        if set(section.all_tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=section.include_path)
    for name in section.all_tasks:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists all."
            raise RecipeError(f"benchmarks: lm-eval {version()} has no task {visible(name, 100)!r}. {hint}")
    return manager


def _leaves(manager: Any, name: str) -> list[Leaf]:
    """What is in a task, group or tag, with its data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # a library of data sets, and a task's own code, may raise anything
        raise DataError(f"benchmarks: task {name}: {_reason(error)}. {_advice(manager, name)}") from None
    return [_leaf(task) for task in loaded["tasks"].values()]


def _leaf(task: Any) -> Leaf:
    config = task.dump_config()
    metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
    settings = {key: value for key, value in config.items() if key != "metadata"} | {"metadata": metadata}
    settings = {key: _ADDRESS.sub("", repr(value)) for key, value in settings.items()}
    seen = hashlib.sha256(digest_json(settings).encode())
    documents = task.eval_docs
    for document in documents:
        seen.update(json.dumps(document, sort_keys=True, default=repr).encode())
    dangerous = bool(getattr(task, "UNSAFE_CODE", False))
    return Leaf(task.task_name, task.OUTPUT_TYPE, dangerous, len(documents), is_drawn(config.get("generation_kwargs")), seen.hexdigest())


def is_drawn(asked: Mapping[str, Any] | None) -> bool:
    """Whether a task's `generation_kwargs` have answers drawn at random, as lm-eval reads them."""
    given = (asked or {}).get("do_sample")
    return bool(given) if given is not None else float((asked or {}).get("temperature") or 0.0) > 0


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return visible(lines[0].rstrip("."), 300) if lines else type(error).__name__


def _advice(manager: Any, name: str) -> str:
    """What to do for the data of a task, which its file names."""
    entry = manager.task_index.get(name)
    source = (entry.cfg or {}).get("dataset_path") if entry is not None else None
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return "Look whether its data set can be reached and read, or leave the task out"
    data = f"data set {source}" if source else "its data sets"
    return (
        f"The Hub is switched off here (HF_HUB_OFFLINE): load the {data.removeprefix('its ')} into the cache first, where there is a "
        f"network, e.g. by `distill check` there with the same HF_HOME; or leave the task out."
    )


def _refuse_twice(leaves: dict[str, list[Leaf]]) -> None:
    """A task that two names bring would be run and counted twice."""
    owner: dict[str, str] = {}
    for name, found in leaves.items():
        for leaf in found:
            other = owner.setdefault(leaf.name, name)
            if other != name:
                raise RecipeError(f"benchmarks: {leaf.name} is a part of {other} and of {name}. Name one of them.")


def _refuse_impossible(recipe: Recipe, leaves: Sequence[Leaf]) -> None:
    """What can't be run with one of the models, or safely."""
    section = recipe.benchmarks
    assert section is not None
    dangerous = [leaf.name for leaf in leaves if leaf.runs_code]
    if dangerous:
        raise RecipeError(
            f"benchmarks: {', '.join(dangerous[:5])}: lm-eval would run code that models write on this machine, unprotected. Leave it out; "
            "the check `code` of section evaluate runs such code in a sandbox."
        )
    _refuse_unserved(recipe, section, leaves)


def _refuse_unserved(recipe: Recipe, section: Benchmarks, leaves: Sequence[Leaf]) -> None:
    """What a model behind a server can't do."""
    silent = [f"{leaf.name} ({leaf.output_type})" for leaf in leaves if leaf.output_type != GENERATIVE]
    for role in section.models:
        spec = recipe.teacher if role == "teacher" else recipe.student
        if spec is None or spec.server is None:
            continue
        drawn = [leaf.name for leaf in leaves if leaf.is_drawn]
        if drawn:
            raise RecipeError(
                f"benchmarks: {', '.join(drawn[:5])} has answers drawn at random, and the {role} behind a server writes the most probable "
                f"ones. Leave it out, or leave {role} out of benchmarks.models."
            )
        if silent:
            more = f" and {len(silent) - 5:,} more" if len(silent) > 5 else ""
            raise RecipeError(
                f"benchmarks: {', '.join(silent[:5])}{more} can't be run with the {role} behind a server: they compare probabilities of "
                f"given answers, and it only writes. Take tasks that are answered in text ({GENERATIVE}), leave {role} out of "
                f"benchmarks.models, or set {'teacher' if role == 'teacher' else 'student'}.server: null."
            )
