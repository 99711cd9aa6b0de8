"""A small config has what a large one has: every kind of layer, the ways of its heads, its experts, its vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from distill.models.miniature import miniature

# Family: settings over its defaults; number of layers; lists and counts that are left.
FAMILIES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "qwen3": ({"num_key_value_heads": 8}, 1, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma3_text": ({}, 2, {"layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ({}, 2, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ({}, 2, {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ({"decoder_sparse_step": 2}, 2, {}),
    "qwen2_moe": ({"mlp_only_layers": [4, 5]}, 2, {"mlp_only_layers": [1]}),
    "llama4_text": ({"interleave_moe_layer_step": 2}, 3, {}),
    "qwen3_next": ({}, 2, {"layer_types": ["linear_attention", "full_attention"]}),
    "falcon_h1": ({}, 1, {}),
    "mamba": ({}, 1, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_of_every_kind(family: str) -> None:
    given, layers, left = FAMILIES[family]
    config = CONFIG_MAPPING[family](**{"num_hidden_layers": 12, "vocab_size": 1009, "pad_token_id": 1} | given)
    before = config.to_dict()
    state = torch.get_rng_state()
    small = miniature(config)
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)
    assert type(small) is type(config) and small.num_hidden_layers == layers and small.vocab_size == config.vocab_size
    assert {name: getattr(small, name) for name in left} == left
    with torch.device("meta"):
        model, whole = (AutoModelForCausalLM.from_config(one) for one in (small, config))
    sizes = [sum(weight.numel() for weight in one.parameters()) for one in (model, whole)]
    assert sizes[0] < 2e7 and sizes[0] < sizes[1] / 10
    names = [{(name.rpartition(".")[2], type(part).__name__) for name, part in one.named_modules()} for one in (model, whole)]
    kinds = [{(name, kind) for name, kind in found if not name.isdigit()} for found in names]
    assert kinds[0] == kinds[1]


def test_a_config_with_parts_is_made_small_in_all_of_them() -> None:
    config = Gemma3Config(text_config={"vocab_size": 1009, "num_hidden_layers": 12})
    small = miniature(config)
    text, vision = small.get_text_config(), getattr(small, "vision_config", None)
    assert text.layer_types == ["sliding_attention", "full_attention"] and getattr(vision, "num_hidden_layers", 0) == 1
    assert small.get_text_config().vocab_size == 1009
