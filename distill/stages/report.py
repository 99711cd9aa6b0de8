"""Stage `report`: a page about the run, from its files alone. Reads every stage's folder, writes report/."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.reporting.benchmarks import NOTHING, benchmarks_shown, benchmarks_text
from distill.reporting.made import MadeStep, repeat_commands
from distill.reporting.pages import render
from distill.reporting.public import file_or_name, public_names, published, published_recipe
from distill.reporting.results import label_tables, results_tables, results_text, tag_tables, win_tables
from distill.reporting.summary import RunSummary, lineage, metrics, summarise
from distill.reporting.tables import (
    ROUND_COLUMNS,
    TARGET_COLUMNS,
    cost_columns,
    cost_rows,
    funnel,
    round_rows,
    target_rows,
    verdict_counts,
)
from distill.run.clock import Clock
from distill.run.files import write_text
from distill.run.folder import StageFolder
from distill.run.log import duration_text
from distill.run.manifest import Manifest, read_manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import THINK_CLOSE, THINK_OPEN
from distill.run.tables import iter_pieces, iter_rows, rows_at
from distill.stages import Step, as_made, folder, folders_to_show, last_round, made_steps, open_stage, plan_of, student_folder, taken

Row = dict[str, Any]
_PASSED = {True: "passed", False: "failed", None: "not judged"}


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make; it takes seconds, so any change makes it anew."""
    recipe = _as_made(recipe)
    stages, rounds = folders_to_show(recipe)
    inputs = [*stages.values(), *(place for places in rounds for place in places.values())]
    return plan_of(recipe, Step("report"), {"report": recipe.report.identity()}, inputs, Growth(anything=True))


def run(recipe: Recipe) -> Manifest:
    """Writes `report.html`, `report.md` and `summary.txt`."""
    with open_stage(recipe, plan(recipe)) as out:
        return out.manifest or _report(_as_made(recipe), out)


def _as_made(recipe: Recipe) -> Recipe:
    """The recipe of what the report is about, and how this command wants the report."""
    return as_made(recipe).model_copy(update={"report": recipe.report})


def _report(recipe: Recipe, out: StageFolder) -> Manifest:
    clock = Clock()
    summary = summarise(*folders_to_show(recipe), public_names(recipe))
    page = _page(recipe, summary)
    write_text(out.path / "report.html", render("report.html.j2", **page, **_pictures(recipe, summary)))
    write_text(out.path / "report.md", render("report.md.j2", **page))
    write_text(out.path / "summary.txt", results_text(summary) + benchmarks_text(page["benchmarks"]))
    return out.finish(files=[out.path / name for name in ("report.html", "report.md", "summary.txt")], facts=clock.facts())


def _page(recipe: Recipe, summary: RunSummary) -> dict[str, Any]:
    """Everything the two templates show, as text and numbers."""
    public = published_recipe(recipe)
    return {
        "name": recipe.name,
        "summary": summary,
        "results": results_tables(summary),
        "tags": tag_tables(summary),
        "wins": win_tables(summary),
        "labels": label_tables(summary),
        "benchmarks": benchmarks_shown(folder(recipe, "benchmark")) if recipe.benchmarks is not None else NOTHING,
        "funnel": funnel(summary, recipe),
        "verdicts": verdict_counts(summary),
        "drops": [(stage, reason, count) for stage, m in summary.stages for reason, count in sorted(m.drops.items())],
        "round_columns": ROUND_COLUMNS,
        "rounds": round_rows(summary, folders_to_show(recipe)[1]),
        "target_columns": TARGET_COLUMNS,
        "targets": target_rows(summary),
        "cost_columns": cost_columns(summary),
        "costs": cost_rows(summary),
        "total_time": duration_text(summary.wall_s),
        "lineage": [*lineage(recipe, summary), *_taken(recipe)],
        "examples": _examples(recipe, summary),
        "no_examples": "None asked for." if recipe.report.examples == 0 else "This method keeps no traces.",
        "recipe": recipe_text(public),
        "repeat": repeat_commands(public, _steps(recipe)),
    }


def _steps(recipe: Recipe) -> list[MadeStep]:
    """What was made, and the export that is still to come."""
    steps = [step._replace(made_with=published(step.made_with)) for step in made_steps(recipe) if step.stage != "export"]
    return [*steps, MadeStep("export", 0, {})] if recipe.export is not None else steps


def _taken(recipe: Recipe) -> list[tuple[str, str]]:
    """The stages that were made in another run."""
    others = taken(recipe)
    return [("taken from another run", f"{', '.join(others)}, of {file_or_name(str(others['prompts'].parent))}")] if others else []


