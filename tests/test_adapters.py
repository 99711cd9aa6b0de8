"""Where LoRA goes: the layers it reaches have an effect, those it leaves alone are named, and a name that matches nothing is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_config
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from distill.errors import RecipeError
from distill.models.adapters import Coverage, coverage, freeze_unread, lora_config
from distill.recipe.models import LoraAdapter


def adapted(family: str, **settings: Any) -> tuple[Any, Coverage]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    found = get_peft_model(model, lora_config(LoraAdapter(r=2, **settings), model))
    return found, coverage(found)


# Family: what is adapted besides attention; what is left.
REACHED: dict[str, tuple[set[str], set[str]]] = {
    "gpt_oss": ({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}, {"mlp.router"}),
    "granitemoe": ({"block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"}, {"block_sparse_moe.router"}),
    "phimoe": ({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}, {"mlp.router"}),
    "llama4_text": ({"feed_forward.experts.gate_up_proj", "feed_forward.shared_expert.up_proj"}, {"feed_forward.router"}),
    "qwen2_moe": ({"mlp.experts.down_proj", "mlp.shared_expert.gate_proj"}, {"mlp.gate", "mlp.shared_expert_gate"}),
    "deepseek_v3": ({"mlp.experts.gate_up_proj", "mlp.shared_experts.up_proj", "mlp.down_proj"}, {"mlp.gate"}),
    "mixtral": ({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}, {"mlp.gate"}),
    "jamba": (
        {"feed_forward.experts.gate_up_proj", "mamba.in_proj"},
        {"feed_forward.router", "mamba.dt_proj", "mamba.conv1d", "mamba.A_log"},
    ),
    "falcon_h1": ({"mamba.in_proj", "feed_forward.up_proj"}, {"mamba.out_proj", "mamba.conv1d"}),
}


@pytest.mark.parametrize("family", REACHED)
def test_all_linear_reaches_experts_and_names_what_it_leaves(family: str) -> None:
    reached, left = REACHED[family]
    model, found = adapted(family)
    assert {f"model.layers.*.{name}" for name in reached | {"self_attn.o_proj"}} <= set(found.adapted)
    assert {f"model.layers.*.{name}" for name in left} == set(found.left)
    assert 0.9 < found.share < 1
    # Every adapter has an effect: its gradient is not nothing.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model(input_ids=torch.arange(3, 67).reshape(2, 32), labels=torch.arange(3, 67).reshape(2, 32)).loss.backward()
    idle = [name for name, weight in model.named_parameters() if "lora_" in name and (weight.grad is None or not weight.grad.abs().sum())]
    assert not idle


def test_other_senses_are_left_alone_unless_asked() -> None:
    _, found = adapted("gemma3")
    assert all(name.startswith("model.language_model.") for name in found.adapted)
    _, found = adapted("gemma3", target_modules=["q_proj", "fc1"])
    assert set(found.adapted) == {"model.language_model.layers.*.self_attn.q_proj", "model.vision_tower.encoder.layers.*.mlp.fc1"} | {
        name for name in found.adapted if name.endswith("head.mlp.fc1")
    }


def test_what_text_never_passes_gets_no_gradient() -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny_config("gemma3"), dtype=torch.float32)
    freeze_unread(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("language_model" in name for name in trained)


def test_a_name_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(
        RecipeError, match=r"target_modules: kk_proj matches no linear layer of Qwen3ForCausalLM. It has down_proj, gate_proj"
    ):
        adapted("qwen3", target_modules=["q_proj", "kk_proj"])
    with pytest.raises(RecipeError, match="matches no linear layer"):
        adapted("qwen3", target_modules=r".*\.z_proj")
    with pytest.raises(RecipeError, match="out_proj past its adapter, which would have no effect"):
        adapted("bamba", target_modules=["in_proj", "out_proj"])
    with pytest.raises(RecipeError, match="without also targeting"):
        adapted("mixtral", target_modules=["q_proj", "w1"])


def test_names_reach_the_same_layers_everywhere() -> None:
    _, found = adapted("deepseek_v3", target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    assert {name.split(".*.")[1] for name in found.adapted} == {
        *("self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        *(f"mlp.{part}{name}_proj" for part in ("", "shared_experts.") for name in ("gate", "up", "down")),
    }
    _, found = adapted("qwen3", target_modules=r".*\.(q|v)_proj")
    assert {name.split(".*.")[1] for name in found.adapted} == {"self_attn.q_proj", "self_attn.v_proj"}


def test_dropout_and_dora_leave_experts_in_one_tensor_alone() -> None:
    for settings in ({"use_dora": True}, {"lora_dropout": 0.1}):
        _, found = adapted("gpt_oss", **settings)
        assert "model.layers.*.mlp.experts.gate_up_proj" in found.left and found.share < 0.9
