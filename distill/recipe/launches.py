"""How a launch deals a student out to its processes, and whether a recipe can be trained so: asked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distill.errors import RecipeError
from distill.recipe.experiment import Recipe

_SPLITS = {"tp": "tensor", "cp": "context", "sp": "sequence"}
_YES = ("1", "true", "yes")


class LaunchKind(NamedTuple):
    """What of a launch file decides which recipes it can train."""

    sharding: str = ""
    """How accelerate names what deals weights out, FSDP or DEEPSPEED; else empty."""
    stage: int = 0
    """Of DeepSpeed's ZeRO, or the version of FSDP."""
    splits: tuple[str, ...] = ()
    """What splits one row, or one layer, over several processes: tensor, context or sequence."""

    def __str__(self) -> str:
        if not self.sharding:
            return "every process holds all weights"
        return f"FSDP{self.stage}" if self.sharding == "FSDP" else f"DeepSpeed ZeRO-{self.stage}"


def kind_of(file: Path) -> LaunchKind:
    """Of a launch file of accelerate.

    Raises:
        RecipeError: it is none.
    """
    try:
        found = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise RecipeError(f"{file}: can't be read as a launch file: {str(error).splitlines()[0]}. slurm/launch/ has some.") from None
    if not isinstance(found, dict) or "distributed_type" not in found:
        raise RecipeError(f"{file}: is no launch file of accelerate, it has no distributed_type. slurm/launch/ has some.")
    split = found.get("parallelism_config") or {}
    splits = tuple(name for short, name in _SPLITS.items() if int(split.get(f"parallelism_config_{short}_size", 1)) > 1)
    if found["distributed_type"] == "FSDP":
        return LaunchKind("FSDP", int((found.get("fsdp_config") or {}).get("fsdp_version", 1)), splits)
    if found["distributed_type"] == "DEEPSPEED":
        given = found.get("deepspeed_config") or {}
        stage = int(given["zero_stage"]) if "zero_stage" in given else _stage_in(given.get("deepspeed_config_file"))
        return LaunchKind("DEEPSPEED", stage, splits)
    return LaunchKind(splits=splits)


def kind_here(environment: Mapping[str, str], given: Mapping[str, Any]) -> LaunchKind:
    """Of the launch that this process belongs to.

    Args:
        environment: As accelerate has set it.
        given: `trainer_args`, which may ask for the same.
    """

    def on(name: str) -> bool:
        return environment.get(name, "").lower() in _YES

    splits = tuple(name for short, name in _SPLITS.items() if int(environment.get(f"PARALLELISM_CONFIG_{short.upper()}_SIZE", "1")) > 1)
    splits = splits if on("ACCELERATE_USE_PARALLELISM_CONFIG") else ()
    if given.get("deepspeed"):
        return LaunchKind("DEEPSPEED", _stage_in(given["deepspeed"]), splits)
    if on("ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        config = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        return LaunchKind("DEEPSPEED", int(stage) if stage.isdecimal() else _stage_in(config), splits)
    if given.get("fsdp"):
        config = given.get("fsdp_config")
        version = config.get("version") or config.get("fsdp_version") if isinstance(config, dict) else None
        return LaunchKind("FSDP", int(version or 2), splits)
    if on("ACCELERATE_USE_FSDP"):
        return LaunchKind("FSDP", int(environment.get("FSDP_VERSION", "1")), splits)
    return LaunchKind(splits=splits)


def _stage_in(config: Any) -> int:
    """The ZeRO stage of a DeepSpeed config, or of the file of one; DeepSpeed says itself what else is wrong with it."""
    try:
        found = json.loads(Path(config).read_text(encoding="utf-8")) if isinstance(config, str) else config
        return int(found["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def refuse_launch(recipe: Recipe, kind: LaunchKind) -> None:
    """Refuses a launch that a recipe can't be trained in.

    Raises:
        RecipeError: naming both, why, and what to do instead.
    """
    if kind.splits:
        raise RecipeError(
            f"launch: {kind.splits[0]} parallelism is asked for, which the kit does not train with: targets and loss are of whole rows, "
            "and what the libraries do with parts of them could not be proved equal. Leave it out. Long rows fit without it: deal the "
            "weights out (slurm/launch/fsdp2.yaml), keep gradient_checkpointing on, set train.trainer_args.activation_offloading: true."
        )
    if recipe.train.trainer_args.get("parallelism_config"):
        raise RecipeError(
            "train.trainer_args.parallelism_config: the kit trains on whole rows. Leave it out, and deal weights out by a launch file "
            "(slurm/launch/fsdp2.yaml)."
        )
    if kind.sharding == "FSDP" and kind.stage < 2:
        raise RecipeError(
            "launch: asks for the first version of FSDP, with which the kit was never tried. Set fsdp_version: 2 (slurm/launch/fsdp2.yaml)."
        )
    quantized = [name for name, spec in (("student", recipe.student), ("teacher", recipe.teacher)) if _is_in_training(recipe, name, spec)]
    if kind.sharding == "DEEPSPEED" and kind.stage == 3 and quantized:
        raise RecipeError(
            f"{quantized[0]}.quantization nf4: ZeRO-3 can't deal 4-bit weights out. Take slurm/launch/fsdp2.yaml, which does; or ddp.yaml, "
            "where a GPU holds them all (about 0.56 bytes a weight)."
        )


def _is_in_training(recipe: Recipe, name: str, spec: Any) -> bool:
    return spec is not None and spec.quantization == "nf4" and (name == "student" or recipe.train.is_live)