def _pictures(recipe: Recipe, summary: RunSummary) -> Row:
    from distill.reporting.plots import accuracy_bars, confusion_square, funnel_bars, loss_curve, reliability

    logged, steps = metrics(student_folder(recipe)), funnel(summary, recipe)
    divergences = [(entry["step"], entry["kl_lower_bound"]) for entry in logged if entry.get("kl_lower_bound") is not None]
    return {
        "reliability_svg": reliability(summary.alike.bins) if summary.alike and summary.alike.bins else None,
        "accuracy_svg": accuracy_bars(summary.results) if summary.results else None,
        "confusion_svgs": {table.title: confusion_square(table.name, *table.square) for table in label_tables(summary)},
        "loss_svg": loss_curve([(entry["step"], entry["loss"]) for entry in logged], divergences) if logged else None,
        "loss_words": _loss_words(recipe, bool(divergences)),
        "funnel_svg": funnel_bars(steps) if steps else None,
    }


def _loss_words(recipe: Recipe, with_divergence: bool) -> str:
    """What the picture of the training shows."""
    number = last_round(recipe)
    what = f"Training loss of round {number}" if number else "Training loss"
    what += " and divergence from the teacher" if with_divergence else ""
    return f"{what}: each logged step, and its running mean."


def _examples(recipe: Recipe, summary: RunSummary) -> list[Row]:
    """Traces to look at: curated ones, else the student's own of the last round, else none."""
    count = recipe.report.examples
    if "curate" in summary.manifests:
        return _curated_examples(folder(recipe, "curate"), count)
    wrote = [number for number, stages in enumerate(summary.rounds, start=1) if "rollouts" in stages]
    if not wrote:
        return []
    written = folder(recipe, "rollouts", wrote[-1])
    rows = rows_at(written, "traces", _evenly(range(read_manifest(written).rows("traces")), count))
    return [_example(row, []) | {"tag": f"written in round {wrote[-1]}, ended by: {row['finish_reason']}"} for row in rows]


def _curated_examples(curated: Path, count: int) -> list[Row]:
    """Evenly over the tables: two of three kept and one of three dropped, as far as there are any."""
    manifest = read_manifest(curated)
    num_kept, num_dropped = manifest.rows("curated"), manifest.rows("dropped")
    dropped = min(num_dropped, max(count // 3, count - num_kept))
    rows = list(rows_at(curated, "curated", _evenly(range(num_kept), count - dropped)))
    rows += _dropped_examples(curated, dropped) if dropped else []
    found = _verdicts_of(curated, rows)
    return [_example(row, found[row["prompt_id"], row["sample_index"]]) for row in rows]


def _dropped_examples(curated: Path, count: int) -> list[Row]:
    """Evenly over the reasons in alphabetical order, and over the rows of each."""
    codes = array("H")
    code_of: dict[str, int] = {}
    for row in iter_rows(curated, "dropped", columns=["reason"]):
        codes.append(code_of.setdefault(str(row["reason"]), len(code_of)))
    rank = np.argsort(np.argsort(list(code_of)))
    by_reason = np.argsort(rank[np.asarray(codes)], kind="stable")
    places = _evenly(by_reason, count)
    rows = dict(zip(sorted(places), rows_at(curated, "dropped", sorted(places)), strict=True))
    return [rows[place] for place in places]


def _verdicts_of(curated: Path, rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    """The verdicts of some traces, by prompt and sample."""
    found: dict[tuple[str, int], list[Row]] = {(row["prompt_id"], row["sample_index"]): [] for row in rows}
    prompts = pa.array({prompt for prompt, _ in found}, pa.string())
    for piece in iter_pieces(curated, "verdicts") if found else ():
        for verdict in piece.filter(pc.is_in(piece["prompt_id"], prompts)).to_pylist():
            key = verdict["prompt_id"], verdict["sample_index"]
            if key in found:
                found[key].append(verdict)
    return found


def _evenly(places: Sequence[int] | NDArray[np.int64], count: int) -> list[int]:
    count = min(count, len(places))
    return [int(places[index * len(places) // count]) for index in range(count)]


def _example(row: Row, verdicts: list[Row]) -> Row:
    """A trace in parts. One that began to reason and never ended has no answer."""
    before, closed, after = row["completion"].partition(THINK_CLOSE)
    reasons = bool(closed) or before.lstrip().startswith(THINK_OPEN)
    return {
        "question": row["messages"][-1]["content"],
        "reasoning": before.replace(THINK_OPEN, "", 1).strip() if reasons else "",
        "answer": (after if reasons else before).strip(),
        "reference": row["reference"],
        "reason": row.get("reason"),
        "tag": f"dropped: {row['reason']}" if row.get("reason") else "kept",
        "verdicts": [f"{verdict['check']} {_PASSED[verdict['passed']]} ({verdict['reason']})" for verdict in verdicts],
    }
