"""Saved models as others load them: older names, nothing of this machine, and what llama.cpp's converter makes of an adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__

from distill.models import portable
from distill.models.loading import load_chat_format
from distill.recipe.models import ModelSpec

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HALF = {"partial_rotary_factor": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 4,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 16}
HEAD = {"head_dim": 8}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}

FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    **{name: ({}, {}) for name in ("mistral", "olmo2", "olmo3", "granite", "smollm3", "cohere", "exaone4", "starcoder2", "phi3", "arcee")},
    **{name: (HEAD, {}) for name in ("qwen3", "gemma", "gemma2", "cohere2", "ernie4_5", "helium", "hunyuan_v1_dense", "seed_oss")},
    **{name: ({}, HALF) for name in ("phi", "stablelm", "nemotron")},
    **{name: (HEAD, HALF) for name in ("glm", "glm4")},
    **{name: ({}, None) for name in ("gpt2", "opt")},
    "llama": ({}, LLAMA3), "qwen2": ({}, YARN), "gpt_oss": (HEAD | LOCAL_EXPERTS, YARN),
    "mixtral": (LOCAL_EXPERTS, {}), "minimax": (HEAD | LOCAL_EXPERTS, {}), "granitemoe": (LOCAL_EXPERTS, {}),
    "qwen3_moe": (HEAD | EXPERTS, {}), "olmoe": (EXPERTS, {}), "qwen2_moe": (EXPERTS | SHARED, {}),
    "qwen3_next": (HEAD | EXPERTS | SHARED | LINEAR, HALF), "glm4_moe": (HEAD | ROUTED, HALF), "deepseek_v3": (ROUTED | MLA, {}),
    "falcon_h1": (HEAD | MAMBA, {}), "lfm2": ({"full_attn_idxs": [1]}, {}),
    "gemma3_text": (HEAD | {"num_hidden_layers": 6, "sliding_window": 8}, {"full_attention": {}, "sliding_attention": {}}),
}  # fmt: skip
"""Of each model type what its config needs, and its rotary embedding; null where it has none."""


def rope_of(kind: dict[str, Any]) -> dict[str, Any]:
    """A rotary embedding whose base is no library's default."""
    if "full_attention" in kind:
        return {"full_attention": {"rope_theta": 777.0, "rope_type": "linear", "factor": 8.0}, "sliding_attention": rope_of({})}
    return {"rope_theta": 123.0, "rope_type": "default"} | kind


