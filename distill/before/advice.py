"""Where a recipe asks a teacher otherwise than its makers advise, by the catalogue: sampling, thinking, a system turn, names that are gone.

A recipe may mean it, so nothing here refutes one: a warning names both values and the source, and says where another value is right.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill.before.findings import Findings
from distill.data.catalogue import Family, Found, Recommended, Template, families, spelled
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec

_MEANT = "Set them so, or keep yours if you mean it"


def check_advice(recipe: Recipe, found: Findings) -> None:
    """Compares what the teacher is asked with the catalogue's advice for its family; silent where the catalogue has none."""
    teacher = recipe.teacher
    if teacher is None:
        return
    for text in _gone(teacher):
        found.warn("teacher's name", text)
    known = next((one for one in families(teacher.model) if one.family.weights == "open"), None)
    if known is None or recipe.traces is not None or recipe.generate is None:
        return
    warnings = [*_on_template(recipe, teacher, known), *_on_sampling(recipe.generate, teacher, known)]
    for claim, text in warnings:
        found.warn(claim, text)
    if not warnings and not isinstance(known.family.sampling, str):
        found.good("advice on the teacher", f"asked as the makers of {known.name} advise, as far as the catalogue knows it")


def _gone(teacher: ModelSpec) -> Iterator[str]:
    """Names of the teacher under which its host answers no more."""
    name = teacher.server.model or teacher.model if teacher.server is not None else ""
    for one in families(name):
        retired = one.family.retired
        if retired is not None and spelled(name.rsplit("/", 1)[-1]) in map(spelled, retired.names):
            yield (
                f"{name} is retired since {retired.date} ({retired.source}), now {retired.now}. Name in teacher.model what answers today, "
                "and in teacher.server.model what its host calls it; its price and its terms may be others."
            )


def _on_template(recipe: Recipe, teacher: ModelSpec, known: Found) -> Iterator[tuple[str, str]]:
    template = known.family.template
    if isinstance(template, str):
        return
    if template.system == "avoid" and recipe.prompts.system_prompt is not None:
        yield (
            "prompts.system_prompt",
            f"the makers of {known.name} advise against a system turn ({template.source}). Put it into prompts.template, if you can.",
        )
    is_hosted = teacher.server is not None and teacher.server.is_hosted  # whose template is the host's own
    if template.switch is not None and not is_hosted:
        yield from _on_thinking(recipe, teacher, known.family, template)


def _on_thinking(recipe: Recipe, teacher: ModelSpec, family: Family, template: Template) -> Iterator[tuple[str, str]]:
    """Whether it thinks as curate.checks want it."""
    mode, wanted = family.mode(teacher.chat_template_kwargs), recipe.curate.reasoning
    if (mode, wanted) not in (("plain", "always"), ("thinking", "none")):
        return
    stated = teacher.chat_template_kwargs.get(str(template.switch))
    now = f"{template.switch} is left out, and then" if stated is None else f"{template.switch} is {str(bool(stated)).lower()}, so"
    thinks, asked = ("it does not think", "true") if mode == "plain" else ("it thinks", "false")
    checks = "curate.checks ask for thinking" if wanted == "always" else "curate.checks drop what thinks"
    yield (
        "teacher.chat_template_kwargs",
        f"{now} {thinks} ({template.source}), but {checks}. Set {{{template.switch}: {asked}}}, or change the checks.",
    )


def _on_sampling(asked: Sampling, teacher: ModelSpec, known: Found) -> Iterator[tuple[str, str]]:
    advised = known.family.recommended(known.family.mode(teacher.chat_template_kwargs))
    if advised is None or _keeps_whole_distributions(asked):
        return
    differing = {name: value for name, value in advised.values.items() if getattr(asked, name) != value}
    if differing:
        values = ", ".join(f"{name} {getattr(asked, name):g} (advised {value:g})" for name, value in differing.items())
        yield "generate", f"{values} by the makers of {_named(known, advised)}, {advised.source}. {_MEANT}: {_why_not(asked)}."


def _keeps_whole_distributions(asked: Sampling) -> bool:
    """Whether the probabilities that are kept are those that were drawn from: then nothing may be cut off or tempered."""
    whole = (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (1.0, 1.0, 0, 0.0)
    return whole and getattr(asked, "logprobs", None) is not None


def _named(known: Found, advised: Recommended) -> str:
    return known.name if advised.mode == "any" else f"{known.name} ({advised.mode})"


def _why_not(asked: Sampling) -> str:
    if asked.temperature == 0:
        return "the most probable answer is the same each time, and a thinking model may repeat itself without end"
    return "more samples of a prompt may well be drawn more freely"
