"""Where a student comes from, for machines: who wrote, who scored, who graded, from which data, each under which terms.

Twice, in forms that others read: the keys at the head of the model card, by the Hub's own class for them, and `provenance.cdx.json`, a bill
of materials in CycloneDX 1.6 (ECMA-424), whose models have ancestors, data and licences. Croissant describes data sets alone, and of SPDX 3
no kept library writes the profile for AI. The form is plain JSON of a few keys, so none is needed for it either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill import __version__
from distill.data.catalogue import UNKNOWN, terms_named
from distill.data.licences import licence_of
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.reporting.measured import SetResults
from distill.reporting.public import file_or_name, public_name
from distill.reporting.summary import RunSummary
from distill.run.manifest import Manifest

FILE = "provenance.cdx.json"
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "cc-by-4.0": "CC-BY-4.0", "cc-by-sa-4.0": "CC-BY-SA-4.0", "cc0-1.0": "CC0-1.0"}
"""Licences of those met here that SPDX has, by how they are written small."""


class Ingredient(NamedTuple):
    """A model or data set that went into the student."""

    role: str
    """What it did: `student before training`, `wrote the traces`, `problems`, ..."""
    name: str
    licence: str = UNKNOWN
    revision: str | None = None
    """Git revision on the Hub."""
    digest: str | None = None
    """SHA-256 of files of one's own."""
    is_data: bool = False
    on_hub: bool = False
    """Whether `name` is an id there."""
    terms: str | None = None
    """Where the recipe says its terms are."""


def ingredients(recipe: Recipe, summary: RunSummary) -> list[Ingredient]:
    """Everything that went into the student, the model that it was before first."""
    measured = summary.manifests["evaluate"].facts.get("models", {}) if "evaluate" in summary.manifests else {}
    base = _of_spec("student before training", recipe.student)._replace(revision=(measured.get("base") or {}).get("revision"))
    return list(dict.fromkeys([base, *_models(recipe, summary), *_data(recipe, summary)]))


def card_keys(recipe: Recipe, summary: RunSummary, name: str) -> dict[str, Any]:
    """`base_model`, `datasets` and `model-index` of the card, as the Hub's own class writes them; what is not on the Hub is left out."""
    from huggingface_hub import ModelCardData

    parts = ingredients(recipe, summary)
    data = list(dict.fromkeys(part.name for part in parts if part.is_data and part.on_hub and "held-out" not in part.role))
    results = list(_results(recipe, summary))
    keys = ModelCardData(
        base_model=parts[0].name if parts[0].on_hub else None,
        datasets=data or None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    return dict(keys.to_dict())


def bill_of_materials(recipe: Recipe, summary: RunSummary, name: str, licence: str, asks: Sequence[str] = ()) -> dict[str, Any]:
    """The same in CycloneDX, with what every part did and where its terms are.

    Args:
        recipe: Of the run.
        summary: Of its stages.
        name: Of the student.
        licence: Its terms, as the card names them.
        asks: What the terms of its parts ask of it.
    """
    base, *others = ingredients(recipe, summary)
    parts = [(f"part-{number}", part) for number, part in enumerate(others, start=1)]
    metrics = [
        {
            "type": one.metric_type,
            "value": f"{one.metric_value:g} %",
            "slice": one.dataset_name,
        }
        for one in _results(recipe, summary)
    ]
    card: dict[str, Any] = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "datasets": [{"ref": ref} for ref, part in parts if part.is_data],
        },
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
    }
    student = {
        "type": "machine-learning-model",
        "bom-ref": "student",
        "name": name,
        "licenses": [_licence(licence)],
        "pedigree": {"ancestors": [_component("base", base)]},
        "modelCard": card,
        "properties": [{"name": "distill-kit:asks", "value": ask} for ask in asks],
    }
    kit = {"type": "application", "name": "distill-kit", "version": __version__}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": [kit]}, "component": student},
        "components": [_component(ref, part) for ref, part in parts],
        "dependencies": [{"ref": "student", "dependsOn": ["base", *(ref for ref, _ in parts)]}],
    }


def _models(recipe: Recipe, summary: RunSummary) -> Iterator[Ingredient]:
    """Those that wrote, scored or graded what the student learned from."""
    for stage, manifest in summary.stages:
        step = stage.rpartition(" ")[2]
        if step == "generate":
            yield _of_facts("wrote the traces", manifest, recipe, summary)
        elif step == "score":
            yield _of_facts("scored each token", manifest, recipe, summary)
        for judge, facts in manifest.facts.get("judges", {}).items():
            author = facts.get("author") or {}
            yield _named(f"graded answers ({judge})", summary.name_of(author.get("model")), facts.get("licence"), author.get("revision"))
    if recipe.train.is_live and recipe.teacher is not None:
        yield _of_spec("scored the student's answers as it wrote them", recipe.teacher)


