"""How the next token is drawn: exactly the distribution asked for, by random numbers that belong to a sequence alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from distill.recipe.base import Sampling


def drawn(scores_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """(B,) tokens at the quantiles `uniforms_B`, in [0, 1), of the distributions that scores are the logarithms of.

    Inverse transform sampling: `torch.multinomial` draws a whole batch from one random stream, so a sequence would change with its
    neighbours.
    """
    cumulative_BV = scores_BV.float().softmax(-1).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]  # 1 up to rounding
    # Strictly below the total, or rounding could draw a token of probability 0 behind it.
    quantile_B1 = torch.minimum(uniforms_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, quantile_B1, right=True)[:, 0]


class Sampler:
    """Chooses next tokens as a recipe asks.

    Args:
        sampling: Temperature and what may be drawn; at temperature 0 the most probable token.
        vocab_size: Number of token ids: rows that pad a head are nothing that can be written.
    """

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.greedy = sampling.temperature == 0
        self._vocab_size = vocab_size
        self._warpers = LogitsProcessorList(_warpers(sampling))

    def __call__(self, logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
        """(B,) tokens from (B, V) logits."""
        scores_BV = logits_BV[:, : self._vocab_size]
        if self.greedy:
            return scores_BV.argmax(-1)
        return drawn(self._warpers(None, scores_BV), uniforms_B)  # type: ignore[arg-type]  # none of them looks at what was written


def _warpers(sampling: Sampling) -> list[Any]:
    if sampling.temperature == 0:
        return []
    warpers: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(float(sampling.min_p)))
    return warpers


class DrawnOnly(LogitsProcessor):
    """Draws in `generate`, which then decodes greedily what is left: leaves only the drawn token possible.

    Args:
        sampler: Draws.
        uniforms_BT: Numbers in [0, 1), one for each sequence and step.
        prompt_length: Padded length of the prompts.
    """

    def __init__(self, sampler: Sampler, uniforms_BT: Tensor, prompt_length: int) -> None:
        self._sampler, self._uniforms_BT, self._prompt_length = sampler, uniforms_BT, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with 0 at the drawn token and -inf elsewhere."""
        token_B = self._sampler(scores, self._uniforms_BT[:, input_ids.shape[1] - self._prompt_length])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
