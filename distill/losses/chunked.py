"""The loss of many positions through the head, a chunk of positions at a time, with the gradients taken on the way.

One (n, V) buffer of float32 serves all chunks. The gradient by the logits is made of the logits that are still in it, so
it costs no second product with the head as recomputing it in the backward would; the backward only multiplies by the
gradient that comes in. Between the products the vocabulary is passed over by torch's own operations, which turn the buffer
into exponentials and then into the gradient, or, where Triton runs, by two kernels (`losses.kernels`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.losses import kernels
from distill.losses.budget import buffer_elements
from distill.losses.objective import Teacher, position_gradient, position_losses, prepare
from distill.losses.settings import Objective
from distill.losses.sparse import SparseTargets

# Of float32, half as much again for the gradient in 16 bits: eight hundred positions of a vocabulary of 152,000, from where on a
# GPU is busier than the processor that launches its work. (TRL's tiles take 320 MiB.)
LARGEST_BUFFER = 2**27
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
    kl_lower_bound: Tensor
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
        rows_M: Tensor,
        position_weights_N: Tensor | None,
        falls_back_N: Tensor | None,
        chunk_size: int | None,
        with_gradient: bool,
    ) -> tuple[Tensor, ...]:
        """The `Sums` over `rows_M`. `head` holds the same tensors as `weight_VH` and `bias_V`, which are there for their gradients."""
        needs = [needed and with_gradient for needed in ctx.needs_input_grad[:3]]
        work = _Work(hidden_NH, rows_M, head, objective, needs, chunk_size)
        sums = torch.zeros(len(Sums._fields), dtype=work.dtype, device=hidden_NH.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start, parts in work.groups(targets.ids_NK.shape[1]):
                rows_m = rows_M[start : start + parts[-1].stop]
                weights_m = None if position_weights_N is None else position_weights_N[rows_m].to(work.dtype)
                falls_back_m = None if falls_back_N is None else falls_back_N[rows_m]
                taken = targets.take(rows_m)
                teacher = prepare(objective, taken, head.vocab_size, work.dtype, falls_back_m)
                slots = Slots.of(taken.ids_NK, teacher.filled_nK, labels_N[rows_m], work.dtype)
                found = [work.chunk(start, part, slots.part(part), teacher.part(part), weights_m) for part in parts]
                sums += _sums(objective, teacher, slots, Student(*map(torch.cat, zip(*found, strict=True))), weights_m)
        ctx.scale = work.scale
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        ctx.save_for_backward(work.whole_grad_hidden(), work.grad_weight_VH, work.grad_bias_V)
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
        return *by_input, None, None, None, None, None, None, None, None, None


class Slots(NamedTuple):
    """The tokens that count by themselves at n positions: the candidates, and the written token."""

    ids_nS: Tensor
    """(n, K + 1). Padding stands for the written token once more: it is read nowhere and adds zeros there."""
    absent_nS: Tensor
    """Where there is padding, or the written token is a candidate already."""
    is_written_nO: Tensor
    """(n, K + 2) where the written token stands, once a position; all others are the last."""
    written_nO: Tensor
    """The same as numbers."""

    @staticmethod
    def of(ids_nK: Tensor, filled_nK: Tensor, labels_n: Tensor, dtype: torch.dtype) -> Slots:
        """Those of some positions, the numbers in a type."""
        labels_n1 = labels_n[:, None]
        is_label_nK = filled_nK & (ids_nK == labels_n1)
        is_new_n1 = ~is_label_nK.any(1, keepdim=True)
        ids_nS = torch.cat([torch.where(filled_nK, ids_nK, labels_n1), labels_n1], 1).long()
        is_written_nO = torch.cat([is_label_nK, is_new_n1, torch.zeros_like(is_new_n1)], 1)
        return Slots(ids_nS, ~torch.cat([filled_nK, is_new_n1], 1), is_written_nO, is_written_nO.to(dtype))

    def part(self, rows: slice) -> Slots:
        """Some of the positions."""
        return Slots(*(each[rows] for each in self))


class Student(NamedTuple):
    """What the student thinks at n positions."""

    log_q_nO: Tensor
    """(n, K + 2) log-probabilities of the candidates, of the written token if it is none of them, and of all others together."""
    sum_n: Tensor
    """Of the others' probabilities, as multiples of the highest of them; 0 where there are none."""
    gap_n: Tensor
    """Of the same, each times the logarithm of that multiple."""
    first_n: Tensor
    """Slot of the one most probable token of all; -1 where it has none, or where several are."""


