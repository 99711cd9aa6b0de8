"""SFT through the kit's own loss: TRL's losses, gradients and metrics, and the divergence from the teacher beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launches import in_two_processes
from peft import LoraConfig
from test_kd import (  # noqa: F401 (fixtures)
    FULL,
    HALVES,
    KILLED,
    ONE_BATCH,
    Make,
    by_trace,
    command,
    log,
    make,
    mean,
    same_students,
    student_dir,
    student_of,
    teacher,
    train,
    weights,
)
from test_train import losses, traces
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import SFTConfig, SFTTrainer

from distill.models.chat import chat_format
from distill.targets.spec import TopK
from distill.trainers.checkpoints import CheckpointMark
from distill.trainers.traces import TraceTrainer

FOLLOWS = {"method": "sft", "validation_prompts": 8}
EARLY = {"eval_strategy": "steps", "eval_steps": 4}


def rows_of(tokenizer: Any, count: int = 24) -> Dataset:
    """Rows of different lengths; one has no supervised token."""
    chat = chat_format(tokenizer)
    rows = [dict(zip(("input_ids", "labels"), chat.trace_row(trace), strict=True)) for trace in traces(count)]
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    return Dataset.from_list(rows)


def trained(trainer: type[SFTTrainer], model: Any, tokenizer: Any, folder: Path, *, lora: bool = True, **settings: Any) -> dict[str, Any]:
    """Logs and weights after some steps."""
    defaults = {"max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 1, "max_length": None}
    fixed = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 3}
    fixed["train_sampling_strategy"] = "sequential"  # the order of the rows is the kit's own
    arguments = SFTConfig(output_dir=str(folder), **{**fixed, **defaults, **settings})
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    rows = rows_of(tokenizer)
    torch.manual_seed(0)
    found = trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    found.train()
    return {
        "log": [entry for entry in found.state.log_history if "loss" in entry],
        "weights": {name: weight.detach() for name, weight in found.model.named_parameters() if weight.requires_grad},
    }


def load(place: Path, *, tied: bool = True) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model, AutoTokenizer.from_pretrained(place)


def same_as_trl(ours: dict[str, Any], theirs: dict[str, Any], averages: tuple[str, ...] = ("entropy", "mean_token_accuracy")) -> None:
    assert len(ours["log"]) == len(theirs["log"]) >= 2
    for found, expected in zip(ours["log"], theirs["log"], strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "learning_rate", "epoch", *averages):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, value in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": False},
        {"lora": False, "tied": False},
        {"packing": True, "max_length": 256, "per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
    ],
    ids=lambda settings: " ".join(settings) or "LoRA",
)
def test_a_step_is_trls(settings: dict[str, Any], student_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    tied = settings.get("tied", True)
    settings = {name: value for name, value in settings.items() if name != "tied"}
    if not settings.get("lora", True):
        settings |= {"learning_rate": 1e-3, "optim": "sgd"}  # Adam would make whole steps of gradients that are rounding alone
    ours, theirs = (trained(kind, *load(student_dir, tied=tied), tmp_path, **settings) for kind in (TraceTrainer, SFTTrainer))
    # TRL averages the averages of batches that differ in size, where a step has several.
    same_as_trl(ours, theirs, () if "gradient_accumulation_steps" in settings else ("entropy", "mean_token_accuracy"))


def test_a_loss_that_comes_in_bf16_is_divided_before(student_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """FSDP2 gives the loss in the type of the weights, and takes its gradient in it: a factor 1 / tokens would be rounded there."""
    model, tokenizer = load(student_dir)
    arguments = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = TraceTrainer(model=model, args=arguments, train_dataset=rows_of(tokenizer), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        def forward(**inputs: Any) -> dict[str, Any]:
            outputs = model(**inputs)
            return outputs | {"loss": outputs["loss"].to(dtype)}

        model.zero_grad()
        trainer.compute_loss(forward, dict(batch), num_items_in_batch=torch.tensor(1_013)).backward()
        found: torch.Tensor = model.model.norm.weight.grad.clone()
        return found

    torch.testing.assert_close(gradient(torch.bfloat16), gradient(torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.2}], ids=lambda settings: next(iter(settings)))
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor")
def test_a_loss_of_trls_own_is_left_to_it(settings: dict[str, Any], student_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    ours, theirs = (trained(kind, *load(student_dir), tmp_path, **settings) for kind in (TraceTrainer, SFTTrainer))
    plain = trained(TraceTrainer, *load(student_dir), tmp_path)
    assert [entry["loss"] for entry in ours["log"]] == [entry["loss"] for entry in theirs["log"]]
    assert ours["log"][0]["loss"] != pytest.approx(plain["log"][0]["loss"], rel=1e-3)


def test_a_routers_loss_is_left_to_trl(student_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    _, tokenizer = load(student_dir)
    config = Qwen2MoeConfig(
        vocab_size=270,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )

    def run(kind: type[SFTTrainer], **settings: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        return trained(kind, Qwen2MoeForCausalLM(config), tokenizer, tmp_path, lora=False, learning_rate=1e-3, **settings)

    ours, theirs, without = run(TraceTrainer), run(SFTTrainer), run(TraceTrainer, router_aux_loss_coef=0.0)
    assert [entry["loss"] for entry in ours["log"]] == [entry["loss"] for entry in theirs["log"]]
    assert ours["log"][0]["aux_loss"] > 0.5
    # The router's loss is over all tokens of a batch, the likelihood over those supervised.
    assert ours["log"][0]["loss"] - without["log"][0]["loss"] == pytest.approx(0.5 * ours["log"][0]["aux_loss"], rel=1e-3)
    same_as_trl(without, run(SFTTrainer, router_aux_loss_coef=0.0))


# ---------------------------------------------------------------- beside the teacher


def whole_head_nll(recipe: Path, names: set[str]) -> float:
    """The mean over the tokens of these traces by the model's own logits: a row that pads the head counts as a token there."""
    model, tokenizer = load(Path(json.loads(recipe.read_text())["student"]["model"]))
    found = []
    for trace in traces(48):
        if trace["prompt_id"] in names:
            input_ids, labels = chat_format(tokenizer).trace_row(trace)
            with torch.no_grad():
                logits = model(torch.tensor([input_ids])).logits[0, :-1]
            found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none", ignore_index=-100))
            found[-1] = found[-1][torch.tensor(labels[1:]) != -100]
    return float(torch.cat(found).mean())


