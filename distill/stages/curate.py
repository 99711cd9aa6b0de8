"""Stage `curate`: checks every trace and chooses those to learn from. Reads traces/, writes curated/.

A dropped trace stays readable with the first reason that applies; every verdict is kept beside it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from distill.checks import Verdict
from distill.checks.form import check_finish, check_think
from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Curate
from distill.run.folder import StageFolder
from distill.run.journal import Journal
from distill.run.log import Clock, progress
from distill.run.manifest import Manifest, read_manifest
from distill.run.plan import StagePlan
from distill.run.schema import DROPPED_TRACE, TRACE, VERDICT
from distill.run.tables import read_rows
from distill.stages import Step, folder, open_stage, plan_of

Row = dict[str, Any]
_BATCH = 64  # answers checked between two writes to the journal


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make."""
    return plan_of(recipe, Step("curate"), {"curate": recipe.curate.identity()}, [folder(recipe, "generate")])


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `curated`, `dropped` and `verdicts`; resumes after the last batch of answer checks."""
    traces = folder(recipe, "generate")
    with open_stage(recipe, plan(recipe)) as out:
        if out.manifest:
            return out.manifest
        clock = Clock()
        rows = read_rows(traces, "traces")
        verdicts = _verdicts(rows, recipe.curate, out.journal())
        kept, dropped = choose(rows, verdicts, recipe.curate)
        drops = dict(Counter(row["reason"] for row in dropped))
        if not kept:
            raise DataError(_nothing_kept(out, len(rows), drops))
        out.write_table("curated", kept, TRACE)
        out.write_table("dropped", dropped, DROPPED_TRACE)
        out.write_table("verdicts", [_verdict_row(row, v) for row, found in zip(rows, verdicts, strict=True) for v in found], VERDICT)
        facts = clock.facts(verdicts=_summary(verdicts), **_carried(read_manifest(traces).facts, kept))
        return out.finish(rows_in=len(rows), rows_kept=len(kept), drops=drops, facts=facts)


def choose(rows: list[Row], verdicts: list[list[Verdict]], curate: Curate) -> tuple[list[Row], list[Row]]:
    """Traces to keep, and the others with their reason, each in the order of `rows`.

    Args:
        rows: Traces.
        verdicts: Of each trace, in the order of `curate.checks`.
        curate: What must pass, and how many of a prompt are kept.
    """
    reasons = [_failure(found, curate.keep_unjudged) for found in verdicts]
    seen: set[tuple[str, str]] = set()
    passing: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if reasons[place] is not None:
            continue
        content = (row["prompt_id"], row["completion"])
        if content in seen:
            reasons[place] = "duplicate"
        else:
            seen.add(content)
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
    by_check: dict[str, list[Verdict]] = {}
    for name in curate.checks:
        if name == "finish":
            by_check[name] = [check_finish(row["finish_reason"], row["completion"]) for row in rows]
        elif name == "think":
            by_check[name] = [check_think(row["completion"]) for row in rows]
        else:
            by_check[name] = _answer_verdicts(rows, curate, journal)
    return [[by_check[name][place] for name in curate.checks] for place in range(len(rows))]


def _answer_verdicts(rows: list[Row], curate: Curate, journal: Journal) -> list[Verdict]:
    """The math verdict of each row, a batch at a time; finished batches are in the journal, in the order of the rows."""
    from distill.checks.math import MathJudge

    done = [Verdict("math", entry["passed"], entry["reason"]) for entry in journal.rows()]
    bar = progress(len(rows), "traces", "check answers", done=len(done))
    with bar, MathJudge(curate.check_timeout_s, curate.workers) as math:
        for start in range(len(done), len(rows), _BATCH):
            pairs = [(row["completion"], row["reference"]) for row in rows[start : start + _BATCH]]
            found = math.judge(pairs, bar.update)
            journal.append([{"passed": verdict.passed, "reason": verdict.reason} for verdict in found])
            done += found
    return done


def _nothing_kept(out: StageFolder, rows_in: int, drops: dict[str, int]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()))
    return (
        f"{out.path}: none of {rows_in:,} traces is kept: {counts}. Look at the traces; then correct what they are made from, "
        "or change curate.checks, or set curate.keep_unjudged for those that could not be judged, and add --redo."
    )


def _carried(earlier: dict[str, Any], kept: list[Row]) -> dict[str, Any]:
    """What the traces' manifest says of their author, and the tokens that are left, where tokens are known."""
    carried: dict[str, Any] = {name: earlier[name] for name in ("author", "licence") if name in earlier}
    ids = [row["completion_ids"] for row in kept]
    return carried if None in ids else {**carried, "tokens": sum(map(len, ids))}


def _verdict_row(row: Row, verdict: Verdict) -> Row:
    return {"prompt_id": row["prompt_id"], "sample_index": row["sample_index"], **verdict._asdict()}


def _summary(verdicts: list[list[Verdict]]) -> dict[str, dict[str, int]]:
    """How many traces passed, failed and could not be judged, for each check."""
    summary: dict[str, dict[str, int]] = {}
    for verdict in (verdict for found in verdicts for verdict in found):
        counts = summary.setdefault(verdict.check, {"passed": 0, "failed": 0, "unjudged": 0})
        counts[{True: "passed", False: "failed", None: "unjudged"}[verdict.passed]] += 1
    return summary
