"""The whole pipeline through the command line: once, again without work, and with every stage killed on its way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import pytest

from distill.run.manifest import MANIFEST, Manifest, read_manifest
from distill.run.tables import read_rows
from distill.stages import FOLDERS

STAGES = [name for name in FOLDERS if name not in ("score", "rollouts", "benchmark")]
ROOT = Path(__file__).resolve().parent.parent


def distill(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return commands.run(["-m", "distill", *arguments])


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe over a random model: its answers are noise, so nothing is asked of them but that they exist."""
    with (folder / "problems.jsonl").open("w") as file:
        for index in range(72):
            file.write(json.dumps({"question": f"What is {index} plus {2 * index}?", "answer": 3 * index}) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: test\nseed: 5\nteacher: {{model: {model}}}\nstudent: {{model: {model}, adapter: {{type: lora, r: 4}}}}\n"
        f"prompts: {{source: {folder / 'problems.jsonl'}, heldout_size: 24}}\n"
        "generate: {samples_per_prompt: 3, max_new_tokens: 24, temperature: 1.0, top_p: 1.0, batch_size: 8}\n"
        "curate: {checks: [], max_per_prompt: 2}\n"
        "train: {max_length: 256, trainer_args: {max_steps: 12, learning_rate: 1e-3, per_device_train_batch_size: 8, save_steps: 3}}\n"
        "evaluate: {max_new_tokens: 16, batch_size: 8}\n"
        "export: {parity_prompts: 4}\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, Path]:
    """A recipe and the run it made, undisturbed."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = write_recipe(folder, tiny_model_dir)
    command = [sys.executable, "-m", "distill", "run", str(recipe), "--run_dir", str(folder / "run")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)  # one that starts from nothing
    assert result.returncode == 0, result.stderr[-3000:]
    assert "\r" not in result.stderr, "a bar was drawn where nobody watches"
    assert "gap recovered" in result.stdout and str(folder / "run" / "report" / "report.html") in result.stdout
    return recipe, folder / "run"


def content(stage_folder: Path) -> Any:
    """Everything in a stage's result that must not depend on how often it was interrupted."""
    manifest: Manifest = read_manifest(stage_folder)
    files = {name: digest for name, digest in manifest.files.items() if not name.endswith((".md", ".html"))}
    tables = {table: read_rows(stage_folder, table) for table in manifest.tables}
    return tables, files, manifest.rows_in, manifest.rows_kept, manifest.drops


def test_every_stage_says_what_it_did(finished: tuple[Path, Path]) -> None:
    recipe, run = finished
    again = distill("run", recipe, "--run_dir", run)
    assert again.returncode == 0
    assert again.stdout.count("nothing to do") == len(STAGES)
    for stage in STAGES:
        name = FOLDERS[stage]
        manifest = read_manifest(run / name)
        assert manifest.stage == stage and manifest.facts["wall_s"] >= 0 and manifest.facts["kit_version"]
        if manifest.rows_in is not None and manifest.rows_kept is not None:
            assert manifest.rows_in * (3 if stage == "generate" else 1) == manifest.rows_kept + sum(manifest.drops.values())
    facts = read_manifest(run / "eval").facts
    assert sum(wrote["tokens"] for wrote in facts["writing"].values()) == facts["tokens"]
    assert list(facts["writing"]) == list(facts["models"]) and all(wrote["seconds"] > 0 for wrote in facts["writing"].values())
    said = distill("costs", run, "--cpu-hour", "1", "--api", "gpt-5-mini").stdout
    assert "1,000 answers of the student: $" in said and "tokens a second on one device in evaluate" in said and "gpt-5-mini" in said


def test_a_second_run_loads_no_torch(finished: tuple[Path, Path]) -> None:
    recipe, run = finished
    code = """
import sys
from distill.pipeline import run_pipeline
from distill.recipe.reading import load_recipe
run_pipeline(load_recipe(sys.argv[1], ["--run_dir", sys.argv[2]]))
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code, str(recipe), str(run)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_a_run_can_be_moved(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = finished
    shutil.copytree(run, tmp_path / "moved")
    assert distill("run", recipe, "--run_dir", tmp_path / "moved").stdout.count("nothing to do") == len(STAGES)


def test_other_settings_are_refused_and_redo_makes_them(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = finished
    shutil.copytree(run, tmp_path / "copy")
    changed = [recipe, "--run_dir", tmp_path / "copy", "--curate.max_per_prompt", "1"]
    refused = distill("curate", *changed)
    assert refused.returncode == 1
    assert "max_per_prompt is 2 there and 1 here" in refused.stderr and "--redo" in refused.stderr
    redone = distill("curate", *changed, "--redo")
    assert redone.returncode == 0 and read_manifest(tmp_path / "copy" / "curated").rows_kept == 48
    stale = distill("train", *changed)
    assert stale.returncode == 1 and "curated/ has changed since" in stale.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_with_the_same_rows(stage: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed twice, each time when its folder has grown to a random share of what it will be, then run to its end."""
    recipe, run = finished
    name = FOLDERS[stage]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / name)
    final_size = sum(path.stat().st_size for path in (run / name).rglob("*") if path.is_file())
    rng = random.Random(f"{stage}/kill")
    killed = 0
    for _ in range(2):
        threshold = rng.uniform(0.0, 0.5) * final_size
        with commands.Command(["-m", "distill", stage, recipe, "--run_dir", copy]) as process:
            while process.runs(0.001) and size_of(copy / name) <= threshold:
                pass
            killed += process.kill() == -signal.SIGKILL
    if stage in ("generate", "train", "evaluate"):
        assert killed and not (copy / name / MANIFEST).exists(), "the kill came too late to test anything"
    result = distill(stage, recipe, "--run_dir", copy)
    assert result.returncode == 0, result.stderr[-3000:]
    assert content(copy / name) == content(run / name)


def size_of(folder: Path) -> int:
    """Bytes in a folder that another process is writing."""
    total = 0
    for place, _, names in os.walk(folder):
        for file in names:
            try:
                total += (Path(place) / file).stat().st_size
            except FileNotFoundError:
                continue
    return total


def test_a_stage_before_its_input_says_what_to_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir)
    result = distill("train", recipe, "--run_dir", tmp_path / "empty")
    assert result.returncode == 1 and "this stage is not there" in result.stderr and "distill run" in result.stderr
