"""Stage `curate`: checks every trace and chooses those to learn from. Reads traces/, writes curated/.

A dropped trace stays readable with the first reason that applies; every verdict is kept beside it. The traces are read twice,
once to check them and once to write them where they belong; between, some bytes of each are in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distill.checks import Given, Verdict, judge
from distill.checks.choice import (
    NOT_ASKED,
    Choice,
    Evidence,
    agree,
    choose,
    evidence_for,
    number_of,
    pass_rates,
    samples_of_unsolved,
    unfailed,
)
from distill.checks.fields import PromptFields
from distill.checks.functions import digest_of
from distill.checks.judge import Case
from distill.checks.judging import Judges, columns_read, given_of
from distill.checks.preferred import by_likelihood, by_mixed_length, by_variety
from distill.checks.tokens import Counted
from distill.errors import DataError, visible
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Curate
from distill.run.clock import Clock
from distill.run.early import EndedEarly
from distill.run.folder import StageFolder
from distill.run.log import Progress, progress, say
from distill.run.manifest import Manifest, read_manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import DROPPED_TRACE, RANKS, TOLD, TRACE, UNSOLVED, VERDICT
from distill.run.tables import iter_pieces, iter_rows, rows_at, rows_of
from distill.servers.judging import CASE, Asked, case_of, grade, with_judges
from distill.stages import Step, folder, open_stage, plan_of, run_dir

if TYPE_CHECKING:
    from distill.engines.ranking import Ranks

_READ = ["prompt_id", "sample_index", "reference", "completion", "finish_reason"]
_BY_VALUE = ("mixed", "varied", "likeliest", "rank_surprisal")  # rather than by number or length alone
_BLOCK = 64  # verdicts of slow checks between two writes to the journal


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make; with more traces, or where more of them may be kept, it chooses anew."""
    curate = recipe.curate
    growth = Growth({"curate.max_per_prompt": 0, "curate.keep_unjudged": 0, "curate.max_pass_rate": 1})
    settings: dict[str, Any] = {"curate": curate.identity()}
    if _counts_tokens(curate):  # whose tokens may be counted
        settings["student"] = recipe.student.identity()
    if curate.prefer == "rank_surprisal":
        # Which of a trace the student will see.
        train = {"max_length": recipe.train.max_length, "overlong": recipe.train.overlong}
        settings |= {"student": recipe.student.identity_here(), "train": train}
    if curate.prefer == "mixed":
        settings["seed"] = recipe.seed
    if (digest := digest_of(recipe.curate.checks)) is not None:
        settings["python_sha256"] = digest
    if (digest := judge.digest_of(recipe.curate.checks)) is not None:
        settings |= {"judge_sha256": digest, "seed": recipe.seed}
    inputs = [folder(recipe, "generate"), *([folder(recipe, "prompts")] if _reads_fields(recipe) else [])]
    return plan_of(recipe, Step("curate"), settings, inputs, growth)


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `curated`, `dropped` and `verdicts`, and `ranks` where the student read traces; resumes after the last block of
    slow checks, or of traces read.
    """
    traces = folder(recipe, "generate")
    with open_stage(recipe, plan(recipe)) as out:
        if out.manifest:
            return out.manifest
        clock, source = Clock(out.path), read_manifest(traces)
        evidence = evidence_for(recipe.curate, source.rows("traces"))
        _examine(recipe, out, evidence)
        judges = _ask_judges(recipe, out, evidence)
        _find_strays(traces, evidence, source.facts.get("control_ids", []))
        rates = pass_rates(evidence).facts
        if recipe.curate.bounds_difficulty:
            say(_told(rates))
        unsolved = _unsolved(recipe, evidence)
        preferred = _Preferred(recipe, out, evidence)
        choice = choose(evidence, recipe.curate, preferred.values if recipe.curate.prefer in _BY_VALUE else None)
        rows_in, drops = len(choice.codes_R), choice.drops
        if not choice.num_kept:
            raise DataError(_nothing_kept(out, rows_in, drops))
        with out.in_one_go():
            tokens = _write(out, traces, evidence, choice)
            preferred.write()
            found: dict[str, Any] = {"verdicts": evidence.summary(), "pass_rates": rates}
            if unsolved is not None:
                found["unsolved"] = _write_unsolved(out, traces, unsolved)
            facts = with_judges(clock.facts(**found, **_carried(source.facts, tokens)), judges)
            finished = out.finish(rows_in=rows_in, rows_kept=choice.num_kept, drops=drops, facts=facts)
        _say_unsolved(recipe, facts.get("unsolved", {}))
        return finished


def _counts_tokens(curate: Curate) -> bool:
    return any(check.length is not None for check in curate.checks)


def _reads_fields(recipe: Recipe) -> bool:
    """Whether a check looks at further columns of the prompts."""
    looks = any(check.python is not None or check.settings.columns for check in recipe.curate.checks)
    return looks and bool(recipe.prompts.fields)


def _examine(recipe: Recipe, out: StageFolder, evidence: Evidence) -> None:
    """Fills the evidence; what slow checks of an earlier run have found is in the journal, in whatever order it came."""
    curate, journal = recipe.curate, out.journal()
    done = 0
    for entry in journal.rows():
        if "surprisal" in entry:  # of a trace that was read
            continue
        done += 1
        # A kit that knew one slow check alone did not write down which.
        evidence.note(entry["row"], Verdict(entry.get("check", "math"), entry["passed"], entry["reason"]))
    block: list[dict[str, Any]] = []
    if recipe.traces is not None and recipe.traces.verdict is not None:
        stand_for = ", ".join(check.called for check in curate.checks if check.settings.of_answers)
        say(f"check traces: the verdicts of {stand_for} are those of the column {visible(recipe.traces.verdict, 80)}")
    judges = Judges(curate.checks, curate.check_timeout_s, curate.workers)
    slow = {name: evidence.has(name) for name in judges.slow}
    unit, times = ("traces", 1) if len(slow) < 2 else ("verdicts", len(slow))
    with judges, progress(times * len(evidence.prompts_R), unit, "check traces", done=done) as bar:
        try:
            traces = _traces(recipe, out, evidence, None if slow else bar)
            for row, verdict in judges.stream(traces, lambda row, name: name in slow and bool(slow[name][row])):
                evidence.note(row, verdict)
                if verdict.check not in slow:
                    continue
                block.append({"row": row, "check": verdict.check, "passed": verdict.passed, "reason": verdict.reason})
                if len(block) == _BLOCK:
                    journal.append(block)
                    block = []
                bar.update()
        except EndedEarly:
            journal.append(block)
            raise
        journal.append(block)
    agree(curate, evidence)


def _ask_judges(recipe: Recipe, out: StageFolder, evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Fills the evidence with what judges find of traces that no other check has failed; returns what is to be known of each judge."""
    facts: dict[str, dict[str, Any]] = {}
    if _is_told(recipe):
        return facts
    for check in recipe.curate.checks:
        if check.judge is None:
            continue
        waiting_R = unfailed(evidence, recipe.curate)
        found, facts[Asked.of_check(check.called).role] = grade(
            recipe, check, out, run_dir(recipe), partial(_cases, recipe, out, waiting_R)
        )
        for row in np.flatnonzero(~waiting_R).tolist():
            evidence.note(row, Verdict(check.called, *NOT_ASKED))
        for row, verdict in found:
            evidence.note(row, Verdict(check.called, *verdict))
    return facts


