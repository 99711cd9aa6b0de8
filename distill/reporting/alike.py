"""How alike base and student are to the teacher, and whether models are right as often as they are sure, as text; from files alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill.measure.likeness import DIVERGENCE, LEAST_DIVERGENCE
from distill.recipe.sets import MAIN
from distill.run.manifest import Manifest
from distill.run.tables import read_rows

Row = dict[str, Any]
Scores = Mapping[tuple[str, str], Row]
ALIKE_COLUMNS = ["model", "KL from the teacher, nats a token", "same most probable token", "perplexity", "chrF"]
CALIBRATION_COLUMNS = ["model", "calibration error", "surest bin: sure", "right", "answers", "least sure bin: sure", "right", "answers"]


@dataclass(frozen=True)
class Alike:
    """What reading gave, as text."""

    rows: list[list[str]]
    """The table of likeness, a row a model, under `ALIKE_COLUMNS`; empty where it was not asked for."""
    notes: list[str]
    """What must be known to read it, a sentence each."""
    sentence: str
    """The outcome in words; empty where the student read nothing."""
    calibration: list[list[str]]
    """A row a model, under `CALIBRATION_COLUMNS`; empty where it was not asked for."""
    sureness: str
    """What a model's sureness of an answer is."""
    bins: dict[str, list[list[float]]]
    """By model how sure it was, how often right, and of how many answers."""

    @property
    def columns(self) -> list[str]:
        """Names of the columns of `rows`."""
        return ALIKE_COLUMNS

    @property
    def calibration_columns(self) -> list[str]:
        """Names of the columns of `calibration`."""
        return CALIBRATION_COLUMNS


def alike_of(evaluated: Path, manifest: Manifest) -> Alike | None:
    """What the finished stage evaluate found; null where no model read anything.

    Args:
        evaluated: Its folder.
        manifest: Of it.
    """
    facts = manifest.facts
    likeness, calibration = facts.get("likeness"), facts.get("calibration")
    if likeness is None and calibration is None:
        return None
    scores = {(row["model_role"], row["metric"]): row for row in read_rows(evaluated, "scores") if (row["set"], row["tag"]) == (MAIN, None)}
    roles = [role for role in ("base", "student", "teacher") if role in facts["models"]]
    bins = (calibration or {}).get("bins", {})
    return Alike(
        rows=[_row(role, scores) for role in roles if (role, "perplexity") in scores],
        notes=_notes(likeness, scores, facts["confidence"]) if likeness else [],
        sentence=_sentence(scores) if likeness else "",
        calibration=[_calibrated(role, scores, bins[role]) for role in roles if role in bins],
        sureness=_sureness(calibration) if calibration else "",
        bins=bins,
    )


def alike_texts(alike: Alike | None) -> list[str]:
    """The tables as plain text for a terminal, each with what must be known to read it; none where there are none."""
    if alike is None:
        return []
    texts = ["\n".join([table_text("likeness to the teacher", ALIKE_COLUMNS, alike.rows), *alike.notes])] if alike.rows else []
    if alike.calibration:
        texts.append("\n".join([table_text("sure and right", CALIBRATION_COLUMNS, alike.calibration), f"sure: {alike.sureness}"]))
    return texts


def table_text(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table with its title as plain text for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=140, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n") + "\n"


def _row(role: str, scores: Scores) -> list[str]:
    agreement = _first(scores, role, "top1_agreement", "top1_of_written")
    return [
        role,
        _number(_first(scores, role, DIVERGENCE, LEAST_DIVERGENCE), "{:.3f}"),
        "" if role == "teacher" else _number(agreement, "{:.1f} %", 100),
        _number(scores.get((role, "perplexity")), "{:.2f}"),
        _number(scores.get((role, "chrf")), "{:.1f}"),
    ]


def _first(scores: Scores, role: str, *metrics: str) -> Row | None:
    return next((scores[role, metric] for metric in metrics if (role, metric) in scores), None)


def _number(score: Row | None, form: str, times: float = 1) -> str:
    """A value with its interval: 0.412 [0.310, 0.520]."""
    if score is None or score["value"] is None:
        return ""
    unit = form[form.index("}") + 1 :]
    value, low, high = (form.removesuffix(unit).format(times * score[name]) for name in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def _notes(likeness: Row, scores: Scores, confidence: float) -> list[str]:
    basis = f"{100 * confidence:g} % intervals, bootstrap over prompts"
    notes = [f"On {likeness['answers']:,} answers of the teacher to held-out prompts; {basis}. chrF: of the answer behind any reasoning."]
    held, covered = (
        next((row for (_, name), row in scores.items() if name == metric), None) for metric in ("held_share", "compared_share")
    )
    if likeness["read_by"] is None:
        notes.append(
            "The teacher's server tells nothing of what it thinks, so no divergence is measured; the tokens compared are those it wrote."
        )
    elif held is not None and not likeness["exact"]:
        notes.append(
            f"The divergence is a lower bound: over the teacher's {likeness['top_k']:,} most probable tokens, which hold "
            f"{100 * held['value']:.2f} % of its probability, and one outcome for all others."
        )
    if covered is not None and covered["value"] < 1:
        bits = ", ".join(f"{role} {row['value']:.3f}" for (role, name), row in scores.items() if name == "bits_per_byte")
        notes.append(
            f"The two have other tokenizers: {100 * covered['value']:.1f} % of the tokens are tokens of both, and only these are compared. "
            f"Perplexities are a token of each model's own; in bits a byte: {bits}."
        )
    if ("gap", "divergence_recovered") in scores:
        gap = scores["gap", "divergence_recovered"]
        text = "not defined, the base is no farther from the teacher than rounding" if gap["value"] is None else f"{gap['value']:.2f}"
        interval = "" if gap["value"] is None else " (no interval)" if gap["low"] is None else f" [{gap['low']:.2f}, {gap['high']:.2f}]"
        notes.append(f"Share of the base's divergence that is gone: {text}{interval}.")
    return notes


def _sentence(scores: Scores) -> str:
    """What is known best: the divergence, a lower bound of it, or, of a teacher that told nothing, what a model makes of its words."""
    forms = {
        DIVERGENCE: ("On the teacher's answers the student is {} nats a token from it", "{:.3f}", 1),
        LEAST_DIVERGENCE: ("On the teacher's answers the student is {} nats a token from it", "at least {:.3f}", 1),
        "top1_of_written": (
            "On the teacher's answers the student's most probable token is the written one {} of the time",
            "{:.1f} %",
            100,
        ),
        "chrf": ("The student's answers come to a chrF of {} against those of the teacher", "{:.1f}", 1),
    }
    for metric, (text, form, times) in forms.items():
        if ("student", metric) in scores:
            student, base = (scores.get((role, metric)) for role in ("student", "base"))
            values = [form.format(times * row["value"]) for row in (student, base) if row is not None]
            return text.format(values[0]) + (f"; before training it was {values[1]}." if base is not None else ".")
    return ""


def _sureness(calibration: Row) -> str:
    if calibration["of_label"]:
        return "the probability of the answer behind any reasoning, all its tokens together"
    return "the probability of a token of the answer behind any reasoning, as their geometric mean"


def _calibrated(role: str, scores: Scores, bins: list[list[float]]) -> list[str]:
    least, most = bins[0], bins[-1]
    shown = [text for sure, right, count in (most, least) for text in (f"{100 * sure:.1f} %", f"{100 * right:.1f} %", f"{count:,.0f}")]
    return [role, _number(scores.get((role, "calibration_error")), "{:.3f}"), *shown]
