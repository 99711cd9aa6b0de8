"""Divergences between a teacher p and a student q = softmax(s) over a few outcomes, with their gradients by s.

Each function takes (n, R) log-probabilities, -inf for outcomes that don't exist, which must be the same on both sides, and
returns the (n,) divergences in nats and their (n, R) gradients by the student's logits. 0 log 0 is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(log_p_nR: Tensor, log_q_nR: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) = Σ p (log p - log q); gradient q - p."""
    p_nR, q_nR = log_p_nR.exp(), log_q_nR.exp()
    return _expectation(p_nR, log_p_nR - log_q_nR), q_nR - p_nR


def reverse_kl(log_p_nR: Tensor, log_q_nR: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) = Σ q (log q - log p); gradient q (log q - log p - KL)."""
    return _student_kl(log_q_nR, log_p_nR)


def generalized_jsd(log_p_nR: Tensor, log_q_nR: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q, 0 < β < 1 (arXiv 2306.13649, section 2).

    Divided by β it tends to the forward KL as β falls to 0; divided by 1 - β, to the reverse KL as β rises to 1. The
    gradient is (1 - β) q (log q - log m - KL(q ‖ m)): what m contributes cancels, because m minimises the sum.
    """
    log_m_nR = torch.logaddexp(log_p_nR + math.log(beta), log_q_nR + math.log1p(-beta))
    teacher_n = _expectation(log_p_nR.exp(), log_p_nR - log_m_nR)
    student_n, gradient_nR = _student_kl(log_q_nR, log_m_nR)
    return beta * teacher_n + (1 - beta) * student_n, (1 - beta) * gradient_nR


def _student_kl(log_q_nR: Tensor, log_reference_nR: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ reference), and its gradient while the reference stands still."""
    q_nR = log_q_nR.exp()
    excess_nR = (log_q_nR - log_reference_nR).masked_fill(q_nR == 0, 0)
    kl_n = (q_nR * excess_nR).sum(-1)
    return kl_n, q_nR * (excess_nR - kl_n[:, None])


def _expectation(p_nR: Tensor, values_nR: Tensor) -> Tensor:
    return (p_nR * values_nR.masked_fill(p_nR == 0, 0)).sum(-1)
