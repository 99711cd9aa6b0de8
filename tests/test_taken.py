"""One set of traces for several trainings: stages of another run in place of a run's own, read, looked through, and never written into."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import distill
from typer.testing import CliRunner

from distill.cli import app
from distill.cluster.chain import Wanted
from distill.cluster.site import Site
from distill.cluster.submit import prepare
from distill.errors import DistillError, IntegrityError, RecipeError, StageConflictError
from distill.recipe.reading import load_recipe
from distill.run.manifest import MANIFEST, read_manifest
from distill.run.tables import read_rows
from distill.stages import Step

TAKEN = ("prompts", "traces")


def problems(path: Path, count: int) -> Path:
    rows = [{"question": f"{n}+1?", "answer": n + 1, "completion": f"<think>\nx\n{'</think>' * (n % 2)}\n\n{n + 1}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(place: Path, model: str = "none", **more: Any) -> Path:
    source = str(problems(place / "problems.jsonl", 40))
    recipe = {
        "name": "test",
        "student": {"model": model},
        "prompts": {"source": source, "heldout_size": 5},
        "traces": {"source": source, "author_model": "Qwen/Qwen3-8B"},
        "curate": {"checks": ["think"]},
        "evaluate": None,
        "export": None,
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe | more))  # which is YAML
    return place / "recipe.yaml"


class Runs:
    """A recipe, the run `a` of it as far as curate, and commands for others."""

    def __init__(self, place: Path) -> None:
        self.place, self.recipe = place, write_recipe(place)
        self.ok("run", "a", "--until", "curate")

    def call(self, command: str, run: str, *words: str) -> Any:
        return CliRunner().invoke(app, [command, str(self.recipe), "--run_dir", str(self.place / run), *words])

    def ok(self, command: str, run: str, *words: str) -> str:
        result = self.call(command, run, *words)
        assert result.exit_code == 0, (result.output, result.exception)
        return str(result.output)

    def refused(self, kind: type[DistillError], command: str, run: str, *words: str) -> str:
        result = self.call(command, run, *words)
        assert isinstance(result.exception, kind), (result.output, result.exception)
        return str(result.exception)

    def of_a(self, until: str = "generate") -> list[str]:
        return ["--inputs.run", str(self.place / "a"), "--inputs.until", until]

    def files(self, run: str = "a") -> dict[str, bytes]:
        """All that is in a run, locks and the record excepted."""
        found = (path for path in (self.place / run).rglob("*") if path.is_file() and path.name not in (".lock", "recipe.yaml"))
        return {str(path): path.read_bytes() + str(path.stat().st_mtime_ns).encode() for path in found}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


ALL = ("--curate.checks", "[]")


def test_a_second_run_curates_the_traces_of_the_first_otherwise(runs: Runs) -> None:
    before = runs.files()
    planned = runs.ok("run", "b", *runs.of_a(), *ALL, "--until", "curate", "--dry-run")
    assert planned.count("taken") == 2 and "curate" in planned and "made" in planned and not (runs.place / "b").exists()
    said = runs.ok("run", "b", *runs.of_a(), *ALL, "--until", "curate")
    assert f"inputs    taken from {runs.place / 'a'}: prompts, generate" in said
    b = runs.place / "b"
    assert all((b / name).resolve() == runs.place / "a" / name for name in TAKEN) and not (b / "curated").is_symlink()
    kept = [read_manifest(runs.place / run / "curated").rows_kept for run in "ab"]
    assert kept[1] == 35 > (kept[0] or 0) > 5
    assert read_manifest(b / "curated").inputs == read_manifest(runs.place / "a" / "curated").inputs  # by the same names and digests
    assert runs.ok("run", "b", *runs.of_a(), *ALL, "--until", "curate").count("nothing to do") == 3
    assert "all as they were written" in CliRunner().invoke(app, ["verify", str(b)]).output
    assert "linked here: prompts, generate" in " ".join(CliRunner().invoke(app, ["status", str(b)]).output.split())
    assert runs.files() == before
    # Both may be moved, and the recipe says where the other is then.
    moved = runs.place / "elsewhere"
    moved.mkdir()
    for run in "ab":
        shutil.move(runs.place / run, moved / run)
    (moved / "b" / "traces").unlink()  # as where a kill came before it was made
    runs.place = moved
    again = runs.ok("run", "b", *runs.of_a(), *ALL, "--until", "curate")
    assert again.count("nothing to do") == 3 and f"taken from {moved / 'a'}: generate;" in again


def test_nothing_of_the_first_is_deleted_or_written(runs: Runs) -> None:
    words = [*runs.of_a(), *ALL]
    runs.ok("run", "b", *words, "--until", "curate")
    before = runs.files()
    runs.ok("run", "b", *words, "--until", "curate", "--redo=all", "--yes")
    runs.ok("run", "b", *words, "--until", "curate", "--redo=curate", "--yes")
    assert "--redo generate: is taken from another run" in runs.refused(RecipeError, "run", "b", *words, "--redo=generate", "--yes")
    for run in ("b", "new"):  # where the links are, and where they are not yet
        assert "link to" in runs.refused(StageConflictError, "prompts", run, *words, "--redo")
    # Without the section the links are still another run's.
    fewer = ("--prompts.max_prompts", "10", "--until", "curate")
    assert "of another run" in runs.refused(StageConflictError, "run", "b", *fewer)
    problems(runs.place / "problems.jsonl", 60)
    assert "into which nothing is written" in runs.refused(StageConflictError, "prompts", "b", *ALL)
    assert "would grow by this recipe" in runs.refused(StageConflictError, "run", "b", *words)
    assert runs.files() == before


def test_what_does_not_fit_is_refused_before_a_link_is_made(runs: Runs) -> None:
    words = [*runs.of_a(), *ALL, "--until", "curate"]
    held = runs.refused(StageConflictError, "run", "b", *words, "--prompts.heldout_size", "6")
    assert "prompts.heldout_size is 5 there and 6 here" in held
    assert "curate.checks" in runs.refused(StageConflictError, "run", "b", *runs.of_a("curate"), *ALL)
    assert "inputs.until: this recipe has no stage score" in runs.refused(RecipeError, "run", "b", *runs.of_a("score"))
    assert "is not there" in runs.refused(StageConflictError, "run", "b", "--inputs.run", str(runs.place / "none"), "--until", "curate")
    assert "is this run itself" in runs.refused(StageConflictError, "run", "a", *words)
    (runs.place / "a" / "recipe.yaml").rename(runs.place / "kept.yaml")
    assert "so it is no run" in runs.refused(StageConflictError, "run", "b", *words)
    (runs.place / "kept.yaml").rename(runs.place / "a" / "recipe.yaml")
    (runs.place / "b" / "prompts").mkdir(parents=True)
    assert "is there, and inputs takes" in runs.refused(StageConflictError, "run", "b", *words)
    (runs.place / "b" / "prompts").rmdir()
    file = runs.place / "a" / "traces" / "traces-00000.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size
    assert f"{file}: is altered" in runs.refused(IntegrityError, "run", "b", *words)
    assert not list((runs.place / "b").glob("*/"))
    file.write_bytes(whole)
    runs.ok("run", "b", *words)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "traces-00000.parquet" in runs.refused(IntegrityError, "run", "b", *runs.of_a(), "--until", "curate", "--redo=curate", "--yes")
    (runs.place / "a" / "traces" / MANIFEST).unlink()
    assert "is not there" in runs.refused(StageConflictError, "run", "b", *words)


def test_the_second_follows_when_the_first_grows(runs: Runs) -> None:
    few = ("--prompts.max_prompts", "10", "--until", "curate")
    runs.ok("run", "first", *few)
    words = ["--inputs.run", str(runs.place / "first"), "--inputs.until", "generate", *ALL, "--until", "curate"]
    runs.ok("run", "b", *words, *few)
    before = read_manifest(runs.place / "b" / "curated")
    runs.ok("run", "first", "--prompts.max_prompts", "30", "--until", "curate")
    assert "max_prompts is 30 there and 10 here" in runs.refused(StageConflictError, "run", "b", *words, *few)
    runs.ok("run", "b", *words, "--prompts.max_prompts", "30")
    after = read_manifest(runs.place / "b" / "curated")
    assert after.grew_from == [before.digest] and after.rows_in == 30
    assert {row["prompt_id"] for row in read_rows(runs.place / "b" / "curated", "curated")} <= {
        row["prompt_id"] for row in read_rows(runs.place / "first" / "prompts", "train")
    }


def test_a_submission_begins_behind_what_is_taken(runs: Runs) -> None:
    recipe = load_recipe(runs.recipe, ["--run_dir", str(runs.place / "b"), "--inputs.run", str(runs.place / "a")])
    assert prepare(recipe, Wanted(gpus=0), Site()).jobs[0].steps[0] == Step("train")


@pytest.mark.slow
def test_two_students_learn_from_one_set_of_traces_and_targets(tmp_path: Path, tiny_model_dir: Path) -> None:
    learns = {"method": "kd", "max_length": 128, "trainer_args": {"max_steps": 2, "per_device_train_batch_size": 4}}
    more = {"teacher": {"model": str(tiny_model_dir)}, "score": {"target": {"kind": "top_k", "k": 4}}, "train": learns}
    recipe = write_recipe(tmp_path, str(tiny_model_dir), **more)
    first = distill("run", recipe, "--run_dir", tmp_path / "a", "--no-check", "--until", "train")
    assert first.returncode == 0, first.stderr[-2000:]
    words = ["--run_dir", tmp_path / "b", "--inputs.run", tmp_path / "a", "--train.trainer_args.learning_rate", "1e-3", "--no-check"]
    second = distill("run", tmp_path / "a" / "recipe.yaml", *words)
    assert second.returncode == 0, second.stderr[-2000:]
    a, b = (read_manifest(tmp_path / run / "student") for run in "ab")
    assert a.inputs == b.inputs and set(a.inputs) == {"curated", "targets"} and a.digest != b.digest
    assert all((tmp_path / "b" / name).is_symlink() for name in ("prompts", "traces", "curated", "targets"))
    page = (tmp_path / "b" / "report" / "report.md").read_text()
    assert "taken from another run" in page and "prompts, generate, curate, score, of a" in page
