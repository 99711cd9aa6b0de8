"""What the loss is at a position, once the student's distribution is coarsened to the outcomes that matter there.

Those outcomes O are the K candidates, the written token if it is none of them, and all other tokens together. Every
term of the loss is a function of their K + 2 probabilities, so is its gradient, and the gradient of a token among the
others is the others' gradient times its share of their mass. That is what makes the dense gradient exact and cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.divergences import forward_kl, generalized_jsd, reverse_kl
from distill.losses.settings import Objective
from distill.losses.sparse import SparseTargets


@dataclass(frozen=True)
class Teacher:
    """What the loss needs of the targets at n positions: made once for all of them, so that a chunk takes views."""

    filled_nK: Tensor
    """Where a candidate stands."""
    has_target_n: Tensor
    target_nR: Tensor
    """`top_k`: (n, K + 1) log-probabilities of the outcomes. `sampled`: (n, K) weights. `chosen_token`: (n, 1) log p."""
    nll_weight_n: Tensor
    """Of the negative log-likelihood, fallbacks included."""

    def part(self, rows: slice) -> Teacher:
        """Some of the positions."""
        return Teacher(self.filled_nK[rows], self.has_target_n[rows], self.target_nR[rows], self.nll_weight_n[rows])


class PositionLosses(NamedTuple):
    """Terms and metrics of n positions, in nats."""

    kd_n: Tensor
    nll_n: Tensor
    kl_lower_bound_n: Tensor
    log_ratio_n: Tensor
    agrees_n: Tensor


def prepare(objective: Objective, targets: SparseTargets, vocab_size: int, dtype: torch.dtype, falls_back_n: Tensor | None) -> Teacher:
    """The targets of n positions as the loss takes them.

    Args:
        objective: Settings.
        targets: As they were stored.
        vocab_size: Number of token ids.
        dtype: What the loss is computed in.
        falls_back_n: Whether the negative log-likelihood takes the divergence's place where there is no target.
    """
    filled_nK = targets.filled_NK()
    if objective.kind == "chosen_token":
        target_nR = targets.log_probs_NK.to(dtype)
        has_target_n = target_nR[:, 0] > -math.inf
    else:
        has_target_n = filled_nK.any(-1)
        if objective.kind == "top_k":
            target_nR = targets.log_outcomes_nR(filled_nK, vocab_size, dtype)
        else:
            target_nR = targets.log_probs_NK.to(dtype).masked_fill(~filled_nK, -math.inf).exp()
    nll_weight_n = torch.full(has_target_n.shape, objective.nll_weight, dtype=dtype, device=has_target_n.device)
    if falls_back_n is not None:
        nll_weight_n = nll_weight_n + objective.kd_weight * (falls_back_n & ~has_target_n).to(dtype)
    return Teacher(filled_nK, has_target_n, target_nR, nll_weight_n)


def position_gradient(objective: Objective, teacher: Teacher, log_q_nO: Tensor, is_written_nO: Tensor, written_nO: Tensor) -> Tensor:
    """(n, K + 2) gradient of the weighted sum of the terms by the logit of each candidate, of the written token and, in sum, of
    all others.

    Args:
        objective: Settings.
        teacher: The targets of these positions.
        log_q_nO: The student: (n, K + 2) log-probabilities of the candidates (-inf for padding), of the written token
            (-inf if it is a candidate), and of all other tokens together.
        is_written_nO: Where the written token stands, once a position.
        written_nO: The same as numbers.
    """
    # The written token's pull: the gradient of -log q(written) is q - 1 there and q elsewhere, times this.
    pull_n = teacher.nll_weight_n
    if objective.kind == "chosen_token":
        if objective.kd_weight:
            pull_n = pull_n + objective.kd_weight * _advantage(teacher, log_q_nO, is_written_nO)
        return pull_n[:, None] * (log_q_nO.exp() - written_nO)
    log_q_nR = _merge_rest(log_q_nO)
    _, gradient_nR = _divergence(objective, teacher, log_q_nR)
    gradient_nO = objective.kd_weight * _split_rest(gradient_nR, log_q_nO, log_q_nR)
    return gradient_nO + pull_n[:, None] * (log_q_nO.exp() - written_nO)


def position_losses(objective: Objective, teacher: Teacher, log_q_nO: Tensor, is_written_nO: Tensor, first_n: Tensor) -> PositionLosses:
    """The terms at n positions, without gradients.

    Args:
        objective: As in `position_gradient`.
        teacher: As there.
        log_q_nO: As there.
        is_written_nO: As there.
        first_n: The student's one most probable token, as its candidate; another number for another token, or for several.
    """
    nll_n = -log_q_nO.masked_fill(~is_written_nO, 0).sum(-1)
    zeros_n = torch.zeros_like(nll_n)
    if objective.kind == "chosen_token":
        advantage_n = _advantage(teacher, log_q_nO, is_written_nO)
        return PositionLosses(advantage_n.square() / 2, nll_n, zeros_n, -advantage_n, zeros_n)
    log_q_nR = _merge_rest(log_q_nO)
    kd_n, _ = _divergence(objective, teacher, log_q_nR)
    kl_n = forward_kl(teacher.target_nR, log_q_nR)[0] if objective.kind == "top_k" else zeros_n
    width = teacher.filled_nK.shape[1]
    candidates_nK = teacher.target_nR[:, :width].masked_fill(~teacher.filled_nK, -math.inf)
    top_n, best_n = candidates_nK.max(-1)
    agrees_n = teacher.has_target_n & (best_n == first_n) & ((candidates_nK == top_n[:, None]).sum(-1) == 1)
    return PositionLosses(kd_n, nll_n, kl_n, zeros_n, agrees_n)


def _advantage(teacher: Teacher, log_q_nO: Tensor, is_written_nO: Tensor) -> Tensor:
    """(n,) log p - log q of the written token; 0 without a target."""
    log_written_n = log_q_nO.masked_fill(~is_written_nO, 0).sum(-1)
    return (teacher.target_nR[:, 0] - log_written_n).masked_fill(~teacher.has_target_n, 0)


def _divergence(objective: Objective, teacher: Teacher, log_q_nR: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of `sampled` or `top_k` targets, and its gradient by the logits of the outcomes."""
    if objective.kind == "sampled":
        return _cross_entropy(teacher, log_q_nR)
    return _tempered_divergence(objective, teacher.target_nR, log_q_nR)


def _tempered_divergence(objective: Objective, log_p_nR: Tensor, log_q_nR: Tensor) -> tuple[Tensor, Tensor]:
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


def _cross_entropy(teacher: Teacher, log_q_nR: Tensor) -> tuple[Tensor, Tensor]:
    """-Σ w_k log q_k over the draws; gradient (Σ w) q - w. The weights are not normalised, which would bias them."""
    weights_nK = teacher.target_nR
    value_n = -(weights_nK * log_q_nR[:, :-1].masked_fill(~teacher.filled_nK, 0)).sum(-1)
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
