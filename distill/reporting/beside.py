"""Runs beside each other: what is read of each, which can be compared, and what each one's teacher, student, method, terms and costs are.

The rule: on other prompts, by other checks, or against other right answers, nothing is compared, and that is an error. Answers that were
drawn otherwise are compared, because sampling belongs to how a student is used, and it is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.catalogue import UNKNOWN
from distill.errors import DataError
from distill.measure.between import Between, between
from distill.measure.marks import marks_of
from distill.recipe.sets import MAIN
from distill.reporting.ledger import Amount, ledger_of
from distill.reporting.prices import Rates
from distill.reporting.public import file_or_name
from distill.reporting.summary import RunSummary
from distill.run.manifest import MANIFEST, Manifest
from distill.run.tables import iter_rows, read_rows

Row = dict[str, Any]
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "samples_per_prompt", "max_new_tokens")
_OF_CHANCE = ("top_p", "top_k", "min_p")
"""What makes no difference where the most probable token is taken."""


class Answered(NamedTuple):
    """What a run's student answered to the run's own held-out prompts."""

    name: str
    right: dict[str, float]
    """By prompt, the share of right answers."""
    tokens: dict[str, float]
    """By prompt, tokens written an answer, where known."""
    references: dict[str, str | None]
    """By prompt, the right answer; empty where the prompts are not there."""
    checks: Row
    """By what answers were judged."""
    sampling: Row
    """How they were drawn."""
    confidence: float


class About(NamedTuple):
    """What else is to be known of a run."""

    teacher: str
    student: str
    method: str
    terms: str
    """Licences of the traces and of the stored distributions."""
    tokens: float | None
    """An answer of the student to a held-out prompt."""
    cost: Amount
    """Of all its stages."""


def about(found: RunSummary, rates: Rates) -> About:
    """Teacher, student, method, terms and costs of a run, by its manifests."""
    named = dict(found.stages)
    wrote, trained = found.manifests.get("generate"), [manifest for name, manifest in found.stages if name.endswith("train")]
    scored = [manifest for name, manifest in found.stages if name.endswith("score")]
    authors = [(manifest.facts.get("author") or {}).get("model") for manifest in (wrote, *scored) if manifest is not None]
    terms = [manifest.facts.get("licence") for manifest in (wrote, *scored) if manifest is not None]
    models = named["evaluate"].facts.get("models", {}) if "evaluate" in named else {}
    student = next((made.settings.get("student", {}).get("model") for made in trained if made.settings.get("student")), None)
    method = next((made.settings["train"].get("method") for made in reversed(trained) if made.settings.get("train")), None)
    rounds = len([stages for stages in found.rounds if "train" in stages])
    return About(
        teacher=_told(authors or [(models.get("teacher") or {}).get("model")]),
        student=_told([student or (models.get("student") or {}).get("model")]),
        method=(method or UNKNOWN) + (f", {rounds} rounds" if rounds else ""),
        terms=", ".join(dict.fromkeys(filter(None, terms))) or UNKNOWN,
        tokens=next((result.mean_tokens for result in found.results if result.role == "student"), None),
        cost=ledger_of(found.stages, rates).total,
    )


def _told(names: Sequence[str | None]) -> str:
    return ", ".join(dict.fromkeys(file_or_name(name) for name in names if name)) or UNKNOWN


def read_answered(name: str, prompts: Path, evaluated: Path, manifest: Manifest) -> Answered | None:
    """What a run's student answered; null where it was not measured, or no answers are kept, as by an earlier kit.

    Args:
        name: Of the run.
        prompts: Folder of that stage, where the right answers stand.
        evaluated: Folder of the evaluation.
        manifest: Of it.
    """
    if "answers" not in manifest.tables:
        return None
    mine = [row for row in read_rows(evaluated, "answers") if row["model_role"] == "student" and (row.get("set") or MAIN) == MAIN]
    marks = marks_of(mine, ["student"])
    if not marks.prompts:
        return None
    written: dict[str, list[int]] = {}
    for row in mine:
        if row["num_tokens"] is not None:
            written.setdefault(row["prompt_id"], []).append(row["num_tokens"])
    asked = manifest.settings.get("evaluate", {})
    there = (prompts / MANIFEST).exists()
    return Answered(
        name=name,
        right=dict(zip(marks.prompts, marks.least_RP[0].tolist(), strict=True)),
        tokens={prompt: sum(counts) / len(counts) for prompt, counts in written.items()},
        references={row["prompt_id"]: row["reference"] for row in iter_rows(prompts, "heldout", columns=["prompt_id", "reference"])}
        if there
        else {},
        checks={"checks": asked.get("checks", "math")} | {key: manifest.settings.get(key) for key in ("python_sha256", "judge_sha256")},
        sampling={key: asked.get(key) for key in _SAMPLING if not (asked.get("temperature") == 0 and key in _OF_CHANCE)},
        confidence=manifest.facts["confidence"],
    )


def compared(runs: Sequence[Answered]) -> tuple[Between, list[str]]:
    """The students on the held-out prompts that all share, and what is to be known beside it.

    Raises:
        DataError: they can't be compared; says which two, and why.
    """
    first = runs[0]
    for other in runs[1:]:
        if other.checks != first.checks:
            raise DataError(
                f"{first.name} and {other.name}: their answers were judged by other checks ({_checks_text(first, other)}), so what is "
                "right in one may be wrong in the other. Give both the same evaluate.checks and run evaluate again: the answers are kept."
            )
    prompts = [prompt for prompt in first.right if all(prompt in other.right for other in runs[1:])]
    if not prompts:
        raise DataError(_nothing_shared(runs))
    for other in runs[1:]:
        moved = [prompt for prompt in prompts if prompt in first.references and prompt in other.references]
        changed = sum(first.references[prompt] != other.references[prompt] for prompt in moved)
        if changed:
            raise DataError(
                f"{first.name} and {other.name}: {changed:,} of {len(moved):,} held-out prompts that they share have another right answer, "
                "so they can't be compared. Make both from the same prompts.source."
            )
    notes = []
    fewer = {run.name: len(run.right) for run in runs if len(run.right) > len(prompts)}
    if fewer:
        told = ", ".join(f"{name} has {count:,}" for name, count in fewer.items())
        notes.append(f"compared on the {len(prompts):,} held-out prompts that all share; {told}")
    notes += _drawn_otherwise(runs)
    return between({run.name: run.right for run in runs}, prompts, first.confidence), notes


def _checks_text(one: Answered, other: Answered) -> str:
    key = next(key for key in one.checks if one.checks[key] != other.checks[key])
    if key != "checks":
        return "the functions of their own differ" if key == "python_sha256" else "the judges differ"
    names = [_names_of(run.checks[key]) for run in (one, other)]
    return f"{names[0]} and {names[1]}" if names[0] != names[1] else f"{names[0]}, with other settings"


def _names_of(checks: str | Sequence[str | Row]) -> str:
    """Names of checks, without their settings."""
    return checks if isinstance(checks, str) else ", ".join(check if isinstance(check, str) else next(iter(check)) for check in checks)


def _nothing_shared(runs: Sequence[Answered]) -> str:
    first = runs[0]
    for other in runs[1:]:
        if not first.right.keys() & other.right.keys():
            return (
                f"{first.name} and {other.name}: share no held-out prompt ({len(first.right):,} and {len(other.right):,}), so that they "
                "can't be compared. They need the same prompts.source, heldout_size and seed, or the same heldout_source, and the same "
                "template and system_prompt."
            )
    return f"{', '.join(run.name for run in runs)}: no held-out prompt is in all of them. Compare fewer at once."


def _drawn_otherwise(runs: Sequence[Answered]) -> list[str]:
    """What differs in how answers were drawn."""
    keys = [key for key in _SAMPLING if len({str(run.sampling.get(key)) for run in runs}) > 1]
    told = "; ".join(f"{run.name}: " + ", ".join(f"{key} {run.sampling[key]}" for key in keys if key in run.sampling) for run in runs)
    return [f"answers were drawn otherwise, so that the differences are those of models and sampling together ({told})"] if keys else []
