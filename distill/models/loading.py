"""Loads tokenizers and models as a recipe describes them, on whatever device there is."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill import embedded
from distill.errors import ModelError
from distill.models.chat import ChatFormat, chat_format
from distill.models.cpu_precision import cpu_computes_in_bf16
from distill.recipe.models import Adapter, ModelSpec

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device() -> torch.device:
    """The accelerator of this process (by `LOCAL_RANK`), else the CPU; `ACCELERATE_USE_CPU=true` forces the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0"))) if accelerator.type != "mps" else accelerator


def pick_dtype(device: torch.device, setting: str = "auto") -> torch.dtype:
    """Type of the weights: the setting, or bf16 where the device computes in it, else fp16 on a GPU, else fp32."""
    if setting != "auto":
        return _DTYPES[setting]
    if device.type == "cuda":
        # Emulated bf16 (Turing, Pascal, Volta) is many times slower than fp16.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "xpu":
        return torch.bfloat16
    if device.type == "cpu":
        return torch.bfloat16 if cpu_computes_in_bf16() else torch.float32
    return torch.float16 if device.type == "mps" else torch.float32


def load_chat_format(spec: ModelSpec) -> ChatFormat:
    """The tokenizer of a model with its template.

    Raises:
        ModelError: it can't be loaded, or its template can't be used.
    """
    return chat_format(load_tokenizer(spec), spec.chat_template_kwargs, spec.pad_token, spec.chat_template)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer named by `tokenizer`, else the model's own."""
    name = spec.tokenizer or spec.model
    revision = None if spec.tokenizer else spec.revision
    try:
        return AutoTokenizer.from_pretrained(
            embedded.resolve(name), revision=revision, trust_remote_code=spec.trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: the tokenizer can't be loaded: {_first_line(error)}. {_ADVICE}") from None


def load_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype | None = None, *, dealt_out: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Args:
        spec: What to load.
        device: Where to put it.
        dtype: Overrides `spec.dtype`.
        dealt_out: Whether FSDP will deal its weights out: that takes 4-bit ones only where they are packed in floating point numbers.

    Raises:
        ModelError: it can't be loaded.
    """
    options: dict[str, Any] = {"dtype": dtype or pick_dtype(device, spec.dtype), "trust_remote_code": spec.trust_remote_code}
    if spec.attn_implementation != "auto":
        options["attn_implementation"] = spec.attn_implementation
    if spec.quantization == "nf4":
        compute = torch.float32 if device.type == "cpu" else pick_dtype(device)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=options["dtype"] if dealt_out else torch.uint8,
        )
        options["device_map"] = {"": str(device)}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(embedded.resolve(spec.model), revision=spec.revision, **options)
    except ImportError as error:  # of a package that its weights are packed with
        raise ModelError(f"{spec.model}: the model can't be loaded without a package: {_first_line(error)}. Install it.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{spec.model}: the model can't be loaded: {_first_line(error)}. {_ADVICE}") from None
    if spec.quantization == "none":
        model.to(device)  # type: ignore[arg-type]  # transformers decorates `to` without its signature
    leave_as_loaded(model)
    model.eval()
    return model


def load_trained(
    spec: ModelSpec,
    adapter: Adapter,
    folder: Path,
    device: torch.device,
    *,
    merge: bool = True,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    dealt_out: bool = False,
) -> PreTrainedModel | PeftModel:
    """The student after training, from the folder of the train stage.

    Args:
        spec: The student before training.
        adapter: What was trained.
        folder: Folder of the train stage.
        device: Where to put it.
        merge: Add the adapter into the weights, which makes inference faster; not done to 4-bit weights.
        dtype: Overrides `spec.dtype`.
        trainable: To be trained further.
        dealt_out: As of `load_model`.
    """
    if adapter.type == "full":
        # The folder holds whole weights; the spec's revision and quantisation belong to what it started from.
        trained = spec.model_copy(update={"model": str(folder / "model"), "revision": None, "quantization": "none"})
        return load_model(trained, device, dtype)
    base = load_model(spec, device, dtype, dealt_out=dealt_out)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=trainable)
    model = model.merge_and_unload() if merge and spec.quantization == "none" else model
    return model.eval()


def model_record(spec: ModelSpec, model: torch.nn.Module) -> dict[str, Any]:
    """Name, revision and size of a loaded model, for the manifest; of one in a folder also what its files are known again by."""
    commit = getattr(model.config, "_commit_hash", None)
    files = spec.identity()["files"]
    return {"model": spec.model, "revision": commit or spec.revision, "parameters": num_parameters(model)} | (
        {"files": files} if files else {}
    )


def leave_as_loaded(model: torch.nn.Module) -> None:
    """Lets 4-bit weights be what they are.

    Where a CPU has AVX512-BF16, bitsandbytes packs them anew at the first evaluation, and not exactly back for training; of rows shorter
    than its blocks it can't.
    """
    for module in _packed(model):
        module.support_avx512bf16_for_cpu = False


def num_parameters(model: torch.nn.Module) -> int:
    """Number of weights, tied ones once, on all processes together; 4-bit weights count as what they stand for."""
    packed = {id(module.weight): module.in_features * module.out_features for module in _packed(model)}
    return sum(packed.get(id(weight)) or num_elements(weight) for weight in model.parameters())


def _packed(model: torch.nn.Module) -> list[Any]:
    """Layers with 4-bit weights, known by their name: bitsandbytes need not be installed."""
    return [module for module in model.modules() if type(module).__name__ == "Linear4bit"]


def num_elements(weight: torch.nn.Parameter) -> int:
    """Of a weight, as it is on all processes together: DeepSpeed leaves it empty where it deals it out."""
    if type(weight).__name__ == "Params4bit":
        return 2 * weight.numel() * weight.element_size()
    return int(getattr(weight, "ds_numel", weight.numel()))


@contextmanager
def loads_whole() -> Iterator[None]:
    """Inside, this process loads models alone and whole, where DeepSpeed would deal them out and wait for the others."""
    from transformers.integrations import deepspeed

    there = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    config = None if there is None else there()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def config_vocab_size(spec: ModelSpec) -> int | None:
    """Rows of a model's embedding by its config alone; null where the config can't be reached (offline)."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(embedded.resolve(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError):
        return None
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


def free_memory() -> None:
    """Gives the memory of deleted models back to the device, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_ADVICE = "Check the name and the network; offline, give a local folder or fill the cache before with `hf download`."


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
