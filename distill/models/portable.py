"""A saved model's files as others can load them: with nothing of this machine, in transformers 4.57 too, and by llama.cpp's converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill import embedded
from distill.models.chat import ChatFormat
from distill.recipe.models import ModelSpec
from distill.run.files import copy_file, write_text

OLDER = "4.57"
"""The last release before transformers 5, which serves and tools still use."""

LOADS_IN_OLDER = frozenset(
    {
        "arcee", "cohere", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
        "glm4_moe", "gpt2", "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "lfm2", "llama", "minimax", "mistral",
        "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next",
        "seed_oss", "smollm3", "stablelm", "starcoder2"
    }
)  # fmt: skip
"""Model types whose written files were loaded there, with the same logits (`pytest -m nightly tests/test_portable.py`)."""

_OF_THIS_MACHINE = ("is_local", "local_files_only")  # how the tokenizer was found here; another machine would not look for it on the Hub


_OLDER_NAMES = frozenset({"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "num_experts"})


def save_tokenizer(spec: ModelSpec, chat: ChatFormat, folder: Path) -> None:
    """Writes a model's tokenizer beside it, and the SentencePiece model that converters to GGUF ask for, where the model has one."""
    from transformers.utils.hub import cached_file

    chat.tokenizer.save_pretrained(folder)
    name, revision = (spec.tokenizer, None) if spec.tokenizer else (spec.model, spec.revision)
    if not (folder / "tokenizer.model").exists():
        found = cached_file(
            embedded.resolve(name), "tokenizer.model", revision=revision,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found is not None:
            copy_file(Path(found), folder / "tokenizer.model")
    _rewrite(folder / "tokenizer_config.json", _older_tokenizer)


def make_loadable(folder: Path) -> str:
    """Adds to a saved model's config what transformers 4.57 reads there, and returns the least version that loads the model.

    Another name for what is there already: without it an older release takes its own default, and computes something else.
    """
    from transformers import AutoConfig, __version__

    path = folder / "config.json"
    before, text = _plain(AutoConfig.from_pretrained(folder).to_dict()), path.read_text(encoding="utf-8")
    _rewrite(path, _older_config)
    if _plain(AutoConfig.from_pretrained(folder).to_dict()) != before:  # this release reads another model with them
        write_text(path, text)
        return __version__
    long = (before.get("rope_parameters") or {}).get("rope_type") == "longrope"  # which 4.57 wants in other words for each family
    return OLDER if before["model_type"] in LOADS_IN_OLDER and not long else __version__


def publish_adapter(folder: Path, base: str, revision: str | None) -> None:
    """Names the base of a saved adapter, and its revision, as others find it."""
    _rewrite(folder / "adapter_config.json", lambda settings: settings | {"base_model_name_or_path": base, "revision": revision})


def why_no_gguf(adapter: Path) -> str:
    """Why llama.cpp's `convert_lora_to_gguf.py` does not take an adapter, or takes it for another one; empty where it does neither."""
    from safetensors import safe_open

    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        return "it refuses the magnitudes of DoRA"
    if settings.get("use_rslora"):
        return "it knows nothing of rsLoRA, and would scale the update by alpha / r in place of alpha / sqrt(r)"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
    other = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight")) or ".experts." in name]
    return f"it refuses tensors like {other[0]}" if other else ""


def _rewrite(path: Path, change: Any) -> None:
    settings = change(json.loads(path.read_text(encoding="utf-8")))
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _older_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config without what is of this machine, and in words that both releases read."""
    settings = {name: value for name, value in settings.items() if name not in _OF_THIS_MACHINE}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and those inside it, without the older names."""
    return {name: _plain(value) if isinstance(value, dict) else value for name, value in config.items() if name not in _OLDER_NAMES}


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and those inside it, with what releases before 5 read under other names: rotary embeddings, and experts."""
    older = {
        name: _older_config(value) if name.endswith("_config") and isinstance(value, dict) else value for name, value in config.items()
    }
    if "num_local_experts" in config:
        older["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters") or {}
    globally, locally = rope.get("full_attention") or rope, rope.get("sliding_attention")
    if "rope_theta" not in globally:
        return older
    older["rope_theta"] = globally["rope_theta"]
    if locally:
        older["rope_local_base_freq"] = locally["rope_theta"]
    if "partial_rotary_factor" in globally:
        older["partial_rotary_factor"] = globally["partial_rotary_factor"]
    scaling = {name: value for name, value in globally.items() if name not in _OLDER_NAMES}
    older["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return older
