"""Stage `curate`: checks every trace and chooses those to learn from. Reads traces/, writes curated/.

A dropped trace stays readable with the first reason that applies; every verdict is kept beside it. The traces are read twice,
once to check them and once to write them where they belong; between, some bytes of each are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill.checks import Verdict
from distill.checks.choice import Choice, Evidence, choose
from distill.checks.form import check_finish, check_think
from distill.checks.math import MathJudge, Pair
from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Curate
from distill.run.clock import Clock
from distill.run.early import EndedEarly
from distill.run.folder import StageFolder
from distill.run.journal import Journal
from distill.run.log import Progress, progress
from distill.run.manifest import Manifest, read_manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import DROPPED_TRACE, TRACE, VERDICT
from distill.run.tables import iter_pieces
from distill.stages import Step, folder, open_stage, plan_of

_READ = ["prompt_id", "sample_index", "reference", "completion", "finish_reason"]
_BLOCK = 64  # answers checked between two writes to the journal


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make; with more traces, or where more of them may be kept, it chooses anew."""
    growth = Growth({"curate.max_per_prompt": 0, "curate.keep_unjudged": 0})
    return plan_of(recipe, Step("curate"), {"curate": recipe.curate.identity()}, [folder(recipe, "generate")], growth)


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `curated`, `dropped` and `verdicts`; resumes after the last block of answer checks."""
    traces = folder(recipe, "generate")
    with open_stage(recipe, plan(recipe)) as out:
        if out.manifest:
            return out.manifest
        clock, source = Clock(out.path), read_manifest(traces)
        evidence = Evidence(source.rows("traces"), recipe.curate.checks)
        _examine(traces, evidence, recipe.curate, out.journal())
        _find_strays(traces, evidence, source.facts.get("control_ids", []))
        choice = choose(evidence, recipe.curate)
        rows_in, drops = len(choice.codes_R), choice.drops
        if not choice.num_kept:
            raise DataError(_nothing_kept(out, rows_in, drops))
        with out.in_one_go():
            tokens = _write(out, traces, evidence, choice)
            facts = clock.facts(verdicts=evidence.summary(), **_carried(source.facts, tokens))
            return out.finish(rows_in=rows_in, rows_kept=choice.num_kept, drops=drops, facts=facts)


def _examine(traces: Path, evidence: Evidence, curate: Curate, journal: Journal) -> None:
    """Fills the evidence; answers that an earlier run has judged are in the journal, in whatever order they came."""
    done = 0
    for done, entry in enumerate(journal.rows(), start=1):  # noqa: B007
        evidence.note(entry["row"], Verdict("math", entry["passed"], entry["reason"]))
    block: list[dict[str, Any]] = []
    bar = progress(len(evidence.prompts_R), "traces", "check traces", done=done)
    with bar, MathJudge(curate.check_timeout_s, curate.workers) as math:
        try:
            for row, verdict in math.stream(_questions(traces, evidence, bar)):
                evidence.note(row, verdict)
                block.append({"row": row, "passed": verdict.passed, "reason": verdict.reason})
                if len(block) == _BLOCK:
                    journal.append(block)
                    block = []
                bar.update()
        except EndedEarly:
            journal.append(block)
            raise
        journal.append(block)


def _questions(traces: Path, evidence: Evidence, bar: Progress) -> Iterator[tuple[int, Pair]]:
    """Number, completion and reference of the traces whose answer is to be judged; all else is noted of each on the way."""
    checks = evidence.checks
    judged = evidence.has("math") if "math" in checks else None
    start = 0
    for piece in iter_pieces(traces, "traces", _READ):
        for row, trace in enumerate(piece.to_pylist(), start):
            evidence.describe(row, trace)
            if "finish" in checks:
                evidence.note(row, check_finish(trace["finish_reason"], trace["completion"]))
            if "think" in checks:
                evidence.note(row, check_think(trace["completion"]))
            if judged is not None and not judged[row]:
                yield row, (trace["completion"], trace["reference"])
        start += len(piece)
        if judged is None:
            bar.update(len(piece))


def _find_strays(traces: Path, evidence: Evidence, control_ids: list[int]) -> None:
    """Notes the traces in which one of these tokens of their author's was drawn."""
    start = 0
    for piece in iter_pieces(traces, "traces", ["completion_ids"]) if control_ids else ():
        ids = piece["completion_ids"]
        stray = np.flatnonzero(np.isin(ids.flatten().to_numpy(), control_ids))
        ends = np.cumsum(pc.list_value_length(ids).fill_null(0).to_numpy())
        evidence.stray_R[start + np.searchsorted(ends, stray, side="right")] = True
        start += len(piece)


def _write(out: StageFolder, traces: Path, evidence: Evidence, choice: Choice) -> int | None:
    """Writes the tables, and returns the tokens of the traces that are kept; null where those of one are not known."""
    curated, dropped, verdicts = out.table("curated", TRACE), out.table("dropped", DROPPED_TRACE), out.table("verdicts", VERDICT)
    reasons = pa.array(choice.reasons, pa.string())
    tokens, unknown, start = 0, 0, 0
    for piece in iter_pieces(traces, "traces"):
        codes = choice.codes_R[start : start + len(piece)]
        kept, lost = piece.filter(pa.array(codes == 0)), piece.filter(pa.array(codes != 0))
        curated.add(kept)
        dropped.add(lost.append_column("reason", reasons.take(pa.array(codes[codes != 0]))))
        verdicts.add(_verdict_rows(piece, evidence, start))
        tokens += pc.sum(pc.list_value_length(kept["completion_ids"])).as_py() or 0
        unknown += kept["completion_ids"].null_count
        start += len(piece)
    return None if unknown else tokens


def _verdict_rows(piece: pa.RecordBatch, evidence: Evidence, start: int) -> pa.RecordBatch:
    """Of each trace the verdicts in the order of the checks."""
    rows = pa.array(np.repeat(np.arange(len(piece)), len(evidence.checks)))
    found = pa.array(evidence.codes_CR[:, start : start + len(piece)].T.reshape(-1) - 1)
    columns = [piece["prompt_id"].take(rows), piece["sample_index"].take(rows)]
    for name in Verdict._fields:
        columns.append(pa.array([getattr(verdict, name) for verdict in evidence.verdicts], VERDICT.field(name).type).take(found))
    return pa.RecordBatch.from_arrays(columns, schema=VERDICT)


def _nothing_kept(out: StageFolder, rows_in: int, drops: dict[str, int]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()))
    return (
        f"{out.path}: none of {rows_in:,} traces is kept: {counts}. Look at the traces; then correct what they are made from, "
        "or change curate.checks, or set curate.keep_unjudged for those that could not be judged, and add --redo."
    )


def _carried(earlier: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """What the traces' manifest says of their author, and the tokens that are left, where they are known."""
    carried: dict[str, Any] = {name: earlier[name] for name in ("author", "licence") if name in earlier}
    return carried if tokens is None else {**carried, "tokens": tokens}
