"""What models were measured by on each held-out set, read from the table of scores, and what that says in words.

"Better" is said only where the interval of the difference leaves zero out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.catalogue import UNKNOWN
from distill.measure.intervals import Estimate
from distill.measure.marks import in_doubt
from distill.measure.scores import DIFFERENCE, P_VALUE, PAIRS
from distill.recipe.sets import MAIN
from distill.run.manifest import Manifest
from distill.run.tables import read_rows

Row = dict[str, Any]
NOT_MEASURED = "not measured"
_LEFT_OUT = {
    "in_training": "are among the prompts that were trained on",
    "duplicate": "were there before",
    "empty_prompt": "are empty",
    "no_answer_match": "have no answer where the pattern looks for it",
}


@dataclass(frozen=True)
class ModelResult:
    """One line of the results."""

    role: str
    model: str
    accuracy: Estimate
    mean_tokens: float | None
    truncation_rate: float
    unjudged_rate: float
    format_rate: float | None
    """Share of answers with a final part in the form that the checks expect; null where they expect none."""
    accuracy_at_most: float
    """If all answers that could not be judged were right; as they are, they count as wrong."""
    parameters: int | None
    more: Mapping[str, Estimate] = field(default_factory=dict)
    """Further measures by their names: pass@k, maj@k, macro-F1."""


@dataclass(frozen=True)
class TagResult:
    """The prompts of one tag."""

    tag: str
    num_prompts: int
    accuracy: Mapping[str, Estimate]
    """By role."""


@dataclass(frozen=True)
class SetResults:
    """A held-out set in numbers."""

    name: str
    results: list[ModelResult]
    gap: Estimate | None
    differences: Mapping[tuple[str, str], Estimate]
    """Of the accuracies of two models, the first less the second; none where an earlier kit measured."""
    by_chance: Mapping[tuple[str, str], float]
    """How often chance alone gives such a difference; none where an earlier kit measured."""
    num_prompts: int
    samples_per_prompt: int
    confidence: float
    tags: list[TagResult] = field(default_factory=list)
    confusion: list[Row] = field(default_factory=list)
    """Rows of that table; none where no labels are answered."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason and number of its prompts that were not asked."""

    @property
    def is_main(self) -> bool:
        """Whether it is the run's own."""
        return self.name == MAIN

    @property
    def samples_text(self) -> str:
        """How many answers each prompt got."""
        return "1 answer a prompt" if self.samples_per_prompt == 1 else f"{self.samples_per_prompt:,} answers a prompt"

    @property
    def confidence_text(self) -> str:
        """Coverage of the intervals."""
        return f"{100 * self.confidence:g} %"

    @property
    def left_out_text(self) -> str:
        """Which prompts were not asked, and why; empty where all that were drawn were."""
        counts = [(self.left_out[reason], words) for reason, words in _LEFT_OUT.items() if self.left_out.get(reason)]
        return "left out: " + ", ".join(f"{count:,} that {words}" for count, words in counts) if counts else ""

    @property
    def doubt_text(self) -> str:
        """Whose order the answers that could not be judged could change; empty where they could not."""
        bounds = {result.role: (result.accuracy.value or 0.0, result.accuracy_at_most) for result in self.results}
        pairs = [f"{worse} ({percent_text(bounds[worse][1])} at most) and {better}" for worse, better in in_doubt(bounds)]
        return f"unjudged answers count as wrong; if they were right, that could change the order of {', of '.join(pairs)}" if pairs else ""

    @property
    def differences_text(self) -> str:
        """Which model is better, as far as that can be said, as clauses; empty where an earlier kit did not look."""
        return "; ".join(self.difference_texts)

    @property
    def difference_texts(self) -> list[str]:
        """The same, a clause a pair of models."""
        told = [(pair, self.differences[pair]) for pair in PAIRS if pair in self.differences]
        asked = told[:2] if len(told) == len(PAIRS) else told  # of three models the third follows, and is in the gap
        return [_difference_text(*pair, found, self._chance_of(pair)) for pair, found in asked]

    def _chance_of(self, pair: tuple[str, str]) -> float | None:
        """How likely a difference is by chance alone, where that is too likely to call one better."""
        chance = self.by_chance.get(pair, 0.0)
        return chance if chance > 1 - self.confidence else None

    @property
    def gap_text(self) -> str:
        """The share of the teacher-base gap recovered, with its interval and what it rests on; or why there is none."""
        if self.gap is None:
            return f"gap recovered: {NOT_MEASURED} (needs base, student and teacher)"
        lead = self.differences.get(("teacher", "base"))
        if self.gap.value is None and (lead is None or (lead.value or 0) <= 0):
            return "gap recovered: not defined, the teacher is no better than the base"
        if self.gap.value is None or self.gap.low is None:  # an earlier kit gave a share of what may be nothing, without an interval
            span = f", {_points(lead, self._chance_of(('teacher', 'base')))}," if lead is not None else ""
            return f"gap recovered: not told, the lead of the teacher over the base{span} is within the noise"
        basis = f"{self.confidence_text} interval, paired bootstrap over {self.num_prompts:,} prompts"
        return f"gap recovered: {self.gap.value:.2f} [{self.gap.low:.2f}, {self.gap.high:.2f}] ({basis})"


