"""Which part of the teacher's distribution is kept, and what a file of targets says of itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class TopK(_Spec):
    """The k most probable tokens with their log-probabilities, and the mass of all others."""

    kind: Literal["top_k"] = "top_k"
    """`top_k`."""
    k: Annotated[int, Field(ge=1)] = 64
    """Number of candidates a position."""
    min_probability: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Leave out candidates less probable than this (never the first); their mass counts as rest."""


class Sampled(_Spec):
    """N draws with replacement from the teacher: an unbiased estimate of its whole distribution (arXiv 2503.16870)."""

    kind: Literal["sampled"] = "sampled"
    """`sampled`."""
    draws: Annotated[int, Field(ge=1, le=65_535)] = 50
    """N, the number of draws a position."""
    proposal_temperature: Annotated[float, Field(gt=0)] = 1.0
    """τ: draw from q ∝ p^(1/τ) and weight by p/q; 1 draws from the teacher itself."""
    stratified: bool = False
    """One draw from each N-th of the distribution: as unbiased as independent draws, with less noise."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""

    @property
    def weighted(self) -> bool:
        """Whether draws carry importance weights, which makes counts alone insufficient."""
        return self.proposal_temperature != 1.0


class ChosenToken(_Spec):
    """The log-probability of the written token alone (arXiv 2604.13010)."""

    kind: Literal["chosen_token"] = "chosen_token"
    """`chosen_token`."""


TargetSpec = TopK | Sampled | ChosenToken


class TargetHeader(_Spec):
    """What every row of a file has in common. Two files belong together if their headers are equal.

    Ids and rows are the student's, whatever the teacher reads.
    """

    target: Annotated[TargetSpec, Field(discriminator="kind")]
    vocab_size: Annotated[int, Field(ge=2, le=2**31 - 1)]
    """Number of the student's token ids, without the rows that pad the head of its model."""
    tokenizer_digest: str
    """Of the student: equal digests mean that the ids can be used."""
    template_digest: str
    """Of the student: with the traces it decides how many positions a row has."""
    teacher_model: str
    teacher_revision: str | None
    teacher_tokenizer_digest: str
    teacher_template_digest: str
    traces_digest: str
    """Digest of the traces that were scored."""

    @model_validator(mode="after")
    def _k_fits(self) -> TargetHeader:
        if isinstance(self.target, TopK) and self.target.k > self.vocab_size:
            raise ValueError(f"target.k is {self.target.k}, but the vocabulary has {self.vocab_size} tokens; lower k")
        return self