def write_model(folder: Path, model_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Saves a tiny random model of a type as the export does; ids, and the logits it gives for them."""
    more, rope = FAMILIES[model_type]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPE | more | ({} if rope is None else {"rope_parameters": rope_of(rope)}))
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    ids = torch.randint(3, 60, (2, 80), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return ids, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "glm", "qwen3_moe"])
def test_a_config_says_the_same_in_older_words(tmp_path: Path, model_type: str) -> None:
    """transformers 4.57 takes a default of its own where it does not find these, and says nothing."""
    ids, expected = write_model(tmp_path, model_type)
    assert portable.make_loadable(tmp_path) == portable.OLDER
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == (777.0 if model_type == "gemma3_text" else 123.0)
    assert {
        "llama": written["rope_scaling"] == LLAMA3,
        "gemma3_text": (written.get("rope_local_base_freq"), written["rope_scaling"]) == (123.0, {"rope_type": "linear", "factor": 8.0}),
        "glm": (written.get("partial_rotary_factor"), written["rope_scaling"]) == (0.5, None),
        "qwen3_moe": written.get("num_experts") == 4,
    }[model_type]
    with torch.inference_mode():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected, atol=0, rtol=0)


def test_what_was_not_tried_in_an_older_release_needs_this_one(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt_neox", **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neox")
    assert portable.make_loadable(tmp_path / "neox") == __version__
    factors = {"short_factor": [1.5] * 4, "long_factor": [2.5] * 4, "original_max_position_embeddings": 128, "factor": 2.0}
    config = AutoConfig.for_model("phi3", **SHAPE, rope_parameters={"rope_theta": 500.0, "rope_type": "longrope", **factors})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi")
    assert portable.make_loadable(tmp_path / "phi") == __version__


def test_the_tokenizer_names_nothing_of_this_machine_and_both_releases_read_it(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"a SentencePiece model")
    spec = ModelSpec(model=str(base))
    chat = load_chat_format(spec)
    portable.save_tokenizer(spec, chat, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & settings.keys()
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["additional_special_tokens"] == ["<|tool|>"]
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == b"a SentencePiece model"  # converters to GGUF look for it
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.extra_special_tokens == ["<|tool|>"] and again.chat_template == tokenizer.chat_template
    text = "<|im_start|>user\nWhat is 3 + 4?<|tool|><|im_end|>"
    assert again(text)["input_ids"] == chat.tokenizer(text)["input_ids"]


def test_an_adapter_names_its_base_and_revision(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(tmp_path / "adapter"))
    portable.publish_adapter(tmp_path / "adapter", "somebody/base", "feedc0de")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("somebody/base", "feedc0de")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [({}, ""), ({"use_dora": True}, "DoRA"), ({"use_rslora": True}, "alpha / sqrt"), ({"modules_to_save": ["norm"]}, r"norm\.weight")],
)
def test_adapters_that_the_converter_to_gguf_does_not_take(tmp_path: Path, tiny_model_dir: Path, kind: dict[str, Any], reason: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **kind)).save_pretrained(str(tmp_path))
    assert reason.replace("\\", "") in portable.why_no_gguf(tmp_path) and bool(portable.why_no_gguf(tmp_path)) == bool(reason)
    save_file({"base_model.model.layers.0.mlp.experts.base_layer.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    assert portable.why_no_gguf(tmp_path)


IN_OLDER_RELEASE = """
import sys, torch, transformers
from pathlib import Path
assert transformers.__version__.startswith(sys.argv[2]), transformers.__version__
for folder in sorted(Path(sys.argv[1]).iterdir()):
    ids, expected = torch.load(folder / "expected.pt")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        print(folder.name, float((model(ids).logits - expected).abs().max()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print("ids", tokenizer("<|im_start|>user\\nWhat is 3?<|tool|><|im_end|>")["input_ids"] == list(torch.load(folder / "ids.pt")))
"""


@pytest.mark.nightly
def test_every_model_type_named_loads_in_the_older_release_with_the_same_logits(tmp_path: Path) -> None:
    """Installs that release beside this one, for a process of its own."""
    assert set(FAMILIES) == portable.LOADS_IN_OLDER
    packages = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
    packages += ["requests", "urllib3", "idna", "certifi", "charset-normalizer"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "older"), *packages]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("needs a package index with transformers 4.57")
    base = build_tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(base)
    spec = ModelSpec(model=str(base))
    for model_type in FAMILIES:
        folder = tmp_path / "models" / model_type
        torch.save(write_model(folder, model_type), folder / "expected.pt")
        assert portable.make_loadable(folder) == portable.OLDER
        portable.save_tokenizer(spec, load_chat_format(spec), folder)
        torch.save(tokenizer("<|im_start|>user\nWhat is 3?<|tool|><|im_end|>")["input_ids"], folder / "ids.pt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "older")}
    command = [sys.executable, "-c", IN_OLDER_RELEASE, str(tmp_path / "models"), portable.OLDER]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert said.returncode == 0, said.stderr[-3000:]
    lines = [line.split() for line in said.stdout.splitlines() if line.split()[0] in {*FAMILIES, "ids"}]
    assert [line for line in lines if line[0] == "ids" and line[1] != "True"] == []
    differences = {name: float(value) for name, value in lines if name != "ids"}
    assert differences.keys() == FAMILIES.keys() and max(differences.values()) < 1e-3, differences
