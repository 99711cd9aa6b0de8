"""Memory of a step that is walked through without memory: the real model and the kit's own loss on tensors that have a size and no content.

The model is built with few layers, once with half as many as the other time, and what a step takes is extended by depth, in which it is
linear: so the longest row and the largest model take seconds. What lies on a device is counted by storages, each once, as they come and go.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, masking_utils

from distill.losses import chunked
from distill.losses.chunked import ChunkedLoss, Head
from distill.losses.sparse import SparseTargets
from distill.models.adapters import freeze_unread, lora_config
from distill.models.heads import backbone, head_of
from distill.models.miniature import shallow
from distill.planning.sizes import Asked, Walk
from distill.recipe.models import FullFinetune, LoraAdapter

_BETWEEN = 2**22  # logits that are worked on at once between the products
_BLOCK = 512  # bytes: an allocator gives multiples of them


class Live(TorchDispatchMode):
    """Bytes of all storages that were made inside and are still there: now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._there: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Does not count what was there before, whatever is done to it in place."""
        self._there |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def peak_since(self) -> int:
        """The most there was since this was asked for before."""
        most, self.peak = self.peak, self.now
        return most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts what an operation has made."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._there:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._there.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._there.discard(key)
        self.now -= size


class Counts(NamedTuple):
    """Numbers of weights."""

    all: int
    """Of the model, tied ones once, without an adapter."""
    trained: int
    """Of the adapter, or of all that is trained."""
    linear: int
    """That nf4 packs: in linear layers, the head aside."""
    layer: int
    """Of the largest layer, which sharded training gathers at once."""
    ends: int
    """Of embedding and head, tied ones once."""
    largest: int
    """Of the largest matrix that nf4 packs."""


def built(config: PretrainedConfig, dtype: torch.dtype, adapter: LoraAdapter | FullFinetune | None, eager: bool = False) -> PreTrainedModel:
    """A model without memory, what is not trained frozen; None for a model that only reads.

    Args:
        config: Of it; left as it is.
        dtype: Of its weights.
        adapter: What is trained.
        eager: Whether attention is computed by plain products, which keep a matrix of all positions.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="eager" if eager else None,
            trust_remote_code=bool(getattr(config, "auto_map", None)),
        )
    model.requires_grad_(adapter is not None and adapter.type == "full")
    if adapter is not None:
        freeze_unread(model)
    if adapter is not None and adapter.type == "lora":
        get_peft_model(model, lora_config(adapter, model), low_cpu_mem_usage=True)
    return model


def counts(config: PretrainedConfig, adapter: LoraAdapter | FullFinetune | None) -> Counts:
    """Of a model by its config, all layers built, without memory.

    Args:
        config: Of the whole model.
        adapter: What is trained of it.
    """
    plain = built(config, torch.bfloat16, None)
    total = sum(weight.numel() for weight in plain.parameters())
    ends: dict[int, Any] = {
        id(part.weight): part.weight for part in (plain.get_input_embeddings(), plain.get_output_embeddings()) if part is not None
    }
    linear = [module.weight.numel() for module in plain.modules() if type(module) is nn.Linear and id(module.weight) not in ends]
    blocks = [block for blocks in plain.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]
    layer = max((sum(weight.numel() for weight in block.parameters()) for block in blocks), default=0)
    trained = 0
    if adapter is not None:
        trained = sum(weight.numel() for weight in built(config, torch.bfloat16, adapter).parameters() if weight.requires_grad)
    return Counts(total, trained, sum(linear), layer, sum(weight.numel() for weight in ends.values()), max(linear, default=0))


def walk(config: PretrainedConfig, asked: Asked) -> Walk:
    """What a step takes beside weights, their gradients and the optimizer, in bytes.

    Args:
        config: Of the whole model.
        asked: Of the step.
    """
    number = int(config.get_text_config(decoder=True).num_hidden_layers)
    depths = [depth for depth in (2, 4) if depth < number] if number > 4 else []
    if len(depths) < 2:
        return _walk(config, asked)
    low, high = (_walk(shallow(config, depth), asked) for depth in depths)
    return low.extended(high, (number - depths[0]) / (depths[1] - depths[0]))


