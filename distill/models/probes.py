"""What is taken for granted of a model, tried on it with a few tokens: its head, and that packed rows don't see each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.errors import ModelError
from distill.models.heads import backbone, head_of, logits_of
from distill.models.miniature import miniature

Collate = Callable[[list[dict[str, Any]]], Any]

_ROWS = (11, 7)  # tokens of the rows that are packed, the second of which is looked at
_HEAD = (1e-3, 2e-2)  # largest deviation from the model's own logits, in float32 and in less, as a share of their spread
_NEIGHBOUR = (2e-5, 5e-3)  # the same for another row in front: nothing but which numbers are added up together may differ
_ALONE = (1e-4, 0.1)  # the same for no row in front: other shapes round otherwise
_LOUD = 30.0  # spread of a stand-in's logits: a cap shows only where they are large


def check_head(model: PreTrainedModel) -> None:
    """Compares the logits that the kit makes of hidden states, in scoring and in its losses, with the model's own.

    Raises:
        ModelError: they differ, so that both would be of another distribution than the model's.
    """
    ids_BT = _tokens(model, sum(_ROWS))[None]
    with _quiet(model):
        own = model(input_ids=ids_BT, use_cache=False).logits[0]
        hidden = backbone(model)(input_ids=ids_BT, use_cache=False).last_hidden_state[0]
        ours = logits_of(hidden, head_of(model))
    if own.isnan().any():
        return  # whoever works with it finds that out, and says more
    found = _deviation(ours, own[:, : ours.shape[1]])
    if not found <= _limit(model, _HEAD):
        raise ModelError(
            f"{_name(model)}: its logits are not those of its head: they differ by {found:.1%} of their spread from hidden states times "
            "output embeddings, with the factor and cap that its config names. Take another model."
        )


def check_packing(model: PreTrainedModel, collate: Collate) -> None:
    """Compares a row behind another one, packed as in training, with the same row alone and behind a third.

    Args:
        model: Not wrapped by peft.
        collate: Makes a batch of rows of `input_ids`, `labels` and `seq_lengths`, without padding.

    Raises:
        ModelError: the row sees its neighbour.
    """
    tokens = _tokens(model, 2 * _ROWS[0] + _ROWS[1]).tolist()
    first, other, row = tokens[: _ROWS[0]], tokens[_ROWS[0] : 2 * _ROWS[0]], tokens[2 * _ROWS[0] :]
    advice = "Set train.trainer_args.packing: false (and leave padding_free out)."
    try:
        with _quiet(model):
            alone, behind, behind_other = (_read(model, collate, before, row) for before in ([], first, other))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # which transformers has for kernels that are not here
        raise ModelError(f"{_name(model)}: can't be trained on packed rows here: {str(error).strip().rstrip('.')}. {advice}") from None
    found = max(_deviation(behind, behind_other) / _limit(model, _NEIGHBOUR), _deviation(behind, alone) / _limit(model, _ALONE))
    if not found <= 1:
        raise ModelError(
            f"{_name(model)}: rows that are packed see each other: a neighbour moves the logits of a row by "
            f"{(behind - alone).abs().max().item():.2g}. {advice}"
        )


def stand_in(model: PreTrainedModel) -> PreTrainedModel:
    """A small model of the same architecture with random weights, in float32 on the CPU: for one whose weights are not whole here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # By its class: `from_config` would take this one apart, too, where DeepSpeed does so.
        found: PreTrainedModel = type(model)(miniature(model.config)).float()
        found.eval()
        head: Any = found.get_output_embeddings()
        hidden = backbone(found)(input_ids=_tokens(found, 8)[None], use_cache=False).last_hidden_state
        spread = torch.nn.functional.linear(hidden, head.weight).std()
        with torch.no_grad():
            head.weight *= _LOUD / spread.clamp(min=1e-6)
    return found


def is_whole(model: torch.nn.Module) -> bool:
    """Whether a model can be run as it is: all its weights are here (DeepSpeed and FSDP take them apart)."""
    return all(weight.numel() and weight.device.type != "meta" and not hasattr(weight, "ds_id") for weight in model.parameters())


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Ordinary tokens, none that the config gives a meaning of its own."""
    config = model.config.get_text_config()
    meant = {value for part in (config, model.config) for name, value in vars(part).items() if name.endswith(("token_id", "token_index"))}
    plain = [index for index in range(min(config.vocab_size, 4096)) if index not in meant]
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))[:count]
    device = next(model.parameters()).device
    return torch.tensor([plain[place % len(plain)] for place in order.tolist()] * (1 + count // len(order)))[:count].to(device)


def _read(model: PreTrainedModel, collate: Collate, before: list[int], row: list[int]) -> Tensor:
    """(T, V) logits of a row behind another."""
    ids, lengths = before + row, [len(part) for part in (before, row) if part]
    batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    device = next(model.parameters()).device
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items() if name != "labels"}
    found: Tensor = model(**given, use_cache=False).logits[0, len(before) :]
    return found.float()


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients, dropout and traces in the model's mode or the seed."""
    training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield
    model.train(training)


def _limit(model: PreTrainedModel, limits: tuple[float, float]) -> float:
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False) and torch.get_float32_matmul_precision() == "highest"
    return limits[0] if exact else limits[1]


def _deviation(found: Tensor, right: Tensor) -> float:
    """Root of the mean square of the difference, as a share of the spread of what is right."""
    found, right = found.float(), right.float()
    return float((found - right).square().mean().sqrt() / (right - right.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-12))


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.config.name_or_path})" if model.config.name_or_path else type(model).__name__
