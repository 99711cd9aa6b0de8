"""The tables of a report as text: what was dropped on the way, on-policy rounds, stored distributions, costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.recipe.experiment import Recipe
from distill.reporting.measured import percent_text
from distill.reporting.summary import RunSummary, bytes_text, metrics
from distill.run.log import duration_text, money_text
from distill.run.manifest import Manifest


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
