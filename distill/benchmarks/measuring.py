"""One task with one model: lm-eval measures, and its own files are kept as it writes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from distill.benchmarks.tasks import calm
from distill.errors import DataError, visible
from distill.recipe.benchmarks import Benchmarks
from distill.run.files import digest_json


def folder_name(task: str) -> str:
    """A task's folder: its name, and where a file system might not take that, something of it with a digest."""
    plain = re.sub(r"[^A-Za-z0-9._+-]", "_", task)
    return plain if plain == task else f"{plain}-{digest_json(task)[:8]}"


def measure(model: Any, name: str, task: str, manager: Any, section: Benchmarks, target: Path) -> None:
    """Writes lm-eval's `results_*.json` and a `samples_*.jsonl` a task into a folder, which is there whole or not at all.

    Args:
        model: lm-eval's.
        name: How results call it.
        task: By the recipe's name.
        manager: Who knows it.
        section: How it is asked.
        target: The folder.

    Raises:
        DataError: lm-eval can't measure it, or can't write what it found.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    writing = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(writing, ignore_errors=True)
    tracker = EvaluationTracker(output_path=str(writing))
    with calm(), _environment_once():
        try:
            found = simple_evaluate(
                model=model,
                tasks=[task],
                num_fewshot=section.num_fewshot,
                limit=section.limit,
                apply_chat_template=section.apply_chat_template,
                gen_kwargs={"max_gen_toks": section.max_gen_toks} if section.max_gen_toks is not None else None,
                task_manager=manager,
                log_samples=True,
            )
        except (ValueError, KeyError, AssertionError, NotImplementedError) as error:  # what a task, or lm-eval, makes of its settings
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"benchmarks: task {task} with {name}: {visible(reason.rstrip('.'), 300)}. Leave the task out, or mend it."
            ) from error
        _log(tracker, model, name, section)
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for leaf, rows in samples.items():
            tracker.save_results_samples(task_name=leaf, samples=rows)
    _move(writing, target, len(samples))


@contextmanager
def _environment_once() -> Iterator[None]:
    """Inside, torch's description of this machine, which lm-eval puts into each file, is found once: it starts pip and many programs."""
    from torch.utils import collect_env

    before = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = _environment
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = before


@cache
def _environment() -> str:
    from torch.utils import collect_env

    return str(collect_env.pretty_str(collect_env.get_env_info()))


def _log(tracker: Any, model: Any, name: str, section: Benchmarks) -> None:
    template = getattr(model, "chat_template", lambda _: "")(section.apply_chat_template) if section.apply_chat_template else ""
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf" if hasattr(model, "pretrained") else "server",
        model_args={"pretrained": name},
        system_instruction=None,
        chat_template=template,
        fewshot_as_multiturn=True,
    )


def _move(writing: Path, target: Path, leaves: int) -> None:
    """Puts the files in their place; lm-eval only logs that it could not write one."""
    files = [file for file in writing.rglob("*") if file.is_file()]
    if len(files) != leaves + 1:
        raise DataError(f"{target}: lm-eval could not write its results there. Look whether the disk is full, and run this again.")
    shutil.rmtree(target, ignore_errors=True)
    whole = target.with_name(f"{target.name}.whole.tmp")
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for file in files:
        file.rename(whole / file.name)
    shutil.rmtree(writing)
    whole.rename(target)


def results_in(folder: Path) -> dict[str, Any]:
    """What lm-eval found, as its file has it."""
    found: dict[str, Any] = json.loads(_results(folder).read_text(encoding="utf-8"))
    return found


def samples_in(folder: Path, leaf: str) -> Iterator[dict[str, Any]]:
    """lm-eval's rows of a task: one a document and filter."""
    date = _results(folder).stem.removeprefix("results_")
    with (folder / f"samples_{leaf}_{date}.jsonl").open(encoding="utf-8") as opened:
        yield from (json.loads(line) for line in opened)


def _results(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("results_*.json"))))
