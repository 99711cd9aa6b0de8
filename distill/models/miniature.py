"""A config of the same architecture, small: what a rehearsal on random weights is run on.

Made by trial, since each family names its pattern of layers in its own way: a model is built without memory (on torch's
`meta` device), its layers are sorted by what they are made of, and one of each kind is kept.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Hashable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from distill.errors import ModelError

Structure = frozenset[Hashable]

_WIDTH, _MULTIPLE = 64, 8  # of the hidden states: at least, and divisible by
_HEADS_LEFT = (2, 4, 8, 16, None)  # tried in this order; null leaves the widths
_LARGE = 3e8  # weights: such a model is only built
_RANK = 16
_EXPERTS = 4
_ROUTED = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_dense_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts", "moe_top_k")
_HEADS = ("num_attention_heads", "num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads", "num_global_key_value_heads")
_WIDTHS = (
    *("hidden_size", "intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("shared_intermediate_size", "dense_intermediate_size", "ffn_hidden_size", "embedding_size", "embedding_dim", "block_ff_dim"),
    *("word_embed_proj_dim", "attention_hidden_size", "lru_width", "mamba_d_ssm", "mamba_n_heads", "num_heads", "mamba_num_heads"),
    *("linear_num_value_heads", "linear_num_key_heads"),
)
_RANKS = ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input", "laurel_rank", "time_step_rank")
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers")
_DEPTHS = ("num_blocks",)
_LAST = ("num_kv_shared_layers",)
_PLACES = ("layers", "indices", "indexes", "idx", "idxs", "layer_ids")  # how lists of layers end
_PATTERN = "pattern"  # how a text ends that has a letter for each layer
_OWN_NUMBER = re.compile("layer_id|index|idx")


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """A copy with one layer of every kind that the config has, few experts and narrow layers; its vocabulary is kept.

    Kinds are told apart by the modules of a layer, their settings and the config's own lists: attention over a window and over
    all, dense and routed, attention and state space. Where a pattern can't be thinned out, the first layers are kept up to the
    last new kind. Parts of a config (text, vision, audio) are treated alike. Nothing is made smaller that then can't be built, or
    computes nothing; the worst that comes back is a copy.

    Args:
        config: Of a causal language model of transformers; left as it is.
    """
    small = copy.deepcopy(config)
    for part in _parts(small):
        _thin_out(small, part)
    for heads in _HEADS_LEFT:
        narrow = copy.deepcopy(small)
        if _computes(narrow, heads):
            return narrow
    return small


def shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy with the first so many layers of every part, at their full width; parts with fewer are left.

    Args:
        config: Of a causal language model of transformers; left as it is.
        layers: Number of layers.
    """
    short = copy.deepcopy(config)
    for part in _parts(short):
        if part.num_hidden_layers > layers:
            _keep(part, list(range(layers)), part.num_hidden_layers)
    return short


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The config and those inside it which have layers."""
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)
    if isinstance(_get(config, "num_hidden_layers"), int):
        yield config


def _get(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):  # some derive it from what is not there
        return None


def _build(config: PretrainedConfig, device: str) -> PreTrainedModel:
    # Random weights must not move the seed of whoever asks.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        copied = copy.deepcopy(config)  # building writes into it
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copied, trust_remote_code=bool(getattr(config, "auto_map", None)), dtype=torch.float32
        )
        model.eval()
        return model


def _thin_out(whole: PretrainedConfig, part: PretrainedConfig) -> None:
    """Leaves one layer of every kind in a part; two, where a family ties the weights of some to each other; else the first ones."""
    number, lists = part.num_hidden_layers, _lists(part)
    made_of = _layers_of(whole, part)
    if len(made_of) != number:
        return  # not the part that this model is made of
    kinds = [(found, *(_hashable(value[place]) for value in lists.values())) for place, found in enumerate(made_of)]
    once, twice = ([place for place, kind in enumerate(kinds) if kinds[:place].count(kind) < times] for times in (1, 2))
    before = dict(vars(part))
    for kept in sorted((once, twice, list(range(once[-1] + 1))), key=len):
        if len(kept) == number:
            continue
        _keep(part, kept, number)
        if set(_layers_of(whole, part)) == set(made_of):
            return
        vars(part).clear()
        vars(part).update(before)


def _keep(part: PretrainedConfig, kept: list[int], number: int) -> None:
    """Leaves some of its layers in a part, and what is said of them in its lists and counts."""
    lists = _lists(part)
    for name, value in list(vars(part).items()):
        if name in lists:
            thin = [value[place] for place in kept]
            vars(part)[name] = "".join(thin) if isinstance(value, str) else type(value)(thin)
        elif _are_places(name, value, number):
            vars(part)[name] = type(value)(kept.index(place) for place in value if place in kept)
        elif name in _FIRST and isinstance(value, int):
            vars(part)[name] = sum(place < value for place in kept)
        elif name in _LAST and isinstance(value, int):
            vars(part)[name] = sum(place >= number - value for place in kept)
    for name in ("num_hidden_layers", *_DEPTHS):
        if isinstance(_get(part, name), int):
            setattr(part, name, len(kept))


def _layers_of(whole: PretrainedConfig, part: PretrainedConfig) -> list[Structure]:
    """What each layer of a part is made of; nothing where it can't be built or has other layers than it says."""
    try:
        model = _build(whole, "meta")
    except Exception:  # whatever a family says to settings that don't fit each other
        return []
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == part.num_hidden_layers and _belongs(model, layers, part):
            return [frozenset(_structure(layer)) for layer in layers]
    return []


