"""`distill check --quick`: what can be said of a recipe in a second, without torch: for a login node, and before each run.

Keys and trainer arguments were checked when the recipe was read. Of every source the first rows are mapped.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from distill.before.advice import check_advice
from distill.before.findings import Findings
from distill.before.likeness import check_likeness
from distill.before.outlook import outlook
from distill.before.packages import check_packages
from distill.before.servers import check_without_asking, warn_of_keys
from distill.data.alike import question_mapping, question_rows
from distill.data.completions import columns_of, traces_of
from distill.data.files import Placed
from distill.data.licences import check_terms
from distill.data.mapping import PromptMapping
from distill.data.sources import Source, benchmark_source, brought_traces, heldout_problems, heldout_set, problems
from distill.errors import DataError, visible
from distill.recipe.alike import Benchmark
from distill.recipe.experiment import Recipe
from distill.recipe.launches import kind_here, kind_of, refuse_launch
from distill.recipe.prompts import Prompts
from distill.recipe.sets import AskedSet
from distill.stages import run_dir, steps_of

MIN_FREE_GIB = 1.0
_FIRST_ROWS = 100  # of each source


def run(recipe: Recipe, launch: Path | None = None, *, there: bool = True) -> bool:
    """Prints every finding; true if none refutes the recipe.

    Args:
        recipe: The recipe.
        launch: The launch file that will train; null for none.
        there: Whether to look at what is in the run's folder, too.
    """
    found = Findings()
    claims(recipe, found, launch)
    if there:
        _check_what_is_there(recipe, found)
    return found.end("nothing was found that speaks against this recipe; `distill check` also reads all rows, and tokenises some")


def claims(recipe: Recipe, found: Findings, launch: Path | None = None) -> None:
    """What can be said of the recipe alone, whatever is in its folder."""
    common(recipe, found, launch)
    warn_of_keys(recipe, found)
    check_packages(recipe, found, importing=False)
    given = len(recipe.train.trainer_args)
    found.good("trainer arguments", f"{given} are given, of known names and types" if given else "the kit's own")
    _check_templates(recipe, found)
    _check_sources(recipe, found)


def common(recipe: Recipe, found: Findings, launch: Path | None = None) -> None:
    """What the whole check claims too: the recipe, its run folder, the launch, the terms, servers before they are asked."""
    found.good("recipe", f"{recipe.name}, run folder {run_dir(recipe)}")
    check_likeness(recipe, found)
    found.prove("launch", lambda: _launch(recipe, launch))
    _check_folder(recipe, found)
    found.prove("terms of the traces", lambda: _terms(recipe))
    check_advice(recipe, found)
    check_without_asking(recipe, found)


def _check_folder(recipe: Recipe, found: Findings) -> None:
    place = run_dir(recipe).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        found.bad("run folder", f"{place} is a file, so nothing can be written below it. Set run_dir.")
        return
    free_gib = shutil.disk_usage(place).free / 2**30
    if not os.access(place, os.W_OK):
        found.bad("run folder", f"{place} can't be written to. Set run_dir.")
    elif free_gib < MIN_FREE_GIB:
        found.bad("run folder", f"only {free_gib:.2f} GiB are free at {place}. Free some, or set run_dir.")
    else:
        found.good("run folder", f"writable, {free_gib:,.0f} GiB free")


def _launch(recipe: Recipe, file: Path | None) -> str:
    """Whether the processes that will train can deal the student out so."""
    kind = kind_of(file) if file is not None else kind_here({}, recipe.train.trainer_args)
    refuse_launch(recipe, kind)
    return f"{file.name if file is not None else 'of the recipe alone'}: {kind}"


def _terms(recipe: Recipe) -> str:
    teacher, traces = recipe.teacher, recipe.traces
    name = recipe.export.model_name if recipe.export and recipe.export.model_name else recipe.name
    held = partial(check_terms, student_name=name, student=recipe.student.model)
    # Brought traces have an author of their own; the teacher is learned from where it writes, scores or judges.
    notes = held(traces.author_model, licence=traces.licence) if traces is not None else []
    if traces is None or recipe.score is not None or recipe.train.is_live:
        notes += held(teacher.model, licence=teacher.licence, spec=teacher) if teacher is not None else held(None)
    return "; ".join(dict.fromkeys(notes)) or "nothing to note"


def _check_templates(recipe: Recipe, found: Findings) -> None:
    """Templates that are given as files, which the whole check reads."""
    for role, spec in (("teacher", recipe.teacher), ("student", recipe.student)):
        given = spec.chat_template if spec is not None else None
        if given is None or given == "chatml":
            continue
        claim = f"{role}'s chat template"
        if Path(given).is_file():
            found.good(claim, given)
        else:
            found.bad(claim, f"{role}.chat_template: there is no file {visible(given, 200)}. Correct the path, or give chatml.")


def _check_sources(recipe: Recipe, found: Findings) -> None:
    prompts, traces = recipe.prompts, recipe.traces
    mapping = PromptMapping(prompts, prompts.columns, prompts.source)

    def of_prompt(placed: Placed) -> list[str | None]:
        return [reason for _, reason in mapping.prompt_rows(placed[1], placed[0])]

    _check_source("prompts", lambda: problems(prompts), of_prompt, mapping.columns, found)
    if prompts.heldout_source is not None:
        _check_source("held-out prompts", lambda: heldout_problems(prompts), of_prompt, mapping.columns, found)
    for benchmark in prompts.decontaminate.benchmarks if prompts.decontaminate is not None else []:
        _check_benchmark(prompts, benchmark, found)
    for name, asked in list(recipe.asked_sets().items())[1:]:
        _check_set(recipe, name, asked, found)
    if traces is None:
        return
    mapping_of_traces = PromptMapping(prompts, traces.columns, traces.source, with_fields=False)

    def of_trace(placed: Placed) -> list[str | None]:
        return [asked.reason or found.reason for asked, found in traces_of(traces, mapping_of_traces, placed[1], placed[0])]

    columns = [*mapping_of_traces.columns, *columns_of(traces)]
    _check_source("traces", lambda: brought_traces(traces), of_trace, columns, found)


def _check_benchmark(prompts: Prompts, benchmark: Benchmark, found: Findings) -> None:
    """A benchmark whose questions are kept out of training."""
    mapping = question_mapping(prompts, benchmark)

    def of_question(placed: Placed) -> list[str | None]:
        return [reason for _, reason in question_rows(mapping, benchmark, placed[1], placed[0])]

    _check_source(f"benchmark {benchmark.called}", lambda: benchmark_source(benchmark), of_question, mapping.columns, found)


def _check_set(recipe: Recipe, name: str, asked: AskedSet, found: Findings) -> None:
    """A further held-out set."""
    assert recipe.evaluate is not None
    each, mapping = recipe.evaluate.sets[name], PromptMapping(asked.prompts, asked.prompts.columns, asked.prompts.source)

    def of_prompt(placed: Placed) -> list[str | None]:
        return [reason for _, reason in mapping.prompt_rows(placed[1], placed[0])]

    _check_source(f"set {name}", lambda: heldout_set(name, each), of_prompt, mapping.columns, found)


def _check_source(
    name: str, find: Callable[[], Source | None], reasons_of: Callable[[Placed], list[str | None]], columns: list[str], found: Findings
) -> None:
    source: Source | None = None

    def attempt() -> str:
        nonlocal source
        source = find()
        assert source is not None
        if not source.is_local:
            return "on the Hub"
        rows: Iterator[Placed] = islice(source.rows(columns), _FIRST_ROWS)
        reasons = Counter(reason for placed in rows for reason in reasons_of(placed))
        usable = reasons.pop(None, 0)
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=str))
        if not usable:
            raise DataError(f"{source.name}: none of the first {reasons.total():,} rows can be used: {dropped}.")
        return f"of the first {usable + reasons.total():,} rows {usable:,} can be used" + (f" ({dropped})" if dropped else "")

    if found.prove(name, attempt) and source is not None and not source.is_local:
        found.unknown(f"rows of {source.name}", "they are on the Hub; `distill check` reads them")


def _check_what_is_there(recipe: Recipe, found: Findings) -> None:
    """What a run would do with each step, and whether it would be refused for what is there already."""
    seen = outlook(recipe, steps_of(recipe))
    for step, _, why in (step for step in seen if step.action == "refuse"):
        found.bad(str(step), why)
    actions: dict[str, list[str]] = {}
    for step, action, _ in seen:
        actions.setdefault(action, []).append(str(step))
    kept = {action: steps for action, steps in actions.items() if action != "refuse"}
    if kept:
        found.good("what a run would do", "; ".join(f"{action}: {', '.join(steps)}" for action, steps in kept.items()))
