"""Stage `curate`: checks every trace and chooses those to learn from. Reads traces/, writes curated/.

A dropped trace stays readable with the first reason that applies; every verdict is kept beside it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from distill.checks import Verdict
from distill.checks.form import check_finish, check_think
from distill.errors import DataError
from distill.recipe import Curate, Recipe
from distill.runlog import Clock, progress
from distill.schema import DROPPED_TRACE, TRACE, VERDICT
from distill.stages import folder
from distill.storage import Journal, Manifest, StageFolder, read_manifest, read_rows

Row = dict[str, Any]
_BATCH = 256  # answers checked between two writes to the journal


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `curated`, `dropped` and `verdicts`; resumes after the last batch of answer checks."""
    traces = folder(recipe, "generate")
    with StageFolder(folder(recipe, "curate"), "curate", {"curate": recipe.curate.identity()}, [traces]) as out:
        if out.manifest:
            return out.manifest
        clock = Clock()
        rows = read_rows(traces, "traces")
        verdicts = _verdicts(rows, recipe.curate, out.journal())
        kept, dropped = choose(rows, verdicts, recipe.curate)
        drops = dict(Counter(row["reason"] for row in dropped))
        if not kept:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()))
            raise DataError(f"{out.path}: none of {len(rows):,} traces is kept: {counts}. Look at the traces, or change curate.checks.")
        out.write_table("curated", kept, TRACE)
        out.write_table("dropped", dropped, DROPPED_TRACE)
        out.write_table("verdicts", [_verdict_row(row, v) for row, found in zip(rows, verdicts, strict=True) for v in found], VERDICT)
        earlier = read_manifest(traces).facts
        carried = {name: earlier[name] for name in ("author", "licence") if name in earlier}
        return out.finish(rows_in=len(rows), rows_kept=len(kept), drops=drops, facts=clock.facts(verdicts=_summary(verdicts), **carried))


def choose(rows: list[Row], verdicts: list[list[Verdict]], curate: Curate) -> tuple[list[Row], list[Row]]:
    """Traces to keep, and the others with their reason, each in the order of `rows`.

    Args:
        rows: Traces.
        verdicts: Of each trace, in the order of `curate.checks`.
        curate: What must pass, and how many of a prompt are kept.
    """
    reasons = [_failure(found, curate.keep_unjudged) for found in verdicts]
    seen: set[tuple[str, str]] = set()
    for place, row in enumerate(rows):
        content = (row["prompt_id"], row["completion"])
        if reasons[place] is None and content in seen:
            reasons[place] = "duplicate"
        seen |= {content} if reasons[place] is None else set()
    passing: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if reasons[place] is None:
            passing[row["prompt_id"]].append(place)
    sign = {"first": 0, "shortest": 1, "longest": -1}[curate.prefer]
    for places in passing.values():
        ranked = sorted(places, key=lambda place: (sign * len(rows[place]["completion"]), rows[place]["sample_index"]))
        for place in ranked[curate.max_per_prompt :]:
            reasons[place] = "over_max_per_prompt"
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    dropped = [{**row, "reason": reason} for row, reason in zip(rows, reasons, strict=True) if reason is not None]
    return kept, dropped


def _failure(verdicts: list[Verdict], keep_unjudged: bool) -> str | None:
    for verdict in verdicts:
        if verdict.passed is False or (verdict.passed is None and not keep_unjudged):
            return f"{verdict.check}:{verdict.reason}"
    return None


def _verdicts(rows: list[Row], curate: Curate, journal: Journal) -> list[list[Verdict]]:
    """Verdicts of each trace in the order of `curate.checks`."""
    answers = _answer_verdicts(rows, curate, journal) if "math" in curate.checks else {}
    return [
        [
            check_finish(row["finish_reason"])
            if name == "finish"
            else check_think(row["completion"])
            if name == "think"
            else answers[place]
            for name in curate.checks
        ]
        for place, row in enumerate(rows)
    ]


def _answer_verdicts(rows: list[Row], curate: Curate, journal: Journal) -> dict[int, Verdict]:
    """The math verdict of each row by its place, a batch at a time; finished batches are in the journal."""
    from distill.checks.math import MathJudge

    done = {entry["place"]: Verdict("math", entry["passed"], entry["reason"]) for entry in journal.rows()}
    bar = progress(len(rows), "traces", "check answers", done=len(done))
    with bar, MathJudge(curate.check_timeout_s, curate.workers) as math:
        for start in range(len(done), len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            pairs = [(row["completion"], row["reference"]) for row in batch]
            found = math.judge(pairs, bar.update)
            journal.append([{"place": start + offset, "passed": v.passed, "reason": v.reason} for offset, v in enumerate(found)])
            done |= {start + offset: verdict for offset, verdict in enumerate(found)}
    return done


def _verdict_row(row: Row, verdict: Verdict) -> Row:
    return {"prompt_id": row["prompt_id"], "sample_index": row["sample_index"], **verdict._asdict()}


def _summary(verdicts: list[list[Verdict]]) -> dict[str, dict[str, int]]:
    """How many traces passed, failed and could not be judged, for each check."""
    summary: dict[str, dict[str, int]] = {}
    for verdict in (verdict for found in verdicts for verdict in found):
        counts = summary.setdefault(verdict.check, {"passed": 0, "failed": 0, "unjudged": 0})
        counts[{True: "passed", False: "failed", None: "unjudged"}[verdict.passed]] += 1
    return summary
