"""Several processes write a stage's traces together: the rows are those of one process, and whatever goes wrong is said once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest
from filelock import FileLock
from launches import launch
from scored import peaked_model

from distill.errors import RecipeError
from distill.models.launched import idle_note, refuse_own_servers
from distill.models.processes import refuse_several
from distill.recipe.experiment import Recipe
from distill.run.manifest import MANIFEST, PARTS, read_manifest

STAGES = ("generate", "rollouts", "evaluate")
FOLDERS = {"generate": "traces", "rollouts": "rounds/01/rollouts", "evaluate": "eval"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return peaked_model(tmp_path_factory.mktemp("teacher"), seed=3), peaked_model(tmp_path_factory.mktemp("student"), seed=0)


def recipe(place: Path, models: tuple[Path, Path], *, prompts: int = 25) -> Path:
    """A recipe of traces and a round from the base, whose prompts are there."""
    place.mkdir()
    rows = [json.dumps({"question": f"What is {n} plus {2 * n}?", "answer": 3 * n}) for n in range(prompts + 5)]
    (place / "problems.jsonl").write_text("\n".join(rows))
    sampling = {"max_new_tokens": 16, "temperature": 1.0, "batch_size": 4}
    content = {
        "name": "together",
        "run_dir": str(place / "run"),
        "teacher": {"model": str(models[0])},
        "student": {"model": str(models[1])},
        "prompts": {"source": str(place / "problems.jsonl"), "heldout_size": 5},
        "generate": sampling | {"samples_per_prompt": 2},
        "rounds": 1,
        "rollouts": sampling | {"start": "base", "teacher_share": 0.2},
        "score": {},
        "evaluate": sampling | {"models": ["base", "teacher"]},
    }
    path = place / "recipe.yaml"
    path.write_text(json.dumps(content))
    assert commands.run(["-m", "distill", "prompts", path]).returncode == 0
    return path


def alone(stage: str, path: Path, *more: str) -> str:
    result = commands.run(["-m", "distill", stage, path, *more])
    assert result.returncode == 0, result.stderr
    return result.stdout


def together(stage: str, path: Path, *more: str) -> str:
    result = launch("ddp", ["-m", "distill", stage, path, *more])
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def tables(path: Path, stage: str) -> dict[str, bytes]:
    """The files of a stage's tables."""
    place = path.parent / "run" / FOLDERS[stage]
    assert (place / MANIFEST).exists() and not (place / PARTS).exists()
    return {file.name: file.read_bytes() for file in sorted(place.glob("*.parquet"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, models: tuple[Path, Path]) -> Iterator[Path]:
    """All stages by one process."""
    path = recipe(tmp_path_factory.mktemp("whole") / "one", models)
    for stage in STAGES:
        alone(stage, path)
    yield path


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_write_the_bytes_of_one(stage: str, whole: Path, tmp_path: Path, models: tuple[Path, Path]) -> None:
    path = recipe(tmp_path / "two", models)
    said = together(stage, path)
    assert said.count(" kept") == 1 and tables(path, stage) == tables(whole, stage)
    assert read_manifest(path.parent / "run" / FOLDERS[stage]).digest == read_manifest(whole.parent / "run" / FOLDERS[stage]).digest


@pytest.mark.slow
def test_processes_finish_what_was_begun_in_other_parts(whole: Path, tmp_path: Path, models: tuple[Path, Path]) -> None:
    """A part of three is there; then two processes do a part of an array together, and at last the rest."""
    path = recipe(tmp_path / "parts", models)
    alone("generate", path, "--shard", "2/4")
    assert "are not yet" in together("generate", path, "--shard", "1/2")  # the first two of four
    assert "kept" in together("generate", path)
    assert tables(path, "generate") == tables(whole, "generate")
    assert "nothing to do" in together("generate", path)


@pytest.mark.slow
def test_a_part_may_have_no_prompt(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """As one of three processes has for two prompts."""
    one, many = recipe(tmp_path / "one", models, prompts=2), recipe(tmp_path / "many", models, prompts=2)
    for stage in ("generate", "rollouts"):
        alone(stage, one)
        for number in (1, 2, 3):
            alone(stage, many, "--shard", f"{number}/3")
        assert tables(one, stage) == tables(many, stage)


@pytest.mark.slow
def test_one_error_ends_all_with_one_message(tmp_path: Path, models: tuple[Path, Path]) -> None:
    path = recipe(tmp_path / "faulty", models)
    (tmp_path / "empty").mkdir()
    everywhere = launch("ddp", ["-m", "distill", "generate", path, "--teacher.model", str(tmp_path / "empty")])
    assert everywhere.returncode == 1 and everywhere.stderr.count("error: ") == 1, everywhere.stderr
    path = recipe(tmp_path / "taken", models)
    alone("generate", path, "--shard", "1/2")
    with FileLock(path.parent / "run" / "traces" / ".lock-00002-of-00002"):  # another works on the part of the second process
        second = launch("ddp", ["-m", "distill", "generate", path])
    assert second.returncode == 1 and second.stderr.count("error: ") == 1 and "another process is working" in second.stderr
    assert "kept" in together("generate", path)


@pytest.mark.slow
def test_what_one_process_does_is_refused_in_a_launch(tmp_path: Path, models: tuple[Path, Path]) -> None:
    path = recipe(tmp_path / "curated", models)
    result = launch("ddp", ["-m", "distill", "pair", path])
    assert result.returncode == 1 and "error: pair: one process does it, and 2 were launched" in result.stderr
    assert result.stderr.count("error: ") == 1


def test_several_processes_share_what_can_be_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_several("curate")
    monkeypatch.setenv("WORLD_SIZE", "8")
    for stage in ("generate", "score", "train", "rollouts", "evaluate"):
        refuse_several(stage)
    with pytest.raises(RecipeError, match=r"pair: one process does it, and 8 were launched\. Run `distill pair` without accelerate"):
        refuse_several("pair")


def test_each_process_would_start_its_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    sections = {"name": "served", "student": {"model": "b"}, "prompts": {"source": "p"}, "generate": {}}
    started = Recipe.model_validate(sections | {"teacher": {"model": "a", "server": {"kind": "vllm"}}})
    with pytest.raises(RecipeError, match=r"teacher\.server: each of 2 processes would start one"):
        refuse_own_servers(started, "generate")
    refuse_own_servers(started, "rollouts")
    elsewhere = {"kind": "vllm", "url": "http://localhost:8000/v1", "model": "a"}
    refuse_own_servers(Recipe.model_validate(sections | {"teacher": {"model": "a", "server": elsewhere}}), "generate")


def test_one_process_among_several_gpus_says_so() -> None:
    assert idle_note(1, 1, "generate") == idle_note(0, 1, "train") == idle_note(8, 8, "generate") == idle_note(8, 2, "train") == ""
    assert idle_note(8, 1, "generate") == (
        "one of 8 GPUs works, the other 7 are idle. To use them all: accelerate launch --num_processes 8 -m distill generate RECIPE"
    )
    assert idle_note(2, 1, "train").endswith(
        "the other is idle. To use them all: accelerate launch --num_processes 2 -m distill.train --config RECIPE"
    )
