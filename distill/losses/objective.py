"""What the loss is at a position, once the student's distribution is coarsened to the outcomes that matter there.

Those outcomes O are the K candidates, the written token if it is none of them, and all other tokens together. Every
term of the loss is a function of their K + 2 probabilities, so is its gradient, and the gradient of a token among the
others is the others' gradient times its share of their mass. That is what makes the dense gradient exact and cheap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.divergences import forward_kl, generalized_jsd, reverse_kl
from distill.losses.settings import Objective
from distill.losses.sparse import SparseTargets


class PositionLosses(NamedTuple):
    """Terms and metrics of n positions, in nats, and the gradient of the weighted sum of the terms."""

    kd_n: Tensor
    nll_n: Tensor
    forward_kl_n: Tensor
    log_ratio_n: Tensor
    agrees_n: Tensor
    has_target_n: Tensor
    nll_weight_n: Tensor
    gradient_nO: Tensor
    """(n, K + 2) by the logit of each candidate, of the written token and, in sum, of all others."""


def position_losses(
    objective: Objective,
    targets: SparseTargets,
    log_q_nO: Tensor,
    is_written_nO: Tensor,
    log_peak_n: Tensor,
    vocab_size: int,
    falls_back_n: Tensor | None = None,
) -> PositionLosses:
    """The loss at n positions.

    Args:
        objective: Settings.
        targets: Targets of these positions.
        log_q_nO: The student: (n, K + 2) log-probabilities of the candidates (-inf for padding), of the written token
            (-inf if it is a candidate), and of all other tokens together.
        is_written_nO: Where the written token stands, once a position.
        log_peak_n: The student's largest log-probability.
        vocab_size: Number of token ids.
        falls_back_n: Whether the negative log-likelihood takes the divergence's place where there is no target.
    """
    filled_nK = targets.filled_NK()
    log_written_n = log_q_nO.masked_fill(~is_written_nO, 0).sum(-1)
    zeros_n = torch.zeros_like(log_written_n)
    kl_n = log_ratio_n = zeros_n
    has_target_n = targets.log_probs_NK[:, 0] > -math.inf if objective.kind == "chosen_token" else filled_nK.any(-1)
    nll_weight_n = zeros_n + objective.nll_weight
    if falls_back_n is not None:
        nll_weight_n = nll_weight_n + objective.kd_weight * (falls_back_n & ~has_target_n).to(nll_weight_n.dtype)
    # The written token's pull: the gradient of -log q(written) is q - 1 there and q elsewhere, times this.
    pull_n = nll_weight_n
    if objective.kind == "chosen_token":
        log_p_n = targets.log_probs_NK[:, 0].to(log_q_nO.dtype)
        advantage_n = (log_p_n - log_written_n).masked_fill(~has_target_n, 0)
        kd_n, log_ratio_n = advantage_n.square() / 2, -advantage_n
        pull_n = pull_n + objective.kd_weight * advantage_n
        gradient_nO, agrees_n = torch.zeros_like(log_q_nO), zeros_n
    else:
        log_q_nR = _merge_rest(log_q_nO)
        if objective.kind == "sampled":
            kd_n, gradient_nR = _cross_entropy(targets, filled_nK, log_q_nR)
        else:
            log_p_nR = targets.log_outcomes_nR(filled_nK, vocab_size, log_q_nO.dtype)
            kd_n, gradient_nR = _divergence(objective, log_p_nR, log_q_nR)
            kl_n, _ = forward_kl(log_p_nR, log_q_nR)
        gradient_nO = objective.kd_weight * _split_rest(gradient_nR, log_q_nO, log_q_nR)
        best_n1 = targets.log_probs_NK.masked_fill(~filled_nK, -math.inf).argmax(-1, keepdim=True)
        agrees_n = has_target_n & (log_q_nO.gather(1, best_n1)[:, 0] >= log_peak_n)
    gradient_nO = gradient_nO + pull_n[:, None] * (log_q_nO.exp() - is_written_nO.to(log_q_nO.dtype))
    return PositionLosses(kd_n, -log_written_n, kl_n, log_ratio_n, agrees_n, has_target_n, nll_weight_n, gradient_nO)


def _divergence(objective: Objective, log_p_nR: Tensor, log_q_nR: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen divergence of `top_k` targets, times τ², so that its gradient keeps its size as τ grows."""
    tau = objective.temperature
    if tau != 1:
        log_p_nR, log_q_nR = (log_p_nR / tau).log_softmax(-1), (log_q_nR / tau).log_softmax(-1)
    if objective.divergence == "forward_kl":
        value_n, gradient_nR = forward_kl(log_p_nR, log_q_nR)
    elif objective.divergence == "reverse_kl":
        value_n, gradient_nR = reverse_kl(log_p_nR, log_q_nR)
    else:
        assert objective.jsd_beta is not None
        value_n, gradient_nR = generalized_jsd(log_p_nR, log_q_nR, objective.jsd_beta)
    # By the logits before they were divided by τ: one factor τ less.
    return value_n * tau**2, gradient_nR * tau


def _cross_entropy(targets: SparseTargets, filled_nK: Tensor, log_q_nR: Tensor) -> tuple[Tensor, Tensor]:
    """-Σ w_k log q_k over the draws; gradient (Σ w) q - w. The weights are not normalised, which would bias them."""
    weights_nK = targets.log_probs_NK.to(log_q_nR.dtype).masked_fill(~filled_nK, -math.inf).exp()
    value_n = -(weights_nK * log_q_nR[:, :-1].masked_fill(~filled_nK, 0)).sum(-1)
    gradient_nR = weights_nK.sum(-1, keepdim=True) * log_q_nR.exp()
    gradient_nR[:, :-1] -= weights_nK
    return value_n, gradient_nR


def _merge_rest(log_q_nO: Tensor) -> Tensor:
    """(n, K + 1): the written token and all others as one outcome, which is how the teacher's rest was stored."""
    return torch.cat([log_q_nO[:, :-2], torch.logaddexp(log_q_nO[:, -2:-1], log_q_nO[:, -1:])], 1)


def _split_rest(gradient_nR: Tensor, log_q_nO: Tensor, log_q_nR: Tensor) -> Tensor:
    """(n, K + 2): the rest's gradient, shared out by mass."""
    share_n2 = (log_q_nO[:, -2:] - log_q_nR[:, -1:]).exp().nan_to_num(0)  # NaN where there is no rest
    return torch.cat([gradient_nR[:, :-1], gradient_nR[:, -1:] * share_n2], 1)
