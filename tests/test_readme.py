"""What the README tells people to type: every command exists, and every recipe and key in it is real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import write_recipe

from distill.recipe.reading import load_recipe

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
BLOCKS = [body for language, body in FENCED if not language]
COMMANDS = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith(("make ", "distill ", "accelerate "))
]


def test_there_are_commands() -> None:
    assert COMMANDS[:2] == ["make quickstart", "make test"] and len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        dry = subprocess.run(["make", "--dry-run", *words], capture_output=True, text=True, cwd=ROOT)
        assert dry.returncode == 0 and ("distill run" in dry.stdout or "pytest" in dry.stdout)
    elif words[0] == "keys":
        assert subprocess.run([sys.executable, "-m", "distill", *words], capture_output=True, cwd=ROOT).returncode == 0
    elif program == "accelerate":
        files = [word for word in words if "/" in word]
        assert all((ROOT / file).exists() for file in files) and ("--config" in words or "generate" in words)
        load_recipe(ROOT / files[-1])
    else:
        known = subprocess.run([sys.executable, "-m", "distill", words[0], "--help"], capture_output=True, text=True, cwd=ROOT)
        assert known.returncode == 0
        own = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", known.stdout))  # options of the command itself
        rest = [word for word in words[2:] if word != "--dry-run"]
        overrides = [word for name, value in zip(rest[::2], rest[1::2], strict=True) if name not in own for word in (name, value)]
        load_recipe(ROOT / words[1], overrides)


@pytest.mark.slow
def test_the_commands_of_a_run_work_in_the_order_they_are_typed(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Those of the two blocks about a run, over a tiny pair."""
    recipe = write_recipe(tmp_path, tiny_model_dir)
    typed = [line for line in COMMANDS if line.split()[1] in ("run", "prompts", "generate", "curate", "launch") and "0.6b.yaml" in line]
    typed = [line for line in typed if "--num_processes" not in line and "--run_dir" not in line]
    assert len(typed) == 9 and "--redo train" in typed[-1]
    for line in typed:
        line = line.replace("recipes/qwen3-8b-to-0.6b.yaml", str(recipe)).replace("accelerate launch", sys.executable)
        program = [sys.executable, "-m", "distill"] if line.startswith("distill") else []
        words = [
            *program,
            *shlex.split(line)[bool(program) :],
            "--run_dir",
            str(tmp_path / "run"),
            *(["--yes"] if "--redo" in line else []),
        ]
        result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, (line, result.stderr[-2000:])


def test_the_quickstart_recipe_is_what_the_makefile_runs() -> None:
    assert "distill run recipes/quickstart.yaml" in (ROOT / "Makefile").read_text()
    assert load_recipe(ROOT / "recipes" / "quickstart.yaml").name == "quickstart"


def test_every_file_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    for name in [*re.findall(r"`((?:recipes|tests|scripts)/[\w.\-/]+)`", text), "ARCHITECTURE.md", "CONTRIBUTING.md"]:
        assert (ROOT / name).exists(), name
