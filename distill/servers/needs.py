"""What a server that is started must be able to do: how long a prompt with its answer may be, and how many log-probabilities it gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distill import embedded
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run.log import say

ROOM_FOR_A_PROMPT = 1024
"""Tokens."""


@dataclass(frozen=True)
class ServerNeeds:
    """What a stage will ask of a server, which one that is started is made for."""

    context: int | None = None
    """Tokens of the longest prompt with its completion; null: as many as the model takes."""
    logprobs: int = 0
    """Most probable tokens asked for beside one, written or read."""


def needs_of(recipe: Recipe, role: str) -> ServerNeeds:
    """What the recipe's stages together will ask of a role's server.

    Its context is that of the longest row to train on, or of the longest answer with room for a prompt. Who has longer prompts gives
    `--max-model-len` or its like in `server.args`.
    """
    written, logprobs = [], [0]
    if recipe.evaluate is not None and role in recipe.evaluate.models:
        written += [each.sampling.max_new_tokens for each in recipe.asked_sets().values()]
    if recipe.benchmarks is not None and role in recipe.benchmarks.models and recipe.benchmarks.max_gen_toks is not None:
        written.append(recipe.benchmarks.max_gen_toks)
    if role == "teacher" and recipe.generate is not None:
        written.append(recipe.generate.max_new_tokens)
        logprobs.append(recipe.generate.logprobs or 0)
    if role in ("student", "base") and recipe.rollouts is not None:
        written.append(recipe.rollouts.max_new_tokens)
    if role == "teacher" and recipe.score is not None and recipe.score.source in ("auto", "server"):
        logprobs.append(getattr(recipe.score.target, "k", 1))
    if role == "teacher" and recipe.likeness is not None and recipe.teacher_tells == "server":
        logprobs.append(recipe.likeness.top_k)
    return ServerNeeds(max([recipe.train.max_length, *(tokens + ROOM_FOR_A_PROMPT for tokens in written)]), max(logprobs))


def within_model(needs: ServerNeeds, spec: ModelSpec) -> ServerNeeds:
    """The needs with no more context than the model's config allows, over which servers refuse to start."""
    if needs.context is None or embedded.resolve(spec.model).endswith(".gguf"):
        return needs
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(embedded.resolve(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):  # the server says better what is wrong with the model
        return needs
    text = config.get_text_config()
    most, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if not isinstance(most, int) or most >= needs.context or "factor" in rope:  # a stretched one counts what it was before
        return needs
    say(f"{spec.model}: takes {most:,} tokens, so its server is started for those, not for {needs.context:,}")
    return replace(needs, context=most)
