"""The losses of training on traces: distillation on stored targets, and the likelihood alone. What they take, check, give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from distill.errors import DataError, ModelError, RecipeError
from distill.losses.chunked import ChunkedLoss, Head, Sums
from distill.losses.settings import Divergence, Objective, likelihood
from distill.losses.sparse import SparseTargets, check_targets


@dataclass(frozen=True)
class StudentHead:
    """The student's last layer: logits = softcap · tanh(logit_scale · (W h + b) / softcap), or without the cap.

    A frozen head (`requires_grad` off, as under LoRA) costs no gradient buffer. A sharded one (DTensor, FSDP2) is
    gathered for the call, and its gradient averaged over the ranks as FSDP averages all others. Under DeepSpeed ZeRO-3
    the caller gathers: `deepspeed.zero.GatheredParameters` around the call; the backward doesn't read the head.
    """

    weight_VH: Tensor
    """(V or more, H): rows behind the vocabulary pad it and get probability 0 and gradient 0."""
    bias_V: Tensor | None = None
    vocab_size: int | None = None
    """V, the number of token ids; None takes every row for a token."""
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class DistillationLoss:
    """Sums over the supervised positions of a batch, in nats: float32 tensors without dimensions.

    Only `loss` has a gradient. Divide it by the number of supervised tokens of the whole optimizer step over all ranks,
    never by this batch's own, or the result depends on how the step was split. None means that the targets can't tell.
    """

    loss: Tensor
    """kd_weight · kd + nll_weight · nll, the nll of fallback positions added with kd_weight."""
    kd: Tensor
    """The distillation term. For `sampled` a cross-entropy, so the teacher's entropy is in it."""
    nll: Tensor
    """-log q of the written tokens."""
    student_entropy: Tensor
    num_positions: int
    """Supervised positions."""
    num_targets: Tensor
    """Those of them with a target: what `kd`, `kl_lower_bound`, `log_ratio` and `top1_agreements` are sums over."""
    kl_lower_bound: Tensor | None
    """KL(teacher ‖ student) at temperature 1 over the candidates and the rest as one, whatever the divergence: at most that over the
    whole vocabulary, and equal to it where every token is a candidate. Only from `top_k`."""
    log_ratio: Tensor | None
    """log q - log p of the written tokens: if the student wrote them, an unbiased estimate of KL(student ‖ teacher).
    Only from `chosen_token`."""
    hits: Tensor
    """Positions where the written token is more probable to the student than every other."""
    top1_agreements: Tensor | None
    """Positions where one and the same token is more probable than every other to the teacher and to the student, so that ties don't
    count; of `sampled`, the one drawn most. Not from `chosen_token`."""


