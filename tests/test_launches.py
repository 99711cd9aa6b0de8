"""Every launch file with every method and kind of training: it works, with weights really dealt out, or is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launches import FILES, dealt_out, in_two_processes, launch, trained
from test_kd import FULL, HALVES, Make, command, in_rounds, make, round_of, student_dir, teacher  # noqa: F401 (fixtures)
from test_train import losses, traces

from distill.errors import RecipeError
from distill.recipe.experiment import Recipe
from distill.recipe.launches import LaunchKind, kind_here, kind_of, refuse_launch
from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.schema import PROMPT

METHODS = ("sft", "kd", "round", "on_policy")
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "qlora": {"quantization": "nf4"}, "full": FULL}
Found = dict[str, tuple[list[float], list[int]]]
FEW = HALVES | {"max_steps": 3}


def recipe(make: Make, teacher: Path, method: str, kind: str) -> Path:  # noqa: F811
    """A recipe with all it needs to train."""
    name = f"{method}{kind}"
    if method == "round":
        return in_rounds(make, teacher, name, 1, trainer_args=FEW, student=KINDS[kind])
    if method == "kd":
        return make(name, trainer_args=FEW, student=KINDS[kind])
    train = {"method": method} | ({"on_policy": {"max_new_tokens": 8}} if method == "on_policy" else {})
    path = make(name, trainer_args=FEW, student=KINDS[kind], train=train, score=False)
    unused = {"score"} | ({"generate"} if method == "on_policy" else set())
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in unused}))
    with StageFolder(path.parent / "run" / "prompts", "prompts", {}) as out:
        rows = [{"prompt_id": row["prompt_id"], "messages": row["messages"]} for row in traces(48)]
        out.write_table("train", rows, PROMPT)
        out.write_table("heldout", rows[:4], PROMPT)
        out.finish()
    return path


def folder_of(path: Path, method: str) -> Path:
    """Beside the student's folder."""
    return round_of(path, 1) if method == "round" else path.parent / "run"


def works(file: str, kind: str, methods: tuple[str, ...], make: Make, teacher: Path) -> Found:  # noqa: F811
    """Trains a recipe of each method in one launch; its losses, and numbers of weights."""
    made = {method: recipe(make, teacher, method, kind) for method in methods}
    in_two_processes(file, *made.values())
    for method, path in made.items():
        if file != "ddp":
            dealt_out(folder_of(path, method), weights=file != "zero2")
    facts = {method: read_manifest(folder_of(path, method) / "student").facts for method, path in made.items()}
    sizes = {method: [fact["parameters"], fact["trainable_parameters"]] for method, fact in facts.items()}
    return {method: (losses(folder_of(path, method) / "student"), sizes[method]) for method, path in made.items()}


def same(found: Found, expected: Found) -> None:
    for method, (values, sizes) in found.items():
        there, of_all = expected[method]
        # What a live student writes is drawn by other numbers. Sizes are those of all processes, however weights are dealt out.
        assert values == pytest.approx(there, rel=1e-4 if method != "on_policy" else 0.2), method
        assert sizes == of_all, method


SOME = [("fsdp2", "qlora", ("sft", "on_policy")), ("zero3", "full", ("kd",))]  # offloading has DeepSpeed compile for a minute


def can(file: str, kind: str) -> bool:
    return not (kind == "qlora" and file.startswith("zero3"))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_launch_trains_every_method(kind: str, make: Make, teacher: Path) -> None:  # noqa: F811
    expected = works("ddp", kind, METHODS, make, teacher)
    for file in ("fsdp2", "zero2", "zero3", "zero3-offload"):
        if can(file, kind):
            same(works(file, kind, METHODS, make, teacher), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "kind", "methods"), SOME)
def test_some_launches(file: str, kind: str, methods: tuple[str, ...], make: Make, teacher: Path) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes" if kind == "qlora" else "deepspeed", reason="needs the extra")
    same(works(file, kind, methods, make, teacher), works("ddp", kind, methods, make, teacher))


@pytest.mark.slow
def test_the_same_recipe_learns_the_same_on_1_2_and_4_processes(make: Make, teacher: Path) -> None:  # noqa: F811
    """45 rows divide by none of these, nor by the rows of a step; kd, and a round of 48 rows in steps of 7."""
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2}

    def both() -> dict[str, Path]:
        kd = {"method": "kd", "global_batch_size": 8}
        rounds = in_rounds(make, teacher, "sameround", 1, trainer_args=settings, train={"global_batch_size": 7})
        return {"kd": make("samekd", trainer_args=settings, train=kd, count=45), "round": rounds}

    made = {count: both() for count in (1, 2, 4)}
    assert command("train", made[1]["kd"]) == command("train", made[1]["round"], "--round", "1") == 0
    for count in (2, 4):
        result = trained("ddp", list(made[count].values()), processes=count)
        assert result.returncode == 0, result.stderr[-9000:]
        for method, path in made[count].items():
            student, alone = (folder_of(each, method) / "student" for each in (path, made[1][method]))
            assert read_manifest(student).facts["world_size"] == count
            assert losses(student) == pytest.approx(losses(alone), rel=1e-5) and len(losses(alone)) == {"kd": 6, "round": 7}[method]


