"""One rank of a launch on CPUs: trains recipes one after another, and shows that what is dealt out really is.

usage: ranks.py KIND RECIPE ...        KIND: DDP, FSDP or DEEPSPEED; a recipe that ends in ! is interrupted behind its first checkpoint
                                       and resumed

Libraries deal nothing out on CPUs by themselves: accelerate makes DDP of FSDP there, without a word.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

_MOST = 0.6  # of all weights, on one of two processes: a half, and what padding to whole shares adds


def prepare(kind: str) -> None:
    """Makes this process one that the libraries would deal weights out to."""
    if kind == "FSDP":  # a gloo group that looks like one of GPUs

        def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
            return "gloo", DistributedType.MULTI_GPU

        PartialState._prepare_backend = backend
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        torch.distributed.init_process_group("gloo")
    if kind == "DEEPSPEED":
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # what it would compile first, like a gloo that is faster within a machine
        deepspeed.init_distributed("gloo")


def held(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Of each weight how much this process holds between two steps, and how much there is."""
    found = {}
    for name, weight in model.named_parameters():
        if isinstance(weight, DTensor):
            found[name] = weight.to_local().numel(), weight.numel()
        elif hasattr(weight, "ds_tensor"):
            found[name] = weight.ds_tensor.numel(), weight.ds_numel
        else:
            found[name] = weight.numel(), weight.numel()
    return found


def averages_held(trainer: Any) -> int:
    """Numbers of the optimizer's averages that this process holds."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    states = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
    return sum((state.to_local() if isinstance(state, DTensor) else state).numel() for state in states)


def show(trainer: Any) -> None:
    """Writes beside the student's folder what this rank holds, and its weights, whole."""
    weights = dict(trainer.model.named_parameters())
    sizes, plugin = held(trainer.model), trainer.accelerator.state.deepspeed_plugin
    found = {
        "type": AcceleratorState().distributed_type.value,
        "stage": plugin.zero_stage if plugin is not None else 0,
        "weights": [sum(pair[which] for pair in sizes.values()) for which in (0, 1)],
        "not_dealt_out": [name for name, (here, there) in sizes.items() if here > _MOST * there],
        "averages": [averages_held(trainer), sum(sizes[name][1] for name, weight in weights.items() if weight.requires_grad)],
    }
    place, rank = Path(trainer.args.output_dir).parents[1], os.environ["RANK"]
    (place / f"held{rank}.json").write_text(json.dumps(found))
    whole = {name: (w.full_tensor() if isinstance(w, DTensor) else w).detach() for name, w in weights.items()}
    torch.save(whole, place / f"rank{rank}.pt")


def main(kind: str, recipes: list[str]) -> None:
    """Trains."""
    prepare(kind)
    from distill.pipeline import run_stage
    from distill.recipe.reading import load_recipe
    from distill.trainers.checkpoints import CheckpointMark

    plain_train, plain_save = transformers.Trainer.train, CheckpointMark.on_save
    stops = False

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain_train(self, *args, **kwargs)
        show(self)
        return result

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_save(self, *args, **kwargs)
        if stops:
            raise KeyboardInterrupt

    transformers.Trainer.train, CheckpointMark.on_save = train, save  # type: ignore[method-assign]
    for recipe in recipes:
        stops = recipe.endswith("!")
        for _ in range(1 + stops):
            try:
                found = load_recipe(recipe.rstrip("!"))
                run_stage("train", found, number=min(found.rounds, 1))
            except KeyboardInterrupt:
                stops = False
            AcceleratorState._reset_state()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
