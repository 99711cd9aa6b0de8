"""Checkpoints that come by time: when, and that they change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_kd import command
from test_resume import same_to_the_bit, student_of
from test_train import recipe  # noqa: F401

from distill.recipe.trainer_args import check_trainer_args
from distill.run.manifest import read_manifest
from distill.trainers import checkpoints
from distill.trainers import early as endings
from distill.trainers.early import Interval, by_time

Make = Callable[..., Path]
MINUTE = 60.0


class Clock:
    """Stands in for the system's."""

    now_s = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now_s

    def time(self) -> float:
        """Unix seconds."""
        return 1e9 + self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    made = Clock()
    monkeypatch.setattr(endings, "time", made)
    return made


def minutes(clock: Clock, interval: Interval, cost_s: float, total: int) -> list[float]:
    """When checkpoints come, where one is asked for every half minute."""
    start, found = clock.now_s, []
    for _ in range(2 * total):
        clock.now_s += MINUTE / 2
        if interval.is_due():
            interval.written(cost_s)
            found.append((clock.now_s - start) / MINUTE)
    return found


@pytest.mark.parametrize(
    ("cost_s", "expected"), [(1.0, [5, 10, 15, 20]), (12.0, [5, 15, 25, 35]), (30.0, [5, 30, 55, 80]), (600.0, [5, 65, 125, 185])]
)
def test_they_take_a_fiftieth_of_the_time(cost_s: float, expected: list[float], clock: Clock) -> None:
    """But 5 minutes at least lie between them, and an hour at most."""
    assert minutes(clock, Interval(), cost_s, 240)[:4] == expected


def test_they_follow_from_the_time_limit(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of it is lost at most; and one more comes two minutes before the end, and as long as three of them take."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(clock.time() + 120 * MINUTE)))
    assert minutes(clock, Interval(), 600.0, 119) == [5, 17, 29, 41, 53, 65, 77, 88, 100, 112]
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(clock.time() + 20 * MINUTE)))
    assert minutes(clock, Interval(), 1.0, 20)[-2:] == [18, 20]
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert minutes(clock, Interval(), 1.0, 10) == [5, 10]


def test_what_is_asked_for_by_steps_comes_by_steps() -> None:
    assert by_time({"save_total_limit": 1, "max_steps": 5})
    assert not any(by_time({name: None}) for name in ("save_steps", "save_strategy", "load_best_model_at_end", "metric_for_best_model"))
    with pytest.raises(ValueError, match="enable_jit_checkpoint can't be set here: at SIGUSR1 or SIGTERM training writes a checkpoint"):
        check_trainer_args({"enable_jit_checkpoint": True})


def test_they_change_no_weight(
    recipe: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "logging_steps": 2, "lr_scheduler_type": "linear"}
    written: list[int] = []
    plain = checkpoints.CheckpointMark.on_save

    def save(self: checkpoints.CheckpointMark, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain(self, args, state, control, **kwargs)
        written.append(state.global_step)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.CheckpointMark, "on_save", save)
        patch.setattr(endings, "_SHORTEST_S", 0.0)
        patch.setattr(endings, "_SHARE", 1e9)
        path = recipe("often", trainer_args=settings)
        assert command("train", path) == 0
    assert written == [1, 2, 3, 4, 5]
    capsys.readouterr()
    plainly = student_of(recipe("once", trainer_args=settings))
    assert "train     a checkpoint every 5 min 00 s to 1 h 00 min, so that" in capsys.readouterr().out
    same_to_the_bit(path.with_suffix("") / "student", plainly)
    assert read_manifest(plainly).facts["checkpoints"]["by"] == "time"
    by_steps = student_of(recipe("steps", trainer_args=settings | {"save_steps": 2}))
    assert read_manifest(by_steps).facts["checkpoints"] == {"by": "steps"}
