"""A run that is steered: what would be done is said, what is asked for more is added, and a run says how it was made."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import content, distill, write_recipe

from distill.recipe.reading import load_recipe
from distill.run.manifest import read_manifest
from distill.run.owned import EARLIER
from distill.run.tables import read_rows

pytestmark = pytest.mark.slow
TRAINING = ("prompts", "traces", "curated", "student")


def ok(*arguments: str | Path) -> str:
    result = distill(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, Path]:
    """A recipe, and a run of it whose stages were made by commands with other settings than the recipe has."""
    folder = tmp_path_factory.mktemp("steering")
    recipe = write_recipe(folder, tiny_model_dir)
    run = ["--run_dir", folder / "run"]
    steps = ["--train.trainer_args.max_steps", "3"]
    ok("run", recipe, "--no-check", *run, *steps, "--until", "generate", "--generate.max_new_tokens", "12", "--generate.batch_size", "5")
    ok("curate", recipe, *run, "--curate.max_per_prompt", "1")
    ok("train", recipe, *run, *steps, "--train.trainer_args.learning_rate", "3e-4", "--seed", "7")
    ok("run", recipe, *run, "--from", "evaluate", "--evaluate.max_new_tokens", "8", "--evaluate.max_prompts", "6")
    return recipe, folder / "run"


def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, list[str | Path]]:
    """A copy of the run, and the words of a command line that ask for it as it was made."""
    shutil.copytree(made[1], tmp_path / "run")
    return tmp_path / "run", [tmp_path / "run" / "recipe.yaml", "--run_dir", tmp_path / "run", "--evaluate", "null"]


def table_of(dry_run: str) -> dict[str, str]:
    """Step and what would be done with it, of what `--dry-run` printed."""
    lines = [line for line in dry_run.splitlines() if not line.startswith(("step ", "run folder"))]
    return {match[1]: match[2] for line in lines if (match := re.match(r"(round \d \w+|\w+)\s{2,}(made anew|gone on with|\w+)\s", line))}


def test_the_record_is_what_was_made_whatever_the_last_command_said(made: tuple[Path, Path]) -> None:
    _, run = made
    record = load_recipe(run / "recipe.yaml")
    assert (record.generate.max_new_tokens, record.generate.batch_size, record.curate.max_per_prompt) == (12, 5, 1)  # type: ignore[union-attr]
    assert record.train.trainer_args["learning_rate"] == 3e-4 and record.train.trainer_args["max_steps"] == 3
    assert record.evaluate is not None and (record.evaluate.max_new_tokens, record.evaluate.max_prompts) == (8, 6)
    assert record.seed == 5  # of the prompts; the student was made with another
    page = (run / "report" / "report.md").read_text()
    for text in ("max_new_tokens: 12", "max_per_prompt: 1", "learning_rate: 0.0003", "distill train recipe.yaml --seed 7"):
        assert text in page
    assert "max_per_prompt: 1" in (run / "export" / "README.md").read_text()


def test_to_repeat_this_run_repeats_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The commands and the recipe of the report, with the folders that the page shortens, make the same run to the last bit."""
    _, run = made
    page = (run / "report" / "report.md").read_text().partition("To repeat this run")[2]
    commands, recipe = re.findall(r"```(?:yaml)?\n(.*?)\n```", page, re.S)
    record = load_recipe(run / "recipe.yaml")
    assert record.prompts is not None and record.teacher is not None
    for place in {record.prompts.source, record.teacher.model}:
        recipe, places = re.subn(rf"(?m)^(  (?:source|model)): {re.escape(Path(place).name)}$", rf"\1: {place}", recipe)
        assert places, f"the page does not name {place}"
    (tmp_path / "recipe.yaml").write_text(recipe)
    for command in commands.splitlines():
        program, stage, file, *overrides = shlex.split(command)
        assert (program, file) == ("distill", "recipe.yaml")
        ok(stage, tmp_path / file, *overrides, "--run_dir", tmp_path / "again")
    for name in (*TRAINING, "eval", "export"):
        assert content(tmp_path / "again" / name) == content(run / name), name


