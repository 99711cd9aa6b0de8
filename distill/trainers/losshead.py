"""The loss inside the model's own forward, so that DDP, FSDP and DeepSpeed see a plain module that returns it."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from distill.losses.distillation import DistillationLoss, distillation_loss, likelihood_loss
from distill.losses.settings import Objective
from distill.models.chat import IGNORE
from distill.models.heads import backbone, head_of
from distill.trainers.targets import StepTargets


class BatchSums:
    """Sums over a batch's supervised tokens, as one float64 tensor, so that they are kept and exchanged at once.

    A plain class, so that FSDP does not round them; see `StepTargets`.

    Args:
        found: The loss of the batch; what its targets can't tell has no name here.
        targets: Of its tokens; None for none.

    Beside the sums there are `weight`, that of all supervised tokens, and `target_weight`, of those with a target: by them `nll` and
    `kd` are averaged, since their terms are weighted.
    """

    def __init__(self, found: DistillationLoss, targets: StepTargets | None = None) -> None:
        known = {name: value for name, value in vars(found).items() if value is not None}
        known |= {"weight": found.num_positions, "target_weight": found.num_targets}
        if targets is not None and targets.weights_M is not None:
            known["weight"] = targets.weights_M.sum()
            known["target_weight"] = targets.weights_M[targets.sparse.filled_NK().any(1)].sum()
        device = found.loss.device
        self.names = list(known)
        self.values = torch.stack([torch.as_tensor(value, dtype=_exact(device), device=device).detach() for value in known.values()])

    @classmethod
    def of_values(cls, names: list[str], values: list[float], device: torch.device) -> BatchSums:
        """Sums as they were written down."""
        found = cls.__new__(cls)
        found.names, found.values = names, torch.tensor(values, dtype=_exact(device), device=device)
        return found

    def of(self, name: str) -> Tensor:
        """One of them, a tensor without dimensions."""
        return self.values[self.names.index(name)]


def _exact(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # Apple's and Intel's may have none


class Divisor:
    """What a loss is divided by; a plain class for the same reason.

    Args:
        value: Without dimensions.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value


def add_loss_head(model: PreTrainedModel, vocab_size: int | None = None, objective: Objective | None = None) -> None:
    """Lets `model(..., labels=..., trace_loss=True)` return the loss instead of logits: the likelihood, or that on targets.

    The result is a dictionary: `loss`, which alone has a gradient; `num_positions`; and `sums`, a `BatchSums`. The loss is divided by
    `divisor`, a `Divisor`, or by the batch's own supervised tokens. That is done in here, since FSDP rounds what comes out, and the
    gradient that goes in, to the type of the weights; so the factor that goes in should be 1. Without `trace_loss` the forward is
    the one it was.

    Args:
        model: A causal language model, not wrapped by peft.
        vocab_size: Number of token ids, for the loss on targets; the likelihood takes every row of the head for a token, as
            the model's own loss does.
        objective: The loss of a batch that comes with `distillation=StepTargets`.
    """
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads its signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        trace_loss: bool = False,
        distillation: StepTargets | None = None,
        divisor: Divisor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not trace_loss:
            return plain(*args, **kwargs)
        labels_BT = kwargs.pop("labels")
        hidden_BTH = backbone(self)(*args, **kwargs).last_hidden_state[:, :-1]
        layer: Any = self.get_output_embeddings()
        labels_BT = labels_BT[:, 1:].to(layer.weight.device)
        # Both by the same places: a mask would be searched, and the device waited for, twice.
        places = (labels_BT != IGNORE).nonzero(as_tuple=True)
        hidden_NH, labels_N = hidden_BTH.to(labels_BT.device)[places], labels_BT[places]
        with maybe_gather_lm_head_ctx(layer.weight, layer.bias):  # DeepSpeed ZeRO-3 leaves the weight empty until then
            if distillation is None:
                found = likelihood_loss(hidden_NH, head_of(self), labels_N)
            else:
                assert objective is not None  # no batch has targets without it
                found = distillation_loss(
                    hidden_NH,
                    head_of(self, vocab_size),
                    labels_N,
                    distillation.sparse,
                    divergence=objective.divergence,
                    jsd_beta=objective.jsd_beta,
                    temperature=objective.temperature,
                    kd_weight=objective.kd_weight,
                    nll_weight=objective.nll_weight,
                    position_weights_N=distillation.weights_M,
                    falls_back_N=distillation.falls_back_M,
                )
        loss = found.loss / (max(found.num_positions, 1) if divisor is None else divisor.value)
        return {"loss": loss, "num_positions": found.num_positions, "sums": BatchSums(found, distillation)}

    model.forward = types.MethodType(forward, model)
