"""Tiny models of many families of the installed transformers, random, with a tokenizer of bytes: for sweeps over what models differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from distill.models.miniature import miniature

_DENSE = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 cohere cohere2 granite glm glm4 starcoder2 stablelm "
    "smollm3 seed_oss helium gpt2 gpt_neox gptj gpt_bigcode opt bloom mpt falcon persimmon exaone4 arcee apertus minicpm3 nanochat "
    "ministral3 internlm3 ernie4_5 hyperclovax vaultgemma"
)
_ROUTED = (
    "gpt_oss mixtral qwen2_moe qwen3_moe olmoe deepseek_v3 granitemoe granitemoeshared phimoe llama4_text llama4 ernie4_5_moe minimax_m2 "
    "flex_olmo jetmoe"
)
_RECURRENT = "jamba falcon_h1 mamba mamba2 falcon_mamba nemotron_h qwen3_next qwen3_5_text recurrent_gemma minimax"
# Family: settings without which its defaults can't be built, or would show less. All else is of the config class.
FAMILIES: dict[str, dict[str, Any]] = {family: {} for family in f"{_DENSE} {_ROUTED} {_RECURRENT}".split()} | {
    "gemma3": {"vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28}},
    "gemma3n_text": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "hidden_size_per_layer_input": 16},
    "glm4_moe": {"num_attention_heads": 32},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "minicpm3": {"scale_emb": 1},  # else it sees nothing but the last token
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2},
}
_TEXT = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_config(family: str) -> PretrainedConfig:
    """A config with one layer of every kind, narrow, for the vocabulary of `build_tiny_model`."""
    settings = dict(FAMILIES[family])
    kind: Any = CONFIG_MAPPING[family]
    plain = kind()
    if plain.get_text_config(decoder=True) is plain:
        config: PretrainedConfig = kind(**_TEXT | settings)
    else:
        config = kind(text_config=_TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    text: Any = config.get_text_config(decoder=True)
    for name, value in list(vars(text).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(text, name, 0.0)
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = _TEXT["vocab_size"]
    return miniature(config)


def tiny_model(family: str, path: Path, *, seed: int = 0) -> Path:
    """Saves a model of a family, with opinions, and its tokenizer."""
    build_tiny_model(path, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        ends[1].weight *= 4 if ends[0].weight is ends[1].weight else 20  # one that is both would see nothing but the last token
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
