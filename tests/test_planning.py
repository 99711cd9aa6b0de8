"""What `distill plan` reckons: by hand, against a real tiny model and its real step, and in what must grow or shrink with what."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen3Config

from distill.before import check
from distill.before.findings import Findings
from distill.errors import RecipeError
from distill.losses.settings import likelihood
from distill.models.adapters import lora_config
from distill.models.heads import backbone
from distill.planning import shown, sizes
from distill.planning.memory import Model, Place, Planner
from distill.planning.sizes import GIB, Asked, Walk
from distill.planning.walked import counts, walk
from distill.recipe.experiment import Recipe
from distill.recipe.launches import LaunchKind
from distill.recipe.models import FullFinetune, LoraAdapter
from distill.recipe.reading import load_recipe

CONFIG = Qwen3Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
STEP = Asked(2, 48, "float32", "float32", LoraAdapter(r=4), likelihood("chosen_token"))
FSDP = LaunchKind("FSDP", 2)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("quickstart")


@pytest.fixture(scope="module")
def planner(recipe: Recipe) -> Planner:
    """On a CPU, so that a step of the embedded pair has its own types; walked through once for all tests."""
    return Planner(Place(on_cpu=True))


def real_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)


def test_sizes_by_hand() -> None:
    assert sizes.card_bytes("24GiB") == 24 * GIB > sizes.card_bytes("NVIDIA GeForce RTX 4090") > sizes.card_bytes("24 GB") > 23 * GIB
    assert sizes.card_bytes("4090") == sizes.card_bytes("rtx-4090") and sizes.card_bytes("A100 80GB") == sizes.card_bytes("a100")
    with pytest.raises(RecipeError, match=r"RTX 9999.*24GiB"):
        sizes.card_bytes("RTX 9999")
    assert sizes.optimizer_bytes("adamw_torch_fused", 1000, 4) == 8000 and sizes.optimizer_bytes("adamw_torch", 1000, 2) == 4000
    assert sizes.optimizer_bytes("paged_adamw_32bit", 1000, 2) == 8000 and 2000 < (sizes.optimizer_bytes("adamw_8bit", 1000, 4) or 0) < 2100
    assert sizes.optimizer_bytes("sgd", 1000, 4) == 0 and sizes.optimizer_bytes("galore_adamw", 1000, 4) is None
    assert sizes.sharing(FSDP, 4) == (0.25, 0.25, 0.25) and sizes.sharing(LaunchKind("DEEPSPEED", 3), 4) == (0.25, 0.25, 0.25)
    assert sizes.sharing(LaunchKind("DEEPSPEED", 2), 4) == (1, 0.25, 0.25) and sizes.sharing(LaunchKind(), 4) == (1, 1, 1)
    assert Walk(10, 20, 30, 40).extended(Walk(20, 20, 20, 80), 3) == (40, 20, 0, 160)


def test_weights_are_those_of_the_real_model(recipe: Recipe) -> None:
    model, adapter = real_model(), LoraAdapter(r=4)
    found = counts(CONFIG, adapter)
    linear = 6 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    assert found.all == sum(weight.numel() for weight in model.parameters())
    assert (found.linear, found.largest, found.ends) == (linear, 64 * 160, 256 * 64)
    assert found.layer * 6 + found.ends + 64 == found.all
    tuned = get_peft_model(model, lora_config(adapter, model))
    assert found.trained == sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
    packed = Model(recipe.student.model_copy(update={"quantization": "nf4"}), CONFIG)
    assert packed.weights(torch.bfloat16).expected == pytest.approx(linear * 0.515869140625 + (found.all - linear) * 2)
    assert packed.counts(adapter).trained == found.trained and packed.counts(FullFinetune(type="full")).trained == found.all


def saved_bytes(adapter: LoraAdapter) -> int:
    """What a real forward pass keeps for the backward pass, by torch's own account."""
    model = real_model()
    tuned = get_peft_model(model, lora_config(adapter, model))
    own = {weight.untyped_storage().data_ptr() for weight in tuned.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backbone(model)(input_ids=torch.ones(2, 48, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def test_a_step_without_content_keeps_what_a_real_one_keeps() -> None:
    """Extended from two and four layers to six; beside it are only blocks' ends, the last hidden state and the like."""
    found = walk(CONFIG, STEP)
    assert found.stored == pytest.approx(saved_bytes(LoraAdapter(r=4)), rel=0.05)
    assert found.peak > found.stored
    less = walk(CONFIG, STEP._replace(checkpointing=True))
    assert less.stored < 0.5 * found.stored and less.peak < found.peak
    cache = walk(CONFIG, STEP._replace(adapter=None, objective=None, caches=True))
    assert cache.stored == pytest.approx(
        6 * 2 * 2 * 48 * 2 * 16 * 4, rel=0.05
    )  # layers, keys and values, rows, tokens, heads, width, bytes


def test_more_takes_more_and_a_launch_shares(recipe: Recipe, planner: Planner) -> None:
    small, long = (
        planner.training(recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": n})})) for n in (1024, 2048)
    )
    assert long.total.expected > small.total.expected and long.parts["weights"] == small.parts["weights"]
    assert planner.training(recipe, 2).total.expected < planner.training(recipe, 4).total.expected
    rank = planner.training(recipe.model_copy(update={"student": recipe.student.model_copy(update={"adapter": LoraAdapter(r=128)})}))
    plain = planner.training(recipe)
    assert rank.parts["optimizer"].expected == pytest.approx(plain.parts["optimizer"].expected * 128 / recipe.student.adapter.r)  # type: ignore[union-attr]
    alone, planner.place = planner.place, Place(4, FSDP, on_cpu=True)
    try:
        shared = planner.training(recipe)
    finally:
        planner.place = alone
    for part in ("weights", "adapter", "gradients", "optimizer"):
        assert shared.parts[part].expected == pytest.approx(plain.parts[part].expected / 4)
    assert plain.total.low < plain.total.expected < plain.total.high


def test_the_command_says_what_fits_and_what_to_change(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from distill.cli import main

    words = ["plan", "quickstart", "--train.max_length", "8192", "--train.trainer_args.gradient_checkpointing", "true", "--json"]
    monkeypatch.setattr(sys, "argv", ["distill", *words, "--gpu", "1.5GiB"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in found["stages"]] == ["generate", "train", "evaluate", "evaluate"]
    assert all(stage["fits"]["8 GB"] == "fits" for stage in found["stages"])
    train = found["stages"][1]
    assert train["total"]["low"] < train["total"]["expected"] < train["total"]["high"]
    assert train["total"]["expected"] == pytest.approx(sum(part["expected"] for part in train["parts"].values()), abs=20)
    assert found["most"]["this card"]["rows"] >= 0 and found["room"] == 1.5 * GIB


def test_a_check_ends_with_the_plan(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models that are worth it; it refutes nothing."""
    for least, lines in ((10**8, 0), (0, 1)):
        monkeypatch.setattr(check, "_WORTH_PLANNING", least)
        found = Findings(Console(file=io.StringIO()))
        check._check_plan(recipe, 1, None, found)
        said = " ".join(found.console.file.getvalue().split())  # type: ignore[attr-defined]
        assert said.count("fits cards from 8 GB") == lines and not found.refuted and not found.warnings


def test_the_last_line_names_the_tightest_stage(planner: Planner, recipe: Recipe) -> None:
    stages = [
        sizes.StageMemory("train", "x", {"weights": sizes.Range(GIB, 2 * GIB, 9 * GIB)}),
        sizes.StageMemory("score", "y", unknown="no config"),
    ]
    assert (
        shown.one_line(shown.Plan(Place(), stages, []))
        == "train takes most, about 2.0 (1.0 to 9.0) GiB a process: fits cards from 12 GB; not known: score"
    )
    assert shown.Plan(Place(room=0.5 * GIB), stages, []).is_impossible and not shown.Plan(Place(room=GIB), stages, []).is_impossible