def test_the_divergence_from_the_teacher_is_followed_on_validation_prompts(make: Make) -> None:  # noqa: F811
    """Without a learning rate all numbers are the base's: the training loss of 40 prompts, the rest of the other 8."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 40, "learning_rate": 0.0, "per_device_eval_batch_size": 3}
    recipe = make("follows", TopK(k=8), trainer_args=settings, train=FOLLOWS)
    first, held_out = (entry for entry in log(train(recipe)) if "nll" in entry or "eval_nll" in entry)
    rows = by_trace(recipe)
    apart = sorted(rows, key=lambda identity: hashlib.sha256(f"validation/1/{identity}".encode()).digest())[:8]
    assert first["loss"] == pytest.approx(whole_head_nll(recipe, rows.keys() - set(apart)), rel=1e-5)
    assert "kl_lower_bound" not in first and "kd" not in first and "target_share" not in first
    assert held_out["eval_kl_lower_bound"] == pytest.approx(mean([rows[name] for name in apart], lambda row: row["kd"]), rel=1e-5)
    assert held_out["eval_loss"] == pytest.approx(mean([rows[name] for name in apart], lambda row: row["nll"]), rel=1e-5)
    assert held_out["eval_target_share"] == 1 and 0 <= held_out["eval_top1_agreement"] <= 1


def test_sft_learns_the_same_with_and_without_targets(make: Make) -> None:  # noqa: F811
    followed, alone = (make(name, TopK(k=8), train=FOLLOWS, trainer_args=ONE_BATCH | {"max_steps": 3}) for name in ("followed", "alone"))
    content = alone.read_text().replace('"score": {', '"score": null, "unused": {')
    alone.write_text(content[: content.index('"unused"')] + content[content.index('"train":') :])
    assert losses(train(followed)) == losses(train(alone))


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.2}], ids=lambda settings: next(iter(settings)))
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor")
def test_beside_a_loss_of_trls_own_the_teacher_is_followed_too(settings: dict[str, Any], make: Make) -> None:  # noqa: F811
    """`eval_loss` is then TRL's; what is measured against the teacher is what it is beside the likelihood."""
    one = {"max_steps": 1, "per_device_train_batch_size": 40, "learning_rate": 0.0}
    found = [log(train(make("own", TopK(k=8), trainer_args=one | more, train=FOLLOWS))) for more in (settings, {})]
    [own], [plain] = ([entry for entry in entries if "eval_loss" in entry] for entries in found)
    assert own["eval_kl_lower_bound"] == plain["eval_kl_lower_bound"] and own["eval_loss"] != pytest.approx(plain["eval_loss"], rel=1e-3)


def test_early_tokens_do_not_weigh_more_in_what_sft_measures(make: Make) -> None:  # noqa: F811
    """The half-life is of the rounds' loss."""
    rounds = {"rounds": 1, "rollouts": {"teacher_share": 0.5, "max_new_tokens": 64}, "trainer_args": {"max_steps": 1}}
    halved, alike = (log(train(make("half", TopK(k=8), train=FOLLOWS | {"kd": kd}, **rounds))) for kd in ({"early_half_life": 3}, {}))
    [[nll], [expected]] = ([entry["eval_nll"] for entry in entries if "eval_nll" in entry] for entries in (halved, alike))
    assert nll == expected


def test_a_resumed_run_goes_on_counting_its_tokens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    whole, killed = (make(name, TopK(k=8), trainer_args=settings, train=FOLLOWS) for name in ("counted", "recounted"))
    train(whole)
    plain_save = CheckpointMark.on_save

    def save(self: CheckpointMark, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain_save(self, args, state, control, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointMark, "on_save", save)
    assert command("train", killed) != 0
    monkeypatch.undo()
    train(killed)
    tokens = [[entry["num_tokens"] for entry in log(student_of(recipe)) if "num_tokens" in entry] for recipe in (whole, killed)]
    assert tokens[1][-1] > tokens[1][0] and len(tokens[1]) == len(tokens[0])


# ---------------------------------------------------------------- several processes


def same_metrics(left: Path, right: Path) -> None:
    """What is summed over the ranks when it is logged."""
    names = ("nll", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_kl_lower_bound", "eval_nll", "eval_top1_agreement")
    for found, expected in zip(log(student_of(left)), log(student_of(right)), strict=True):
        assert found.keys() == expected.keys()
        for name in set(names) & found.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.fixture(scope="module")
def one(make: Make) -> Path:  # noqa: F811
    recipe = make("onesft", TopK(k=8), trainer_args=EARLY, train=FOLLOWS)
    train(recipe)
    return recipe


@pytest.mark.slow
def test_one_process_equals_two(make: Make, one: Path) -> None:  # noqa: F811
    two = make("twosft", TopK(k=8), trainer_args=HALVES | EARLY, train=FOLLOWS)
    in_two_processes("ddp", two)
    same_students(one, two, 1e-5)
    same_metrics(one, two)
    for name, value in weights(two).items():
        assert torch.equal(value, weights(two, 1)[name]), name


@pytest.mark.slow
def test_fsdp_equals_one_process_and_resumes(make: Make, one: Path) -> None:  # noqa: F811
    two = make("fsdpsft", TopK(k=8), trainer_args=HALVES | EARLY, train=FOLLOWS)
    whole, resumed = (make(name, trainer_args=KILLED | EARLY, train=FOLLOWS, student=FULL) for name in ("wholesft", "resumedsft"))
    in_two_processes("fsdp2", two, whole, f"{resumed}!")
    same_students(one, two, 1e-5)
    same_metrics(one, two)
    same_students(whole, resumed, 1e-6)
    alone = make("fullsft", trainer_args=KILLED | EARLY | {"per_device_train_batch_size": 8}, train=FOLLOWS, student=FULL)
    train(alone)
    same_students(alone, whole, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_equals_one_process(stage: int, make: Make, one: Path) -> None:  # noqa: F811
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    two = make("zerosft", TopK(k=8), trainer_args=HALVES | EARLY | {"deepspeed": config}, train=FOLLOWS)
    in_two_processes("ddp", two, kind="DEEPSPEED")  # the recipe asks for it, not the launch
    same_students(one, two, 1e-5)
    same_metrics(one, two)