def distillation_loss(
    hidden_NH: Tensor,
    head: StudentHead,
    labels_N: Tensor,
    targets: SparseTargets,
    *,
    divergence: Divergence = "forward_kl",
    jsd_beta: float | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    nll_weight: float = 0.0,
    position_weights_N: Tensor | None = None,
    falls_back_N: Tensor | None = None,
    chunk_size: int | None = None,
) -> DistillationLoss:
    """Sum over positions of kd_weight · divergence(teacher, student) + nll_weight · (-log q(written token)), in nats.

    **`top_k`.** The stored ids are not renormalised: both models are coarsened to K + 1 outcomes, the ids and one bucket for
    the rest. Merging outcomes can only lower a divergence, so this is a lower bound that rises with K and is exact at
    K = V. The gradient reaches every token: the rest's, by each token's share of the student's own rest.

    **`sampled`.** The cross-entropy -Σ w log q with the draws' weights w, without a bucket: its expectation over the draws is the
    dense cross-entropy, and its gradient (Σ w) q - w is on average that of the dense forward KL (arXiv 2503.16870). Other
    divergences are not linear in the teacher, so draws would bias them.

    **`chosen_token`, `policy_gradient`.** With the advantage A = log p(y) - log q(y) of the written token y, the value is A² / 2 and
    the gradient -A ∇ log q(y), the policy gradient with A as a constant weight (arXiv 2604.13010); the square is written
    because its gradient is that very one. Where the current student wrote y, its expectation is the gradient of the
    position's KL(student ‖ teacher), since E[∇ log q(y)] = 0. Neither the effect of y on later positions nor a change of
    the student since it wrote y is corrected for. On text of others it is a regression of log q(y) on log p(y), which
    says nothing of the other tokens.

    Softmax and sums are float32 (float64 for float64 inputs) whatever the inputs are; products with the head are taken
    in the type of `hidden_NH`, or autocast's. The gradients are computed here, not in the backward, and only if grad
    mode is on; the backward can be taken once, without `retain_graph`.

    Args:
        hidden_NH: Hidden states behind the last norm. Position i predicts `labels_N[i]`: the caller has shifted.
        head: The student's last layer; a head tied to the embedding is passed as it is.
        labels_N: Written tokens; -100 where a position is not supervised, which then adds nothing.
        targets: What the teacher stored, in the student's ids; all N positions, or nonsense where not supervised.
        divergence: `forward_kl` KL(teacher ‖ student), `reverse_kl` KL(student ‖ teacher), `jsd` or `policy_gradient`.
        jsd_beta: Share of the teacher in the mixture of `jsd`, between 0 and 1 (arXiv 2306.13649); for others None.
        temperature: τ by which the log-probabilities of both are divided; the divergence is then times τ² (arXiv 1503.02531,
            section 2). Only where all V tokens are candidates: the tail of a tempered teacher can't be recovered from
            some log-probabilities stored at temperature 1. The metrics stay at temperature 1.
        kd_weight: Weight of the divergence.
        nll_weight: Weight of the negative log-likelihood; positions without a target keep this term.
        position_weights_N: Factors of both terms at each position; None for 1. The metrics beside `kd` and `nll` ignore them.
        falls_back_N: (N,) bool: positions at which, if they have no target, the negative log-likelihood is added with
            kd_weight: the written token then stands for the teacher's whole distribution. None for no position.
        chunk_size: Positions at once; None fills a buffer of 128 MiB, on a GPU up to 512. It changes speed and memory, not the result.

    Raises:
        DataError: shapes, devices, types or ids don't fit, or a temperature was asked for with candidates missing.
        ModelError: the head is smaller than the vocabulary, or wider than the hidden states.
        RecipeError: a setting is out of range, would be ignored, or doesn't suit the kind of targets.
    """
    objective = Objective(targets.kind, divergence, jsd_beta, temperature, kd_weight, nll_weight)
    vocab_size = _check(hidden_NH, head, labels_N, position_weights_N, chunk_size)
    if falls_back_N is not None and (falls_back_N.shape != labels_N.shape or falls_back_N.dtype != torch.bool):
        found = f"{tuple(falls_back_N.shape)} of {falls_back_N.dtype}"
        raise DataError(f"loss: falls_back_N is {found}, labels {tuple(labels_N.shape)}. Give a bool each.")
    check_targets(targets, labels_N, vocab_size)
    if temperature != 1:
        _check_complete(targets, labels_N, vocab_size, temperature)
    return _loss(hidden_NH, head, vocab_size, labels_N, targets, objective, position_weights_N, falls_back_N, chunk_size)


def likelihood_loss(hidden_NH: Tensor, head: StudentHead, labels_N: Tensor, *, chunk_size: int | None = None) -> DistillationLoss:
    """Sum over positions of -log q(written token), in nats: the loss of SFT, with the same precision, memory and backward.

    It is `distillation_loss` with a target at no position, so `kd` and `num_targets` are 0.

    Args:
        hidden_NH: As there.
        head: As there.
        labels_N: As there.
        chunk_size: As there.

    Raises:
        DataError: shapes, devices, types or ids don't fit.
        ModelError: the head is smaller than the vocabulary, or wider than the hidden states.
        RecipeError: the chunk size is not positive.
    """
    vocab_size = _check(hidden_NH, head, labels_N, None, chunk_size)
    nothing = SparseTargets("chosen_token", labels_N.new_empty(len(labels_N), 0), hidden_NH.new_full((len(labels_N), 1), -math.inf))
    check_targets(nothing, labels_N, vocab_size)
    return _loss(hidden_NH, head, vocab_size, labels_N, nothing, likelihood(nothing.kind), None, None, chunk_size)


