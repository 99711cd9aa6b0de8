"""What of a recipe a kind of server can't honour: an error for a key that was set, a warning for a default."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from distill.recipe.base import Sampling
from distill.recipe.servers import Server
from distill.servers.facts import FACTS, Facts

NEUTRAL: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""Values that ask for nothing, so that whoever does not know the field honours them."""
_IN_OPTIONS = frozenset({"temperature", "top_p", "top_k", "min_p", "seed", "num_predict"})
_LONG_SILENCE = 2048  # tokens, at about 10 a second and a sixth of that under load


@dataclass(frozen=True)
class Unhonoured:
    """What can't be as a recipe says."""

    errors: list[str]
    """Of keys that were set; each names the key and the place, and says what to do."""
    warnings: list[str]
    """Of defaults, and what a user of this kind should know."""


def unhonoured(
    server: Server,
    sampling: Sampling | None = None,
    *,
    role: str = "teacher",
    section: str = "generate",
    fields: Collection[str] | None = None,
    model: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    terms: bool = True,
) -> Unhonoured:
    """What a kind of server would ignore or refuse of what a recipe asks of it.

    Args:
        server: Of the recipe.
        sampling: The section that says how tokens are drawn; null where nothing is written.
        role: Whose server it is, for the words.
        section: Name of the section, for the words.
        fields: Keys that were set in it; null takes the section's own `model_fields_set`, which a section that was put together
            by the kit (`Sampling.plain`) has not.
        model: Name that the server knows the model by.
        kwargs: The model's `chat_template_kwargs`.
        logprobs: Alternatives wanted beside each written token.
        prompt_logprobs: Alternatives wanted beside each token of a prompt.
        terms: Whether what a user of this kind should know is among the warnings.
    """
    facts, found = FACTS[server.kind], Unhonoured([], [])
    place = f"{role}.server.kind {server.kind}"
    thinks = _thinks(server, model, kwargs or {})
    if sampling is not None:
        _look_at_sampling(found, facts, sampling, sampling.model_fields_set if fields is None else fields, section, place, thinks)
        if not facts.streams and sampling.max_new_tokens > _LONG_SILENCE:
            found.warnings.append(
                f"{place}: it says nothing until an answer is whole; {role}.server.timeout_s ({server.timeout_s:g} s) must be longer than "
                f"{sampling.max_new_tokens:,} tokens take."
            )
    _look_at_probabilities(found, facts, server, place, logprobs, prompt_logprobs, thinks)
    if not facts.takes_ids:
        _look_at_template(found, facts, kwargs or {}, server.body, role, place)
    if server.kind == "ollama":
        _look_at_options(found, server.body.get("options") or {}, role)
    found.warnings.extend(f"{place}: {term}." for term in facts.terms if terms)
    return found


def _look_at_sampling(
    found: Unhonoured, facts: Facts, sampling: Sampling, fields: Collection[str], section: str, place: str, thinks: bool
) -> None:
    greedy = sampling.temperature == 0
    for name, neutral in NEUTRAL.items():
        value = getattr(sampling, name)
        if value == neutral or (greedy and name != "temperature"):
            continue
        if name not in facts.sampling:
            if name in fields:
                able = ", ".join(kind for kind, row in FACTS.items() if name in row.sampling)
                found.errors.append(
                    f"{section}.{name}: {place} takes no {name}, got {value:g}. Leave it out, or take a kind that does ({able})."
                )
            else:
                found.warnings.append(f"{section}.{name}: {place} takes no {name}; the default, {value:g}, is not applied.")
        elif thinks and name in facts.thinks_without:
            found.warnings.append(f"{section}.{name}: {place} ignores it while the model thinks, got {value:g}.")
    if not facts.has_seeds and not greedy:
        found.warnings.append(f"seed: {place} has none; written anew, an answer is another one.")


def _look_at_probabilities(
    found: Unhonoured, facts: Facts, server: Server, place: str, logprobs: int | None, prompt_logprobs: int | None, thinks: bool
) -> None:
    if logprobs is not None:
        if not facts.logprobs:
            found.errors.append(f"{place} gives no log-probabilities of what it writes. Leave them out, or take another kind.")
        elif thinks and "logprobs" in facts.thinks_without:
            found.errors.append(
                f"{place} gives no log-probabilities while the model thinks. Leave them out, or set chat_template_kwargs: "
                "{enable_thinking: false} of this model."
            )
        elif logprobs > facts.logprobs:
            _above(found, facts, server, place, "beside each written token", logprobs, facts.logprobs)
    if prompt_logprobs is not None:
        if not facts.prompt_logprobs:
            able = ", ".join(kind for kind, row in FACTS.items() if row.prompt_logprobs)
            found.errors.append(f"{place} gives no log-probabilities of a prompt, so it can't score. Take a kind that does ({able}).")
        elif prompt_logprobs > facts.prompt_logprobs:
            _above(found, facts, server, place, "beside each token of a prompt", prompt_logprobs, facts.prompt_logprobs)


def _above(found: Unhonoured, facts: Facts, server: Server, place: str, where: str, asked: int, most: int) -> None:
    """A number above the usual most: vLLM's own is set where it is started."""
    if facts.kind != "vllm":
        found.errors.append(f"{place} gives at most {most} alternatives {where}, got {asked}. Ask for fewer, or take another kind.")
    elif not server.is_started:
        found.warnings.append(f"{place}: more than {most} alternatives {where} need a server started with --max-logprobs {asked}.")


def _look_at_template(
    found: Unhonoured, facts: Facts, kwargs: Mapping[str, Any], further: Mapping[str, Any], role: str, place: str
) -> None:
    """Arguments of a template that the server renders, and not the kit."""
    if facts.thinking is None:
        return
    for name in kwargs:
        if name not in facts.thinking:
            known = ", ".join(facts.thinking)
            found.errors.append(f"{role}.chat_template_kwargs.{name}: {place} can't be asked for it. Leave it out; it takes {known}.")
    if facts.kind == "dashscope" and "enable_thinking" not in {*kwargs, *further}:
        found.warnings.append(f"{role}.chat_template_kwargs.enable_thinking: not set, so {place} is asked to think.")


def _look_at_options(found: Unhonoured, options: Mapping[str, Any], role: str) -> None:
    for name in sorted(_IN_OPTIONS & set(options)):
        found.errors.append(f"{role}.server.body.options.{name} is decided by other keys of the recipe. Leave it out there.")


def _thinks(server: Server, model: str | None, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model of a kind that ignores something while it thinks has to be taken to think."""
    if not FACTS[server.kind].thinks_without:
        return False
    asked = server.body.get("thinking")
    if isinstance(asked, Mapping) and "type" in asked:
        return bool(asked["type"] != "disabled")
    told = kwargs.get("enable_thinking", kwargs.get("thinking"))
    return bool(told) if told is not None else (model or server.model) != "deepseek-chat"
