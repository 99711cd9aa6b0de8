"""Where LoRA goes: which layers of a model get an adapter, and which are left alone.

`all-linear` means the language model's linear layers and its experts, also where a family keeps those in one tensor. Left alone
are routers, what belongs to other senses (vision, audio), and layers that a family reads past an adapter.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill import embedded
from distill.errors import ModelError, RecipeError
from distill.models.heads import backbone
from distill.recipe.models import LoraAdapter, Student

ALL_LINEAR = "all-linear"
_ROUTER = re.compile(r"(?:^|[._])router(?:\.|$)")
_GATE = re.compile(r"(?:^|\.)(?:gate|wg|\w*expert_gate)(?:\.|$)")  # of experts, where there are any
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Coverage:
    """What of a model is adapted and what is not, by the names of layers, `*` for their numbers; embeddings and norms aside."""

    adapted: dict[str, int]
    """Number of weight tensors of that name with an adapter."""
    left: dict[str, int]
    """Number of those without."""
    share: float
    """Share of these weights, by their number, that have an adapter."""

    def __str__(self) -> str:
        named = [f"{name} x {count}" for name, count in self.adapted.items()]
        alone = [f"{name} x {count}" for name, count in self.left.items()]
        return f"{self.share:.1%} of the weights: {', '.join(named)}; " + (
            f"left alone: {', '.join(alone)}" if alone else "none left alone"
        )


def lora_config(adapter: LoraAdapter, model: PreTrainedModel) -> LoraConfig:
    """The recipe's adapter as peft describes it, with the layers of this model by name.

    Raises:
        RecipeError: a name in `target_modules` matches nothing, or a layer whose adapter would have no effect.
    """
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]  # only ever divided
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.target_modules,
        use_dora=adapter.use_dora,
        use_rslora=adapter.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    layers = _Layers(model)
    if adapter.target_modules == ALL_LINEAR:
        names = {name for name in layers.text if not layers.is_router(name) and name not in layers.bypassed}
        # peft can't put a decomposed adapter, or one with dropout, on a tensor that is no layer.
        plain = not adapter.use_dora and not adapter.lora_dropout
        return _on(config, names, layers.experts if plain else set(), layers, plain)
    if isinstance(adapter.target_modules, str):  # a pattern is taken as it is
        if not any(re.fullmatch(adapter.target_modules, name) for name in layers.every):
            raise RecipeError(_unmatched([adapter.target_modules], layers))
        return config
    return _listed(config, adapter, layers)


def coverage(model: nn.Module) -> Coverage:
    """What of a model with adapters is adapted."""
    adapted: Counter[str] = Counter()
    left: Counter[str] = Counter()
    weights = [0, 0]
    wrapped = {(layer.get_base_layer(), _parameter_of(layer)) for layer in model.modules() if isinstance(layer, LoraLayer)}
    ignored = set(_embeddings(model))
    for name, module in model.named_modules():
        if module in ignored or ".lora_" in name or "lora_embedding" in name or "lora_magnitude" in name:
            continue
        for key, weight in module.named_parameters(recurse=False):
            if len(_shape(weight)) < 2 or key.endswith("bias"):
                continue
            has = (module, key) in wrapped
            plain = name.replace("base_model.model.", "").replace(".base_layer", "")
            full = plain if key == "weight" else f"{plain}.{key}"
            (adapted if has else left)[re.sub(r"\.\d+(?=\.|$)", ".*", full)] += 1
            weights[has] += _shape(weight).numel() * (2 if type(weight).__name__ == "Params4bit" else 1)
    return Coverage(dict(adapted), dict(left), weights[1] / max(sum(weights), 1))


def planned_coverage(spec: Student) -> Coverage:
    """What of a student would be adapted, by its config alone: nothing is loaded.

    Raises:
        ModelError: the config can't be had, or no model be built of it.
        RecipeError: see `lora_config`.
    """
    assert spec.adapter.type == "lora"
    try:
        config = AutoConfig.from_pretrained(embedded.resolve(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise ModelError(f"{spec.model}: no model can be built of its config: {str(error).strip().splitlines()[0]}") from None
    return coverage(get_peft_model(model, lora_config(spec.adapter, model), low_cpu_mem_usage=True))


def freeze_unread(model: PreTrainedModel) -> None:
    """Freezes what text never passes, vision and audio: it would get no gradient, for which the processes of a launch would wait."""
    decoder = _decoder(model)
    if decoder is backbone(model):
        return
    inside = _name_of(model, decoder)
    heads: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    read = {id(weight) for part in heads if part is not None for weight in part.parameters()}
    for name, weight in model.named_parameters():
        if not name.startswith(inside) and id(weight) not in read:
            weight.requires_grad_(False)


class _Layers:
    """What of a model can have an adapter, by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        heads = set(_embeddings(model))
        self.every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module not in heads}
        inside = _name_of(model, _decoder(model))
        self.text = {name for name in self.every if name.startswith(inside)}
        """Linear layers of the language model."""
        numbers = {getattr(model.config.get_text_config(), name, None) for name in _EXPERTS} - {None}
        self._routes = bool(numbers)
        self.experts = {
            name
            for name, weight in model.named_parameters()
            if name.startswith(inside) and len(_shape(weight)) == 3 and _shape(weight)[0] in numbers
        }
        """Tensors that hold all experts of a layer."""
        self.parameters = {name for name, weight in model.named_parameters() if len(_shape(weight)) >= 2}
        self.bypassed = set(_bypassed(model)) & self.every
        """Layers whose weight the module around them reads itself, so that an adapter would have no effect."""

    def is_router(self, name: str) -> bool:
        """Whether a layer says where a token goes."""
        return _ROUTER.search(name) is not None or (self._routes and _GATE.search(name) is not None)


