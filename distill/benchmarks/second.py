"""A second scorer: the kit's own checks on the answers that lm-eval has judged, so that its number does not stand alone."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

import distill
from distill.benchmarks.measuring import results_in, samples_in
from distill.benchmarks.scores import Found, Metric
from distill.checks import Given
from distill.checks.judging import Judges
from distill.recipe.benchmarks import Benchmarks

_METRIC, _FILTER = "accuracy", "whole answer"


def scorer(section: Benchmarks) -> tuple[str, str]:
    """Name and version of the checks."""
    names = ", ".join(check.called for check in section.second_checks)
    return f"distill-kit: {names}", f"{distill.__version__} (math-verify {importlib.metadata.version('math-verify')})"


def is_judged(section: Benchmarks, task: str, output_type: str) -> bool:
    """Whether the kit's checks judge a task, too."""
    return output_type == "generate_until" and any(fnmatchcase(task, pattern) for pattern in section.second_tasks)


def second_rows(places: Mapping[tuple[str, str], Path], section: Benchmarks) -> Iterator[tuple[str, Metric, Found]]:
    """The role of a model, and its accuracy by the kit's checks, for each task that they judge; what could not be judged counts as wrong.

    Args:
        places: Folders with lm-eval's files, by role and the recipe's name of the task.
        section: Which tasks, and by which checks.
    """
    tasks = [
        (role, asked, task, results_in(folder).get("n-shot", {}).get(task), list(_given(folder, task, section).items()))
        for (role, asked), folder in places.items()
        for task, config in results_in(folder)["configs"].items()
        if is_judged(section, task, config.get("output_type", ""))
    ]
    if not tasks:
        return
    name, version = scorer(section)
    right: dict[int, float] = {}
    with Judges(section.second_checks, section.check_timeout_s) as judges:
        for number, (correct, _) in judges.answers(enumerate(given for *_, documents in tasks for _, given in documents)):
            right[number] = float(correct is True)
    first = 0
    for role, asked, task, num_fewshot, documents in tasks:
        values = {place: right[first + number] for number, (place, _) in enumerate(documents)}
        first += len(documents)
        accuracy = float(np.mean(list(values.values())))
        row = {
            "model_role": role,
            "asked": asked,
            "task": task,
            "metric": _METRIC,
            "filter": _FILTER,
            "value": accuracy,
            "stderr": None,
            "num_documents": len(values),
            "num_fewshot": num_fewshot,
            "higher_is_better": True,
            "task_version": None,
            "scorer": name,
            "scorer_version": version,
        }
        yield role, Metric(task, f"{_METRIC} by {name}", _FILTER), Found(accuracy, None, values, row)


def _given(folder: Path, task: str, section: Benchmarks) -> dict[str, Given]:
    """What is judged of each document: its first answer."""
    given: dict[str, Given] = {}
    for sample in samples_in(folder, task):
        place = f"{task}/{sample['doc_id']}"
        if place not in given:  # each filter has a row of the same answers
            given[place] = Given(_first(sample["resps"]), _reference(sample["target"], section))
    return given


def _first(answers: Any) -> str:
    """The first answer of a document, as far inside as lm-eval has put it."""
    while isinstance(answers, list) and answers:
        answers = answers[0]
    return answers if isinstance(answers, str) else ""


def _reference(target: str, section: Benchmarks) -> str:
    match = re.search(section.second_reference, target)
    return match[1].strip() if match else target
