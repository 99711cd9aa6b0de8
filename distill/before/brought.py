"""What of the traces that are there already, brought ones or those of an earlier run, would be learned from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from distill.before.findings import Even, Findings
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Curate
from distill.run.manifest import MANIFEST, read_manifest
from distill.run.schema import TOLD, prompt_id
from distill.run.tables import iter_rows
from distill.stages import folder

if TYPE_CHECKING:
    from distill.checks.choice import Choice
    from distill.stages.prompts import Survey

Row = dict[str, Any]
SAMPLE = 2000
"""Rows that are looked at, of any number; evenly drawn."""
_TOGETHER = 200  # matched to their prompts at once
_CURATED = 300  # that curate's checks look at, or up to twice as many
_LOW = 0.5  # share of traces kept under which something is hardly as it is meant


def check_traces(recipe: Recipe, survey: Survey, found: Findings) -> tuple[list[Row], int]:
    """Some rows with messages and completion, and of how many: of those an earlier run has curated, or of brought ones.

    Evenly drawn; none before they are written.
    """
    curated = folder(recipe, "curate")
    there = (curated / MANIFEST).exists()
    sample = _Sample(survey)

    def attempt() -> str:
        if there:
            sample.total = read_manifest(curated).rows("curated")
            sample.rows = list(iter_rows(curated, "curated", step=-(-sample.total // SAMPLE), columns=["messages", "completion"]))
            return f"{sample.total:,} curated ones in {curated}"
        fitting, total = sample.read(recipe)
        return f"{fitting:,} of {total:,} belong to a training prompt"

    if not there and recipe.traces is None:
        return [], 0
    if not found.prove("traces", attempt):
        return [], 0
    if not sample.rows:
        found.bad("traces", "none has a prompt of this run. Their text must be the same; check traces.columns.")
    elif not there:
        _check_curation(recipe.curate, sample.whole or [row | {"sample_index": 0, "reference": None} for row in sample.rows], found)
    return [row for row in sample.rows if _is_well_formed(recipe.curate, row)], sample.total


def _is_well_formed(curate: Curate, row: Row) -> bool:
    """Whether curate would let the form of a row through."""
    from distill.checks.judging import asks_final, given_of, question

    of_form = [check for check in curate.checks if check.finish is not None or check.think is not None]
    return all(question(check, given_of(row), asks_final=asks_final(curate.checks) and TOLD.name not in row)[0] for check in of_form)


class _Sample:
    """Traces evenly drawn from all; and, for curate, some of those whose prompts are in a survey's sample, with their references."""

    def __init__(self, survey: Survey) -> None:
        self.rows: list[Row] = []
        self.whole: list[Row] = []
        self.total = 0
        self._survey = survey

    def read(self, recipe: Recipe) -> tuple[int, int]:
        """Reads all brought traces; returns how many belong to a training prompt, and of how many."""
        seen: Counter[bool] = Counter()
        drawn: Even[Row] = Even(SAMPLE)
        whole: Even[Row] = Even(_CURATED)
        known = {row["prompt_id"]: {name: row.get(name) for name in ("reference", "fields")} for row in self._survey.sample}
        of_prompt: Counter[str] = Counter()
        for row in _brought(recipe, self._survey, seen):
            drawn.add(row)
            if row["prompt_id"] in known:
                numbered = {"sample_index": of_prompt[row["prompt_id"]], **known[row["prompt_id"]]}
                whole.add(numbered | row)
                of_prompt[row["prompt_id"]] += 1
        self.rows, self.total, self.whole = drawn.kept, drawn.total, whole.kept
        return seen[True], seen.total()


def _brought(recipe: Recipe, survey: Survey, seen: Counter[bool]) -> Iterator[Row]:
    """Brought traces of training prompts; counts all, by whether they are."""
    from distill.data.completions import columns_of, traces_of
    from distill.data.identities import Identities, as_numbers
    from distill.data.mapping import PromptMapping
    from distill.data.sources import brought_traces

    traces = recipe.traces
    assert traces is not None
    known = Identities(survey.ids)
    mapping = PromptMapping(recipe.prompts, traces.columns, traces.source, with_fields=False)
    rows = brought_traces(traces).rows([*mapping.columns, *columns_of(traces)], "traces")
    each = (trace for where, raw in rows for trace in traces_of(traces, mapping, raw, where))
    while batch := list(islice(each, _TOGETHER)):
        ids = [prompt_id(asked.messages) for asked, _ in batch]
        for (asked, found), name, place in zip(batch, ids, known.places(as_numbers(ids)), strict=True):
            fits = found.reason is None and place >= 0
            seen[fits] += 1
            if fits:
                yield {"prompt_id": name, "messages": asked.messages, "completion": found.text, "finish_reason": found.finish_reason} | (
                    {} if traces.verdict is None else {TOLD.name: found.verdict}
                )


def _check_curation(curate: Curate, rows: list[Row], found: Findings) -> None:
    """What share of brought traces curate would keep, by the reasons of the others."""
    choice = _curated(curate, rows)
    share = choice.num_kept / len(rows)
    lost = ", ".join(f"{count / len(rows):.0%} {reason}" for reason, count in sorted(choice.drops.items(), key=lambda drop: -drop[1]))
    detail = f"{share:.0%} of {len(rows):,} traces looked at would be kept" + (f"; dropped: {lost}" if lost else "")
    if not choice.num_kept:
        found.bad("curate", f"{detail}. Look at the traces; correct what they are made from, or change curate.checks.{_advice(choice)}")
    elif share < _LOW:
        found.warn("curate", f"{detail}.{_advice(choice)}")
    else:
        found.good("curate", detail)


def _advice(choice: Choice) -> str:
    first = max(choice.drops, key=lambda reason: choice.drops[reason], default="")
    return {
        "think:no_reasoning": " Traces without reasoning are learned from with curate.checks: [finish, math].",
        "math:no_reference": " Set prompts.columns.reference, or leave math out of curate.checks.",
    }.get(first, "")


def _curated(curate: Curate, rows: list[Row]) -> Choice:
    """What curate's own checks and choice say of some traces."""
    from distill.checks.choice import agree, choose, evidence_for
    from distill.checks.fields import as_fields
    from distill.checks.judging import Judges, given_of

    evidence = evidence_for(curate, len(rows))
    for number, row in enumerate(rows):
        evidence.describe(number, row)
    with Judges(curate.checks, curate.check_timeout_s, curate.workers) as judges:
        for number, verdict in judges.stream(enumerate(given_of(row, as_fields(row.get("fields"))) for row in rows)):
            evidence.note(number, verdict)
    agree(curate, evidence)
    # Of a prompt hardly all traces are looked at, so how many of them pass is not known.
    return choose(evidence, curate.model_copy(update={"min_pass_rate": None, "max_pass_rate": None}))
