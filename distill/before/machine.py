"""Whether this machine can do what a recipe asks of one: the kind of device, and room for the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill.before.findings import Findings
from distill.before.servers import is_loaded, served
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.stages import Step

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_ON_GPU_ALONE = ("activation_offloading", "use_liger_kernel", "tf32")
"""Fields of a trainer that no CPU can follow."""
_OF_LAUNCH = {"fsdp": "--use_fsdp", "deepspeed": "--use_deepspeed"}
_PACKED_BYTES = 0.5  # a weight of a checkpoint that brings its own packing: as little as 4 bits
_NF4_BYTES = 0.56  # a weight with its share of the scales
_TRAINED_BYTES = 16  # a weight, its gradient and two averages, in fp32


def possible(recipe: Recipe) -> Recipe:
    """The recipe without what another device, or a launch of several processes, would have to decide."""
    from distill.models.loading import pick_device

    lost = {*_needs_launch(recipe), *(_needs_gpu(recipe) if pick_device().type == "cpu" else ())}
    changed: dict[str, Any] = {}
    for role, spec in _specs(recipe).items():
        if f"{role}.attn_implementation" in lost:
            changed[role] = spec.model_copy(update={"attn_implementation": "auto"})
    arguments = {name: value for name, value in recipe.train.trainer_args.items() if f"train.trainer_args.{name}" not in lost}
    return recipe.model_copy(update=changed | {"train": recipe.train.model_copy(update={"trainer_args": arguments})})


def _specs(recipe: Recipe) -> dict[str, ModelSpec]:
    return {"student": recipe.student, **({} if recipe.teacher is None else {"teacher": recipe.teacher})}


def _needs_gpu(recipe: Recipe) -> list[str]:
    """The keys of a recipe that only an accelerator can follow."""
    flash = [f"{role}.attn_implementation" for role, spec in _specs(recipe).items() if spec.attn_implementation == "flash_attention_2"]
    return [*flash, *(f"train.trainer_args.{name}" for name in _ON_GPU_ALONE if recipe.train.trainer_args.get(name))]


def _needs_launch(recipe: Recipe) -> list[str]:
    """Those that work in a launch of several processes alone."""
    return [f"train.trainer_args.{name}" for name in _OF_LAUNCH if recipe.train.trainer_args.get(name)]


def check_device(recipe: Recipe, found: Findings, *, here: bool, processes: int) -> bool:
    """Whether device and number of processes are what the recipe needs; true if nothing is left open.

    Args:
        recipe: The recipe.
        found: Where it is said.
        here: Whether this machine is the one that the recipe is to be run on.
        processes: That train.
    """
    from distill.models.loading import pick_device

    device = pick_device()
    found.good("device", f"{describe_device()}, {_memory_gib(device):,.0f} GiB")
    missing = _needs_gpu(recipe) if device.type == "cpu" else []
    for key in missing:
        if here:
            found.bad(key, "needs a GPU, and there is none here. Leave it out, or run this on another machine.")
        else:
            found.unknown(key, "it needs a GPU")
    for key in _needs_launch(recipe):
        if processes > 1:
            found.unknown(key, "the launch decides it")
            continue
        found.bad(
            key,
            "works among several processes, and `distill run` and `distill train` are one. Train with `accelerate launch "
            f"{_OF_LAUNCH[key.rpartition('.')[2]]} -m distill.train`; `distill check --processes N` leaves this claim to the launch.",
        )
    return not missing


def check_memory(recipe: Recipe, steps: Sequence[Step], found: Findings, *, here: bool, processes: int) -> None:
    """Whether the weights that must be in memory together have room in it; activations and the rest come on top.

    Args:
        recipe: The recipe.
        steps: Of the run.
        found: Where it is said.
        here: Whether this machine is the one that the recipe is to be run on.
        processes: That train, and may share the weights.
    """
    from distill.models.loading import pick_device

    device = pick_device()
    sizes = {role: parameters(spec) for role, spec in _specs(recipe).items() if is_loaded(recipe, role)}
    if None in sizes.values():
        unknown = " and ".join(role for role, size in sizes.items() if size is None)
        found.unknown("memory", f"the config of the {unknown} can't be reached from here")
        return
    known = {role: size for role, size in sizes.items() if size is not None}
    stages = {step.stage for step in steps}
    wanted = _wanted_gib(recipe, known, stages, device, processes) | _started_gib(recipe, device)
    if not wanted:
        found.good("memory", "no weights come into that of this machine")
        return
    room_gib = _memory_gib(device)
    detail = "; ".join(f"{what}: {gib:,.1f} GiB" for what, gib in wanted.items())
    over = [what for what, gib in wanted.items() if gib > room_gib]
    if not over:
        found.good("memory", f"of {room_gib:,.0f} GiB the weights take: {detail}; activations come on top")
        return
    reason = (
        f"{' and '.join(over)} {'needs' if len(over) == 1 else 'need'} more than the {room_gib:,.0f} GiB here (weights alone: {detail})"
    )
    if here or device.type != "cpu":
        found.bad("memory", f"{reason}. Take a smaller model, quantization: nf4, or a LoRA adapter; or run this on another machine.")
    else:
        found.unknown("memory", f"{reason}, and there is no GPU")


def _wanted_gib(recipe: Recipe, sizes: dict[str, int], stages: set[str], device: torch.device, processes: int) -> dict[str, float]:
    """Weights in memory at once, by what is done with them."""
    from distill.trainers.arguments import training_dtype

    def at_rest(role: str) -> float:
        spec = recipe.student if role == "student" else recipe.teacher
        assert spec is not None
        return sizes[role] * _bytes_each(spec, device)

    wanted: dict[str, float] = {}
    if "teacher" in sizes and stages & {"generate", "score"}:
        wanted["teacher alone"] = at_rest("teacher")
    if "train" in stages and (processes == 1 or not _needs_launch(recipe)):
        if recipe.student.adapter.type == "full":
            trained: float = sizes["student"] * _TRAINED_BYTES
        else:
            trained = sizes["student"] * min(_bytes_each(recipe.student, device), training_dtype(recipe, device).itemsize)
        beside = recipe.train.is_live and "teacher" in sizes and not (recipe.train.on_policy and recipe.train.on_policy.teacher_server)
        wanted["training" + (" with the teacher beside it" if beside else "")] = trained + (at_rest("teacher") if beside else 0)
    return {what: size / _GIB for what, size in wanted.items()}


def _started_gib(recipe: Recipe, device: torch.device) -> dict[str, float]:
    """What a device must have for weights to fit into the share of it that a server gets; of one whose arguments decide that, nothing."""
    wanted = {}
    for role, (spec, server) in served(recipe).items():
        takes_share = server.is_started and server.kind in ("vllm", "sglang")
        if not takes_share or any(word in argument for argument in server.args for word in ("parallel", "tp", "quantization", "offload")):
            continue
        if (weights := parameters(spec)) is not None:
            share = f"{server.memory_share:.0%}"
            wanted[f"{role}'s server, which gets {share}"] = weights * _bytes_each(spec, device) / server.memory_share / _GIB
    return wanted


def _bytes_each(spec: ModelSpec, device: torch.device) -> float:
    from distill.models.loading import pick_dtype

    if spec.quantization == "nf4":
        return _NF4_BYTES
    packed = getattr(model_config(spec), "quantization_config", None) is not None
    return _PACKED_BYTES if packed else pick_dtype(device, spec.dtype).itemsize


def parameters(spec: ModelSpec) -> int | None:
    """Weights of a model by its config alone; null where the config can't be reached, or has a form that nobody here knows."""
    import torch
    from transformers import AutoModelForCausalLM

    from distill.models.loading import num_parameters

    config = model_config(spec)
    if config is None:
        return None
    try:
        with torch.device("meta"):
            return num_parameters(AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code))
    except Exception:  # whatever the code of a family says; loading it says it again, and better
        return None


def model_config(spec: ModelSpec) -> Any:
    """A model's config; null where it can't be reached (offline)."""
    from transformers import AutoConfig

    from distill import embedded

    try:
        return AutoConfig.from_pretrained(embedded.resolve(spec.model), revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError):
        return None


def describe_device() -> str:
    """The device that stages work on, with its name."""
    import torch

    from distill.models.loading import pick_device

    device = pick_device()

    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device}, {cores} cores" if device.type == "cpu" else str(device)


def gpu_memory() -> str:
    """Of the GPU here, as `distill plan` takes it; empty where there is none."""
    from distill.models.loading import pick_device

    device = pick_device()
    return f"{_memory_gib(device):.2f}GiB" if device.type == "cuda" else ""


def _memory_gib(device: torch.device) -> float:
    """Of the device; of the machine, where it has none of its own."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / _GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
