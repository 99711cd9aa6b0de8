"""What a run did and found, gathered from its files alone: its manifests and scores, and what they say in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.catalogue import UNKNOWN
from distill.data.licences import licence_of
from distill.measure.intervals import Estimate
from distill.recipe.experiment import Recipe
from distill.reporting.alike import Alike, alike_of
from distill.reporting.measured import ModelResult, SetResults, percent_text, read_results, read_wins
from distill.reporting.public import file_or_name, hide_secrets
from distill.run.log import duration_text
from distill.run.manifest import MANIFEST, Manifest, checked_file, read_manifest

Row = dict[str, Any]
_MEASURING = ("evaluate", "benchmark")


@dataclass(frozen=True)
class RunSummary:
    """A run in numbers. Null or empty where a stage was left out."""

    manifests: dict[str, Manifest]
    """By stage, in the order of the pipeline, without those inside the rounds."""
    rounds: list[dict[str, Manifest]]
    """Of each on-policy round its stages."""
    sets: list[SetResults]
    """What was measured, a held-out set after the other, the run's own first."""
    names: Mapping[str, str]
    """Public names of models, by those they were loaded by."""
    alike: Alike | None = None
    """What the models thought of answers; null where they read none."""
    wins: list[Row] = field(default_factory=list)
    """How often a judge prefers the answers of one model to those of another, on the run's own held-out prompts."""

    @property
    def main(self) -> SetResults | None:
        """What was measured on the run's own held-out prompts."""
        return next((each for each in self.sets if each.is_main), None)

    @property
    def results(self) -> list[ModelResult]:
        """The models on these."""
        return self.main.results if self.main else []

    @property
    def gap(self) -> Estimate | None:
        """What the student recovered on these."""
        return self.main.gap if self.main else None

    def name_of(self, model: str | None, otherwise: str = UNKNOWN) -> str:
        """How a model that a stage recorded is called elsewhere."""
        return self.names.get(model) or file_or_name(model) if model else otherwise

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        further = [_set_sentence(each) for each in self.sets if not each.is_main]
        told = [
            _set_sentence(self.main) if self.main else "",
            self.alike.sentence if self.alike else "",
            _win_sentence(self.wins),
            *further,
        ]
        return next(filter(None, told), "The student has not been measured on held-out prompts.")

    @property
    def unjudged_text(self) -> str:
        """Why there is no accuracy on the run's own held-out prompts; empty where there is one."""
        if self.main is not None:
            return ""
        if "evaluate" not in self.manifests:
            return "Not measured: this recipe leaves the evaluation out."
        return "No answer to the run's own held-out prompts was judged right or wrong: there are no references."

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


def summarise(folders: dict[str, Path], rounds: Sequence[dict[str, Path]], names: Mapping[str, str]) -> RunSummary:
    """Reads the manifests and scores of a run.

    Args:
        folders: Stage name and its folder; unfinished ones are left out.
        rounds: The same of every on-policy round.
        names: Public names of models, by those they were loaded by.
    """
    manifests = _finished(folders)
    of_rounds = [stages for stages in map(_finished, rounds) if stages]
    sets = read_results(folders["evaluate"], manifests["evaluate"]) if "evaluate" in manifests else []
    alike = alike_of(folders["evaluate"], manifests["evaluate"]) if "evaluate" in manifests else None
    wins = read_wins(folders["evaluate"], manifests["evaluate"]) if "evaluate" in manifests else []
    return RunSummary(manifests, of_rounds, sets, names, alike, wins)


def _finished(folders: dict[str, Path]) -> dict[str, Manifest]:
    return {stage: read_manifest(folder) for stage, folder in folders.items() if (folder / MANIFEST).exists()}


def _set_sentence(found: SetResults) -> str:
    """How many answers to a set are right; empty where the student was not measured."""
    right = {result.role: percent_text(result.accuracy.value) for result in found.results}
    if "student" not in right:
        return ""
    prompts = f"{found.num_prompts:,} held-out prompts" if found.is_main else f"{found.num_prompts:,} prompts of the set {found.name}"
    text = f"The student answers {right['student']} of {prompts} correctly"
    text += f"; before training it was {right['base']}" if "base" in right else ""
    return text + (f", and its teacher answers {right['teacher']}." if "teacher" in right else ".")


def _win_sentence(wins: Sequence[Row]) -> str:
    """How often a judge prefers the student's answers; empty where none compared them."""
    row = next((row for row in wins if row["model_role"] == "student"), None)
    if row is None:
        return ""
    share, prompts = percent_text(row["value"]), f"{row['num_prompts']:,} held-out prompts"
    return f"A judge prefers the student's answer to that of the {row['against']} on {share} of {prompts}, a tie counted as half."


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
