"""What a run found, gathered from its files alone: the numbers that the report, the card and the terminal show."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill.intervals import Estimate
from distill.licences import UNKNOWN, licence_of
from distill.recipe import Recipe
from distill.storage import MANIFEST, Manifest, read_manifest, read_rows

Row = dict[str, Any]
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class ModelResult:
    """One line of the results."""

    role: str
    model: str
    accuracy: Estimate
    mean_tokens: float
    truncation_rate: float
    unjudged_rate: float
    parameters: int | None


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers. Null or empty where a stage was left out."""

    manifests: dict[str, Manifest]
    """By stage, in the order of the pipeline."""
    results: list[ModelResult]
    gap: Estimate | None
    num_prompts: int
    samples_per_prompt: int
    confidence: float

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        by_role = {result.role: result for result in self.results}
        if "student" not in by_role:
            return "The student has not been measured on held-out prompts."
        student = by_role["student"].accuracy
        text = f"The student answers {_percent(student.value)} of {self.num_prompts:,} held-out prompts correctly"
        if "base" in by_role:
            text += f"; before training it was {_percent(by_role['base'].accuracy.value)}"
        if "teacher" in by_role:
            text += f", and its teacher answers {_percent(by_role['teacher'].accuracy.value)}"
        return text + "."

    @property
    def course(self) -> str:
        """What was done, in words: traces, author, steps, time."""
        curated, trained = self.manifests["curate"], self.manifests["train"]
        author = (self.manifests["generate"].facts.get("author") or {}).get("model") or "an author not recorded"
        text = f"It learned from {trained.rows_kept or 0:,} of {curated.rows_in or 0:,} traces by {author}"
        steps = trained.facts.get("steps")
        text += "" if steps is None else f", in {steps:,} optimizer steps"
        return f"{text}. All stages together took {duration_text(self.wall_s)}."

    @property
    def wall_s(self) -> float:
        """Wall seconds of all stages."""
        return sum(float(manifest.facts["wall_s"]) for manifest in self.manifests.values())

    @property
    def finished_at(self) -> str:
        """When the last of the stages was finished, ISO 8601."""
        return max(str(manifest.facts["finished_at"]) for manifest in self.manifests.values())

    @property
    def samples_text(self) -> str:
        """How many answers each prompt got."""
        return "1 answer a prompt" if self.samples_per_prompt == 1 else f"{self.samples_per_prompt:,} answers a prompt"

    @property
    def confidence_text(self) -> str:
        """Coverage of the intervals."""
        return f"{100 * self.confidence:g} %"

    @property
    def gap_text(self) -> str:
        """The share of the teacher-base gap recovered, with its interval and what it rests on."""
        if self.gap is None:
            return f"gap recovered: {NOT_MEASURED} (needs base, student and teacher)"
        if self.gap.value is None:
            return "gap recovered: not defined, the teacher is no better than the base"
        interval = "no interval" if self.gap.low is None else f"[{self.gap.low:.2f}, {self.gap.high:.2f}]"
        basis = f"{self.confidence_text} interval, paired bootstrap over {self.num_prompts:,} prompts"
        return f"gap recovered: {self.gap.value:.2f} {interval} ({basis})"


def summarise(run_dir: Path, folders: dict[str, str]) -> RunSummary:
    """Reads the manifests and scores of a run.

    Args:
        run_dir: Folder of the run.
        folders: Stage name and folder inside it; unfinished ones are left out.
    """
    manifests = {stage: read_manifest(run_dir / name) for stage, name in folders.items() if (run_dir / name / MANIFEST).exists()}
    if "evaluate" not in manifests:
        return RunSummary(manifests, [], None, 0, 0, 0.95)
    scores = read_rows(run_dir / folders["evaluate"], "scores")
    by_key = {(score["model_role"], score["metric"]): score for score in scores}
    models = manifests["evaluate"].facts["models"]
    results = [
        ModelResult(
            role=role,
            model=record["model"],
            accuracy=_estimate(by_key[role, "accuracy"]),
            mean_tokens=by_key[role, "mean_tokens"]["value"],
            truncation_rate=by_key[role, "truncation_rate"]["value"],
            unjudged_rate=by_key[role, "unjudged_rate"]["value"],
            parameters=record["parameters"],
        )
        for role, record in models.items()
    ]
    gap = by_key.get(("gap", "gap_recovered"))
    return RunSummary(
        manifests=manifests,
        results=results,
        gap=_estimate(gap) if gap else None,
        num_prompts=max(score["num_prompts"] for score in scores if score["metric"] == "accuracy"),
        samples_per_prompt=scores[0]["samples_per_prompt"],
        confidence=manifests["evaluate"].facts["confidence"],
    )