def test_a_dry_run_says_what_would_be_done_and_does_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    run, words = copied(made, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    assert set(table_of(ok("run", *words, "--until", "curate", "--dry-run")).values()) == {"kept"}
    more = table_of(ok("run", *words, "--seed", "5", "--generate.samples_per_prompt", "4", "--until", "curate", "--dry-run"))
    assert more == {"prompts": "kept", "generate": "grown", "curate": "grown"}
    refused = distill("run", *words, "--generate.temperature", "0.5", "--dry-run")
    assert refused.returncode == 1 and "generate.temperature is 1.0 there and 0.5 here" in " ".join(refused.stdout.split())
    redo = table_of(ok("run", *words, "--redo", "curate", "--dry-run"))
    assert redo["generate"] == "kept" and redo["curate"] == redo["train"] == "made anew"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_what_is_refused_later_is_refused_before_anything_is_spent(made: tuple[Path, Path], tmp_path: Path) -> None:
    run, words = copied(made, tmp_path)
    prompts = read_manifest(run / "prompts")
    refused = distill("run", *words, "--seed", "5", "--prompts.max_prompts", "40", "--train.trainer_args.learning_rate", "1e-2")
    assert refused.returncode == 1 and "prompts.max_prompts is None there and 40 here" in refused.stderr
    refused = distill("run", *words, "--seed", "7", "--until", "prompts")
    assert refused.returncode == 1 and "seed is 5 there and 7 here" in refused.stderr and not re.search(r"[0-9a-f]{64}", refused.stderr)
    assert read_manifest(run / "prompts") == prompts


def test_redo_asks_before_it_deletes_what_cost_something(made: tuple[Path, Path], tmp_path: Path) -> None:
    run, words = copied(made, tmp_path)
    for wrong in (["--from", "trian"], ["--until", "trian"], ["--from", "train"], ["--prompts.heldout_size", "30"]):
        assert distill("run", *words, "--redo", "train", "--yes", *wrong).returncode == 1 and (run / "student" / "manifest.json").exists()
    refused = distill("run", *words, "--redo", "train")
    assert refused.returncode == 1 and "there is nobody to ask" in refused.stderr and str(run / "student") in refused.stderr
    assert (run / "student" / "manifest.json").exists()
    said = ok("run", *words, "--no-check", "--redo", "curate", "--until", "curate", "--yes")
    assert "nothing to do" in said and not (run / "student").exists() and read_manifest(run / "curated").rows_kept == 48


def test_more_samples_and_epochs_go_on_from_what_is_there(made: tuple[Path, Path], tmp_path: Path) -> None:
    """No trace is written again; the student is made anew, and the one before is kept."""
    run, words = copied(made, tmp_path)
    before = {(row["prompt_id"], row["sample_index"]): row for row in read_rows(run / "traces", "traces")}
    student = read_manifest(run / "student")
    more = ["--generate.samples_per_prompt", "4", "--train.trainer_args.max_steps", "5", "--seed"]
    said = ok("run", *words, "--no-check", *more, "5", "--until", "curate")
    assert "144 traces were written before" in said
    after = {(row["prompt_id"], row["sample_index"]): row for row in read_rows(run / "traces", "traces")}
    assert len(after) == 48 * 4 and before.items() <= after.items()
    assert list(after) == sorted(after, key=lambda key: (list(dict.fromkeys(k[0] for k in after)).index(key[0]), key[1]))
    ok("train", *words, *more, "7")
    assert read_manifest(run / "student").facts["steps"] == 5 and read_manifest(run / "student" / EARLIER) == student
    fewer = distill("train", *words, "--generate.samples_per_prompt", "4", "--seed", "7", "--train.trainer_args.max_steps", "4")
    assert fewer.returncode == 1 and "train.trainer_args.max_steps is 5 there and 4 here" in fewer.stderr


def test_traces_of_another_model_are_not_put_beside(made: tuple[Path, Path], tmp_path: Path, tiny_model_dir: Path) -> None:
    """Other weights in the same folder are noticed before anything is written; and what was there comes back."""
    run, words = copied(made, tmp_path)
    weights = tiny_model_dir / "model.safetensors"
    whole, before = weights.read_bytes(), read_manifest(run / "traces")
    weights.write_bytes(whole[:-64] + bytes(64))
    try:
        refused = distill("generate", *words, "--generate.samples_per_prompt", "4", "--seed", "5")
    finally:
        weights.write_bytes(whole)
    assert refused.returncode == 1 and "teacher.files: its content has changed" in refused.stderr
    back = ok("generate", *words, "--seed", "5", "--generate.samples_per_prompt", "3")
    assert "nothing to do" in back and read_manifest(run / "traces") == before


def test_what_shows_and_keeps_locks_no_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, words = copied(made, tmp_path)
    arguments: dict[str, Any] = {"logging_steps": 7, "save_steps": 2, "report_to": "tensorboard", "run_name": "x", "ddp_timeout": 9}
    shown = [word for name, value in arguments.items() for word in (f"--train.trainer_args.{name}", json.dumps(value))]
    assert "nothing to do" in ok("train", *words, "--seed", "7", *shown, "--evaluate.batch_size", "3")
    assert "nothing to do" in ok("curate", *words, "--curate.check_timeout_s", "3.5", "--curate.workers", "1")


def test_an_evaluation_keeps_what_the_other_models_answered(made: tuple[Path, Path], tmp_path: Path) -> None:
    run, words = copied(made, tmp_path)
    before = {(row["author"], row["prompt_id"]): row for row in read_rows(run / "eval", "traces")}
    ok("train", *words, "--seed", "7", "--train.trainer_args.max_steps", "4")
    record = [tmp_path / "run" / "recipe.yaml", "--run_dir", run]
    said = ok("evaluate", *record, "--evaluate.max_prompts", "8")
    assert said.count("6 traces were written before") == 2  # by base and teacher; the student is another
    after = {(row["author"], row["prompt_id"]): row for row in read_rows(run / "eval", "traces")}
    assert len(after) == 24 and all(after[key] == row for key, row in before.items() if key[0] != "student")
