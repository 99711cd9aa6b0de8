"""The tables of a report as text: results, what was dropped on the way, on-policy rounds, stored distributions, costs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from distill.recipe.experiment import Recipe
from distill.reporting.alike import alike_text
from distill.reporting.summary import NOT_MEASURED, ModelResult, RunSummary, bytes_text, metrics, parameters_text, percent_text
from distill.run.log import duration_text, money_text
from distill.run.manifest import Manifest


def results_rows(summary: RunSummary) -> list[list[str]]:
    """The table of results as text, a row a model, under `RESULT_COLUMNS`."""
    return [
        [
            result.role,
            _accuracy_text(result),
            f"[{percent_text(result.accuracy.low)}, {percent_text(result.accuracy.high)}]",
            f"{result.mean_tokens:.0f}",
            percent_text(result.truncation_rate),
            percent_text(result.unjudged_rate),
            parameters_text(result.parameters),
        ]
        for result in summary.results
    ]


RESULT_COLUMNS = ["model", "accuracy", "interval", "tokens an answer", "truncated", "unjudged", "parameters"]


def results_text(summary: RunSummary) -> str:
    """The table and the gap as plain text for a terminal."""
    if not summary.results:
        return f"{NOT_MEASURED}: this recipe leaves the evaluation out\n" if summary.alike is None else alike_text(summary.alike)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(RESULT_COLUMNS):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in results_rows(summary):
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=110, no_color=True).print(table)
    table_text = "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
    more = alike_text(summary.alike)
    return (
        "\n".join([table_text, "", summary.gap_text, *([summary.doubt_text] if summary.doubt_text else [])])
        + "\n"
        + ("\n" + more if more else "")
    )


def _accuracy_text(result: ModelResult) -> str:
    """The accuracy; where answers could not be judged, from all of them wrong to all of them right."""
    least, most = percent_text(result.accuracy.value), percent_text(result.accuracy_at_most)
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


def funnel(summary: RunSummary, recipe: Recipe) -> list[tuple[str, int]]:
    """From prompts to what is learned from: name of a step and what is left after it. Empty where rounds alone draw from them."""
    steps = [("prompts", summary.manifests["prompts"].rows("train"))]
    if "curate" not in summary.manifests:
        return [*steps, ("with room for an answer", summary.manifests["train"].rows_kept or 0)] if "train" in summary.manifests else []
    curated = summary.manifests["curate"]
    left = curated.rows_in or 0
    steps.append(("traces", left))
    for check in (check.called for check in recipe.curate.checks):
        left -= sum(count for reason, count in curated.drops.items() if reason.startswith(f"{check}:"))
        steps.append((f"pass {check}", left))
    return [*steps, ("kept", curated.rows_kept or 0)]


def verdict_counts(summary: RunSummary) -> list[tuple[str, int, int, int]]:
    """For each check: its name, and how many traces passed, failed and could not be judged."""
    if "curate" not in summary.manifests:
        return []
    counts: dict[str, dict[str, int]] = summary.manifests["curate"].facts.get("verdicts", {})
    return [(check, count["passed"], count["failed"], count["unjudged"]) for check, count in counts.items()]


ROUND_COLUMNS = ["round", "rollouts", "tokens each", "longest", "cut off", "divergence at first", "at last", "steps"]


def round_rows(summary: RunSummary, folders: Sequence[dict[str, Path]]) -> list[list[str]]:
    """The table of on-policy rounds as text, under `ROUND_COLUMNS`. The divergence from the teacher is in nats a token."""
    rows = []
    for number, (stages, places) in enumerate(zip(summary.rounds, folders, strict=False), start=1):
        wrote = stages["rollouts"].facts if "rollouts" in stages else {}
        count = sum(wrote.get("finish_reasons", {}).values())
        share = wrote["finish_reasons"].get("length", 0) / count if count else None
        trained = stages["train"].facts if "train" in stages else {}
        logged = metrics(places["train"]) if "train" in places else []
        divergences = [entry.get("kl_lower_bound", entry.get("log_ratio")) for entry in logged]
        ends = [value for value in divergences if value is not None]
        rows.append(
            [
                str(number),
                f"{count:,}" if count else "",
                f"{wrote['tokens'] / count:,.0f}" if count and "tokens" in wrote else "",
                f"{wrote['horizon']:,}" if "horizon" in wrote else "",
                "" if share is None else percent_text(share),
                f"{ends[0]:.4f}" if ends else "",
                f"{ends[-1]:.4f}" if ends else "",
                f"{trained['steps']:,}" if "steps" in trained else "",
            ]
        )
    return rows


TARGET_COLUMNS = ["stage", "traces", "tokens", "stored", "bytes a token", "probability held", "with a target"]


def target_rows(summary: RunSummary) -> list[list[str]]:
    """The table of stored teacher distributions as text, a row for each scoring, under `TARGET_COLUMNS`."""
    return [
        [
            name,
            f"{manifest.rows_kept or 0:,}",
            f"{facts['positions']:,}" if "positions" in facts else "",
            bytes_text(facts.get("bytes")),
            f"{facts['bytes_per_token']:,.1f}" if "bytes_per_token" in facts else "",
            ", ".join(f"top {k}: {percent_text(mass)}" for k, mass in _some(facts.get("captured_mass") or {})),
            "" if facts.get("aligned_share") is None else percent_text(facts["aligned_share"]),
        ]
        for name, manifest in summary.stages
        if name.endswith("score")
        for facts in [manifest.facts]
    ]


def _some(masses: dict[str, float]) -> list[tuple[str, float]]:
    """The first, the middle and the last of them."""
    entries = list(masses.items())
    return [entries[place] for place in sorted({0, len(entries) // 2, len(entries) - 1})] if entries else []


COST_COLUMNS = ["stage", "wall time", "tokens", "US dollars", "device", "finished", "SHA-256 of its content"]


def cost_columns(summary: RunSummary) -> list[str]:
    """Names of the columns of `cost_rows`: money only where a stage cost some."""
    return COST_COLUMNS if _costs_money(summary) else [name for name in COST_COLUMNS if name != "US dollars"]


def _costs_money(summary: RunSummary) -> bool:
    return any((manifest.facts.get("server") or {}).get("cost_usd") is not None for _, manifest in summary.stages)


def cost_rows(summary: RunSummary) -> list[list[str]]:
    """What each stage cost, a row a stage, under `cost_columns`."""
    money = _costs_money(summary)
    return [_cost(name, manifest, money) for name, manifest in summary.stages]


def _cost(name: str, manifest: Manifest, money: bool) -> list[str]:
    dollars = (manifest.facts.get("server") or {}).get("cost_usd")
    facts, tokens = manifest.facts, manifest.facts.get("tokens")
    return [
        name,
        duration_text(facts["wall_s"]),
        "" if tokens is None else f"{tokens:,}",
        *(["" if dollars is None else money_text(dollars)] if money else []),
        str(facts.get("device", "cpu")),
        facts["finished_at"],
        manifest.digest[:12],
    ]
