"""The loss of many positions through the head, a chunk of positions at a time, with the gradients taken on the way.

One (n, V) buffer of float32 serves all chunks. The gradient by the logits is made of the logits that are still in it, so
it costs no second product with the head as recomputing it in the backward would; the backward only multiplies by the
gradient that comes in. Between the products the vocabulary is passed over by torch's own operations, which turn the buffer
into exponentials and then into the gradient, or, where Triton runs, by two kernels (`losses.kernels`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.losses import kernels
from distill.losses.objective import PositionLosses, position_losses
from distill.losses.settings import Objective
from distill.losses.sparse import SparseTargets

# 128 MiB of float32: on a CPU the products with the head don't get faster above some hundred positions.
_BUFFER_ELEMENTS = 2**25
# On a GPU they do, up to some thousand. A 64th of its memory is the same on an 8 GiB card, and enough on one of 80.
_BUFFER_SHARE, _LARGEST_BUFFER_ELEMENTS = 64, 2**28
# Elements worked on at once between products: on a CPU what its caches hold, elsewhere what is worth starting kernels for.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_OTHER_BLOCK_ELEMENTS = 2**23
# float16 ends at 6e-8; without this the gradients of improbable tokens would vanish on the way through the products.
_FLOAT16_SCALE = 256.0


class Head(NamedTuple):
    """The student's last layer as plain tensors: logits = cap · tanh(scale · (W h + b) / cap)."""

    weight_VH: Tensor
    """(V or more, H): what stands behind the vocabulary pads it."""
    bias_V: Tensor | None
    vocab_size: int
    logit_scale: float
    softcap: float | None


class Sums(NamedTuple):
    """Sums over positions, as 0-dimensional tensors."""

    loss: Tensor
    kd: Tensor
    nll: Tensor
    forward_kl: Tensor
    log_ratio: Tensor
    entropy: Tensor
    agreements: Tensor
    hits: Tensor
    targets: Tensor


class ChunkedLoss(torch.autograd.Function):
    """Sums over the supervised positions; only the first, the weighted loss, has a gradient.

    The gradient by the weight is scaled in place, since a copy would double the largest buffer there is; so the
    backward can be taken once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        objective: Objective,
        targets: SparseTargets,
        labels_N: Tensor,
        position_weights_N: Tensor | None,
        falls_back_N: Tensor | None,
        chunk_size: int | None,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        """The `Sums`. `head` holds the same tensors as `weight_VH` and `bias_V`, which are there for their gradients."""
        needs = [needed and with_gradient for needed in ctx.needs_input_grad[:3]]
        rows_M = (labels_N != -100).nonzero()[:, 0]
        work = _Work(hidden_NH, head, objective, needs, len(rows_M), chunk_size)
        sums = torch.zeros(len(Sums._fields), dtype=work.dtype, device=hidden_NH.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, len(rows_M), work.chunk_size):
                rows_n = rows_M[start : start + work.chunk_size]
                weights_n = None if position_weights_N is None else position_weights_N[rows_n].to(work.dtype)
                falls_back_n = None if falls_back_N is None else falls_back_N[rows_n]
                sums += work.chunk(rows_n, labels_N[rows_n], targets.take(rows_n), weights_n, falls_back_n)
        ctx.scale = work.scale
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        ctx.save_for_backward(work.grad_hidden_NH, work.grad_weight_VH, work.grad_bias_V)
        ctx.spent = False
        loss, *others = sums.unbind()
        loss, others = loss.clone(), [other.clone() for other in others]
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients times that of the loss."""
        if ctx.spent:
            raise RuntimeError("loss: its gradient can be taken once; compute the loss again instead of retain_graph=True.")
        ctx.spent = True
        factor = gradients[0] / ctx.scale
        by_input = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *by_input, None, None, None, None, None, None, None, None