def _belongs(model: PreTrainedModel, layers: nn.ModuleList, part: PretrainedConfig) -> bool:
    """Whether the innermost model around some layers is the one that a config describes."""
    around = [found for found in model.modules() if isinstance(found, PreTrainedModel) and any(one is layers for one in found.modules())]
    return around[-1].config.model_type == part.model_type


def _structure(layer: nn.Module) -> Iterator[Hashable]:
    """Class, shapes and settings of each module of a layer; of a list of modules what they are, not how many."""
    for full, module in layer.named_modules():
        name = re.sub(r"\d+", "*", full)
        yield name, type(module).__name__
        yield from ((name, key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False))
        for key, value in vars(module).items():
            if isinstance(value, bool | int | str | None) and not key.startswith("_") and not _OWN_NUMBER.search(key):
                yield name, key, bool(value) if isinstance(value, int) else value  # a window or none, rotated or not


def _lists(part: PretrainedConfig) -> dict[str, Any]:
    """What a part says of each of its layers, by name."""
    number = part.num_hidden_layers
    found = {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, list | tuple) or (isinstance(value, str) and name.endswith(_PATTERN))
    }
    return {name: value for name, value in found.items() if value and len(value) == number and not _are_places(name, value, number)}


def _are_places(name: str, value: Any, number: int) -> bool:
    """Whether a list names some of so many layers."""
    if not isinstance(value, list | tuple) or not name.endswith(_PLACES) or not all(type(place) is int for place in value):
        return False
    return list(value) == sorted(set(value)) and all(0 <= place < number for place in value)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _narrow(config: PretrainedConfig, heads_left: int) -> None:
    """Divides all widths and numbers of heads by one number; the width of a head, on which positions depend, is left.

    Raises:
        ModelError: the widths can't be divided so.
    """
    heads, width = _get(config, "num_attention_heads"), _get(config, "hidden_size")
    if not isinstance(heads, int):  # a state space alone
        heads, heads_left = width, 2 * heads_left * _WIDTH // 4
    scale = Fraction(heads_left, heads)
    tied = not isinstance(_get(config, "head_dim"), int)  # a head is as wide as the hidden states leave it
    if scale > 1 or scale * width < _WIDTH or (tied and (scale * width) % _MULTIPLE):
        raise ModelError(f"{config.model_type}: {width} hidden dimensions of {heads} heads can't be divided to {heads_left} heads.")
    for name in (*_HEADS, *_WIDTHS):
        value, multiple = _get(config, name), 1 if name.endswith("heads") else _MULTIPLE
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, _divided(value, scale, multiple))
        elif isinstance(value, list | tuple):
            setattr(config, name, type(value)(_divided(width, scale, multiple) for width in value))
    for name in _RANKS:
        value = _get(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, min(value, _RANK))


def _divided(value: int, scale: Fraction, multiple: int) -> int:
    return max(1, math.floor(value * scale / multiple)) * multiple


def _few_experts(config: PretrainedConfig) -> None:
    """Leaves four experts, of which at most two are chosen."""
    for names, most in ((_ROUTED, _EXPERTS), (_CHOSEN, _EXPERTS // 2), (("n_group",), 2), (("topk_group",), 1)):
        for name in names:
            value = _get(config, name)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(config, name, min(value, most))


@torch.no_grad()
def _computes(config: PretrainedConfig, heads: int | None) -> bool:
    """Makes a config narrower; whether a model of random weights can then be built and read a few tokens (a large one only the first)."""
    try:
        text = config.get_text_config(decoder=True)
        _few_experts(text)
        if heads is not None:
            _narrow(text, heads)
        size = sum(weight.numel() for weight in _build(config, "meta").parameters())
        if size < _LARGE:
            _build(config, "cpu")(input_ids=torch.arange(3, 11)[None], use_cache=False)
    except Exception:  # whatever a family says to widths that don't fit each other
        return False
    return True