def _cases(recipe: Recipe, out: StageFolder, waiting_R: NDArray[np.bool_]) -> Iterator[tuple[int, Case]]:
    """The traces that a judge is asked of, by their numbers."""
    start = 0
    with PromptFields(folder(recipe, "prompts"), out.path) if _reads_fields(recipe) else nullcontext() as fields:
        for piece in iter_pieces(folder(recipe, "generate"), "traces", CASE):
            places = np.flatnonzero(waiting_R[start : start + len(piece)])
            rows = rows_of(piece.take(pa.array(places)))
            of_prompts = fields.of([trace["prompt_id"] for trace in rows]) if fields is not None else [{}] * len(rows)
            for place, trace, known in zip(places.tolist(), rows, of_prompts, strict=True):
                yield start + place, case_of(trace, known)
            start += len(piece)


def _is_told(recipe: Recipe) -> bool:
    """Whether the source of the traces says itself which answers are right."""
    return recipe.traces is not None and recipe.traces.verdict is not None


def _traces(recipe: Recipe, out: StageFolder, evidence: Evidence, bar: Progress | None) -> Iterator[tuple[int, Given]]:
    """What checks are told of each trace, after what tells it from others was noted."""
    checks, start = recipe.curate.checks, 0
    counted = Counted(recipe) if _counts_tokens(recipe.curate) else None
    told = [TOLD.name] if _is_told(recipe) else []
    names = [*_READ, *told, *columns_read(checks), *(["completion_ids"] if counted else [])]
    with PromptFields(folder(recipe, "prompts"), out.path) if _reads_fields(recipe) else nullcontext() as fields:
        for piece in iter_pieces(folder(recipe, "generate"), "traces", names):
            rows = _rows(piece, counted)
            of_prompts = fields.of([trace["prompt_id"] for trace in rows]) if fields is not None else [{}] * len(rows)
            for row, (trace, known) in enumerate(zip(rows, of_prompts, strict=True), start):
                evidence.describe(row, trace)
                yield row, given_of(trace, known)
            start += len(piece)
            if bar is not None:
                bar.update(len(piece))