def _data(recipe: Recipe, summary: RunSummary) -> Iterator[Ingredient]:
    settings = summary.manifests["prompts"].settings if "prompts" in summary.manifests else {}
    prompts, traces = recipe.prompts, recipe.traces
    yield _data_of("problems", prompts.source, None, settings.get("source_sha256"))
    if prompts.heldout_source is not None:
        yield _data_of("held-out problems", prompts.heldout_source, None, settings.get("heldout_source_sha256"))
    if traces is not None and "generate" in summary.manifests:
        digest = summary.manifests["generate"].settings.get("source_sha256")
        yield _data_of("traces, brought from elsewhere", traces.source, traces.licence, digest)


def _of_spec(role: str, spec: ModelSpec) -> Ingredient:
    on_hub = _is_id(public_name(spec)) and (spec.public_name is not None or not Path(spec.model).exists())
    licence = licence_of(spec.model, spec.licence)
    return Ingredient(role, public_name(spec), licence, spec.revision, on_hub=on_hub, terms=spec.terms)


def _of_facts(role: str, manifest: Manifest, recipe: Recipe, summary: RunSummary) -> Ingredient:
    author = manifest.facts.get("author") or {}
    teacher = recipe.teacher
    made = _named(role, summary.name_of(author.get("model"), "not recorded"), manifest.facts.get("licence"), author.get("revision"))
    is_teacher = teacher is not None and author.get("model") == teacher.model
    return made._replace(terms=teacher.terms) if is_teacher and teacher is not None else made


def _named(role: str, name: str, licence: str | None, revision: str | None) -> Ingredient:
    return Ingredient(role, name, licence or UNKNOWN, revision, on_hub=_is_id(name) and not Path(name).exists())


def _data_of(role: str, source: str, licence: str | None, digest: Any) -> Ingredient:
    on_hub = _is_id(source) and not Path(source).exists()
    hashed = digest if isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) else None
    return Ingredient(role, file_or_name(source), licence or UNKNOWN, None, hashed, is_data=True, on_hub=on_hub)


def _is_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def _results(recipe: Recipe, summary: RunSummary) -> Iterator[Any]:
    """What was measured of the student, a judged set each, as the Hub has it."""
    from huggingface_hub import EvalResult

    for found in summary.sets:
        for result in found.results:
            if result.role != "student" or result.accuracy.value is None:
                continue
            source = _source_of(found, recipe)
            told = f"accuracy on {found.num_prompts:,} held-out prompts"
            if result.accuracy.low is not None and result.accuracy.high is not None:
                told += f", {found.confidence_text} interval {100 * result.accuracy.low:.1f} to {100 * result.accuracy.high:.1f}"
            yield EvalResult(
                task_type="text-generation",
                dataset_type=source if _is_id(source) and not Path(source).exists() else "custom",
                dataset_name=file_or_name(source) if found.is_main else found.name,
                metric_type="accuracy",
                metric_name=told,
                metric_value=round(100 * result.accuracy.value, 2),
            )


def _source_of(found: SetResults, recipe: Recipe) -> str:
    """Where the prompts of a set are from; its name where the recipe does not ask it any more."""
    if found.is_main:
        return recipe.prompts.heldout_source or recipe.prompts.source
    asked = recipe.asked_sets().get(found.name)
    return asked.prompts.source if asked is not None else found.name


def _component(ref: str, part: Ingredient) -> dict[str, Any]:
    """A part as CycloneDX has it."""
    kind = "datasets/" if part.is_data else ""
    where = [{"type": "distribution", "url": f"https://huggingface.co/{kind}{part.name}"}] if part.on_hub else []
    known = terms_named(part.licence)
    said = {"role": part.role, "terms": part.terms, "terms read": known[1].read.isoformat() if known else None}
    said |= {"terms dated": str(known[1].date) if known else None}
    return {
        "type": "data" if part.is_data else "machine-learning-model",
        "bom-ref": ref,
        "name": part.name,
        **({"version": part.revision} if part.revision else {}),
        "licenses": [_licence(part.licence)],
        **({"hashes": [{"alg": "SHA-256", "content": part.digest}]} if part.digest else {}),
        **({"externalReferences": where} if where else {}),
        "properties": [{"name": f"distill-kit:{name}", "value": value} for name, value in said.items() if value],
    }


def _licence(name: str) -> dict[str, Any]:
    """A licence by its SPDX id, or else by its name, with the address of terms that the catalogue has."""
    known = terms_named(name)
    address = re.match(r"https?://\S+", known[1].source) if known else None
    named = {"id": _SPDX[name.lower()]} if name.lower() in _SPDX else {"name": name}
    return {"license": named | ({"url": address[0]} if address else {})}
