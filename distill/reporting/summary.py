"""What a run did and found, gathered from its files alone: its manifests and scores, and what they say in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.data.licences import UNKNOWN, licence_of
from distill.measure.intervals import Estimate
from distill.measure.marks import in_doubt
from distill.recipe.experiment import Recipe
from distill.reporting.public import file_or_name, hide_secrets
from distill.run.log import duration_text
from distill.run.manifest import MANIFEST, Manifest, checked_file, read_manifest
from distill.run.tables import read_rows

Row = dict[str, Any]
NOT_MEASURED = "not measured"
_MEASURING = ("evaluate", "benchmark")


@dataclass(frozen=True)
class ModelResult:
    """One line of the results."""

    role: str
    model: str
    accuracy: Estimate
    mean_tokens: float
    truncation_rate: float
    unjudged_rate: float
    accuracy_at_most: float
    """If all answers that could not be judged were right; as they are, they count as wrong."""
    parameters: int | None


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers. Null or empty where a stage was left out."""

    manifests: dict[str, Manifest]
    """By stage, in the order of the pipeline, without those inside the rounds."""
    rounds: list[dict[str, Manifest]]
    """Of each on-policy round its stages."""
    results: list[ModelResult]
    gap: Estimate | None
    num_prompts: int
    samples_per_prompt: int
    confidence: float
    names: Mapping[str, str]
    """Public names of models, by those they were loaded by."""

    def name_of(self, model: str | None, otherwise: str = UNKNOWN) -> str:
        """How a model that a stage recorded is called elsewhere."""
        return self.names.get(model) or file_or_name(model) if model else otherwise

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        by_role = {result.role: result for result in self.results}
        if "student" not in by_role:
            return "The student has not been measured on held-out prompts."
        student = by_role["student"].accuracy
        text = f"The student answers {percent_text(student.value)} of {self.num_prompts:,} held-out prompts correctly"
        if "base" in by_role:
            text += f"; before training it was {percent_text(by_role['base'].accuracy.value)}"
        if "teacher" in by_role:
            text += f", and its teacher answers {percent_text(by_role['teacher'].accuracy.value)}"
        return text + "."

    @property
    def course(self) -> str:
        """What was done, in words: what it learned from, who wrote or judged that, steps, time."""
        parts = []
        if "train" in self.manifests:
            parts.append(f"It learned from {self._material}{_steps_text([self.manifests['train']])}.")
        trained = [stages["train"] for stages in self.rounds if "train" in stages]
        if trained:
            own = sum(stages["rollouts"].rows_kept or 0 for stages in self.rounds if "train" in stages)
            rounds = f"{len(trained)} on-policy round{'s' if len(trained) > 1 else ''}"
            text = f"It then learned in {rounds}" if parts else f"It learned in {rounds}"
            parts.append(f"{text} from {own:,} answers of its own{_steps_text(trained)}.")
        return " ".join([*parts, f"All stages together took {duration_text(self.wall_s)}."])

    @property
    def _material(self) -> str:
        """What the training outside the rounds read, and from whom it is."""
        trained = self.manifests["train"]
        if "curate" not in self.manifests:
            judge = self.name_of(trained.settings.get("teacher", {}).get("model"), "a teacher not recorded")
            return f"its own answers to {trained.rows_kept or 0:,} of {trained.rows_in or 0:,} prompts, judged by {judge} as it wrote them"
        author = self.name_of(_author(self.manifests["generate"]), "an author not recorded")
        text = f"{trained.rows_kept or 0:,} of {self.manifests['curate'].rows_in or 0:,} traces by {author}"
        if trained.settings.get("train", {}).get("method") != "kd":
            return text
        teacher = self.name_of(_author(self.manifests["score"]), author)
        return f"{text} and {'its' if teacher == author else f'the {teacher}'} distributions at their tokens"

    @property
    def stages(self) -> list[tuple[str, Manifest]]:
        """Every finished stage under the name a reader knows it by, in the order they ran."""
        named = [(f"round {number} {stage}", m) for number, stages in enumerate(self.rounds, start=1) for stage, m in stages.items()]
        before = [(stage, m) for stage, m in self.manifests.items() if stage not in _MEASURING]
        return [*before, *named, *((stage, m) for stage, m in self.manifests.items() if stage in _MEASURING)]

    @property
    def stop(self) -> str:
        """Why the rounds ended before the last one; empty where they did not."""
        return next((str(m.facts["stop"]).rstrip(".") for stages in self.rounds for m in stages.values() if "stop" in m.facts), "")

    @property
    def trained(self) -> Manifest:
        """Of the training that made the student which was measured."""
        return next(stages["train"] for stages in [*reversed(self.rounds), self.manifests] if "train" in stages)

    @property
    def wall_s(self) -> float:
        """Wall seconds of all stages."""
        return sum(float(manifest.facts["wall_s"]) for _, manifest in self.stages)

    @property
    def finished_at(self) -> str:
        """When the last of the stages was finished, ISO 8601."""
        return max(str(manifest.facts["finished_at"]) for _, manifest in self.stages)

    @property
    def samples_text(self) -> str:
        """How many answers each prompt got."""
        return "1 answer a prompt" if self.samples_per_prompt == 1 else f"{self.samples_per_prompt:,} answers a prompt"

    @property
    def confidence_text(self) -> str:
        """Coverage of the intervals."""
        return f"{100 * self.confidence:g} %"

    @property
    def doubt_text(self) -> str:
        """Whose order the answers that could not be judged could change; empty where they could not."""
        bounds = {result.role: (result.accuracy.value or 0.0, result.accuracy_at_most) for result in self.results}
        pairs = [f"{worse} ({percent_text(bounds[worse][1])} at most) and {better}" for worse, better in in_doubt(bounds)]
        return f"unjudged answers count as wrong; if they were right, that could change the order of {', of '.join(pairs)}" if pairs else ""

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


