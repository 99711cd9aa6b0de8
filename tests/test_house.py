"""The rules of the house that a machine can hold: layers, names, sizes, documentation, a fast and torch-free command."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "distill"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# From the top down; a folder imports only from rows below its own (ARCHITECTURE.md shows the same table).
LAYERS = [
    {"__main__"},
    {"cli", "train", "library"},
    {"reference"},
    {"cluster"},
    {"before"},
    {"planning"},
    {"pipeline"},
    {"stages"},
    {"trainers", "reporting", "benchmarks"},
    {"servers"},
    {"engines", "checks", "measure"},
    {"models", "data"},
    {"recipe"},
    {"targets"},
    {"losses"},
    {"run", "embedded"},
    {"errors"},
    {"__init__"},
]
TORCH_FREE = {
    "cli",
    "reference",
    "cluster",
    "library",
    "pipeline",
    "reporting",
    "checks",
    "measure",
    "data",
    "recipe",
    "run",
    "embedded",
    "errors",
    "before.check",
    "before.machine",
    "before.record",
}
TORCH_FREE |= {
    "trainers.launches",
    "before.quick",
    "before.advice",
    "before.findings",
    "before.packages",
    "before.tokens",
    "before.brought",
    "before.judging",
    "before.likeness",
    "stages.links",
    "planning.sizes",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def folder_of(module: str) -> str:
    return module.split(".")[0]


def row_of(module: str) -> int:
    rows = [index for index, row in enumerate(LAYERS) if folder_of(module) in row]
    assert rows, f"{folder_of(module)} has no place in LAYERS (tests/test_house.py) and ARCHITECTURE.md"
    return rows[0]


def imports_of(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Modules that a file imports; only those executed at its import, if asked."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if not top_level_only else (n for n in tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def ours(imported: str) -> str | None:
    """The module of this package that an imported name belongs to."""
    names = {name_of(path) for path in MODULES}
    if imported == "distill":
        return None
    name = imported.removeprefix("distill.")
    return name if imported.startswith("distill.") and name in names else None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_the_folders_below(path: Path) -> None:
    own = name_of(path)
    for imported in imports_of(path):
        target = ours(imported)
        if own == "__init__":  # it names what a library offers, for type checkers, and loads it when it is asked for
            assert target is None or folder_of(target) in ("library", "losses")
        elif target and folder_of(target) != folder_of(own):
            assert row_of(target) > row_of(own), f"{own} imports {target}, which is not below it"


def test_modules_of_a_folder_import_each_other_without_circles() -> None:
    below = {name_of(path): {target for imported in imports_of(path) if (target := ours(imported))} - {name_of(path)} for path in MODULES}
    # A package's own page has no imports but those of its modules' common words, so it stands below them.
    assert list(graphlib.TopologicalSorter(below).static_order())


def test_stages_never_import_each_other() -> None:
    for path in MODULES:
        if name_of(path).startswith("stages."):
            assert not {target for imported in imports_of(path) if (target := ours(imported)) and target.startswith("stages.")}


@pytest.mark.parametrize("path", [p for p in MODULES if {folder_of(name_of(p)), name_of(p)} & TORCH_FREE], ids=name_of)
def test_these_folders_do_not_import_torch(path: Path) -> None:
    heavy = {"torch", "transformers", "peft", "trl", "accelerate", "datasets"}
    assert not heavy & {name.split(".")[0] for name in imports_of(path, top_level_only=True)}


def test_top_level_names_hide_nothing() -> None:
    """`accelerate launch distill/train.py` puts distill/ on sys.path: a module there must not be called like an installed one."""
    installed = {name.split(".")[0] for names in importlib.metadata.packages_distributions() for name in [names]}
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__", "__main__"}
    assert not names & (set(sys.stdlib_module_names) | installed)
    assert not names & {"datasets", "evaluate", "logging", "tokenizers", "utils"}


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "scripts").rglob("*.py"))], ids=lambda path: path.name)
def test_files_and_functions_stay_small_and_documented(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = len((ast.get_docstring(node, clean=False) or "").splitlines())  # a long explanation is no long function
            assert (node.end_lineno or 0) - node.lineno - documented < 60, f"{node.name} is over 60 lines"


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, **options)  # type: ignore[call-overload, no-any-return]


def test_help_loads_nothing_heavy() -> None:
    """What makes `distill --help` answer in a fraction of a second: no torch, no numpy, no Arrow."""
    code = """
import json, sys
sys.argv = ["distill", "--help"]
from distill.cli import main
try: main()
except SystemExit: pass
print(json.dumps(sorted({"torch", "transformers", "datasets", "pyarrow", "numpy", "pandas", "matplotlib", "pydantic"} & set(sys.modules))))
"""
    result = run("-c", code)
    assert json.loads(result.stdout.splitlines()[-1]) == [], result.stdout
    for command in ("run", "prompts", "generate", "curate", "train", "evaluate", "report", "export", "check", "keys"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["run", "train", "check", "keys"])
def test_every_command_has_help(command: str) -> None:
    result = run("-m", "distill", command, "--help")
    assert result.returncode == 0 and "Usage" in result.stdout and len(result.stdout) > 200


def test_errors_are_one_message_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nteachr: {}\n")
    for arguments in (["-m", "distill", "run", str(tmp_path / "r.yaml")], ["distill/train.py", "--config", str(tmp_path / "r.yaml")]):
        result = run(*arguments)
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: {tmp_path / 'r.yaml'}") and "Traceback" not in result.stderr
        assert "teachr" in result.stderr and "teacher" in result.stderr


def test_train_entry_explains_itself(tmp_path: Path) -> None:
    assert "--config RECIPE" in run("distill/train.py", "--help").stdout
    assert run("distill/train.py").returncode == 2
    recipe = "recipes/qwen3-8b-to-0.6b-rounds.yaml"
    assert "the recipe has 3 rounds" in run("distill/train.py", f"--run_dir={tmp_path}", "--round=4", "--config", recipe).stderr


def test_train_entry_takes_its_options_in_any_order() -> None:
    from distill.train import Asked, parse

    expected = Asked("r.yaml", 2, True, False, ["--seed", "1", "--train.max_length=8"])
    for words in (
        "--config r.yaml --round 2 --redo --seed 1 --train.max_length=8",
        "--seed 1 --round=2 --train.max_length=8 --config=r.yaml --redo",
    ):
        assert parse(words.split()) == expected
    for words, expected_words in [
        ("--round 1", "Write --config RECIPE"),
        ("--seed 1 --config", "--config has no value"),
        ("--config r.yaml --round two", "whole number ≥ 0, got 'two'"),
    ]:
        result = run("distill/train.py", *words.split())
        assert result.returncode == 1 and result.stderr.startswith("error: command line: ") and expected_words in result.stderr


def test_every_setting_is_read() -> None:
    """A key of the recipe that no code reads would be a promise not kept."""
    from distill.recipe.keys import keys

    code = "\n".join(path.read_text() for path in MODULES if path.parent.name != "recipe" or path.stem == "learning")
    unread = [info.key for info in keys() if not re.search(rf"\.{info.key.rsplit('.', 1)[-1]}\b", code)]
    assert unread == []


def test_the_architecture_page_shows_every_module() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for path in MODULES:
        name = name_of(path)
        assert name.split(".")[-1] in page or name == "__init__", f"ARCHITECTURE.md does not mention {name}"
