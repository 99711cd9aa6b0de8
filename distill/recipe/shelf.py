"""The recipes that ship with the kit: where they lie, what their headers say of them, and a copy of one to change.

In a checkout they are the folder `recipes/` beside the package; in a wheel they lie inside it, as `distill/shelf/`.
"""

from __future__ import annotations

import difflib
import io
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from distill.errors import RecipeError, plain_storage_errors, shown, visible
from distill.recipe.base import expanded

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "shelf", _PACKAGE.parent / "recipes")


class Shipped(NamedTuple):
    """A recipe of the kit, and what its header says."""

    name: str
    path: Path
    about: str
    """Its first lines."""
    author: str
    """Who writes the traces: the teacher, or whoever wrote those that are brought."""
    student: str
    facts: dict[str, str]
    """`hardware`, `memory`, `time`, `result`, ..., each as it was measured, or "not measured yet"."""


def shipped() -> list[Shipped]:
    """All recipes of the kit, by name."""
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    return [_read(path) for path in sorted(folder.glob("*.yaml"))]


def table(recipes: Iterable[Shipped], width: int) -> str:
    """The recipes as a table for a terminal of so many columns: of hardware and result the first words of their headers."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("recipe", "teacher → student", "hardware", "result"):
        shown.add_column(column, overflow="fold", no_wrap=column == "recipe")
    for recipe in recipes:
        facts = [re.split(r"[;:] ", recipe.facts.get(name, "not measured yet"))[0] for name in ("hardware", "result")]
        author, student = (name.rsplit("/", 1)[-1] for name in (recipe.author, recipe.student))
        shown.add_row(recipe.name, f"{author} → {student}", *facts)
    text = io.StringIO()
    Console(file=text, width=width, no_color=True).print(shown)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def find_recipe(name: str | Path) -> Path:
    """The file that a command's RECIPE means: a path, or where there is no such file the name of a recipe of the kit.

    Raises:
        RecipeError: it is neither.
    """
    path, why = Path(expanded(str(name))), "there is no such file"
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        is_there, is_folder, why = False, False, error.strerror or why
    if is_there and not is_folder:
        return path
    known = {recipe.name: recipe.path for recipe in shipped()}
    if str(name) in known:
        return known[str(name)]
    if is_folder:
        raise RecipeError(f"{path}: can't be read: it is a folder. Give the path of a recipe, e.g. {path / 'recipe.yaml'}.")
    if path.is_symlink():
        raise RecipeError(f"{path}: can't be read: it is a link, and what it names is not there. Give the path of a recipe.")
    close = difflib.get_close_matches(path.stem, known, n=2)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`distill recipes` lists those of the kit."
    raise RecipeError(f"{visible(str(path), 200)}: can't be read: {why}, and no recipe of the kit is called so. {hint}")


@plain_storage_errors()
def copy_recipe(name: str, target: Path | None = None, *, force: bool = False) -> Path:
    """Copies a recipe of the kit, and returns where to.

    Args:
        name: Of the recipe.
        target: File or folder; the folder the command is run in if none is given.
        force: Write over a file that is there.

    Raises:
        RecipeError: there is no such recipe, or the file is there already.
    """
    known = {recipe.name: recipe.path for recipe in shipped()}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else "`distill recipes` lists them."
        raise RecipeError(f"recipes: there is no recipe {shown(name)} in the kit. {hint}")
    target = Path(expanded(str(target or ".")))
    if target.is_dir():
        target /= f"{name}.yaml"
    if target.exists() and not force:
        raise RecipeError(f"{target}: is there already. Give another name, or --force to write over it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(known[name], target)
    return target


def _read(path: Path) -> Shipped:
    """A recipe's header: lines of text, then `# word: value`, each value going on in lines that are set in."""
    facts: dict[str, str] = {}
    about, last = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        named = re.match(r"# (\w+): +(.*)", line)
        if named:
            last = named[1]
            facts[last] = named[2]
        elif last and line.startswith("#   "):
            facts[last] += " " + line[1:].strip()
        else:
            about.append(line[1:].strip())
    recipe = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    author = recipe["teacher"]["model"] if "teacher" in recipe else recipe["traces"].get("author_model", "given traces")
    return Shipped(path.stem, path, " ".join(about), author, recipe["student"]["model"], facts)
