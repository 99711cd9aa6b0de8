"""Which weights a server is to load for a role: a model as it is, a trained one, or a student with its adapter, merged where need be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill import embedded
from distill.errors import ModelError
from distill.recipe.models import Adapter, ModelSpec
from distill.run.log import say
from distill.run.manifest import MERGED
from distill.run.owned import own_cache

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""
_IN_THE_HEAD_OR_EMBEDDING = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Weights:
    """What a server loads."""

    model: str
    """Folder, file, or id on the Hub."""
    revision: str | None = None
    adapter: Path | None = None
    """Folder of an adapter that it loads beside the model."""
    rank: int = 0
    """Least rank the server must be able to take for it."""
    merged: str | None = None
    """Why the adapter was merged into weights of its own, if it was."""


@contextmanager
def weights_for(
    spec: ModelSpec,
    role: str,
    place: Path,
    trained: Path | None,
    adapter: Adapter | None,
    *,
    takes_adapters: bool,
    folder: str = MERGED,
) -> Iterator[Weights]:
    """What a server is to load, for as long as the context lasts.

    Args:
        spec: The model before training.
        role: For messages.
        place: A folder for merged weights is made there, and removed at the end.
        trained: The folder of the train stage; null for a model as it is.
        adapter: What was trained.
        takes_adapters: Whether this kind of server loads one beside the model.
        folder: Name of that for merged weights.

    Raises:
        ModelError: an adapter would have to be merged, and can't be.
    """
    plain = Weights(embedded.resolve(spec.model), spec.revision)
    if trained is None or adapter is None:
        yield plain
        return
    if adapter.type == "full":
        yield Weights(str((trained / "model").absolute()))
        return
    saved = (trained / "adapter").absolute()
    reason = why_merged(saved) if takes_adapters else "this kind of server takes none"
    if reason is None:
        rank = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        yield replace(plain, adapter=saved, rank=next(allowed for allowed in _RANKS if allowed >= rank))
        return
    if spec.quantization != "none":
        raise ModelError(
            f"{role}.server: the adapter would have to be merged ({reason}), and {role}.quantization {spec.quantization} allows no "
            "merging. Let this model run in this process (leave server out), or serve it with vllm."
        )
    target = own_cache(place / folder)
    try:
        yield replace(_merge(spec, trained, adapter, target, reason), merged=reason)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def why_merged(folder: Path) -> str | None:
    """Why vLLM would not take an adapter as it is, or would take it for another one; null where it takes it."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        return "it is DoRA"
    if settings.get("modules_to_save"):
        return "whole modules were trained beside it"
    if settings.get("target_parameters"):
        return "it adapts experts that share a tensor"
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        return "its rank or scale differs from module to module"
    if settings.get("bias", "none") != "none":
        return "biases were trained beside it"
    if settings["r"] > _RANKS[-1]:
        return f"its rank {settings['r']} is over {_RANKS[-1]}"
    adapted = settings.get("target_modules") or []
    if not isinstance(adapted, str) and (other := [name for name in adapted if name.endswith(_IN_THE_HEAD_OR_EMBEDDING)]):
        return f"it adapts {other[0]}"
    return None


def _merge(spec: ModelSpec, trained: Path, adapter: Adapter, target: Path, reason: str) -> Weights:
    """Writes the student with its adapter in the weights, on the CPU: the device is the server's."""
    import torch

    from distill.models.loading import free_memory, load_chat_format, load_trained
    from distill.models.portable import make_loadable, save_tokenizer

    say(f"the student's adapter is merged for its server, because {reason}")
    device = torch.device("cpu")
    # Added in fp32 and rounded once, as `export` does.
    plain = spec.model_copy(update={"attn_implementation": "auto"})
    model: Any = load_trained(plain, adapter, trained, device, merge=True, dtype=torch.float32)
    model = model.to(getattr(torch, own_dtype(spec)))
    model.save_pretrained(target)
    save_tokenizer(spec, load_chat_format(spec), target)
    make_loadable(target)
    del model
    free_memory()
    return Weights(str(target.absolute()))


def own_dtype(spec: ModelSpec) -> str:
    """The type that the recipe, or else the checkpoint, names for a model's weights."""
    from transformers import AutoConfig

    if spec.dtype != "auto":
        return spec.dtype
    config = AutoConfig.from_pretrained(embedded.resolve(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    own = config.get_text_config()
    return str(config.dtype or own.dtype or "float32").removeprefix("torch.")
