"""Stage `report`: a page about the run, from its files alone. Reads every stage's folder, writes report/."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from distill.pages import render
from distill.recipe import Recipe
from distill.recipe_io import recipe_text
from distill.runlog import Clock
from distill.schema import THINK_CLOSE, THINK_OPEN
from distill.stages import FOLDERS, folder, run_dir, stages_of, student_folder
from distill.storage import Manifest, StageFolder, read_rows, write_text
from distill.summary import (
    RESULT_COLUMNS,
    RunSummary,
    duration_text,
    funnel,
    lineage,
    metrics,
    results_rows,
    results_text,
    summarise,
    verdict_counts,
)

Row = dict[str, Any]
_PASSED = {True: "passed", False: "failed", None: "not judged"}


def run(recipe: Recipe) -> Manifest:
    """Writes `report.html`, `report.md` and `summary.txt`."""
    stages = [stage for stage in stages_of(recipe) if stage not in ("report", "export")]
    inputs = [folder(recipe, stage) for stage in stages]
    with StageFolder(folder(recipe, "report"), "report", {"report": recipe.report.identity()}, inputs) as out:
        return out.manifest or _report(recipe, stages, out)


def _report(recipe: Recipe, stages: list[str], out: StageFolder) -> Manifest:
    clock = Clock()
    summary = summarise(run_dir(recipe), {stage: FOLDERS[stage] for stage in stages})
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
        "drops": [(stage, reason, count) for stage, m in summary.manifests.items() for reason, count in sorted(m.drops.items())],
        "costs": [_cost(manifest) for manifest in summary.manifests.values()],
        "total_time": duration_text(summary.wall_s),
        "lineage": lineage(recipe, summary),
        "examples": _examples(folder(recipe, "curate"), recipe.report.examples),
        "recipe": recipe_text(recipe),
    }


def _pictures(recipe: Recipe, summary: RunSummary) -> dict[str, str | None]:
    from distill.plots import accuracy_bars, funnel_bars, loss_curve

    logged = metrics(student_folder(recipe) / "metrics.jsonl")
    return {
        "accuracy_svg": accuracy_bars(summary.results) if summary.results else None,
        "loss_svg": loss_curve([entry["step"] for entry in logged], [entry["loss"] for entry in logged]) if logged else None,
        "funnel_svg": funnel_bars(funnel(summary, recipe)),
    }


def _cost(manifest: Manifest) -> list[str]:
    facts = manifest.facts
    tokens = facts.get("tokens")
    return [
        manifest.stage,
        duration_text(facts["wall_s"]),
        "" if tokens is None else f"{tokens:,}",
        str(facts.get("device", "cpu")),
        facts["finished_at"],
        manifest.digest[:12],
    ]


def _examples(curated: Path, count: int) -> list[Row]:
    """Traces to look at, evenly over the tables: two of three kept and one of three dropped, as far as there are any."""
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
        "verdicts": [f"{verdict['check']} {_PASSED[verdict['passed']]} ({verdict['reason']})" for verdict in verdicts],
    }