class _Work:
    """The buffers of one call: what is accumulated over chunks, and what is overwritten by each."""

    def __init__(
        self, hidden_NH: Tensor, rows_M: Tensor, head: Head, objective: Objective, needs: list[bool], chunk_size: int | None
    ) -> None:
        device = hidden_NH.device
        compute = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden_NH.dtype
        self.dtype = torch.float64 if compute == torch.float64 else torch.float32
        self.scale = _FLOAT16_SCALE if compute == torch.float16 else 1.0
        self._chunk_size = chunk_size or max(64, buffer_elements(device, LARGEST_BUFFER) // len(head.weight_VH) // 64 * 64)
        self._head, self._objective = head, objective
        self._rows_M, self._num_rows = rows_M, len(hidden_NH)
        self._hidden_MH = (hidden_NH if len(rows_M) == len(hidden_NH) else hidden_NH[rows_M]).to(compute)
        # The rows that pad a head to a size that devices like go through the products with the others.
        self._weight_VH, self._bias_V = head.weight_VH.to(compute), head.bias_V
        self._logits_nV = torch.empty((min(self._chunk_size, len(rows_M)), len(head.weight_VH)), dtype=self.dtype, device=device)
        self._needs_gradient = any(needs)
        self._fused = self.dtype == torch.float32 and kernels.available(device)
        slopes = head.softcap is not None and self._needs_gradient and not self._fused
        self._slope_nV = torch.empty_like(self._logits_nV) if slopes else None
        # The gradient in the type of the products. Of the logits' own type it takes their place.
        own = self._fused and self._needs_gradient and compute != self.dtype
        self._gradient_nV = torch.empty(self._logits_nV.shape, dtype=compute, device=device) if own else self._logits_nV
        hidden, weight, bias = needs[0], needs[1], needs[2] and head.bias_V is not None
        self._grad_hidden_MH = torch.empty(self._hidden_MH.shape, dtype=self.dtype, device=device) if hidden else None
        # Of the whole parameters, padding included: filling up at the end would take the memory twice.
        self.grad_weight_VH = torch.zeros(head.weight_VH.shape, dtype=self.dtype, device=device) if weight else None
        self.grad_bias_V = torch.zeros(len(head.weight_VH), dtype=self.dtype, device=device) if bias else None

    def groups(self, candidates: int) -> Iterator[tuple[int, list[slice]]]:
        """Groups of chunks: the position that each begins at, and its chunks counted from there.

        What is the same for every chunk is done once a group, which saves launches; a group's candidates take a fraction of the buffer.
        """
        chunks = max(1, self._logits_nV.numel() // (16 * (candidates + 2) * self._chunk_size))
        size = chunks * self._chunk_size
        for start in range(0, len(self._rows_M), size):
            end = min(size, len(self._rows_M) - start)
            yield start, [slice(place, min(place + self._chunk_size, end)) for place in range(0, end, self._chunk_size)]

    def whole_grad_hidden(self) -> Tensor | None:
        """(N, H) of all positions, those not supervised included."""
        if self._grad_hidden_MH is None or len(self._grad_hidden_MH) == self._num_rows:
            return self._grad_hidden_MH
        whole_NH = self._grad_hidden_MH.new_zeros(self._num_rows, self._grad_hidden_MH.shape[1])
        whole_NH[self._rows_M] = self._grad_hidden_MH
        return whole_NH

    def chunk(self, start: int, part: slice, slots: Slots, teacher: Teacher, weights_m: Tensor | None) -> Student:
        """What the student thinks at a part of the group that begins at `start`; adds its gradients to the accumulated ones."""
        rows = slice(start + part.start, start + part.stop)
        logits_nV = self._project(self._hidden_MH[rows])
        at_slots_nS = logits_nV.gather(1, slots.ids_nS)
        logits_nV.scatter_(1, slots.ids_nS, -math.inf)
        peak_n, sum_n, gap_n = (kernels.statistics if self._fused else _exponentials)(logits_nV)
        # Without candidates the written token is none of them, and so never absent.
        logits_nS = at_slots_nS.masked_fill(slots.absent_nS, -math.inf) if slots.ids_nS.shape[1] > 1 else at_slots_nS
        top_n, first_n = logits_nS.max(1)
        is_one_n = ((logits_nS == top_n[:, None]).sum(1) == 1) & ((peak_n < top_n) | (sum_n == 0))
        logits_nO = torch.cat([logits_nS, (peak_n + sum_n.log())[:, None]], 1)
        # Relative to the highest first: at a logit of 40, float32 would round every probability by 4e-6.
        logits_nO -= logits_nO.amax(1, keepdim=True)
        log_q_nO = logits_nO.log_softmax(1)
        if self._needs_gradient:
            gradient_nO = position_gradient(self._objective, teacher, log_q_nO, slots.is_written_nO, slots.written_nO)
            scale = self._head.logit_scale * self.scale
            if weights_m is not None:
                gradient_nO = gradient_nO * (weights_m[part, None] * scale)
            elif scale != 1:
                gradient_nO = gradient_nO * scale
            factor_n = gradient_nO[:, -1] / sum_n
            if not self._fused:  # the kernel gives 0 where there are no others
                factor_n.masked_fill_(sum_n == 0, 0)
            spread = self._spread_fused if self._fused else self._spread
            self._accumulate(rows, spread(logits_nV, peak_n, factor_n, at_slots_nS, slots.ids_nS, gradient_nO[:, :-1]))
        return Student(log_q_nO, sum_n, gap_n, first_n.masked_fill(~is_one_n, -1))

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
        if self._head.vocab_size < logits_nV.shape[1]:
            logits_nV[:, self._head.vocab_size :] = -math.inf
        return logits_nV

    def _spread(
        self, exponentials_nV: Tensor, peak_n: Tensor, factor_n: Tensor, at_slots_nS: Tensor, slots_nS: Tensor, gradient_nS: Tensor
    ) -> Tensor:
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

    def _accumulate(self, rows: slice, gradient_nV: Tensor) -> None:
        hidden_nH = self._hidden_MH[rows]
        if self.grad_bias_V is not None:
            self.grad_bias_V += gradient_nV.sum(0, dtype=self.dtype)
        narrow_nV = gradient_nV.to(hidden_nH.dtype)
        if self._grad_hidden_MH is not None:
            _matmul(narrow_nV, self._weight_VH, self._grad_hidden_MH[rows])
        if self.grad_weight_VH is None:
            return
        if _widens(narrow_nV):
            torch.addmm(self.grad_weight_VH, narrow_nV.t(), hidden_nH, out_dtype=self.dtype, out=self.grad_weight_VH)
        else:
            # Rounding each chunk's product to 16 bits before summing would bias the sum.
            self.grad_weight_VH.addmm_(gradient_nV.t().to(self.dtype), hidden_nH.to(self.dtype))


def _sums(objective: Objective, teacher: Teacher, slots: Slots, student: Student, weights_M: Tensor | None) -> Tensor:
    """The `Sums` as one tensor, of what the chunks found."""
    log_q_nO, has_others_n = student.log_q_nO, student.sum_n > 0
    log_top_other_n = (log_q_nO[:, -1] - student.sum_n.log()).masked_fill(~has_others_n, -math.inf)
    mean_log_other_n = log_top_other_n + (student.gap_n / student.sum_n).masked_fill(~has_others_n, 0)
    losses = position_losses(objective, teacher, log_q_nO, slots.is_written_nO, student.first_n)
    kd_n, nll_n = (term_n if weights_M is None else term_n * weights_M for term_n in (losses.kd_n, losses.nll_n))
    by_name = {
        "loss": objective.kd_weight * kd_n + teacher.nll_weight_n * nll_n,
        "kd": kd_n,
        "nll": nll_n,
        "kl_lower_bound": losses.kl_lower_bound_n,
        "log_ratio": losses.log_ratio_n,
        "entropy": _entropy(log_q_nO, mean_log_other_n),
        "agreements": losses.agrees_n,
        "hits": slots.is_written_nO.gather(1, student.first_n.clamp(min=0)[:, None])[:, 0] & (student.first_n >= 0),
        "targets": teacher.has_target_n,
    }
    return torch.stack([by_name[name].sum(dtype=log_q_nO.dtype) for name in Sums._fields])


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