def results_rows(summary: RunSummary) -> list[list[str]]:
    """The table of results as text, a row a model, under `RESULT_COLUMNS`."""
    return [
        [
            result.role,
            _percent(result.accuracy.value),
            f"[{_percent(result.accuracy.low)}, {_percent(result.accuracy.high)}]",
            f"{result.mean_tokens:.0f}",
            _percent(result.truncation_rate),
            _percent(result.unjudged_rate),
            parameters_text(result.parameters),
        ]
        for result in summary.results
    ]


RESULT_COLUMNS = ["model", "accuracy", "interval", "tokens an answer", "truncated", "unjudged", "parameters"]


def results_text(summary: RunSummary) -> str:
    """The table and the gap as plain text for a terminal."""
    if not summary.results:
        return f"{NOT_MEASURED}: this recipe leaves the evaluation out\n"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(RESULT_COLUMNS):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in results_rows(summary):
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=110, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n") + f"\n\n{summary.gap_text}\n"


def funnel(summary: RunSummary, recipe: Recipe) -> list[tuple[str, int]]:
    """From prompts to kept traces: name of a step and what is left after it."""
    steps = [("prompts", summary.manifests["prompts"].rows("train"))]
    curated = summary.manifests["curate"]
    left = curated.rows_in or 0
    steps.append(("traces", left))
    for check in recipe.curate.checks:
        left -= sum(count for reason, count in curated.drops.items() if reason.startswith(f"{check}:"))
        steps.append((f"pass {check}", left))
    return [*steps, ("kept", curated.rows_kept or 0)]


def verdict_counts(summary: RunSummary) -> list[tuple[str, int, int, int]]:
    """For each check: its name, and how many traces passed, failed and could not be judged."""
    counts: dict[str, dict[str, int]] = summary.manifests["curate"].facts.get("verdicts", {})
    return [(check, count["passed"], count["failed"], count["unjudged"]) for check, count in counts.items()]


def lineage(recipe: Recipe, summary: RunSummary) -> list[tuple[str, str]]:
    """Where the student comes from: models, terms, digests and versions, as name and text."""
    traces, trained = summary.manifests["generate"].facts, summary.manifests["train"].facts
    student = recipe.student
    measured = summary.manifests["evaluate"].facts["models"] if "evaluate" in summary.manifests else {}
    base = measured.get("base") or {"model": student.model, "revision": student.revision}
    trainable = parameters_text(trained.get("trainable_parameters"))
    return [
        ("traces by", _model_text(traces.get("author") or {})),
        ("terms of the traces", traces.get("licence") or UNKNOWN),
        ("student before training", _model_text(base)),
        ("its terms", licence_of(student.model, student.licence)),
        ("method", f"{recipe.train.method}, {student.adapter.type}, {trainable} trained parameters"),
        ("precision", trained.get("precision") or UNKNOWN),
        ("problems", recipe.prompts.source),
        ("tokenizer of the student", _digest_text(trained.get("tokenizer_digest"))),
        ("chat template of the student", _digest_text(trained.get("template_digest"))),
        ("kit", f"{trained.get('kit_version') or UNKNOWN}, git {trained.get('git_revision') or UNKNOWN}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in trained.get("packages", {}).items()) or UNKNOWN),
    ]


def _model_text(record: Row) -> str:
    if not record.get("model"):
        return UNKNOWN
    revision = f" at {record['revision']}" if record.get("revision") else ""
    size = f", {parameters_text(record['parameters'])} parameters" if record.get("parameters") else ""
    return f"{record['model']}{revision}{size}"


def _digest_text(digest: str | None) -> str:
    return f"SHA-256 {digest[:16]}" if digest else UNKNOWN


def metrics(path: Path) -> list[Row]:
    """Logged training metrics with a loss, a dictionary a logging step."""
    if not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if "loss" in entry]


def parameters_text(count: int | None) -> str:
    """A number of parameters as people write it: 0.85M, 7.6B."""
    if count is None:
        return UNKNOWN
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f}".rstrip("0").rstrip(".") + letter
    return str(count)


def _estimate(score: Row) -> Estimate:
    return Estimate(score["value"], score["low"], score["high"])


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def duration_text(seconds: float) -> str:
    """Seconds as people read them: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
