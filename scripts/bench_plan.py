"""How far `distill plan` is from what a training really takes: on a CPU, each combination in a process of its own, by its VmHWM.

    python scripts/bench_plan.py [--first N]

Random models, two optimizer steps of the kit's own loss. What a process holds before there is a model is taken off, and so is not planned
either: this measures weights, adapter, gradients, averages, activations and loss. A row says planned, used, and planned over used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SHAPES: dict[str, dict[str, Any]] = {
    "4M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "60M": {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 2},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
}
_VOCABULARY = {"4M": 8192, "60M": 32768, "0.5B": 151936}
_GOAL = 0.1
_APART = ("context", "allocator")  # parts of a plan that are not measured here
# Two rows of 1,024 tokens for one of 2,048, so that rows and lengths are told apart.
_ROWS = [(2, 256), (1, 1024), (2, 1024), (1, 2048)]


def combinations() -> list[dict[str, Any]]:
    """The small ones first: shapes, rows and lengths, what is trained, checkpointing; half of them with kd."""
    found = []
    for number, (shape, (rows, tokens), adapter, checkpointing) in enumerate(
        itertools.product(_SHAPES, _ROWS, ("lora", "full"), (False, True))
    ):
        method = "kd" if number % 4 in (1, 2) else "sft"
        found.append({"shape": shape, "rows": rows, "tokens": tokens, "adapter": adapter, "checkpointing": checkpointing, "method": method})
    return found


def recipe_of(asked: dict[str, Any], folder: Path) -> Any:
    """The quickstart with a random student of a shape, whose config is written into a folder."""
    from transformers import Qwen3Config

    from distill.recipe.reading import load_recipe

    shape = asked["shape"]
    Qwen3Config(**_SHAPES[shape], head_dim=64, vocab_size=_VOCABULARY[shape], tie_word_embeddings=True).save_pretrained(folder)
    words = ["--student.model", str(folder), "--student.dtype", "float32", "--train.max_length", str(asked["tokens"])]
    words += ["--student.adapter", json.dumps({"type": asked["adapter"]}), "--train.method", asked["method"]]
    words += ["--train.trainer_args", json.dumps({"gradient_checkpointing": asked["checkpointing"]})]
    return load_recipe(Path("quickstart"), [*words, *(["--score.target", '{"kind": "top_k", "k": 32}'] if asked["method"] == "kd" else [])])


def bytes_now(name: str) -> int:
    """Of this process: VmRSS, or VmHWM, the most since it was set back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def used(asked: dict[str, Any]) -> dict[str, float]:
    """Planned and used bytes of a combination, in this process, which does nothing else."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from distill.losses.sparse import SparseTargets
    from distill.planning.memory import Place, Planner
    from distill.trainers.losshead import add_loss_head
    from distill.trainers.targets import StepTargets

    with tempfile.TemporaryDirectory() as name:
        recipe = recipe_of(asked, Path(name))
        config = AutoConfig.from_pretrained(name)
    rows, tokens = asked["rows"], asked["tokens"]
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before = bytes_now("VmRSS")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    add_adapter(model, recipe)
    targets, objective = None, None
    if asked["method"] == "kd":
        number = rows * (tokens - 1)
        ids = torch.arange(32, dtype=torch.int32).repeat(number, 1)
        sparse = SparseTargets("top_k", ids, torch.full((number, 32), -4.0), torch.full((number,), -0.89))
        targets, objective = StepTargets(sparse, torch.ones(number, dtype=torch.bool), None), recipe.train.kd.objective(recipe.score.target)
    add_loss_head(model, config.vocab_size, objective)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ids_BT = torch.randint(0, config.vocab_size, (rows, tokens))
    for _ in range(2):
        for _ in range(2):  # passes, so that gradients of an earlier one are there
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False, trace_loss=True, distillation=targets)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    most = bytes_now("VmHWM")
    with tempfile.TemporaryDirectory() as name:  # only now, since it takes memory itself
        plan = Planner(Place(on_cpu=True)).training(recipe_of(asked, Path(name)), rows)
    planned = sum(part.expected for name, part in plan.parts.items() if name not in _APART)
    return {"planned": planned, "used": most - before}


def add_adapter(model: Any, recipe: Any) -> None:
    """What the trainer does to a model before it trains."""
    from peft import get_peft_model

    from distill.models.adapters import lora_config

    model.train()
    if recipe.student.adapter.type == "lora":
        get_peft_model(model, lora_config(recipe.student.adapter, model))
    if recipe.train.trainer_args["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if recipe.student.adapter.type == "lora":
            model.enable_input_require_grads()


def main() -> None:
    """Prints a row for each combination, and how many are within the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, help="Only so many combinations; the small ones come first.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(used(json.loads(given.one))))
        return
    # Freed blocks go back at once, or VmHWM would count what the C library keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    within, asked = 0, combinations()[: given.first]
    for one in asked:
        ended = subprocess.run([sys.executable, __file__, "--one", json.dumps(one)], capture_output=True, text=True, env=environment)
        if ended.returncode:
            print(f"{one}: failed\n{ended.stderr[-2000:]}")
            continue
        found = json.loads(ended.stdout.splitlines()[-1])
        ratio = found["planned"] / found["used"]
        within += abs(ratio - 1) <= _GOAL
        print(f"{one}: planned {found['planned'] / 2**20:,.0f} MiB, used {found['used'] / 2**20:,.0f} MiB, {ratio:.2f}", flush=True)
    print(f"{within} of {len(asked)} within {_GOAL:.0%}")


if __name__ == "__main__":
    main()