def summarise(folders: dict[str, Path], rounds: Sequence[dict[str, Path]], names: Mapping[str, str]) -> RunSummary:
    """Reads the manifests and scores of a run.

    Args:
        folders: Stage name and its folder; unfinished ones are left out.
        rounds: The same of every on-policy round.
        names: Public names of models, by those they were loaded by.
    """
    manifests = _finished(folders)
    of_rounds = [stages for stages in map(_finished, rounds) if stages]
    if "evaluate" not in manifests:
        return RunSummary(manifests, of_rounds, [], None, 0, 0, 0.95, names)
    scores = read_rows(folders["evaluate"], "scores")
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
            accuracy_at_most=by_key.get((role, "accuracy_if_unjudged_right"), by_key[role, "accuracy"])["value"],
            parameters=record["parameters"],
        )
        for role, record in models.items()
    ]
    gap = by_key.get(("gap", "gap_recovered"))
    return RunSummary(
        manifests=manifests,
        rounds=of_rounds,
        results=results,
        gap=_estimate(gap) if gap else None,
        num_prompts=max(score["num_prompts"] for score in scores if score["metric"] == "accuracy"),
        samples_per_prompt=scores[0]["samples_per_prompt"],
        confidence=manifests["evaluate"].facts["confidence"],
        names=names,
    )


def _finished(folders: dict[str, Path]) -> dict[str, Manifest]:
    return {stage: read_manifest(folder) for stage, folder in folders.items() if (folder / MANIFEST).exists()}


def _steps_text(trained: Sequence[Manifest]) -> str:
    steps = [manifest.facts["steps"] for manifest in trained if manifest.facts.get("steps") is not None]
    return f", in {sum(steps):,} optimizer steps" if steps else ""


def lineage(recipe: Recipe, summary: RunSummary) -> list[tuple[str, str]]:
    """Where the student comes from: models, terms, digests and versions, as name and text."""
    trained = summary.trained.facts
    student = recipe.student
    measured = summary.manifests["evaluate"].facts["models"] if "evaluate" in summary.manifests else {}
    base = measured.get("base") or {"model": student.model, "revision": student.revision}
    trainable = parameters_text(trained.get("trainable_parameters"))
    return [
        *_sources(recipe, summary),
        ("student before training", _model_text(base, summary)),
        ("its terms", licence_of(student.model, student.licence)),
        ("method", f"{_method_text(recipe, summary)}, {student.adapter.type}, {trainable} trained parameters"),
        ("precision", trained.get("precision") or UNKNOWN),
        ("problems", hide_secrets(file_or_name(recipe.prompts.source))),
        ("tokenizer of the student", _digest_text(trained.get("tokenizer_digest"))),
        ("chat template of the student", _digest_text(trained.get("template_digest"))),
        ("kit", f"{trained.get('kit_version') or UNKNOWN}, git {trained.get('git_revision') or UNKNOWN}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in trained.get("packages", {}).items()) or UNKNOWN),
    ]


def _sources(recipe: Recipe, summary: RunSummary) -> list[tuple[str, str]]:
    """Who wrote the traces and whose distributions the student learned, each with its terms."""
    found = []
    if "generate" in summary.manifests:
        traces = summary.manifests["generate"].facts
        found += [
            ("traces by", _model_text(traces.get("author") or {}, summary)),
            ("terms of the traces", traces.get("licence") or UNKNOWN),
        ]
    scored = [manifest for name, manifest in summary.stages if name.endswith("score")]
    if scored:
        facts = scored[-1].facts
        found += [
            ("distributions of", _model_text(facts.get("author") or {}, summary)),
            ("terms of the distributions", facts.get("licence") or UNKNOWN),
        ]
    if recipe.train.is_live and recipe.teacher is not None:
        terms = licence_of(recipe.teacher.model, recipe.teacher.licence)
        found += [
            ("judged by", _model_text({"model": recipe.teacher.model, "revision": recipe.teacher.revision}, summary)),
            ("terms of the teacher", terms),
        ]
    return found


def _method_text(recipe: Recipe, summary: RunSummary) -> str:
    method: str = recipe.train.method if "train" in summary.manifests else "kd"
    if recipe.train.on_policy is not None:
        method += f" ({recipe.train.on_policy.divergence})"
    rounds = len([stages for stages in summary.rounds if "train" in stages])
    return method + (f", {rounds} on-policy rounds" if rounds else "")


def bytes_text(count: int | None) -> str:
    """A size as people write it: 12.3 MiB."""
    if count is None:
        return ""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _author(manifest: Manifest) -> str | None:
    """The model that wrote or judged what a stage made."""
    model: str | None = (manifest.facts.get("author") or {}).get("model")
    return model


def _model_text(record: Row, summary: RunSummary) -> str:
    if not record.get("model"):
        return UNKNOWN
    revision = f" at {record['revision']}" if record.get("revision") else ""
    size = f", {parameters_text(record['parameters'])} parameters" if record.get("parameters") else ""
    return f"{summary.name_of(record['model'])}{revision}{size}"


def _digest_text(digest: str | None) -> str:
    return f"SHA-256 {digest[:16]}" if digest else UNKNOWN


def metrics(student: Path) -> list[Row]:
    """Logged training metrics with a loss, a dictionary a logging step.

    Raises:
        IntegrityError: they are not as the training left them.
    """
    path = checked_file(student, "metrics.jsonl")
    if path is None:
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


def percent_text(share: float | None) -> str:
    """A share as people write it: 12.3 %."""
    return UNKNOWN if share is None else f"{100 * share:.1f} %"
