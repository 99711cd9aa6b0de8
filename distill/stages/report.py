"""Stage `report`: a page about the run, from its files alone. Reads every stage's folder, writes report/."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.reporting.made import repeat_commands
from distill.reporting.pages import render
from distill.reporting.summary import RunSummary, lineage, metrics, summarise
from distill.reporting.tables import (
    COST_COLUMNS,
    RESULT_COLUMNS,
    ROUND_COLUMNS,
    TARGET_COLUMNS,
    cost_rows,
    funnel,
    results_rows,
    results_text,
    round_rows,
    target_rows,
    verdict_counts,
)
from distill.run.clock import Clock
from distill.run.files import write_text
from distill.run.folder import StageFolder
from distill.run.log import duration_text
from distill.run.manifest import Manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import THINK_CLOSE, THINK_OPEN
from distill.run.tables import read_rows
from distill.stages import Step, as_made, folder, folders_to_show, last_round, made_steps, open_stage, plan_of, student_folder

Row = dict[str, Any]
_PASSED = {True: "passed", False: "failed", None: "not judged"}


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make; it takes seconds, so any change makes it anew."""
    stages, rounds = folders_to_show(recipe)
    inputs = [*stages.values(), *(place for places in rounds for place in places.values())]
    return plan_of(recipe, Step("report"), {"report": recipe.report.identity()}, inputs, Growth(anything=True))


def run(recipe: Recipe) -> Manifest:
    """Writes `report.html`, `report.md` and `summary.txt`."""
    with open_stage(recipe, plan(recipe)) as out:
        return out.manifest or _report(as_made(recipe), out)


def _report(recipe: Recipe, out: StageFolder) -> Manifest:
    clock = Clock()
    summary = summarise(*folders_to_show(recipe))
    page = _page(recipe, summary)
    write_text(out.path / "report.html", render("report.html.j2", **page, **_pictures(recipe, summary)))
    write_text(out.path / "report.md", render("report.md.j2", **page))
    write_text(out.path / "summary.txt", results_text(summary))
    return out.finish(files=[out.path / name for name in ("report.html", "report.md", "summary.txt")], facts=clock.facts())


def _page(recipe: Recipe, summary: RunSummary) -> dict[str, Any]:
    """Everything the two templates show, as text and numbers."""
    return {
        "name": recipe.name,
        "summary": summary,
        "columns": RESULT_COLUMNS,
        "results": results_rows(summary),
        "funnel": funnel(summary, recipe),
        "verdicts": verdict_counts(summary),
        "drops": [(stage, reason, count) for stage, m in summary.stages for reason, count in sorted(m.drops.items())],
        "round_columns": ROUND_COLUMNS,
        "rounds": round_rows(summary, folders_to_show(recipe)[1]),
        "target_columns": TARGET_COLUMNS,
        "targets": target_rows(summary),
        "cost_columns": COST_COLUMNS,
        "costs": cost_rows(summary),
        "total_time": duration_text(summary.wall_s),
        "lineage": lineage(recipe, summary),
        "examples": _examples(recipe, summary),
        "no_examples": "None asked for." if recipe.report.examples == 0 else "This method keeps no traces.",
        "recipe": recipe_text(recipe),
        "repeat": repeat_commands(recipe, made_steps(recipe)),
    }


def _pictures(recipe: Recipe, summary: RunSummary) -> dict[str, str | None]:
    from distill.reporting.plots import accuracy_bars, funnel_bars, loss_curve

    logged, steps = metrics(student_folder(recipe) / "metrics.jsonl"), funnel(summary, recipe)
    divergences = [(entry["step"], entry["kl"]) for entry in logged if entry.get("kl") is not None]
    return {
        "accuracy_svg": accuracy_bars(summary.results) if summary.results else None,
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
    rows = _evenly(read_rows(folder(recipe, "rollouts", wrote[-1]), "traces"), count)
    return [_example(row, []) | {"tag": f"written in round {wrote[-1]}, ended by: {row['finish_reason']}"} for row in rows]


def _curated_examples(curated: Path, count: int) -> list[Row]:
    """Evenly over the tables: two of three kept and one of three dropped, as far as there are any."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for verdict in read_rows(curated, "verdicts"):
        found[verdict["prompt_id"], verdict["sample_index"]].append(verdict)
    kept, dropped = read_rows(curated, "curated"), sorted(read_rows(curated, "dropped"), key=lambda row: str(row["reason"]))
    num_dropped = min(len(dropped), max(count // 3, count - len(kept)))
    rows = [*_evenly(kept, count - num_dropped), *_evenly(dropped, num_dropped)]
    return [_example(row, found[row["prompt_id"], row["sample_index"]]) for row in rows]


def _evenly(rows: list[Row], count: int) -> list[Row]:
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


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
