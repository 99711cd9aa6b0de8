"""Which packages beside the kit's own a recipe needs, and whether they are here; without torch until one is imported."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from distill.before.findings import Findings
from distill.before.servers import is_loaded
from distill.errors import RecipeError
from distill.recipe.experiment import Recipe

_QLORA = "distill-kit[qlora]"

REPORTERS = {
    "azure_ml": ("azureml.core.run", "azureml-core azureml-mlflow"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet_ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit flytekitplugins-deck-standard"),
    "kubeflow": ("kubeflow", "kubeflow"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""Where transformers can report to, with the module behind it and what `pip install` takes."""

_OPTIMIZERS = (
    ("galore_.*", "galore_torch", "galore-torch"),
    ("apollo_.*", "apollo_torch", "apollo-torch"),
    ("(ada)?lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free_.*", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("adamw_torch_[48]bit", "torchao", "torchao"),
    ("adamw_anyprecision", "torchdistx", "torchdistx"),
    (".*_8bit|paged_.*|lion_.*|ademamix|rmsprop_bnb.*", "bitsandbytes", _QLORA),
)  # transformers' names; the first pattern that fits one whole


class Need(NamedTuple):
    """A package that a recipe needs."""

    key: str
    """Of the recipe, with its value."""
    module: str
    install: str
    """What `pip install` takes."""


def needs(recipe: Recipe) -> list[Need]:
    """The packages that a recipe's keys ask for.

    Raises:
        RecipeError: it reports to what transformers does not know.
    """
    found: list[Need] = []
    for role, spec in (("student", recipe.student), ("teacher", recipe.teacher)):
        if spec is None or not is_loaded(recipe, role):
            continue
        if spec.quantization == "nf4":
            found.append(Need(f"{role}.quantization nf4", "bitsandbytes", _QLORA))
        # Without flash-attn transformers takes the same kernels from the package `kernels`.
        if spec.attn_implementation == "flash_attention_2" and importlib.util.find_spec("kernels") is None:
            found.append(Need(f"{role}.attn_implementation flash_attention_2", "flash_attn", "flash-attn --no-build-isolation"))
    if recipe.benchmarks is not None:
        found.append(Need("benchmarks", "lm_eval", "distill-kit[benchmarks]"))
    found += _of_arguments("train.trainer_args", recipe.train.trainer_args)
    if recipe.rollouts is not None:
        found += _of_arguments("rollouts.trainer_args", recipe.rollouts.trainer_args)
    return found


def reporters(arguments: dict[str, Any]) -> list[str]:
    """What a trainer is asked to report to, by name; `all` is what is installed, and needs nothing more."""
    asked = arguments.get("report_to") or []
    return [name for name in ([asked] if isinstance(asked, str) else asked) if name not in ("none", "all")]


def _of_arguments(section: str, arguments: dict[str, Any]) -> Iterator[Need]:
    optimizer = str(arguments.get("optim", ""))
    for pattern, module, install in _OPTIMIZERS:
        if re.fullmatch(pattern, optimizer):
            yield Need(f"{section}.optim {optimizer}", module, install)
            break
    if arguments.get("use_liger_kernel"):
        yield Need(f"{section}.use_liger_kernel", "liger_kernel", "liger-kernel")
    if arguments.get("deepspeed"):
        yield Need(f"{section}.deepspeed", "deepspeed", "deepspeed")
    for name in reporters(arguments):
        if name == "tensorboard" and importlib.util.find_spec("tensorboardX") is not None:  # which transformers takes as well
            continue
        if name not in REPORTERS:
            close = difflib.get_close_matches(name, REPORTERS, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"It knows {', '.join(REPORTERS)}."
            raise RecipeError(f"{section}.report_to: transformers can't report to {name!r}. {hint}")
        yield Need(f"{section}.report_to {name}", *REPORTERS[name])


def check_packages(recipe: Recipe, found: Findings, *, importing: bool) -> None:
    """One claim for all packages.

    Args:
        recipe: The recipe.
        found: Where it is said.
        importing: Whether each is imported, or only looked for, which takes no time.
    """

    def attempt() -> str:
        asked = needs(recipe)
        for need in asked:
            _prove(need, importing)
        for section in (recipe.train.trainer_args, recipe.rollouts.trainer_args if recipe.rollouts else {}):
            _prove_login(section)
            _prove_hub(section)
        return ", ".join(dict.fromkeys(need.module for need in asked)) or "the kit's own suffice"

    found.prove("packages", attempt)


def _prove(need: Need, importing: bool) -> None:
    top = need.module.partition(".")[0]
    advice = f"`pip install {_quoted(need.install)}`"
    if importlib.util.find_spec(top) is None:
        raise RecipeError(f"{need.key}: needs the package {top}, which is not installed. {advice}, or leave the key out.")
    if not importing:
        return
    try:
        importlib.import_module(need.module)
    except Exception as error:  # a library built for another torch or driver may raise anything
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise RecipeError(
            f"{need.key}: the package {top} is installed, but can't be imported: {reason[0].rstrip('.')}. Install a build of it that "
            f"fits torch and driver ({advice}), or leave the key out."
        ) from None


def _quoted(install: str) -> str:
    return f"'{install}'" if "[" in install else install


def _prove_login(arguments: dict[str, Any]) -> None:
    """Whether a wandb that is to be reported to knows whom from: it would ask, and there is nobody, once the teacher has written."""
    if "wandb" not in reporters(arguments) or os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return
    if importlib.import_module("wandb").api.api_key is None:
        raise RecipeError("train.trainer_args.report_to: nobody is logged in to wandb here. `wandb login`, or set WANDB_MODE=offline.")


def _prove_hub(arguments: dict[str, Any]) -> None:
    if not arguments.get("push_to_hub"):
        return
    from huggingface_hub import constants, get_token

    problem = "the Hub is switched off here (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else None
    problem = problem or (None if get_token() else "nobody is logged in to the Hub here")
    if problem:
        raise RecipeError(
            f"train.trainer_args.push_to_hub: {problem}, so training would end before its first step. `hf auth login`, or leave it "
            "out and upload the folder that `distill export` writes."
        )