def _loss(
    hidden_NH: Tensor,
    head: StudentHead,
    vocab_size: int,
    labels_N: Tensor,
    targets: SparseTargets,
    objective: Objective,
    position_weights_N: Tensor | None,
    falls_back_N: Tensor | None,
    chunk_size: int | None,
) -> DistillationLoss:
    """The loss of arguments that were checked."""
    weight_VH, bias_V = _gathered(head.weight_VH), None if head.bias_V is None else _gathered(head.bias_V)
    plain = Head(weight_VH.detach(), None if bias_V is None else bias_V.detach(), vocab_size, head.logit_scale, head.softcap)
    rows_M = (labels_N != -100).nonzero()[:, 0]
    settings = plain, objective, targets, labels_N, rows_M, position_weights_N, falls_back_N, chunk_size, torch.is_grad_enabled()
    sums = Sums(*ChunkedLoss.apply(hidden_NH, weight_VH, bias_V, *settings))  # type: ignore[no-untyped-call]
    return DistillationLoss(
        loss=sums.loss,
        kd=sums.kd,
        nll=sums.nll,
        student_entropy=sums.entropy,
        num_positions=len(rows_M),
        num_targets=sums.targets,
        kl_lower_bound=sums.kl_lower_bound if targets.kind == "top_k" else None,
        log_ratio=sums.log_ratio if targets.kind == "chosen_token" else None,
        hits=sums.hits,
        top1_agreements=None if targets.kind == "chosen_token" else sums.agreements,
    )


def _gathered(parameter: Tensor) -> Tensor:
    """A whole parameter of a sharded one; the gradient is averaged over the ranks, as FSDP does, and sharded again."""
    if not isinstance(parameter, DTensor):
        return parameter
    # Without placements each rank would keep its own gradient of its own shard, and drop those of the others.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _check(hidden_NH: Tensor, head: StudentHead, labels_N: Tensor, position_weights_N: Tensor | None, chunk_size: int | None) -> int:
    """The vocabulary's size, after head, hidden states and labels were found to fit."""
    rows, width = head.weight_VH.shape
    vocab_size = rows if head.vocab_size is None else head.vocab_size
    if not 1 <= vocab_size <= rows:
        raise ModelError(f"loss: the head has {rows} rows, the vocabulary {vocab_size} tokens. Take the student's own vocab_size.")
    if hidden_NH.ndim != 2 or hidden_NH.shape[1] != width:
        raise ModelError(f"loss: hidden states are {tuple(hidden_NH.shape)}, the head {rows} x {width}. Give (N, {width}) states.")
    if head.bias_V is not None and head.bias_V.shape != (rows,):
        raise ModelError(f"loss: the head's bias is {tuple(head.bias_V.shape)}, the head has {rows} rows. Give ({rows},).")
    if head.softcap is not None and head.softcap <= 0:
        raise ModelError(f"loss: softcap must be positive, got {head.softcap}. None means no cap.")
    if labels_N.shape != hidden_NH.shape[:1] or labels_N.is_floating_point():
        raise DataError(
            f"loss: labels are {tuple(labels_N.shape)} of {labels_N.dtype}, hidden states {tuple(hidden_NH.shape)}. Give an id each."
        )
    if hidden_NH.device != labels_N.device or hidden_NH.device != head.weight_VH.device:
        raise DataError(
            f"loss: hidden states are on {hidden_NH.device}, the head on {head.weight_VH.device}, labels on {labels_N.device}. "
            "Move all to the head's device."
        )
    if position_weights_N is not None and position_weights_N.shape != labels_N.shape:
        raise DataError(f"loss: position weights are {tuple(position_weights_N.shape)}, labels {tuple(labels_N.shape)}. Give one each.")
    if chunk_size is not None and chunk_size < 1:
        raise RecipeError(f"loss: chunk_size must be at least 1, got {chunk_size}. None chooses it.")
    return vocab_size


def _check_complete(targets: SparseTargets, labels_N: Tensor, vocab_size: int, temperature: float) -> None:
    incomplete_N = (labels_N != -100) & (targets.filled_NK().sum(1) < vocab_size)
    count = int(incomplete_N.sum())
    if count:
        raise DataError(
            f"loss: temperature {temperature} needs the teacher's whole distribution, but {count} of {len(labels_N)} positions have fewer "
            f"than {vocab_size} candidates: the tail of a tempered teacher can't be recovered from log-probabilities stored at "
            "temperature 1. Use temperature 1, or store all candidates."
        )