def read_results(evaluated: Path, manifest: Manifest) -> list[SetResults]:
    """What a finished evaluation found, a set after the other, the run's own first; also of an earlier kit, which had no others.

    Args:
        evaluated: Folder of the stage.
        manifest: Of it.
    """
    by_set: dict[str, list[Row]] = {MAIN: []}
    for score in read_rows(evaluated, "scores"):
        by_set.setdefault(score.get("set") or MAIN, []).append(score)
    confusion = read_rows(evaluated, "confusion") if "confusion" in manifest.tables else []
    return [
        _of_set(name, scores, [row for row in confusion if row["set"] == name], manifest)
        for name, scores in by_set.items()
        if any(row["metric"] == "accuracy" for row in scores)
    ]


def read_wins(evaluated: Path, manifest: Manifest) -> list[Row]:
    """How often a judge prefers the answers of one model to those of another, on the run's own held-out prompts; none where none was asked.

    Args:
        evaluated: Folder of the stage.
        manifest: Of it.
    """
    return list(read_rows(evaluated, "wins")) if "wins" in manifest.tables else []


def _of_set(name: str, scores: Sequence[Row], confusion: list[Row], manifest: Manifest) -> SetResults:
    whole = {(score["model_role"], score["metric"]): score for score in scores if score.get("tag") is None}
    gap, models = whole.get(("gap", "gap_recovered")), manifest.facts["models"]
    differences = {(one, other): whole.get((f"{one}-{other}", DIFFERENCE)) for one, other in PAIRS}
    by_chance = {(one, other): whole[f"{one}-{other}", P_VALUE]["value"] for one, other in PAIRS if (f"{one}-{other}", P_VALUE) in whole}
    return SetResults(
        name=name,
        results=[_of_model(role, record, whole) for role, record in models.items()],
        gap=_estimate(gap) if gap else None,
        differences={pair: _estimate(score) for pair, score in differences.items() if score is not None},
        by_chance=by_chance,
        num_prompts=max(score["num_prompts"] for (_, metric), score in whole.items() if metric == "accuracy"),
        samples_per_prompt=scores[0]["samples_per_prompt"],
        confidence=manifest.facts["confidence"],
        tags=_of_tags(scores),
        confusion=confusion,
        left_out=manifest.facts.get("sets", {}).get(name, {}).get("left_out", {}),
    )


def _of_model(role: str, record: Row, whole: Mapping[tuple[str, str], Row]) -> ModelResult:
    def rate(metric: str) -> Any:
        return whole[role, metric]["value"]

    further = {metric: score for (who, metric), score in whole.items() if who == role and ("@" in metric or metric == "macro_f1")}
    return ModelResult(
        role=role,
        model=record["model"],
        accuracy=_estimate(whole[role, "accuracy"]),
        mean_tokens=rate("mean_tokens"),
        truncation_rate=rate("truncation_rate"),
        unjudged_rate=rate("unjudged_rate"),
        format_rate=rate("format_rate") if (role, "format_rate") in whole else None,
        accuracy_at_most=whole.get((role, "accuracy_if_unjudged_right"), whole[role, "accuracy"])["value"],
        parameters=record["parameters"],
        more={metric.replace("macro_f1", "macro-F1"): _estimate(score) for metric, score in further.items()},
    )


def _of_tags(scores: Sequence[Row]) -> list[TagResult]:
    """The tags, the commonest first, as they stand in the table."""
    found: dict[str, TagResult] = {}
    for score in scores:
        if score.get("tag") is not None:
            before = found.get(score["tag"], TagResult(score["tag"], score["num_prompts"], {}))
            found[score["tag"]] = TagResult(before.tag, before.num_prompts, {**before.accuracy, score["model_role"]: _estimate(score)})
    return list(found.values())


def _difference_text(one: str, other: str, found: Estimate, chance: float | None) -> str:
    if not found.is_beyond_noise or chance is not None:
        return f"no difference between {one} and {other} beyond the noise ({_points(found, chance)})"
    if (found.value or 0) < 0:
        one, other = other, one
        found = Estimate(*(None if value is None else -value for value in (found.value, found.high, found.low)))
    return f"{one} better than {other} by {_points(found)}"


def _points(found: Estimate, chance: float | None = None) -> str:
    """A difference of shares in points, with its interval; and its p-value, where that is what speaks against it."""
    value, low, high = (100 * (number or 0.0) for number in found)
    doubt = f", p = {chance:.2f}" if chance is not None and found.is_beyond_noise else ""
    return f"{value:.1f} points [{low:.1f}, {high:.1f}]{doubt}"


def _estimate(score: Row) -> Estimate:
    return Estimate(score["value"], score["low"], score["high"])


def percent_text(share: float | None) -> str:
    """A share as people write it: 12.3 %."""
    return UNKNOWN if share is None else f"{100 * share:.1f} %"