def _rows(piece: pa.RecordBatch, counted: Counted | None) -> list[dict[str, Any]]:
    """Rows of a piece; with the number of tokens, where it is asked for, in place of their ids."""
    if counted is None:
        return rows_of(piece)
    lengths = pc.list_value_length(piece["completion_ids"])
    rows = rows_of(piece.drop_columns("completion_ids").append_column("num_tokens", lengths))
    # Whose tokenizer wrote a trace without ids is not known; the student will read it with its own.
    return [trace | {"num_tokens": counted({**trace, "author": "student"})} for trace in rows]


def _find_strays(traces: Path, evidence: Evidence, control_ids: list[int]) -> None:
    """Notes the traces in which one of these tokens of their author's was drawn."""
    start = 0
    for piece in iter_pieces(traces, "traces", ["completion_ids"]) if control_ids else ():
        ids = piece["completion_ids"]
        stray = np.flatnonzero(np.isin(ids.flatten().to_numpy(), control_ids))
        ends = np.cumsum(pc.list_value_length(ids).fill_null(0).to_numpy())
        evidence.stray_R[start + np.searchsorted(ends, stray, side="right")] = True
        start += len(piece)


class _Preferred:
    """By what a prompt's passing traces are preferred to each other, and what the student made of those that it read for that."""

    def __init__(self, recipe: Recipe, out: StageFolder, evidence: Evidence) -> None:
        self._recipe, self._out, self._evidence = recipe, out, evidence
        self._traces = folder(recipe, "generate")
        self._read: dict[int, Ranks | None] = {}

    def values(self, competing_R: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Of each trace that competes for a place a number, `(R,)`: the lowest are kept, and those without one last."""
        curate, number = self._recipe.curate, len(competing_R)
        if curate.prefer == "mixed":
            assert curate.long_share is not None  # the recipe was validated
            return by_mixed_length(self._evidence, curate.long_share, self._recipe.seed)
        if curate.prefer == "varied":
            return by_variety(self._traces, self._evidence, competing_R, curate.max_per_prompt)
        values_R = by_likelihood(self._traces, number) if curate.prefer == "likeliest" else self._ratios(competing_R)
        unknown = int(np.isnan(values_R[competing_R]).sum())
        if unknown:
            why = "their server told no log-probabilities" if curate.prefer == "likeliest" else "the student would not train on them"
            say(f"choose    {unknown:,} of {int(competing_R.sum()):,} traces come last: {why}")
        return values_R

    def _ratios(self, competing_R: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Their Rank-Surprisal Ratios; what was read before a stop is in the journal, and before a growth in the table."""
        from distill.engines.ranking import RankReader
        from distill.engines.reading import COLUMNS

        rows, before = np.flatnonzero(competing_R).tolist(), self._before()
        traces = (trace | {"row": row} for row, trace in zip(rows, rows_at(self._traces, "traces", rows, COLUMNS), strict=True))
        reader = RankReader(self._recipe)
        self._read = reader.read_numbered(traces, len(rows), self._out.journal(), lambda trace: before.get(_key(trace)))
        values_R = np.full(len(competing_R), np.nan)
        for row in rows:
            ranks = self._read[row]
            values_R[row] = np.nan if ranks is None else ranks.ratio
        return values_R

    def _before(self) -> dict[tuple[str, int], Ranks]:
        """What the student made of traces before the stage grew."""
        from distill.engines.ranking import Ranks

        earlier = self._out.earlier
        if earlier is None or "ranks" not in read_manifest(earlier).tables:
            return {}
        return {_key(row): found for row in iter_rows(earlier, "ranks") if (found := Ranks.of(row)) is not None}

    def write(self) -> None:
        """Writes the table `ranks`, where the student read."""
        if self._recipe.curate.prefer != "rank_surprisal":
            return
        from distill.engines.ranking import Ranks

        rows = sorted(self._read)
        names = rows_at(self._traces, "traces", rows, ["prompt_id", "sample_index"])
        self._out.write_table("ranks", (name | Ranks.entry(self._read[row]) for row, name in zip(rows, names, strict=True)), RANKS)


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["prompt_id"], row["sample_index"]


def _write(out: StageFolder, traces: Path, evidence: Evidence, choice: Choice) -> int | None:
    """Writes the tables, and returns the tokens of the traces that are kept; null where those of one are not known."""
    curated, dropped, verdicts = out.table("curated", TRACE), out.table("dropped", DROPPED_TRACE), out.table("verdicts", VERDICT)
    reasons = pa.array(choice.reasons, pa.string())
    tokens, unknown, start = 0, 0, 0
    for piece in iter_pieces(traces, "traces", TRACE.names):
        codes = choice.codes_R[start : start + len(piece)]
        kept, lost = piece.filter(pa.array(codes == 0)), piece.filter(pa.array(codes != 0))
        curated.add(kept)
        dropped.add(lost.append_column("reason", reasons.take(pa.array(codes[codes != 0]))))
        verdicts.add(_verdict_rows(piece, evidence, start))
        tokens += pc.sum(pc.list_value_length(kept["completion_ids"])).as_py() or 0
        unknown += kept["completion_ids"].null_count
        start += len(piece)
    return None if unknown else tokens


def _unsolved(recipe: Recipe, evidence: Evidence) -> dict[int, int] | None:
    """Samples of each prompt without a right answer, by the hash of its name; null where nothing would be done about it."""
    if recipe.generate is None:
        return None
    found, size = samples_of_unsolved(evidence, recipe.generate.samples_per_prompt), recipe.generate.samples_per_prompt
    traces = folder(recipe, "generate")
    for row in iter_rows(traces, "dropped", columns=["prompt_id", "sample_index"]) if "dropped" in read_manifest(traces).tables else ():
        prompt = number_of(row["prompt_id"])
        if prompt in found:  # asked for, even if no answer came
            found[prompt] = max(found[prompt], -(-(row["sample_index"] + 1) // size) * size)
    return found


def _write_unsolved(out: StageFolder, traces: Path, unsolved: dict[int, int]) -> dict[str, int]:
    """Writes the table `unsolved`; returns how many prompts have each number of samples."""
    table, left = out.table("unsolved", UNSOLVED), dict(unsolved)
    for row in iter_rows(traces, "traces", columns=["prompt_id"]):
        samples = left.pop(number_of(row["prompt_id"]), None)
        if samples is not None:
            table.append({"prompt_id": row["prompt_id"], "samples": samples})
    return {str(samples): count for samples, count in sorted(Counter(unsolved.values()).items())}


def _say_unsolved(recipe: Recipe, unsolved: dict[str, int]) -> None:
    """Says how many prompts have no right answer, where more samples of them can be written."""
    if recipe.generate is None or recipe.generate.unsolved is None or not unsolved:
        return
    most = recipe.generate.most_samples
    open_ = sum(count for samples, count in unsolved.items() if int(samples) < most)
    say(f"unsolved  {sum(unsolved.values()):,} prompts have no right answer yet; more can be written of {open_:,}, up to {most:,}")


def _verdict_rows(piece: pa.RecordBatch, evidence: Evidence, start: int) -> pa.RecordBatch:
    """Of each trace the verdicts in the order of the checks."""
    rows = pa.array(np.repeat(np.arange(len(piece)), len(evidence.checks)))
    found = pa.array(evidence.codes_CR[:, start : start + len(piece)].T.reshape(-1) - 1)
    columns = [piece["prompt_id"].take(rows), piece["sample_index"].take(rows)]
    for name in Verdict._fields:
        columns.append(pa.array([getattr(verdict, name) for verdict in evidence.verdicts], VERDICT.field(name).type).take(found))
    return pa.RecordBatch.from_arrays(columns, schema=VERDICT)


def _told(rates: dict[str, Any]) -> str:
    """The pass rates in a line."""
    if not rates["prompts"]:
        return "pass rate  of no prompt is known: not one trace was judged"
    single = f"; {rates['one_sample']:,} have one judged trace, whose rate is 0 or 1" if rates["one_sample"] else ""
    return (
        f"pass rate  {rates['mean']:.1%} on average over {rates['prompts']:,} prompts: {rates['never']:,} never pass, {rates['always']:,} "
        f"always{single}"
    )


def _nothing_kept(out: StageFolder, rows_in: int, drops: dict[str, int]) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()))
    reasons = {"think:no_reasoning", "think:empty_reasoning"} & set(drops)
    bare = " (think: optional for traces that need not think)" if reasons else ""
    bounds = " or the bounds of its pass rates" if {"too_hard", "too_easy"} & set(drops) else ""
    return (
        f"{out.path}: none of {rows_in:,} traces is kept: {counts}. Look at the traces; then correct what they are made from, "
        f"or change curate.checks{bare}{bounds}, or set curate.keep_unjudged for those that could not be judged, and add --redo."
    )


def _carried(earlier: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """What the traces' manifest says of their author, and the tokens that are left, where they are known."""
    carried: dict[str, Any] = {name: earlier[name] for name in ("author", "licence") if name in earlier}
    return carried if tokens is None else {**carried, "tokens": tokens}
