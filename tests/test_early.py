"""Work that ends early on a signal goes on to the very same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ending import told
from scored import score_by_hand
from test_resume import same_to_the_bit, student_of
from test_train import recipe  # noqa: F401

from distill.errors import EARLY
from distill.recipe.reading import load_recipe
from distill.targets.spec import TopK

Make = Callable[..., Path]
SETTINGS: dict[str, Any] = {"max_steps": 6, "logging_steps": 2, "lr_scheduler_type": "linear"}


def train(path: Path, signals: str = "", *, processes: int = 0) -> tuple[int, str]:
    """Exit code, and what was said."""
    result = told(signals, ["train", "--config", path], path.parent, processes=processes)
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    return result.returncode, result.stdout + result.stderr


def checkpoints(path: Path) -> list[str]:
    return sorted(place.name for place in (path.with_suffix("") / "student" / "checkpoints").glob("checkpoint-*"))


def test_training_that_was_told_to_end_goes_on_to_the_same_weights(recipe: Make) -> None:  # noqa: F811
    path = recipe("early", trainer_args=SETTINGS)
    code, said = train(path, "0:1:SIGUSR1")
    assert code == EARLY and checkpoints(path) == ["checkpoint-1"]
    assert "ended early by SIGUSR1 behind step 1 of 6, with a checkpoint. What is finished in" in said and "the same command" in said
    code, said = train(path, "0:4:SIGTERM 0:4:SIGTERM 0:_sums:SIGTERM")
    assert code == EARLY and "going on from step 1" in said and "SIGTERM behind step 4 of 6" in said
    assert train(path)[0] == 0
    same_to_the_bit(path.with_suffix("") / "student", student_of(recipe("undisturbed", trainer_args=SETTINGS)))


@pytest.mark.parametrize("place", ["_batch", "_student_to_train", "MetricsFile.on_train_begin"])
def test_before_the_first_step_there_is_nothing_to_keep(place: str, recipe: Make) -> None:  # noqa: F811
    path = recipe("before", trainer_args=SETTINGS)
    code, said = train(path, f"0:{place}:SIGTERM")
    assert code == EARLY and "ended early by SIGTERM. What is finished" in said and checkpoints(path) == []
    assert train(path)[0] == 0


@pytest.mark.parametrize("place", ["6", "_save"])
def test_behind_the_last_step_it_finishes(place: str, recipe: Make) -> None:  # noqa: F811
    path = recipe("behind", trainer_args=SETTINGS)
    assert train(path, f"0:{place}:SIGUSR1")[0] == 0
    assert train(path)[1].count("nothing to do") == 1


@pytest.mark.parametrize("step", [2, 3], ids=["inside an epoch", "at its end"])
def test_what_belongs_to_the_end_of_an_epoch_is_done_once(step: int, recipe: Make) -> None:  # noqa: F811
    settings = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 16, "lr_scheduler_type": "linear"}
    settings |= {"logging_strategy": "epoch", "save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    make: dict[str, Any] = {"trainer_args": settings | {"metric_for_best_model": "eval_loss"}, "train": "  validation_prompts: 4\n"}
    path = recipe("epochs", **make)
    assert train(path, f"0:{step}:SIGUSR1")[0] == EARLY and checkpoints(path) == [f"checkpoint-{step}"]
    assert train(path)[0] == 0
    same_to_the_bit(path.with_suffix("") / "student", student_of(recipe("undisturbed", **make)))


def test_kd_goes_on_to_the_same_weights(recipe: Make, tmp_path: Path) -> None:  # noqa: F811
    def make(name: str) -> Path:
        path = recipe(name, trainer_args=SETTINGS, train="  method: kd\n")
        path.write_text(path.read_text() + "score: {target: {kind: top_k, k: 8}}\n")
        return path

    path, other = make("early"), make("undisturbed")
    for each in (path, other):
        score_by_hand(each.with_suffix(""), Path(load_recipe(each, []).student.model), TopK(k=8))
    assert train(path, "0:3:SIGUSR1")[0] == EARLY and train(path)[0] == 0
    same_to_the_bit(path.with_suffix("") / "student", student_of(other))


@pytest.mark.slow
def test_two_processes_end_behind_the_same_step(recipe: Make) -> None:  # noqa: F811
    """The other learns of it a step later; whether one is told, or both at different steps, and again while the checkpoint is written."""
    settings = SETTINGS | {"per_device_train_batch_size": 4}
    path, other = recipe("early", trainer_args=settings), recipe("undisturbed", trainer_args=settings)
    for signals, step in (("1:1:SIGUSR1", 2), ("0:3:SIGTERM 1:4:SIGTERM 1:_sums:SIGTERM", 4)):
        code, said = train(path, signals, processes=2)
        assert code == EARLY and checkpoints(path)[-1] == f"checkpoint-{step}"
        assert said.count("ended early by") == 1 and f"behind step {step} of 6" in said
    assert train(path, processes=2)[0] == 0 and train(other, processes=2)[0] == 0
    same_to_the_bit(path.with_suffix("") / "student", other.with_suffix("") / "student")


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["0:_batch:SIGUSR1", "1:_student_to_train:SIGTERM"])
def test_two_processes_that_have_nothing_yet_both_end(signal: str, recipe: Make) -> None:  # noqa: F811
    path = recipe("before", trainer_args=SETTINGS | {"per_device_train_batch_size": 4})
    assert train(path, signal, processes=2)[0] == EARLY and checkpoints(path) == []
