"""Training that goes on: with damaged checkpoints, with sums that were not logged yet, on another number of processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from test_kd import command
from test_train import LAUNCH, ROOT, adapter, logged, losses, recipe  # noqa: F401

from distill.errors import StageConflictError
from distill.recipe.learning import Train
from distill.run import files
from distill.run.manifest import read_manifest
from distill.trainers import checkpoints
from distill.trainers.checkpoints import CheckpointMark
from distill.trainers.launches import Checkpoint, Launch, last_whole_checkpoint, refuse_launch

Make = Callable[..., Path]
SETTINGS = {"max_steps": 6, "save_steps": 2, "logging_steps": 3, "lr_scheduler_type": "linear"}


def interrupted(path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> Path:
    """The checkpoints of a training that was ended behind the one of a step."""
    plain = CheckpointMark.on_save

    def save(self: CheckpointMark, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointMark, "on_save", save)
        assert command("train", path) != 0
    return path.with_suffix("") / "student" / "checkpoints"


def student_of(path: Path) -> Path:
    assert command("train", path) == 0
    return path.with_suffix("") / "student"


def without_times(student: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name} for entry in entries]


def same_to_the_bit(left: Path, right: Path) -> None:
    assert without_times(left) == without_times(right)
    for name, value in adapter(left).items():
        assert torch.equal(value, adapter(right)[name]), name
    facts, expected = read_manifest(left).facts, read_manifest(right).facts
    assert all(facts[name] == expected[name] for name in ("train_loss", "tokens", "steps", "rows_a_step"))


def test_what_was_not_logged_yet_is_not_lost(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Checkpoints lie between logs; the first was written before any."""
    path = recipe("between", trainer_args=SETTINGS)
    for step in (2, 4):
        assert interrupted(path, monkeypatch, step).exists()
    same_to_the_bit(student_of(path), student_of(recipe("undisturbed", trainer_args=SETTINGS)))


def test_a_training_that_was_ended_behind_its_last_step_takes_no_other(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Inside an epoch, with a learning rate that has not come down: the checkpoint of the last step is all there is to learn."""
    settings = SETTINGS | {"max_steps": 5, "save_steps": 5, "lr_scheduler_type": "constant"}
    path = recipe("ended", trainer_args=settings)
    there = interrupted(path, monkeypatch, 5)
    for _ in range(2):
        with monkeypatch.context() as patch:  # stopped once more, while the weights are saved
            patch.setattr("distill.stages.train._save", lambda *_: 1 // 0)
            assert command("train", path) != 0
        assert [each.name for each in there.glob("checkpoint-*")] == ["checkpoint-5"]
    same_to_the_bit(student_of(path), student_of(recipe("undisturbed", trainer_args=settings)))


def test_what_a_kill_left_of_the_weights_is_no_part_of_them(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    path = recipe("left", trainer_args=SETTINGS)
    adapter_folder = interrupted(path, monkeypatch, 2).parent / "adapter"
    adapter_folder.mkdir()
    (adapter_folder / ".tmpAb1Cd2").write_bytes(b"half of the weights")  # as safetensors calls it until it is whole
    student = student_of(path)
    assert not (student / "adapter" / ".tmpAb1Cd2").exists() and not any(".tmp" in name for name in read_manifest(student).files)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two marked checkpoints of small files."""
    folder = tmp_path_factory.mktemp("two")
    mark = CheckpointMark(checkpoints.Processes(), Launch(1, 8, ""), None)
    mark.trainer = type("Trainer", (), {"_total_loss_scalar": 0.0, "_tr_loss": torch.tensor(0.5), "_globalstep_last_logged": 1})()
    mark.trainer._metrics = {"train": {}}
    for step in (2, 4):
        place = folder / f"checkpoint-{step}"
        (place / "shards").mkdir(parents=True)
        for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "shards/0.distcp"):
            (place / name).write_bytes(bytes(range(256)) * 16)
        (place / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None}))
        state = type("State", (), {"global_step": step, "best_model_checkpoint": None})()
        mark.on_save(type("Arguments", (), {"output_dir": folder})(), state, None)  # type: ignore[arg-type]
    yield folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "shards/0.distcp", "whole"])
