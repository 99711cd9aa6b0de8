"""A causal language model in two parts: the backbone that gives hidden states, and the head that makes logits of them.

Taking the two apart is what lets a vocabulary of 152,000 tokens be worked on a few hundred positions at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.errors import ModelError
from distill.losses.distillation import StudentHead


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head; its output's `last_hidden_state` lies behind the last norm."""
    found: Any = model
    while isinstance(found, PreTrainedModel) and found.get_output_embeddings() is not None:
        inner = found.base_model
        # Llama 4 names its parts otherwise than it says.
        found = inner if inner is not found else getattr(found, "language_model", None) or getattr(found, "model", None)
    if not isinstance(found, torch.nn.Module):
        raise ModelError(f"{type(model).__name__}: has no backbone apart from its head. Use a causal language model of transformers.")
    return found


def head_of(model: PreTrainedModel, vocab_size: int | None = None) -> StudentHead:
    """The head of a model, with what its family does to the logits, as each config names it.

    Args:
        model: A causal language model.
        vocab_size: Number of token ids; rows of the head behind it are padding. None takes every row for a token.

    Raises:
        ModelError: the model has no head, or one with fewer rows than there are tokens.
    """
    layer: Any = model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(model).__name__}: has no output embeddings. Use a causal language model.")
    config = model.config.get_text_config()
    rows = layer.weight.shape[0]
    if vocab_size is not None and rows < vocab_size:
        raise ModelError(f"{type(model).__name__}: has {rows:,} rows for {vocab_size:,} tokens. Its tokenizer is not its own.")
    return StudentHead(layer.weight, layer.bias, vocab_size, _logit_scale(config), _softcap(config))


def logits_of(hidden_nH: Tensor, head: StudentHead) -> Tensor:
    """(n, V) logits of some positions, in the type of the head; without the rows that pad it."""
    logits_nV = torch.nn.functional.linear(hidden_nH.to(head.weight_VH.dtype), head.weight_VH, head.bias_V)[:, : head.vocab_size]
    if head.logit_scale != 1:
        logits_nV = logits_nV * head.logit_scale
    return logits_nV if head.softcap is None else (logits_nV / head.softcap).tanh() * head.softcap


def _softcap(config: Any) -> float | None:
    """Cap of the logits: Gemma's name for it, RecurrentGemma's, xLSTM's."""
    found = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    return next((float(cap) for cap in found if cap is not None), None)


def _logit_scale(config: Any) -> float:
    """Factor of the logits before any cap: Cohere, Muse and Falcon-H1 name one, Granite and MiniCPM3 a divisor."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)