def _walk(config: PretrainedConfig, asked: Asked) -> Walk:
    model = built(config, getattr(torch, asked.dtype), asked.adapter, asked.eager)
    with FakeTensorMode(), _without_content(), torch.random.fork_rng(devices=[]):
        _make_fake(model)
        ids_BT = torch.ones(asked.rows, asked.tokens, dtype=torch.long)
        return step(model, ids_BT, asked) if asked.adapter is not None else _read(model, ids_BT, asked)


@contextmanager
def _without_content() -> Iterator[None]:
    """Inside, nothing asks for the content of tensors.

    transformers does not look whether rows are packed, since of tensors without content it would believe it, and mask them; and the loss
    takes more positions between its products than on a CPU, one there, four thousand times over: it costs at most some 32 MiB too much.
    """
    packed, blocks = masking_utils.find_packed_sequence_indices, chunked._BLOCK_ELEMENTS
    masking_utils.find_packed_sequence_indices, chunked._BLOCK_ELEMENTS = lambda position_ids: None, {"cpu": _BETWEEN}
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, chunked._BLOCK_ELEMENTS = packed, blocks


def _make_fake(model: nn.Module) -> None:
    """Puts tensors of the same sizes in the place of all weights, as if they were on a device."""
    made: dict[int, Any] = {}

    def stand_in(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            kept.update({name: stand_in(tensor) for name, tensor in kept.items() if tensor is not None})


def step(model: PreTrainedModel, ids_BT: Tensor, asked: Asked) -> Walk:
    """Forward, loss and backward of one pass, every token supervised, gradients of an earlier pass being there.

    Args:
        model: With its adapter, if it has one; of tensors with content or without.
        ids_BT: Tokens.
        asked: Of the step.
    """
    model.train()
    if asked.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if asked.adapter is not None and asked.adapter.type == "lora":
            model.enable_input_require_grads()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    live = Live()
    live.leave_out([*model.parameters(), *model.buffers(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    compute = getattr(torch, asked.compute)
    with live:
        with torch.autocast("cpu", compute, enabled=compute != torch.float32):
            hidden_BTH = backbone(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
            stored, forward = live.now, live.peak_since()
            loss = _loss(model, hidden_BTH[:, :-1].flatten(0, 1), asked)
            del hidden_BTH
        in_loss = live.peak_since()
        loss.backward()
    return Walk(stored, forward, in_loss, live.peak_since())


def _loss(model: PreTrainedModel, hidden_NH: Tensor, asked: Asked) -> Tensor:
    """The kit's loss on all positions, without its checks, which would ask for the content of tensors."""
    number, head = len(hidden_NH), head_of(model)
    rows_N = torch.arange(number)
    objective = asked.objective
    assert objective is not None  # only reading goes without
    width = 0 if objective.kind == "chosen_token" else asked.candidates
    targets = SparseTargets(
        objective.kind,
        torch.zeros(number, width, dtype=torch.int32),
        torch.zeros(number, max(width, 1)),
        torch.zeros(number) if objective.kind == "top_k" else None,
    )
    plain = Head(
        head.weight_VH.detach(),
        None if head.bias_V is None else head.bias_V.detach(),
        head.weight_VH.shape[0],
        head.logit_scale,
        head.softcap,
    )
    chunk = max(64, asked.buffer // len(head.weight_VH) // 64 * 64)
    labels_N = torch.zeros(number, dtype=torch.long)
    found: Any = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NH[rows_N], head.weight_VH, head.bias_V, plain, objective, targets, labels_N, rows_N, None, None, chunk, True
    )
    total: Tensor = found[0]
    return total


@torch.no_grad()
def _read(model: PreTrainedModel, ids_BT: Tensor, asked: Asked) -> Walk:
    """A pass that keeps keys and values if asked."""
    model.eval()
    live = Live()
    live.leave_out([*model.parameters(), *model.buffers()])
    with live:
        found = backbone(model)(input_ids=ids_BT, use_cache=asked.caches)
        hidden_NH = found.last_hidden_state[:, -1]
        cache = found.past_key_values if asked.caches else None
        del found
        hidden_NH = hidden_NH.clone()
        kept = live.now if asked.caches else 0
        del cache
    return Walk(kept, live.peak_since(), 0, 0)