@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:20])], ids=["flip", "delete", "cut"]
)
def test_a_damaged_checkpoint_is_not_gone_on_from(
    name: str, damage: Callable[[Path], None], two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    assert last_whole_checkpoint(folder) == Checkpoint(folder / "checkpoint-4", 4, Launch(1, 8, ""), [found_sums(folder)])
    damage(folder / "checkpoint-4" / name)
    found = last_whole_checkpoint(folder)
    assert found is not None and found.step == 2 and not (folder / "checkpoint-4").exists()
    assert name == "whole" or f"{name}: is gone or was altered" in capsys.readouterr().out
    damage(folder / "checkpoint-2" / name)
    (folder / "checkpoint-4.kept").mkdir()
    assert last_whole_checkpoint(folder) is None and last_whole_checkpoint(tmp_path / "absent") is None
    assert (folder / "checkpoint-4.kept").is_dir()  # somebody's copy


def found_sums(folder: Path) -> dict[str, Any]:
    [sums] = json.loads((folder / "checkpoint-4" / "whole").read_text())["sums"]
    return dict(sums)


def test_the_best_checkpoint_is_looked_at_too(two: Path, tmp_path: Path) -> None:
    """A run that takes it at its end would take damaged weights, or forget that there was a better one."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    state = folder / "checkpoint-4" / "trainer_state.json"
    mark = files.read_json(folder / "checkpoint-4" / "whole")
    state.write_text(json.dumps({"best_model_checkpoint": "elsewhere/checkpoint-2"}))
    mark["files"]["trainer_state.json"] = files.digest_file(state)
    files.write_json(folder / "checkpoint-4" / "whole", mark)
    flip(folder / "checkpoint-2" / "optimizer.pt")
    assert last_whole_checkpoint(folder) is None


def test_training_falls_back_to_the_older_checkpoint(
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recipe("fallen", trainer_args=SETTINGS)
    folder = interrupted(path, monkeypatch, 4)
    flip(folder / "checkpoint-4" / "optimizer.pt")
    capsys.readouterr()
    student = student_of(path)
    assert "going on from step 2" in capsys.readouterr().out
    same_to_the_bit(student, student_of(recipe("undisturbed", trainer_args=SETTINGS)))


def test_the_old_checkpoint_goes_when_the_new_one_is_marked(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    path = recipe("one", trainer_args=SETTINGS | {"save_total_limit": 1})

    def write(mark: Path, content: dict[str, Any]) -> None:
        if mark.parent.name == "checkpoint-4":
            raise KeyboardInterrupt
        files.write_json(mark, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", write)
        assert command("train", path) != 0
    folder = path.with_suffix("") / "student" / "checkpoints"
    assert {place.name for place in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    found = last_whole_checkpoint(folder)
    assert found is not None and found.step == 2
    assert interrupted(path, monkeypatch, 4) == folder
    assert {place.name for place in folder.glob("checkpoint-*")} == {"checkpoint-4"}


def test_a_launch_that_would_take_other_rows_is_refused(tmp_path: Path) -> None:
    there = Checkpoint(tmp_path, 20, Launch(1, 8, ""), [])
    there.check(Launch(2, 8, ""))
    with pytest.raises(StageConflictError, match=r"written by 1 processes with 8 rows a step; this launch of 2 takes 16"):
        there.check(Launch(2, 16, ""))
    sharded = there._replace(launch=Launch(2, 8, "FSDP"))
    sharded.check(Launch(2, 8, "FSDP"))
    for launch in (Launch(2, 8, ""), Launch(4, 8, "FSDP")):
        with pytest.raises(StageConflictError, match="are read by the launch that wrote them"):
            sharded.check(launch)


def test_a_launch_is_refused_before_it_is_submitted(two: Path, tmp_path: Path) -> None:
    """By the mark of the newest checkpoint, which one process wrote with 8 rows a step."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    flip(folder / "checkpoint-4" / "optimizer.pt")  # what the job will see itself
    for train, processes in ((Train(global_batch_size=8), 4), (Train(trainer_args={"per_device_train_batch_size": 8}), 1)):
        refuse_launch(folder, train, processes, on_cpu=True)
    with pytest.raises(StageConflictError, match="checkpoint-4: was written by 1 processes with 8 rows a step; this launch of 2 takes 16"):
        refuse_launch(folder, Train(trainer_args={"per_device_train_batch_size": 8}), 2, on_cpu=True)
    with pytest.raises(StageConflictError, match="this launch has 2 with FSDP"):
        refuse_launch(folder, Train(global_batch_size=8), 2, sharding="FSDP")
    refuse_launch(tmp_path / "absent", Train(), 64)


PIECE = """
import sys
from distill.pipeline import run_stage
from distill.recipe.reading import load_recipe
from distill.trainers.checkpoints import CheckpointMark

plain = CheckpointMark.on_save
def save(self, *arguments, **more):
    plain(self, *arguments, **more)
    raise KeyboardInterrupt

if sys.argv[2] == "stop":
    CheckpointMark.on_save = save
try:
    run_stage("train", load_recipe(sys.argv[1]))
except KeyboardInterrupt:
    pass
"""


def piece(path: Path, processes: int, *, stop: bool = False) -> str:
    """Trains in so many processes, to the end or up to the first checkpoint; returns what was said."""
    script = path.with_name("piece.py")
    script.write_text(PIECE)
    words = [script, path, "stop" if stop else "end"]
    result = commands.run(words) if processes == 1 else commands.launch(words, processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_training_goes_on_with_another_number_of_processes(recipe: Make) -> None:  # noqa: F811
    """31 rows in steps of 16: half of an epoch is behind the checkpoint, and a log is half full."""
    settings = {"max_steps": -1, "num_train_epochs": 4, "per_device_train_batch_size": 8, "save_steps": 5, "logging_steps": 2}
    make = {"trainer_args": settings | {"lr_scheduler_type": "linear"}, "train": "  global_batch_size: 16\n", "count": 31}
    paths = {name: recipe(name, **make) for name in ("one", "two", "oneto2", "twoto1")}
    for processes, name in ((1, "one"), (2, "two")):
        piece(paths[name], processes)
    for first, then, name in ((1, 2, "oneto2"), (2, 1, "twoto1")):
        piece(paths[name], first, stop=True)
        said = piece(paths[name], then)
        assert f"going on from step 5, which {first} processes reached: the same rows follow" in said
    students = {name: path.with_suffix("") / "student" for name, path in paths.items()}

    def distance(left: str, right: str) -> float:
        pairs = zip(adapter(students[left]).values(), adapter(students[right]).values(), strict=True)
        return float(torch.stack([(one - other).norm() for one, other in pairs]).norm())

    for name in ("oneto2", "twoto1"):
        assert losses(students[name]) == pytest.approx(losses(students["one"]), abs=1e-5)
        assert logged(students[name], "num_tokens") == logged(students["one"], "num_tokens")
        assert read_manifest(students[name]).facts["train_loss"] == pytest.approx(
            read_manifest(students["one"]).facts["train_loss"], abs=1e-5
        )
        assert min(distance(name, "one"), distance(name, "two")) <= distance("one", "two") + 1e-6
