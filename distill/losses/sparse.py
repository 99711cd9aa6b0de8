"""The teacher's side of the loss: what `score` stored for each position, as tensors, and what makes it unusable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import DataError
from distill.losses.settings import Kind

LOG_REST_FLOOR = -88.0
"""A rest that the teacher holds for impossible is taken as exp(-88), where float32 and the codec end. Without it a
reverse KL would be infinite wherever the student puts anything outside the candidates."""
_LOG_RESOLUTION = math.log(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's next-token distributions at N positions, as `distill.targets` decodes them, at temperature 1.

    The candidates of a position are distinct; a position may have fewer than K, in any columns, or none, and then adds
    nothing to the distillation term. Nothing is renormalised over the candidates: what they don't hold is the rest.
    """

    kind: Kind
    ids_NK: Tensor
    """(N, K) integer ids below the vocabulary's size, padded with -1. (N, 0) for `chosen_token`."""
    log_probs_NK: Tensor
    """(N, K) float, nats, padded with -inf. For `sampled` the logarithms of the weights of the draws: count / N, or
    importance weights, which needn't sum to 1. (N, 1) for `chosen_token`: the written token's, -inf where unknown."""
    log_rest_N: Tensor | None = None
    """(N,) logarithm of the mass of all other tokens. Only `top_k` uses it; None computes it with `log_remainder`,
    which can't tell a rest below 1.2e-7 from rounding, so give the stored one where there is one."""

    def filled_NK(self) -> Tensor:
        """(N, K) where a candidate stands; a candidate of probability 0 counts as none, its mass as rest."""
        return (self.ids_NK >= 0) & (self.log_probs_NK[:, : self.ids_NK.shape[1]] > -math.inf)

    def take(self, rows_n: Tensor) -> SparseTargets:
        """Some of the positions."""
        log_rest_n = None if self.log_rest_N is None else self.log_rest_N[rows_n]
        return SparseTargets(self.kind, self.ids_NK[rows_n], self.log_probs_NK[rows_n], log_rest_n)

    def log_outcomes_nR(self, filled_nK: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """(n, K + 1) log-probabilities of `top_k` candidates and of the rest, which sum to 1 exactly.

        Stored values are quantised, so as they stand they miss a sum of 1 by up to some per cent; dividing all K + 1
        outcomes by the sum makes a distribution of them again.
        """
        log_probs_nK = self.log_probs_NK.to(dtype).masked_fill(~filled_nK, -math.inf)
        log_rest_n = log_remainder(log_probs_nK) if self.log_rest_N is None else self.log_rest_N.to(dtype)
        num_filled_n = filled_nK.sum(1)
        log_rest_n = log_rest_n.clamp(min=LOG_REST_FLOOR).masked_fill(num_filled_n == 0, 0)
        # Where all tokens are candidates there is no rest, neither the teacher's nor the student's.
        log_rest_n = log_rest_n.masked_fill(num_filled_n == vocab_size, -math.inf)
        return torch.cat([log_probs_nK, log_rest_n[:, None]], 1).log_softmax(-1)


def log_remainder(log_probs_NK: Tensor) -> Tensor:
    """(N,) log(1 - Σ_k p_k), in nats, from log-probabilities padded with -inf.

    A sum within float32's resolution of 1, or beyond it by rounding, gives log(1.2e-7): float32 log-probabilities
    don't determine a smaller rest.
    """
    log_held_N = log_probs_NK.logsumexp(-1).clamp(max=0)
    # Both are log(1 - e^x): the first is exact for a small rest, the second for a large one.
    log_rest_N = torch.where(log_held_N > -math.log(2), (-log_held_N.expm1()).log(), (-log_held_N.exp()).log1p())
    return log_rest_N.clamp(min=_LOG_RESOLUTION)


def check_targets(targets: SparseTargets, labels_N: Tensor, vocab_size: int) -> None:
    """Whether the targets of the supervised positions can be used.

    Args:
        targets: Targets of N positions.
        labels_N: Written tokens, -100 where a position is not supervised.
        vocab_size: Number of token ids.

    Raises:
        DataError: shapes or devices don't fit, ids lie outside the vocabulary or repeat within a position, or the
            log-probabilities are none.
    """
    _check_shapes(targets, labels_N)
    supervised_N = labels_N != -100
    ids_NK, log_probs_NK = targets.ids_NK, targets.log_probs_NK
    sorted_NK = ids_NK.masked_fill(~targets.filled_NK(), -1).sort(-1).values
    repeats_N = ((sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)).any(-1)
    # Importance weights may exceed 1. The comparisons are False for NaN.
    highest = math.inf if targets.kind == "sampled" else 1e-3
    not_log_N = ~((log_probs_NK <= highest) & (log_probs_NK < math.inf)).all(-1)
    problems = {
        f"a written token outside the vocabulary's {vocab_size} ids": (labels_N < 0) | (labels_N >= vocab_size),
        f"a candidate outside the vocabulary's {vocab_size} ids": (ids_NK >= vocab_size).any(-1) | (ids_NK < -1).any(-1),
        "the same candidate twice": repeats_N,
        "a log-probability above 0, or NaN": not_log_N,
        "candidates and a rest whose probabilities don't sum to 1 within 5 %": _off_mass_N(targets),
    }
    # One transfer from the device for all of them.
    counts = torch.stack([(bad_N & supervised_N).sum() for bad_N in problems.values()]).tolist()
    for problem, count in zip(problems, counts, strict=True):
        if count:
            raise DataError(
                f"loss: {problem}, at {count} of {len(labels_N)} positions. "
                "Check that targets and labels are of the same rows and in the student's ids, in nats at temperature 1."
            )


def _off_mass_N(targets: SparseTargets) -> Tensor:
    """(N,) whether the mass of a `top_k` target is too far from 1 to be rounding."""
    if targets.kind != "top_k":
        return torch.zeros(len(targets.ids_NK), dtype=torch.bool, device=targets.ids_NK.device)
    filled_NK = targets.filled_NK()
    held_N = targets.log_probs_NK.exp().masked_fill(~filled_NK, 0).sum(-1)
    if targets.log_rest_N is None:
        return held_N > 1.05
    # A position without candidates carries nothing, whatever stands in its rest.
    return ~((held_N + targets.log_rest_N.exp() - 1).abs() <= 0.05) & filled_NK.any(-1)


def _check_shapes(targets: SparseTargets, labels_N: Tensor) -> None:
    n = len(labels_N)
    ids, log_probs, rest = targets.ids_NK, targets.log_probs_NK, targets.log_rest_N
    width = ids.shape[1] if ids.ndim == 2 else -1
    fits = ids.ndim == 2 and log_probs.shape == (n, 1 if targets.kind == "chosen_token" else width) and len(ids) == n
    if not fits or (targets.kind == "chosen_token") != (width == 0) or (rest is not None and rest.shape != (n,)):
        raise DataError(
            f"loss: {targets.kind} targets of {n} positions have ids {tuple(ids.shape)}, log_probs {tuple(log_probs.shape)} and "
            f"log_rest {None if rest is None else tuple(rest.shape)}. Give (N, K), (N, K) and (N,), or for chosen_token (N, 0), (N, 1)."
        )
    if ids.is_floating_point() or not log_probs.is_floating_point():
        raise DataError(f"loss: targets have ids of {ids.dtype} and log_probs of {log_probs.dtype}. Give integers and floats.")
    devices = {tensor.device for tensor in (ids, log_probs, labels_N) if tensor is not None}
    if len(devices) > 1 or (rest is not None and rest.device != ids.device):
        raise DataError(f"loss: targets and labels lie on {len(devices)} devices: {sorted(map(str, devices))}. Move them to the student's.")
