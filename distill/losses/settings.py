"""The settings of the loss and which of them suit which kind of targets. Imports no torch, so that a recipe is checked at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distill.errors import RecipeError

Kind = Literal["top_k", "sampled", "chosen_token"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "policy_gradient"]

_ALLOWED: dict[Kind, tuple[str, tuple[Divergence, ...]]] = {
    "top_k": ("log-probabilities of candidates", ("forward_kl", "reverse_kl", "jsd")),
    "sampled": ("draws, which estimate without bias only what is linear in the teacher's distribution", ("forward_kl",)),
    "chosen_token": ("the log-probability of one token", ("policy_gradient",)),
}


@dataclass(frozen=True)
class Objective:
    """The settings of the loss; see `distill.losses.distillation.distillation_loss` for what each means.

    Raises:
        RecipeError: a setting is out of range, would be ignored, or doesn't suit the kind of targets.
    """

    kind: Kind
    divergence: Divergence
    jsd_beta: float | None
    temperature: float
    kd_weight: float
    nll_weight: float

    def __post_init__(self) -> None:
        holds, allowed = _ALLOWED[self.kind]
        if self.divergence not in allowed:
            raise RecipeError(
                f"loss: divergence {self.divergence!r} can't be computed from {self.kind} targets: they hold {holds}. "
                f"Use {' or '.join(map(repr, allowed))}, or score other targets."
            )
        if (self.divergence == "jsd") != (self.jsd_beta is not None):
            raise RecipeError(f"loss: jsd_beta goes with divergence 'jsd' and only with it, got {self.jsd_beta} with {self.divergence!r}.")
        if self.jsd_beta is not None and not 0 < self.jsd_beta < 1:
            raise RecipeError(f"loss: jsd_beta must lie between 0 and 1, got {self.jsd_beta}. Its ends are 'forward_kl' and 'reverse_kl'.")
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"loss: temperature must be positive, got {self.temperature}. 1 changes nothing.")
        if self.temperature != 1 and self.kind != "top_k":
            raise RecipeError(
                f"loss: temperature {self.temperature} is not defined for {self.kind} targets: a tempered teacher can't be recovered "
                f"from {holds.partition(',')[0]} at temperature 1. Use temperature 1."
            )
        for name, weight in (("kd_weight", self.kd_weight), ("nll_weight", self.nll_weight)):
            if not 0 <= weight < math.inf:
                raise RecipeError(f"loss: {name} must not be negative, got {weight}.")


def likelihood(kind: Kind) -> Objective:
    """The likelihood alone, while what the targets of a kind tell of the divergence is measured."""
    return Objective(kind, default_divergence(kind), None, temperature=1.0, kd_weight=0.0, nll_weight=1.0)


def default_divergence(kind: Kind) -> Divergence:
    """The divergence a kind of targets is made for."""
    return _ALLOWED[kind][1][0]