class _Work:
    """The buffers of one call: what is accumulated over chunks, and what is overwritten by each."""

    def __init__(
        self, hidden_NH: Tensor, head: Head, objective: Objective, needs: list[bool], positions: int, chunk_size: int | None
    ) -> None:
        device = hidden_NH.device
        compute = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden_NH.dtype
        self.dtype = torch.float64 if compute == torch.float64 else torch.float32
        self.scale = _FLOAT16_SCALE if compute == torch.float16 else 1.0
        self.chunk_size = chunk_size or max(64, _buffer_elements(device) // head.vocab_size // 64 * 64)
        self._hidden_NH, self._head, self._objective = hidden_NH, head, objective
        self._weight_VH = head.weight_VH[: head.vocab_size].to(compute)
        self._bias_V = None if head.bias_V is None else head.bias_V[: head.vocab_size]
        rows = min(self.chunk_size, positions)
        self._logits_nV = torch.empty((rows, head.vocab_size), dtype=self.dtype, device=device)
        self._needs_gradient = any(needs)
        self._fused = self.dtype == torch.float32 and kernels.available(device)
        slopes = head.softcap is not None and self._needs_gradient and not self._fused
        self._slope_nV = torch.empty_like(self._logits_nV) if slopes else None
        # The gradient in the type of the products. Of the logits' own type it takes their place.
        own = self._fused and self._needs_gradient and compute != self.dtype
        self._gradient_nV = torch.empty(self._logits_nV.shape, dtype=compute, device=device) if own else self._logits_nV
        # Of the whole parameters, padding included: filling up at the end would take the memory twice.
        self.grad_hidden_NH, self.grad_weight_VH, self.grad_bias_V = (
            torch.zeros(tensor.shape, dtype=self.dtype, device=device) if needed and tensor is not None else None
            for needed, tensor in zip(needs, (hidden_NH, head.weight_VH, head.bias_V), strict=True)
        )

    def chunk(
        self, rows_n: Tensor, labels_n: Tensor, targets: SparseTargets, weights_n: Tensor | None, falls_back_n: Tensor | None
    ) -> Tensor:
        """The sums over some positions; adds their gradients to the accumulated ones."""
        hidden_nH = self._hidden_NH[rows_n].to(self._weight_VH.dtype)
        logits_nV = self._project(hidden_nH)
        filled_nK = targets.filled_NK()
        # Padding stands for the written token once more: it is read nowhere and adds zeros there.
        slots_nS = torch.cat([torch.where(filled_nK, targets.ids_NK, labels_n[:, None]), labels_n[:, None]], 1).long()
        is_label_nK = filled_nK & (targets.ids_NK == labels_n[:, None])
        is_new_n1 = ~is_label_nK.any(1, keepdim=True)
        at_slots_nS = logits_nV.gather(1, slots_nS)
        logits_nS = at_slots_nS.masked_fill(~torch.cat([filled_nK, is_new_n1], 1), -math.inf)
        logits_nV.scatter_(1, slots_nS, -math.inf)
        peak_n, sum_n, gap_n = (kernels.statistics if self._fused else _exponentials)(logits_nV)
        logits_nO = torch.cat([logits_nS, (peak_n + sum_n.log())[:, None]], 1)
        # Relative to the highest first: at a logit of 40, float32 would round every probability by 4e-6.
        highest_n1 = logits_nO.amax(1, keepdim=True)
        log_total_n1 = (logits_nO - highest_n1).logsumexp(-1, keepdim=True)
        log_q_nO = logits_nO - highest_n1 - log_total_n1
        log_other_n = (peak_n - highest_n1[:, 0] - log_total_n1[:, 0]).masked_fill(sum_n == 0, -math.inf)
        log_peak_n = torch.maximum(log_q_nO[:, :-1].amax(1), log_other_n)
        is_written_nO = torch.cat([is_label_nK, is_new_n1, torch.zeros_like(is_new_n1)], 1)
        losses = position_losses(self._objective, targets, log_q_nO, is_written_nO, log_peak_n, logits_nV.shape[1], falls_back_n)
        if self._needs_gradient:
            gradient_nO = losses.gradient_nO * (self._head.logit_scale * self.scale)
            gradient_nO = gradient_nO if weights_n is None else gradient_nO * weights_n[:, None]
            factor_n = (gradient_nO[:, -1] / sum_n).masked_fill(sum_n == 0, 0)
            if self._fused:
                gradient_nV = self._spread_fused(logits_nV, peak_n, factor_n, at_slots_nS, slots_nS, gradient_nO[:, :-1])
            else:
                gradient_nV = self._spread(logits_nV, factor_n, slots_nS, gradient_nO[:, :-1])
            self._accumulate(rows_n, hidden_nH, gradient_nV)
        is_hit_n = log_q_nO.masked_fill(~is_written_nO, -math.inf).amax(1) >= log_peak_n
        return self._sums(losses, _entropy(log_q_nO, log_other_n + gap_n / sum_n), is_hit_n, weights_n)

    def _project(self, hidden_nH: Tensor) -> Tensor:
        """Logits in the buffer, and beside it their slope by what goes into the cap."""
        logits_nV = self._logits_nV[: len(hidden_nH)]
        _matmul(hidden_nH, self._weight_VH.t(), logits_nV)
        if self._bias_V is not None:
            logits_nV += self._bias_V
        if self._head.logit_scale != 1:
            logits_nV *= self._head.logit_scale
        if self._head.softcap is not None:
            logits_nV.div_(self._head.softcap).tanh_()
            if self._slope_nV is not None:
                slope_nV = torch.mul(logits_nV, logits_nV, out=self._slope_nV[: len(hidden_nH)])
                slope_nV.neg_().add_(1)
            logits_nV *= self._head.softcap
        return logits_nV

    def _spread(self, exponentials_nV: Tensor, factor_n: Tensor, slots_nS: Tensor, gradient_nS: Tensor) -> Tensor:
        """Turns the exponentials of the others into the gradient by what the head computes, before scale and cap."""
        exponentials_nV *= factor_n[:, None]
        exponentials_nV.scatter_add_(1, slots_nS, gradient_nS)
        if self._slope_nV is not None:
            exponentials_nV *= self._slope_nV[: len(exponentials_nV)]
        return exponentials_nV

    def _spread_fused(
        self, logits_nV: Tensor, peak_n: Tensor, factor_n: Tensor, at_slots_nS: Tensor, slots_nS: Tensor, gradient_nS: Tensor
    ) -> Tensor:
        """The same from the logits of the others, in the type of the products."""
        softcap = self._head.softcap
        gradient_nV = kernels.gradient(logits_nV, peak_n, factor_n, self._gradient_nV[: len(logits_nV)], softcap)
        if softcap is not None:
            gradient_nS = gradient_nS * (1 - (at_slots_nS / softcap).square())
        return gradient_nV.scatter_add_(1, slots_nS, gradient_nS.to(gradient_nV.dtype))

    def _accumulate(self, rows_n: Tensor, hidden_nH: Tensor, gradient_nV: Tensor) -> None:
        if self.grad_bias_V is not None:
            self.grad_bias_V[: self._head.vocab_size] += gradient_nV.sum(0, dtype=self.dtype)
        narrow_nV = gradient_nV.to(hidden_nH.dtype)
        if self.grad_hidden_NH is not None:
            grad_nH = torch.empty(hidden_nH.shape, dtype=self.dtype, device=hidden_nH.device)
            self.grad_hidden_NH[rows_n] = _matmul(narrow_nV, self._weight_VH, grad_nH)
        if self.grad_weight_VH is None:
            return
        grad_weight_VH = self.grad_weight_VH[: self._head.vocab_size]
        if _widens(narrow_nV):
            torch.addmm(grad_weight_VH, narrow_nV.t(), hidden_nH, out_dtype=self.dtype, out=grad_weight_VH)
        else:
            # Rounding each chunk's product to 16 bits before summing would bias the sum.
            grad_weight_VH.addmm_(gradient_nV.t().to(self.dtype), hidden_nH.to(self.dtype))

    def _sums(self, losses: PositionLosses, entropy_n: Tensor, is_hit_n: Tensor, weights_n: Tensor | None) -> Tensor:
        kd_n, nll_n = (term_n if weights_n is None else term_n * weights_n for term_n in (losses.kd_n, losses.nll_n))
        loss_n = self._objective.kd_weight * kd_n + losses.nll_weight_n * nll_n
        by_name = {
            "loss": loss_n,
            "kd": kd_n,
            "nll": nll_n,
            "forward_kl": losses.forward_kl_n,
            "log_ratio": losses.log_ratio_n,
            "entropy": entropy_n,
            "agreements": losses.agrees_n,
            "hits": is_hit_n,
            "targets": losses.has_target_n,
        }
        return torch.stack([by_name[name].sum(dtype=self.dtype) for name in Sums._fields])


def _buffer_elements(device: torch.device) -> int:
    if device.type != "cuda":
        return _BUFFER_ELEMENTS
    of_memory = torch.cuda.get_device_properties(device).total_memory // (4 * _BUFFER_SHARE)
    return min(max(of_memory, _BUFFER_ELEMENTS), _LARGEST_BUFFER_ELEMENTS)


def _exponentials(logits_nV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns logits into exp(logit - peak) in place; gives peak, their sum, and the sum of them times (logit - peak).

    A position whose logits are all -inf gives 0 three times. Block by block, so that a CPU reads memory once.
    """
    rows, vocab_size = logits_nV.shape
    peak_n, sum_n, gap_n = logits_nV.new_zeros((3, rows)).unbind()
    block = max(1, _BLOCK_ELEMENTS.get(logits_nV.device.type, _OTHER_BLOCK_ELEMENTS) // vocab_size)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        logits_bV = logits_nV[part]
        torch.amax(logits_bV, 1, out=peak_n[part])
        peak_n[part].masked_fill_(peak_n[part] == -math.inf, 0)
        logits_bV -= peak_n[part, None]
        exponentials_bV = logits_bV.exp()
        torch.sum(exponentials_bV, 1, out=sum_n[part])
        # The lowest finite number for -inf, whose product with 0 is no number.
        logits_bV.clamp_(min=torch.finfo(logits_bV.dtype).min)
        gap_n[part] = torch.linalg.vecdot(exponentials_bV, logits_bV)
        logits_bV.copy_(exponentials_bV)
    return peak_n, sum_n, gap_n


def _entropy(log_q_nO: Tensor, mean_log_other_n: Tensor) -> Tensor:
    """(n,) entropy over the whole vocabulary, in nats, from the outcomes and the mean log-probability within the others."""
    q_nO = log_q_nO.exp()
    log_q_nO = torch.cat([log_q_nO[:, :-1], mean_log_other_n[:, None]], 1)
    return -(q_nO * log_q_nO.masked_fill(q_nO == 0, 0)).sum(-1)


def _widens(factor: Tensor) -> bool:
    """Whether the device multiplies 16-bit numbers into 32-bit ones."""
    return factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of two matrices of one type, in the type of `out`."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if _widens(left):
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left @ right)