@pytest.mark.slow
def test_what_trl_deals_out_itself_must_come_out_even(make: Make, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    path = recipe(make, teacher, "on_policy", "lora")
    steps = ("--train.global_batch_size", "8", "--train.trainer_args.per_device_train_batch_size", "1")
    wrong = launch("ddp", ["-m", "distill.train", "--config", path, *steps], processes=3)
    assert wrong.returncode == 1 and wrong.stderr.count("error: ") == 1
    assert "8 can't be dealt out evenly to 3 processes that take 1 at once. The nearest that can: 6 or 9" in wrong.stderr
    command("check", path, *steps, "--processes", "3")
    assert "8 can't be dealt out evenly to 3 processes that take 1 at once" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_launch_that_can_t_train_a_recipe_is_refused_before_anything_is_loaded(make: Make, teacher: Path) -> None:  # noqa: F811
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    path = recipe(make, teacher, "sft", "qlora")
    result = launch("zero3", ["-m", "distill.train", "--config", path])
    assert result.returncode == 1 and result.stderr.count("error: ") == 1
    assert "error: student.quantization nf4: ZeRO-3 can't deal 4-bit weights out. Take slurm/launch/fsdp2.yaml" in result.stderr
    assert "Loading weights" not in result.stderr


@pytest.mark.slow
def test_weights_that_are_not_dealt_out_after_all_are_noticed(make: Make, teacher: Path) -> None:  # noqa: F811
    """On CPUs accelerate makes DDP of FSDP, and says nothing."""
    result = launch("fsdp2", ["-m", "distill.train", "--config", recipe(make, teacher, "sft", "lora")])
    assert result.returncode == 1 and result.stderr.count("error: ") == 1, result.stderr
    assert "launch: FSDP was to deal the weights out, but accelerate made MULTI_CPU of it" in result.stderr


def test_launch_files_are_known_for_what_they_are() -> None:
    found = {file.stem: str(kind_of(file)) for file in FILES.glob("*.yaml")}
    zero = {"zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3", "zero3-offload": "DeepSpeed ZeRO-3"}
    assert found == {"ddp": "every process holds all weights", "fsdp2": "FSDP2"} | zero
    here = kind_here({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {})
    assert here == kind_of(FILES / "zero3.yaml") == kind_here({}, {"deepspeed": {"zero_optimization": {"stage": 3}}})
    assert (
        kind_here({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {})
        == kind_of(FILES / "fsdp2.yaml")
        == kind_here({}, {"fsdp": True})
    )
    assert kind_here({}, {}) == kind_of(FILES / "ddp.yaml")


LIVE = {"train": {"method": "on_policy"}, "teacher": {"model": "t", "quantization": "nf4"}}


@pytest.mark.parametrize(
    ("kind", "sections", "says"),
    [
        (LaunchKind("FSDP", 2, ("context",)), {}, "context parallelism is asked for, which the kit does not train with"),
        (LaunchKind("DEEPSPEED", 3, ("sequence",)), {}, "sequence parallelism is asked for"),
        (LaunchKind("FSDP", 1), {}, "the first version of FSDP"),
        (LaunchKind("DEEPSPEED", 3), {"student": {"model": "s", "quantization": "nf4"}}, "student.quantization nf4: ZeRO-3 can't deal"),
        (LaunchKind("DEEPSPEED", 3), LIVE, "teacher.quantization nf4: ZeRO-3 can't deal"),
        (LaunchKind(), {"train": {"trainer_args": {"parallelism_config": "x"}}}, "train.trainer_args.parallelism_config"),
    ],
)
def test_what_can_t_be_trained_so_is_refused_by_name(kind: LaunchKind, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        refuse_launch(_recipe(sections), kind)
    refuse_launch(_recipe({"student": {"model": "s", "quantization": "nf4"}}), LaunchKind("FSDP", 2))
    refuse_launch(_recipe({"student": {"model": "s", "quantization": "nf4"}}), LaunchKind("DEEPSPEED", 2))


def _recipe(sections: dict[str, Any]) -> Recipe:
    live = sections.get("train", {}).get("method") == "on_policy"
    base = {"name": "r", "teacher": {"model": "t"}, "student": {"model": "s"}, "prompts": {"source": "p"}, "evaluate": None}
    return Recipe.model_validate(base | ({} if live else {"generate": {}}) | sections)


def test_check_looks_at_the_launch_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n"
        "parallelism_config: {parallelism_config_cp_size: 4}\n"
    )
    where = ("--run_dir", tmp_path / "run")
    assert command("check", "quickstart", "--quick", "--launch", tmp_path / "long.yaml", *where) == 1
    assert "context parallelism is asked for" in " ".join(capsys.readouterr().out.split())
    assert command("check", "quickstart", "--quick", "--launch", FILES / "fsdp2.yaml", *where) == 0
    assert "fsdp2.yaml: FSDP2" in capsys.readouterr().out
    assert command("check", "quickstart", "--quick", "--launch", tmp_path / "absent.yaml", *where) == 1
