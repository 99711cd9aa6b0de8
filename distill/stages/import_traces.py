"""Stage `generate` for traces from elsewhere: maps them onto the run's prompts. Reads prompts/, writes traces/.

A trace for a held-out prompt is dropped: training on it would make the evaluation worthless.
"""

from __future__ import annotations

from collections import Counter

from distill.data.sources import PromptMapping, Row, read_source, source_digest, text_in
from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Traces
from distill.run.folder import StageFolder
from distill.run.log import Clock
from distill.run.manifest import Manifest
from distill.run.schema import DROPPED_TRACE, THINK_CLOSE, THINK_OPEN, TRACE, prompt_id
from distill.run.tables import read_rows
from distill.stages import folder


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `traces` and `dropped`."""
    traces = recipe.traces
    assert traces is not None  # the recipe was validated
    settings = {"traces": traces.identity(), "source_sha256": source_digest(traces.source)}
    with StageFolder(folder(recipe, "generate"), "generate", settings, [folder(recipe, "prompts")]) as out:
        return out.manifest or _import(recipe, traces, out)


def _import(recipe: Recipe, traces: Traces, out: StageFolder) -> Manifest:
    from distill.data.licences import licence_of

    clock = Clock()
    prompts = {row["prompt_id"]: row for row in read_rows(folder(recipe, "prompts"), "train")}
    heldout = {row["prompt_id"] for row in read_rows(folder(recipe, "prompts"), "heldout")}
    mapping = PromptMapping(recipe.prompts, traces.columns, traces.source)
    source = read_source(traces.source, traces.subset, traces.split)
    seen: Counter[str] = Counter()
    kept: list[Row] = []
    dropped: list[Row] = []
    for number, raw in enumerate(source, start=1):
        messages = mapping.messages(raw, number) or []
        identity = prompt_id(messages)
        completion, reason = completion_of(traces, raw, number)
        if identity in heldout:  # before any other reason, so that the count says how much was kept out
            reason = "in_heldout"
        elif identity not in prompts:
            reason = "no_such_prompt" if messages else "empty_prompt"
        row = {
            "prompt_id": identity,
            "sample_index": seen[identity],
            "author": "teacher",
            "messages": messages,
            "reference": prompts[identity]["reference"] if identity in prompts else None,
            "completion": completion,
        }
        seen[identity] += 1
        if reason:
            dropped.append({**row, "reason": reason})
        else:
            kept.append(row)
    drops = dict(Counter(row["reason"] for row in dropped))
    if not kept:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(drops.items()))
        raise DataError(
            f"{traces.source}: none of {len(source):,} traces can be used: {counts}. Their prompts must be the same text as "
            "training prompts of this run: check traces.columns, and the keys of traces that say where reasoning and answer are."
        )
    out.write_table("traces", kept, TRACE)
    out.write_table("dropped", dropped, DROPPED_TRACE)
    author = {"model": traces.author_model, "revision": None, "parameters": None}
    facts = clock.facts(author=author, licence=licence_of(traces.author_model, traces.licence))
    return out.finish(rows_in=len(source), rows_kept=len(kept), drops=drops, facts=facts)


def completion_of(traces: Traces, row: Row, number: int) -> tuple[str, str | None]:
    """The whole answer of a brought trace, reasoning between think tags, and the reason to drop it or null.

    Args:
        traces: Where reasoning and answer are.
        row: Of the source.
        number: Of the row, from 1, for errors.
    """
    text = (text_in(row, traces.completion, traces.source, number) or "").strip()
    if not text:
        return "", "empty_completion"
    if traces.answer_separator is not None:
        reasoning, found, answer = text.rpartition(traces.answer_separator)
        if not found:
            return text, "no_answer_separator"
        if not answer.strip():
            return text, "empty_answer"
        answer = answer.strip() if "\\boxed" in answer else f"\\boxed{{{answer.strip()}}}"
    elif traces.reasoning is not None:
        reasoning, answer = text_in(row, traces.reasoning, traces.source, number) or "", text
        if THINK_OPEN in text or THINK_CLOSE in text:
            return text, "reasoning_in_completion"
    else:
        return text, None
    reasoning = reasoning.replace(THINK_OPEN, "").replace(THINK_CLOSE, "").strip()
    if not reasoning:
        return text, "empty_reasoning"
    return f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{answer}", None
