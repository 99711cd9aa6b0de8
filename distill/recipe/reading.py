"""Reads a recipe file and its command-line overrides, and says precisely what is wrong with them.

YAML 1.2 through ruamel.yaml: `1e-5` is a number, a repeated key is an error, and every key knows its line.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from distill.errors import RecipeError
from distill.recipe.experiment import Recipe
from distill.recipe.keys import suggest
from distill.recipe.shelf import find_recipe

# pydantic puts the tag of a chosen union member into an error's location, behind the key of the union.
_TAGS = {"adapter": {"lora", "full"}, "target": {"top_k", "sampled", "chosen_token"}}


def load_recipe(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """The recipe of a file with overrides laid over it.

    Args:
        path: YAML file, or the name of a recipe of the kit.
        overrides: `["--generate.samples_per_prompt", "8", "--seed=1"]`; a value is read as YAML. Or values by
            key, `{"seed": 1}`, as they are.

    Raises:
        RecipeError: naming file, line, key, value and the nearest valid key.
    """
    path = find_recipe(path)
    document = _read_yaml(path)
    changed = _apply(document, overrides)
    try:
        return Recipe.model_validate(_to_plain(document), context={"folder": path.absolute().parent})
    except ValidationError as error:
        problems = [_describe(item, path, document, changed) for item in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that `load_recipe` reads back."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 120
    yaml.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()


def _read_yaml(path: Path) -> CommentedMap:
    try:
        document = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}. Give the path of a recipe, e.g. recipes/quickstart.yaml.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not a text file. Give the path of a recipe (YAML, UTF-8).") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}. {error.context or ''}".rstrip()) from None
    except YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(document, CommentedMap):
        raise RecipeError(f"{path}: holds {type(document).__name__}, not a mapping. A recipe starts with `name: ...`.")
    return document


def _apply(document: CommentedMap, overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Lays overrides over the document in place; returns the dotted keys they set, and where each was given."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(document, key, value, "overrides")
        return dict.fromkeys(overrides, "overrides")
    words, changed = list(overrides), {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"command line: {word!r} is not expected here. An override reads --section.key VALUE.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise RecipeError(f"command line: --{key} has no value. Write --{key} VALUE.")
            text = words.pop(0)
        try:
            value = YAML(typ="safe").load(text)
        except YAMLError:
            value = text
        _set(document, key, value, "command line")
        changed[key] = "command line"
    return changed


def _set(document: CommentedMap, key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    node: Any = document
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = CommentedMap()
        node = node[parent]
        if not isinstance(node, dict):
            raise RecipeError(f"{where}: {key}: {parent} is a plain value here, not a section.")
    node[last] = value


def _to_plain(node: Any) -> Any:
    """The containers and scalars of ruamel as the built-in types that strict validation asks for."""
    if isinstance(node, dict):
        return {str(key): _to_plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_to_plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _describe(item: ErrorDetails, path: Path, document: CommentedMap, changed: dict[str, str]) -> str:
    """One pydantic error as one line: where, what, got, and what to do."""
    loc = [str(part) for part in item["loc"]]
    parts = [part for before, part in zip(["", *loc], loc, strict=False) if part not in _TAGS.get(before, ())]
    key = ".".join(parts)
    where = _where(path, document, parts, changed)
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"{where}: {key}: unknown key, got {item['input']!r}. {suggest(key)}"
    if kind == "missing":
        return f"{where}: {key}: missing. Add it; `distill keys {parts[0]}` explains it."
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        named = re.match(r"[a-z_]+(?:\.[a-z_]+)+", message)
        if named and named.group().startswith(f"{key}." if key else ""):  # the message names the key inside this section
            where, key = _where(path, document, named.group().split("."), changed), ""
        if parts and parts[-1] == "trainer_args":  # the message starts with the field it is about
            where = _where(path, document, [*parts, message.split()[0]], changed)
        return f"{where}: {key + ': ' if key else ''}{message.rstrip('.?')}{'?' if message.endswith('?') else '.'}"
    return f"{where}: {key}: {message}, got {item['input']!r}. `distill keys {parts[0] if parts else ''}` explains it."


def _where(path: Path, document: CommentedMap, parts: list[str], changed: dict[str, str]) -> str:
    """`file:line` of the deepest key of `parts` that the file has, or what an override that set it came from."""
    dotted = ".".join(parts)
    for key, given in changed.items():
        if dotted == key or dotted.startswith(key + "."):
            return given
    node, line = document, None
    for part in parts:
        if not isinstance(node, CommentedMap) or part not in node:
            break
        try:
            line = node.lc.key(part)[0] + 1
        except (KeyError, TypeError, AttributeError):
            break
        node = node[part]
    return f"{path}:{line}" if line else str(path)