def _listed(config: LoraConfig, adapter: LoraAdapter, layers: _Layers) -> LoraConfig:
    """An adapter on named layers: of the language model, or of another sense where that has none of the name."""
    chosen: set[str] = set()
    missing = []
    peft_knows = _converted(config, layers)
    for name in adapter.target_modules:
        found = _matching(name, layers.text) or _matching(name, layers.every)
        if not found and name in (peft_knows.target_modules or ()):
            missing.append(name)
        chosen |= found
    if missing:
        raise RecipeError(_unmatched(missing, layers))
    if without := sorted(chosen & layers.bypassed):
        raise RecipeError(
            f"student.adapter.target_modules: {type(layers.model).__name__} reads the weight of {without[0]} past its adapter, which would "
            "have no effect. Leave it out."
        )
    experts = {name for name in layers.parameters if any(_matches(name, target) for target in peft_knows.target_parameters or ())}
    return _on(config, chosen, experts, layers, True)


def _on(config: LoraConfig, names: set[str], tensors: set[str], layers: _Layers, plain: bool) -> LoraConfig:
    """Puts an adapter on these layers and tensors; where peft would take a layer's name for that of old experts, on its tensor."""
    others = {name for name, _ in layers.model.named_modules()} - names
    targets = _suffixes(names, others)
    config.target_modules = sorted(targets)
    kept = set(_converted(config, layers).target_modules or ())
    renamed = {name for name in names if targets and not any(_matches(name, target) for target in kept)}
    if renamed and plain:
        tensors = tensors | {f"{name}.weight" for name in renamed if not hasattr(layers.model.get_submodule(name).weight, "quant_state")}
    config.target_modules = sorted(kept)
    everything = {name for name, _ in layers.model.named_parameters()}
    config.target_parameters = sorted(_suffixes(tensors, everything - tensors)) or None
    return config


def _converted(config: LoraConfig, layers: _Layers) -> LoraConfig:
    """What peft makes of targets in families whose experts had other names before."""
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, layers.model, None)
    except ValueError as error:
        raise RecipeError(f"student.adapter.target_modules: {error}") from None
    return converted


def _suffixes(names: set[str], others: set[str]) -> set[str]:
    """The shortest ends of names that no other name has."""
    taken = {end for name in others for end in _ends(name)}
    return {next((end for end in _ends(name) if end not in taken and not end[0].isdigit()), name) for name in names}


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matching(target: str, names: set[str]) -> set[str]:
    return {name for name in names if _matches(name, target)}


def _unmatched(missing: list[str], layers: _Layers) -> str:
    there = sorted(_suffixes(layers.text, {name for name, _ in layers.model.named_modules()} - layers.text))
    return (
        f"student.adapter.target_modules: {', '.join(missing)} matches no linear layer of {type(layers.model).__name__}. "
        f"It has {', '.join(there[:24])}{', ...' if len(there) > 24 else ''}."
    )


def _bypassed(model: nn.Module) -> Iterator[str]:
    children = {kind: _read_by_weight(kind) for kind in {type(module) for module in model.modules()}}
    for name, module in model.named_modules():
        for child in children[type(module)]:
            if isinstance(getattr(module, child, None), nn.Module):
                yield f"{name}.{child}"


def _read_by_weight(kind: type[nn.Module]) -> frozenset[str]:
    """Names of children whose `weight` a class hands to its kernels, by its source."""
    if kind.__module__.startswith(("torch.", "peft.")):
        return frozenset()
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data_ptr))", source))


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The language model inside a model; the model itself where it is nothing else."""
    found: Any = backbone(model)
    return found.get_decoder() if isinstance(found, PreTrainedModel) else found  # type: ignore[no-any-return]


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next((f"{name}." for name, module in model.named_modules() if module is part and name), "")


def _embeddings(model: Any) -> Iterator[nn.Module]:
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None:
            yield part
    yield from (module for module in model.modules() if isinstance(module, nn.Embedding))


def _parameter_of(layer: LoraLayer) -> str:
    return str(layer.parameter_name) if isinstance(layer, ParamWrapper) else "weight"


def _shape(weight: torch.Tensor) -> torch.Size:
    """Also of a weight that DeepSpeed has taken apart."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape
