"""Training on stored targets, held by invariances through the user's own commands."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch
from launches import dealt_out, in_two_processes
from safetensors.torch import load_file
from scored import peaked_model, score_by_hand
from test_train import ROOT, adapter, losses, same, traces

from distill import cli
from distill.errors import IntegrityError
from distill.models.chat import IGNORE
from distill.models.loading import load_chat_format, load_model
from distill.recipe.models import ModelSpec
from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.schema import TRACE
from distill.run.tables import read_rows
from distill.targets.codec import Targets
from distill.targets.files import TargetReader
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK
from distill.trainers.checkpoints import CheckpointMark
from distill.trainers.targets import NO_TARGET, StoredTargets, TargetCollator, TargetSource

VOCAB_SIZE = 261
DENSE = TopK(k=VOCAB_SIZE)
TARGETS: dict[str, TargetSpec] = {"dense": DENSE, "top_k": TopK(k=8), "sampled": Sampled(draws=20), "chosen_token": ChosenToken()}
STEPS = {"max_steps": 6, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "warmup_steps": 0, "save_strategy": "no"}
ONE_BATCH = {"max_steps": 1, "per_device_train_batch_size": 48}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_model(tmp_path_factory.mktemp("teacher"), seed=3, hidden_size=48, norm=8, padding=8)


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, student_dir: Path, teacher: Path) -> Make:
    """Makes a run folder with curated traces and targets, and a recipe over it."""

    def recipe(
        name: str,
        target: TargetSpec = DENSE,
        *,
        trainer_args: dict[str, Any] | None = None,
        student: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        holes: int = 0,
        score: bool = True,
        count: int = 48,
        **sections: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp(name)
        run = folder / "run"
        with StageFolder(run / "curated", "curate", {}) as out:
            out.write_table("curated", traces(count), TRACE)
            out.finish(rows_in=count, rows_kept=count)
        if score:
            score_by_hand(run, teacher, target, holes=holes)
        content = {
            "name": name,
            "run_dir": str(run),
            "seed": 1,
            "teacher": {"model": str(teacher)},
            "student": {"model": str(student_dir), "adapter": {"type": "lora", "r": 4}, **(student or {})},
            "prompts": {"source": "none.jsonl"},
            "generate": {},
            "score": {"target": target.model_dump()},
            "train": {"method": "kd", "max_length": 256, "trainer_args": STEPS | (trainer_args or {}), **(train or {})},
            **sections,
        }
        path = folder / "run.yaml"
        path.write_text(json.dumps(content))
        return path

    return recipe


def command(*arguments: str | Path) -> int:
    """`distill` with these arguments, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        cli.main()
    return end.value.code or 0  # type: ignore[return-value]


def train(recipe: Path, *overrides: str) -> Path:
    assert command("train", recipe, *overrides) == 0
    return recipe.parent / "run" / "student"


def refused(recipe: Path, capsys: pytest.CaptureFixture[str], *messages: str, overrides: tuple[str, ...] = ()) -> None:
    """Training ends with exit code 1 and one error that says all of these."""
    capsys.readouterr()
    assert command("train", recipe, *overrides) == 1
    found = capsys.readouterr().err
    assert found.count("error: ") == 1 and "Traceback" not in found, found
    assert all(message in found for message in messages), found


def log(student: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(make: Make) -> Path:
    """The student that others are compared with."""
    return train(make("plain"))


# ---------------------------------------------------------------- the loss of a step against the definition


def by_trace(recipe: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Prompt id: the definition's values at each supervised token, in float64 over the whole vocabulary, of an untrained student."""
    content = json.loads(recipe.read_text())
    spec = ModelSpec(model=content["student"]["model"])
    model: Any = load_model(spec, torch.device("cpu")).double()
    chat, run = load_chat_format(spec), recipe.parent / "run"
    reader = TargetReader(sorted((run / "targets").glob("*.targets")))
    found = {}
    for trace in read_rows(run / "curated", "curated"):
        input_ids, labels = chat.trace_row(trace)
        written = torch.tensor([label for label in labels[1:] if label != IGNORE])
        with torch.no_grad():
            logits = model(torch.tensor([input_ids])).logits[0, :-1][torch.tensor(labels[1:]) != IGNORE]
        q = logits[:, :VOCAB_SIZE].softmax(-1)
        found[trace["prompt_id"]] = definition(
            content["score"]["target"]["kind"], q, written, reader[reader.find(trace["prompt_id"] + "/0")]
        )
    return found


def definition(kind: str, q: torch.Tensor, written: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
    nll = -q.gather(1, written[:, None])[:, 0].log()
    p = torch.from_numpy(targets.log_probs).double().exp()
    if kind == "chosen_token":
        return {"kd": (p[:, 0].log() + nll) ** 2 / 2, "nll": nll, "has_target": p[:, 0] > 0}
    ids = torch.from_numpy(targets.ids).long()
    there, q_of = ids >= 0, q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
    if kind == "sampled":
        return {"kd": -(p * q_of.log().masked_fill(~there, 0)).sum(1), "nll": nll, "has_target": there.any(1)}
    p = torch.cat([p, torch.from_numpy(targets.log_rest).double().exp()[:, None]], 1)
    p = p / p.sum(1, keepdim=True)
    outcomes = torch.cat([q_of, (1 - q_of.sum(1, keepdim=True)).clamp(min=1e-12)], 1)
    kl = (p * (p.log() - outcomes.log()).masked_fill(p == 0, 0)).masked_fill(~there.any(1, keepdim=True), 0).sum(1)
    return {"kd": kl, "nll": nll, "has_target": there.any(1)}


def mean(rows: Any, value: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> float:
    """The mean over all tokens of all rows."""
    return float(torch.cat([value(row) for row in rows]).mean())


@pytest.mark.parametrize("kind", TARGETS)
def test_the_loss_of_a_step_is_the_definition_averaged_over_its_tokens(kind: str, make: Make) -> None:
    recipe = make("first", TARGETS[kind], trainer_args=ONE_BATCH)
    [first, *_] = log(train(recipe))
    rows = by_trace(recipe).values()
    assert first["loss"] == pytest.approx(mean(rows, lambda row: row["kd"]), rel=1e-5)
    assert first["kd"] == pytest.approx(first["loss"], rel=1e-6)
    assert first["nll"] == pytest.approx(mean(rows, lambda row: row["nll"]), rel=1e-5)
    assert first["target_share"] == 1 and first["loss"] > 0.5
    assert ("kl_lower_bound" in first) == (kind in ("dense", "top_k")) and ("log_ratio" in first) == (kind == "chosen_token")


def test_the_terms_are_weighted_and_early_tokens_more(make: Make) -> None:
    settings = {"weight": 0.7, "nll_weight": 0.4, "early_half_life": 5}
    recipe = make("weights", TopK(k=8), trainer_args=ONE_BATCH, train={"kd": settings})
    [first, *_] = log(train(recipe))

    def weight(row: dict[str, torch.Tensor]) -> torch.Tensor:
        return 0.5 ** (torch.arange(len(row["kd"])) / 5)

    def averaged(value: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> float:
        rows = by_trace(recipe).values()
        return mean(rows, lambda row: value(row) * weight(row)) / mean(rows, weight)  # long answers count no less

    assert first["loss"] == pytest.approx(averaged(lambda row: 0.7 * row["kd"] + 0.4 * row["nll"]), rel=1e-5)
    assert first["kd"] == pytest.approx(averaged(lambda row: row["kd"]), rel=1e-5)
    assert first["nll"] == pytest.approx(averaged(lambda row: row["nll"]), rel=1e-5)


@pytest.mark.parametrize("kind", ["top_k", "sampled", "chosen_token"])
def test_in_the_teachers_traces_a_token_without_a_target_is_learned_as_written(kind: str, make: Make) -> None:
    recipe = make("holes", TARGETS[kind], trainer_args=ONE_BATCH, train={"kd": {"weight": 0.7, "nll_weight": 0.1}}, holes=3)
    [first, *_] = log(train(recipe))
    rows = by_trace(recipe).values()

    def value(row: dict[str, torch.Tensor]) -> torch.Tensor:
        return 0.7 * torch.where(row["has_target"], row["kd"], row["nll"]) + 0.1 * row["nll"]

    assert first["loss"] == pytest.approx(mean(rows, value), rel=1e-5)
    assert (
        first["target_share"] == pytest.approx(mean(rows, lambda row: row["has_target"].double()), rel=1e-6) and first["target_share"] < 0.7
    )


def in_rounds(make: Make, teacher: Path, name: str, rounds: int, *, holes: int = 0, **settings: Any) -> Path:
    """A recipe of rounds from the base, with the rollouts of all of them written and scored."""
    rollouts = {"start": "base", "max_new_tokens": 64, **settings.pop("rollouts", {})}
    recipe = make(name, TopK(k=8), holes=holes, rounds=rounds, rollouts=rollouts, generate=None, **settings)
    for number in range(1, rounds + 1):
        place = round_of(recipe, number)
        with StageFolder(place / "rollouts", "rollouts", {}) as out:
            out.write_table("traces", [row | {"author": "student"} for row in traces(48)], TRACE)
            out.finish(rows_in=48, rows_kept=48)
        score_by_hand(place, teacher, TopK(k=8), table=("rollouts", "traces"), holes=holes)
    return recipe


def round_of(recipe: Path, number: int) -> Path:
    return recipe.parent / "run" / "rounds" / f"{number:02d}"


def test_in_its_own_traces_it_is_not(make: Make, teacher: Path) -> None:
    """A round of the student's traces: a token without a target adds nothing, but counts as a token."""
    recipe = in_rounds(make, teacher, "own", 1, trainer_args=ONE_BATCH, holes=3)
    expected = by_trace(recipe).values()
    train(recipe, "--round", "1")
    [first, *_] = log(round_of(recipe, 1) / "student")
    assert first["loss"] == pytest.approx(mean(expected, lambda row: row["kd"] * row["has_target"]), rel=1e-5)


# ---------------------------------------------------------------- the learning rate over rounds

LINEAR = {"lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 3e-3, "max_steps": 6}


def rates(recipe: Path, *numbers: int) -> list[float]:
    """The learning rate of every step of these rounds."""
    logs = [entry for number in numbers for entry in log(round_of(recipe, number) / "student")]
    return [entry["learning_rate"] for entry in logs if "learning_rate" in entry]


def linear(steps: int) -> list[float]:
    """Up in two steps, then down to nothing."""
    return [3e-3 * (step / 2 if step < 2 else (steps - step) / (steps - 2)) for step in range(steps)]


def test_one_schedule_runs_over_all_rounds_or_over_each(make: Make, teacher: Path) -> None:
    recipe = in_rounds(make, teacher, "one", 2, trainer_args=LINEAR)
    for number in ("1", "2"):
        train(recipe, "--round", number)
    assert rates(recipe, 1, 2) == pytest.approx(linear(12), rel=1e-9)
    each = in_rounds(make, teacher, "each", 2, trainer_args=LINEAR, rollouts={"schedule_over": "each_round"})
    for number in ("1", "2"):
        train(each, "--round", number)
    assert rates(each, 1, 2) == pytest.approx(linear(6) * 2, rel=1e-9)


def test_a_round_resumes_within_the_schedule(make: Make, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LINEAR | {"save_strategy": "steps", "save_steps": 2}
    whole, killed = (in_rounds(make, teacher, name, 3, trainer_args=settings) for name in ("whole", "killed"))
    for recipe in (whole, killed):
        train(recipe, "--round", "1")
    train(whole, "--round", "2")
    plain_save = CheckpointMark.on_save

    def save(self: CheckpointMark, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain_save(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointMark, "on_save", save)
    assert command("train", killed, "--round", "2") != 0
    monkeypatch.undo()
    train(killed, "--round", "2")
    assert rates(killed, 2) == rates(whole, 2) == pytest.approx(linear(18)[6:12], rel=1e-9)
    for name, value in adapter(round_of(whole, 2) / "student").items():
        assert torch.equal(value, adapter(round_of(killed, 2) / "student")[name]), name


def test_rounds_are_not_added_to_a_finished_schedule(make: Make, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = in_rounds(make, teacher, "more", 2, trainer_args=LINEAR)
    train(recipe, "--round", "1")
    assert command("train", recipe, "--round", "1", "--rounds", "3") == 1
    assert "rollouts.schedule_over is 'part 1 of 2' there" in capsys.readouterr().err
    train(recipe, "--round", "2")
    for number in (1, 2):
        shutil.copytree(round_of(recipe, number) / "rollouts", round_of(recipe, number + 2) / "rollouts")
        shutil.copytree(round_of(recipe, number) / "targets", round_of(recipe, number + 2) / "targets")
    for change in (("--rounds", "3"), ("--rounds", "3", "--rollouts.schedule_over", "each_round")):
        assert command("train", recipe, "--round", "3", *change) == 1
        assert "its learning rate ran over part 2 of 2 of a schedule" in capsys.readouterr().err


def test_the_stored_divergence_is_the_live_teachers(make: Make, teacher: Path) -> None:
    """Whatever is lost in storing: less than half a per cent of the loss."""
    recipe = make("live", trainer_args=ONE_BATCH)
    [first, *_] = log(train(recipe))
    spec = [ModelSpec(model=str(place)) for place in (teacher, json.loads(recipe.read_text())["student"]["model"])]
    models: list[Any] = [load_model(one, torch.device("cpu")).double() for one in spec]
    chat, values = load_chat_format(spec[1]), []
    for trace in traces(48):
        input_ids, labels = chat.trace_row(trace)
        at = torch.tensor(labels[1:]) != IGNORE
        with torch.no_grad():
            log_p, log_q = (model(torch.tensor([input_ids])).logits[0, :-1, :VOCAB_SIZE][at].log_softmax(-1) for model in models)
        values.append((log_p.exp() * (log_p - log_q)).sum(1))
    assert first["kl_lower_bound"] == pytest.approx(float(torch.cat(values).mean()), rel=5e-3)


# ---------------------------------------------------------------- it learns


def test_the_student_comes_nearer_to_the_teacher_on_prompts_it_has_not_seen(make: Make) -> None:
    settings = {"max_steps": 40, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 10}
    recipe = make("learns", TopK(k=32), trainer_args=settings, train={"validation_prompts": 8})
    student = train(recipe)
    entries = log(student)
    trained, held_out = ([entry for entry in entries if key in entry] for key in ("loss", "eval_loss"))
    assert len(trained) == 40 and trained[-1]["kl_lower_bound"] < 0.5 * trained[0]["kl_lower_bound"]
    assert [entry["step"] for entry in held_out] == [10, 20, 30, 40]
    assert held_out[-1]["eval_kl_lower_bound"] < 0.9 * held_out[0]["eval_kl_lower_bound"] < 0.9 * trained[0]["kl_lower_bound"]
    assert held_out[-1]["eval_top1_agreement"] > held_out[0]["eval_top1_agreement"] > trained[0]["top1_agreement"]
    assert read_manifest(student).drops == {"validation": 8}


def test_held_out_prompts_are_measured_and_not_trained_on(make: Make) -> None:
    """Without a learning rate both numbers are the base's: of 40 prompts the one, of the other 8 the other."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 40, "learning_rate": 0.0, "per_device_eval_batch_size": 3}
    recipe = make("held", TopK(k=8), trainer_args=settings, train={"validation_prompts": 8, "kd": {"nll_weight": 0.5}})
    first, held_out = (entry for entry in log(train(recipe)) if "kd" in entry or "eval_kd" in entry)
    rows = by_trace(recipe)
    apart = sorted(rows, key=lambda identity: hashlib.sha256(f"validation/1/{identity}".encode()).digest())[:8]
    for found, names in ((first["kl_lower_bound"], rows.keys() - set(apart)), (held_out["eval_kl_lower_bound"], apart)):
        assert found == pytest.approx(mean([rows[name] for name in names], lambda row: row["kd"]), rel=1e-5)
    # Of tokens, not of batches, which are of different sizes.
    assert held_out["eval_loss"] == pytest.approx(mean([rows[n] for n in apart], lambda row: row["kd"] + 0.5 * row["nll"]), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "kd"),
    [
        ("top_k", {"divergence": "reverse_kl"}),
        ("top_k", {"divergence": "jsd", "jsd_beta": 0.3}),
        ("dense", {"temperature": 2.0}),
        ("sampled", {}),
        ("chosen_token", {}),
    ],
)
def test_every_kind_and_divergence_trains(kind: str, kd: dict[str, Any], make: Make) -> None:
    recipe = make("kinds", TARGETS[kind], trainer_args={"max_steps": 8, "learning_rate": 1e-2}, train={"kd": kd}, count=16)
    found = losses(train(recipe))
    assert found[-1] < 0.98 * found[0]


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize(
    "changed",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_how_a_step_is_computed_changes_nothing(changed: dict[str, Any], make: Make, plain: Path) -> None:
    student = train(make("same", trainer_args=changed))
    same(plain, student)
    for found, expected in zip(log(student), log(plain), strict=True):
        for name in ("kd", "kl_lower_bound", "nll", "entropy", "top1_agreement", "num_tokens"):
            assert (name in found) == (name in expected)
            assert found.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-3), name


def test_packing_leaks_nothing(make: Make) -> None:
    """All rows in one step: packed into a few long sequences, or padded side by side, the loss is the same."""
    settings = {"kd": {"early_half_life": 20, "nll_weight": 0.3}}
    padded = log(train(make("padded", trainer_args=ONE_BATCH, train=settings)))[0]
    packed = log(train(make("packed", trainer_args=ONE_BATCH | {"packing": True}, train=settings)))[0]
    for name in ("loss", "kd", "nll", "grad_norm", "num_tokens"):
        assert packed[name] == pytest.approx(padded[name], rel=1e-5), name
    assert packed["epoch"] == padded["epoch"] == 1


def test_padding_of_the_students_head_changes_nothing(make: Make, plain: Path, tmp_path: Path) -> None:
    wider = peaked_model(tmp_path / "wider", seed=0, padding=13)
    same(plain, train(make("wider", student={"model": str(wider)})))


@pytest.mark.parametrize("adapter_settings", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_adapters(adapter_settings: dict[str, Any], make: Make, plain: Path) -> None:
    found = losses(train(make("adapter", student={"adapter": {"type": "lora", "r": 4, **adapter_settings}})))
    assert found[0] == pytest.approx(losses(plain)[0], rel=1e-5) and found[-1] < found[0]


def test_full_finetuning_trains_the_tied_head_too(make: Make, student_dir: Path) -> None:
    student = train(make("full", student={"adapter": {"type": "full"}}, trainer_args={"max_steps": 2}))
    after, before = load_file(student / "model" / "model.safetensors"), load_file(student_dir / "model.safetensors")
    assert after.keys() == before.keys() and all(not torch.equal(after[name], before[name]) for name in after)


def test_qlora_trains(make: Make) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra qlora")
    recipe = make("qlora", student={"quantization": "nf4"}, trainer_args={"max_steps": 8, "learning_rate": 1e-2})
    found = losses(train(recipe))
    assert found[-1] < 0.98 * found[0]


@pytest.mark.slow
def test_ten_steps_equal_five_and_a_kill_and_five(make: Make) -> None:
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "linear"}
    undisturbed, killed = make("undisturbed", trainer_args=settings), make("killed", trainer_args=settings)
    student = killed.parent / "run" / "student"
    words = [ROOT / "distill" / "train.py", "--config", killed]
    with commands.Command(words) as process:
        process.until((student / "checkpoints" / "checkpoint-5" / "whole").exists)
    assert not (student / "manifest.json").exists()
    result = commands.run(words)
    assert result.returncode == 0 and "going on from step 5" in result.stdout, result.stderr[-2000:]
    expected = train(undisturbed)
    assert losses(student) == losses(expected)  # to the last bit, and no step twice
    for name, value in adapter(expected).items():
        assert torch.equal(value, adapter(student)[name]), name


# ---------------------------------------------------------------- where targets are read


def stored_of(recipe: Path) -> StoredTargets:
    return StoredTargets(
        [
            TargetSource(
                sorted((recipe.parent / "run" / "targets").glob("*.targets")),
                read_manifest(recipe.parent / "run" / "curated").digest,
                teacher_wrote=True,
            )
        ]
    )


def test_targets_travel_as_paths(make: Make) -> None:
    """What a loader's worker is given does not grow with the targets, and finds the same ones."""
    stored = stored_of(make("paths", TopK(k=8)))
    copy = pickle.loads(pickle.dumps(stored))
    assert len(pickle.dumps(TargetCollator(dict, stored, None))) < 1000
    index = np.concatenate([stored.indices(0, f"{trace['prompt_id']}/0", _supervised(trace))[-3:] for trace in traces(4)])
    assert torch.equal(copy.gather(index).sparse.log_probs_NK, stored.gather(index).sparse.log_probs_NK)


def _supervised(trace: dict[str, Any]) -> int:
    return len(trace["completion"]) - len("<think>") - len("</think>") + 2 + 1


def test_sharding_does_not_round_targets(make: Make) -> None:
    """FSDP casts every float it finds in what a model is given; with bf16 a log-probability would keep three digits."""
    from torch.distributed.utils import _apply_to_tensors

    stored = stored_of(make("rounded", count=2))
    targets = stored.gather(stored.indices(0, f"{traces(1)[0]['prompt_id']}/0", _supervised(traces(1)[0])), half_life=5)
    given = _apply_to_tensors(lambda tensor: tensor.bfloat16(), {"distillation": targets})["distillation"]
    assert given.sparse.log_probs_NK.dtype == given.sparse.log_rest_N.dtype == given.weights_M.dtype == torch.float32


@pytest.mark.parametrize("kind", ["top_k", "sampled", "chosen_token"])
def test_a_batch_without_any_target_is_one(kind: str, make: Make) -> None:
    """Nothing supervised, or no token with a target: shapes that the loss takes."""
    stored = stored_of(make("none", TARGETS[kind], holes=1, count=2))
    for index in (np.empty(0, np.int64), stored.indices(0, f"{traces(1)[0]['prompt_id']}/0", _supervised(traces(1)[0]))):
        sparse = stored.gather(index).sparse
        assert sparse.ids_NK.shape == (len(index), 0 if kind == "chosen_token" else 1) and sparse.log_probs_NK.shape == (len(index), 1)
        assert not sparse.filled_NK().any()


def test_a_supervised_token_without_a_place_is_refused(make: Make) -> None:
    stored = stored_of(make("place", count=2))
    batch = {"labels": torch.tensor([[IGNORE, 5, 6]])}
    with pytest.raises(IntegrityError, match="no place among the targets"):
        TargetCollator(lambda _: batch, stored, None)([{"target_index": [NO_TARGET, 0, NO_TARGET]}])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_digest": "x"}, "for a student with another tokenizer"),
        ({"template_digest": "x"}, "for a student with another chat template"),
    ],
)
def test_targets_for_another_student_are_refused(
    fields: dict[str, str], message: str, make: Make, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("other", score=False, count=4)
    score_by_hand(recipe.parent / "run", teacher, DENSE, **fields)
    refused(recipe, capsys, message, "distill score", "--redo")


def test_a_trace_that_was_not_scored_is_refused(make: Make, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, other = make("unscored", score=False, count=8), make("scored", count=4)
    (other.parent / "run" / "targets").rename(recipe.parent / "run" / "targets")
    refused(recipe, capsys, "was scored for other traces", "distill score")


def test_another_number_of_tokens_is_refused(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    cut = ("--train.overlong", "cut", "--train.max_length", "60")
    refused(make("lengths", count=4), capsys, "supervised tokens", "max_length", overrides=cut)


def test_an_altered_shard_is_refused(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make("altered", count=4)
    [shard] = (recipe.parent / "run" / "targets").glob("*.targets")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(recipe, capsys, str(shard))


def test_a_temperature_without_all_candidates_is_refused(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        make("tempered", TopK(k=8), count=4),
        capsys,
        "temperature 2.0 needs the teacher's whole",
        overrides=("--train.kd.temperature", "2.0"),
    )


def test_missing_targets_are_refused(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    refused(make("absent", score=False, count=4), capsys, "targets")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--train.trainer_args.loss_type", "dft"), "loss_type"),
        (("--train.trainer_args.label_smoothing_factor", "0.1"), "label_smoothing_factor"),
        (("--train.kd.divergence", "policy_gradient"), "policy_gradient"),
        (("--train.kd.jsd_beta", "0.5"), "jsd_beta"),
        (("--train.method", "sft"), "score"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_settings_that_would_be_ignored_are_refused(
    overrides: tuple[str, ...], message: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(make("ignored", count=2), capsys, message, overrides=overrides)


# ---------------------------------------------------------------- two processes

HALVES = {"per_device_train_batch_size": 4}
KILLED = HALVES | {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
FULL = {"adapter": {"type": "full"}}


def weights(recipe: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(recipe.parent / "run" / f"rank{rank}.pt")
    return found


def student_of(recipe: Path) -> Path:
    return recipe.parent / "run" / "student"


def saved(recipe: Path) -> dict[str, torch.Tensor]:
    """The trained weights as they are loaded again."""
    if (student_of(recipe) / "adapter").exists():
        return adapter(student_of(recipe))
    model: Any = load_model(ModelSpec(model=str(student_of(recipe) / "model")), torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return dict(model.state_dict())


def same_students(left: Path, right: Path, tolerance: float) -> None:
    torch.testing.assert_close(losses(student_of(left)), losses(student_of(right)), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(saved(left), saved(right), rtol=100 * tolerance, atol=100 * tolerance)
    for found, expected in zip(log(student_of(left)), log(student_of(right)), strict=True):
        assert found.get("kl_lower_bound", 0) == pytest.approx(expected.get("kl_lower_bound", 0), rel=1e-4)


@pytest.fixture(scope="module")
def ddp(make: Make) -> dict[str, Path]:
    """LoRA and full fine-tuning in two processes."""
    found = {"lora": make("ddp", trainer_args=HALVES), "full": make("ddpfull", trainer_args=HALVES, student=FULL)}
    in_two_processes("ddp", *found.values())
    return found


@pytest.mark.slow
def test_one_process_equals_two_and_all_ranks_hold_the_same(make: Make, plain: Path, ddp: dict[str, Path]) -> None:
    same(plain, student_of(ddp["lora"]))
    one = make("onefull", student=FULL)
    train(one)
    same_students(one, ddp["full"], 1e-5)
    for recipe in ddp.values():
        assert weights(recipe).keys() == weights(recipe, 1).keys()
        for name, value in weights(recipe).items():
            assert torch.equal(value, weights(recipe, 1)[name]), name


@pytest.mark.slow
def test_fsdp_equals_ddp_and_resumes(make: Make, teacher: Path, ddp: dict[str, Path]) -> None:
    found = {"lora": make("fsdp", trainer_args=HALVES), "full": make("fsdpfull", trainer_args=HALVES, student=FULL)}
    whole, resumed = (make(name, trainer_args=KILLED, student=FULL) for name in ("whole", "resumed"))
    narrow = make("narrow", trainer_args=HALVES | {"bf16": True})
    part = in_rounds(make, teacher, "fsdppart", 2, trainer_args=HALVES | LINEAR)
    in_two_processes("fsdp2", *found.values(), whole, f"{resumed}!", narrow, part)
    for recipe in (*found.values(), whole):
        dealt_out(recipe.parent / "run")
    dealt_out(round_of(part, 1))
    assert rates(part, 1) == pytest.approx(linear(12)[:6], rel=1e-9)
    for name, recipe in found.items():
        same_students(recipe, ddp[name], 1e-5)
    same_students(resumed, whole, 1e-6)
    assert losses(student_of(narrow)) == pytest.approx(losses(student_of(ddp["lora"])), rel=3e-2)
    for entry in log(student_of(narrow))[:-1]:  # neither the sums nor the loss are rounded to bf16 on their way out
        assert entry["kd"] == pytest.approx(entry["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero2", "zero3"])
def test_deepspeed_equals_ddp_and_resumes(file: str, make: Make, teacher: Path, ddp: dict[str, Path]) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    found = {"lora": make("zero", trainer_args=HALVES), "full": make("zerofull", trainer_args=HALVES, student=FULL)}
    whole, resumed = (make(name, trainer_args=KILLED, student=FULL) for name in ("whole", "resumed"))
    part = in_rounds(make, teacher, "zeropart", 2, trainer_args=HALVES | LINEAR)
    in_two_processes(file, *found.values(), whole, f"{resumed}!", part)
    for run in (*(recipe.parent / "run" for recipe in found.values()), round_of(part, 1)):
        dealt_out(run, weights=file == "zero3")
    assert rates(part, 1) == pytest.approx(linear(12)[:6], rel=1e-9)
    for name, recipe in found.items():
        same_students(recipe, ddp[name], 1e-5)
    same_students(resumed, whole, 1e-6)
