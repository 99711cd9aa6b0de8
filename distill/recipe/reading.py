"""Reads a recipe file and its command-line overrides, and says precisely what is wrong with them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from distill.errors import RecipeError, shown, visible
from distill.recipe.document import DEEPEST, plain, read_document, read_override
from distill.recipe.experiment import Recipe
from distill.recipe.keys import suggest
from distill.recipe.secrets import refuse_secrets
from distill.recipe.shelf import find_recipe

# pydantic puts the tag of a chosen union member into an error's location, behind the key of the union.
_TAGS = {"adapter": {"lora", "full"}, "target": {"top_k", "sampled", "chosen_token"}}
_SHOWN = 8  # problems of a recipe, of which there may be thousands
_LONGEST = 600  # characters of one


def load_recipe(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """The recipe of a file with overrides laid over it.

    Args:
        path: YAML file, or the name of a recipe of the kit.
        overrides: `["--generate.samples_per_prompt", "8", "--seed=1"]`; for a key that takes text a word is taken as it stands, for
            others it is read as YAML; `null` is null wherever a key takes it; a number counts the entries of a list, from 0
            (`--curate.checks.2.length.max_tokens`). Or values by key, `{"seed": 1}`, as they are.

    Raises:
        RecipeError: naming file, line, key, value and the nearest valid key.
    """
    path = find_recipe(path)
    document = read_document(path)
    places = _Places(path, document.lines, _apply(document.values, overrides))
    refuse_secrets(document.values, places.of)
    try:
        return Recipe.model_validate(document.values, context={"folder": path.absolute().parent})
    except ValidationError as error:
        items = error.errors(include_url=False)
    problems = list(dict.fromkeys(visible(_describe(item, places), _LONGEST) for item in items[: 2 * _SHOWN]))
    rest = len(items) - min(len(items), _SHOWN) if len(problems) > _SHOWN else 0
    more = [f"{path}: and {rest:,} more problems."] if rest else []
    raise RecipeError("\n".join(problems[:_SHOWN] + more)) from None


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that `load_recipe` reads back."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 120
    yaml.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()


class _Places(NamedTuple):
    """Where what stands in a recipe was given."""

    path: Path
    lines: dict[tuple[str, ...], int]
    changed: dict[str, str]
    """Dotted keys that overrides set, and where each was given."""

    def of(self, parts: Sequence[str]) -> str:
        """`file:line` of the deepest key of `parts` that the file has, or what an override that set it came from."""
        dotted = ".".join(parts)
        for key, given in self.changed.items():
            if dotted == key or dotted.startswith(key + "."):
                return given
        for key, given in self.changed.items():  # what an override sets may be wrong about a section that it alone has made
            if tuple(parts) not in self.lines and key.startswith(dotted + "."):
                return given
        for end in range(len(parts), 0, -1):
            if tuple(parts[:end]) in self.lines:
                return f"{self.path}:{self.lines[tuple(parts[:end])]}"
        return str(self.path)


def _apply(values: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Lays overrides over values in place; returns the dotted keys they set, and where each was given."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(values, str(key), plain(value, f"overrides: {shown(key)}"), "overrides")
        return dict.fromkeys(map(str, overrides), "overrides")
    words, changed = list(overrides), {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"command line: {shown(word)} is not expected here. An override reads --section.key VALUE.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise RecipeError(f"command line: --{visible(key, 80)} has no value. Write --{visible(key, 80)} VALUE.")
            text = words.pop(0)
        if not all(key.split(".")) or key.count(".") > DEEPEST:
            raise RecipeError(f"command line: --{visible(key, 80)} names no key. An override reads --section.key VALUE.")
        _set(values, key, read_override(text, key), "command line")
        changed[key] = "command line"
    return changed


def _set(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        place = _place(node, parent, key, where)
        if isinstance(node, dict) and node.get(parent) is None:
            node[parent] = {}
        node = node[place]
        if not isinstance(node, dict | list):
            raise RecipeError(f"{where}: {visible(key, 80)}: {visible(parent, 80)} is a plain value here, not a section.")
    node[_place(node, last, key, where)] = value


def _place(node: dict[str, Any] | list[Any], name: str, key: str, where: str) -> Any:
    """What a part of a dotted key stands for: a name, or in a list the number of one of its entries."""
    if isinstance(node, dict):
        return name
    if not name.isdecimal() or int(name) >= len(node):
        raise RecipeError(
            f"{where}: {visible(key, 80)}: is in a list of {len(node):,} here, whose entries are numbered from 0, got {shown(name)}. Give "
            "the number of one that is there, or the whole list."
        )
    return int(name)


def _describe(item: ErrorDetails, places: _Places) -> str:
    """One pydantic error as one line: where, what, got, and what to do."""
    loc = [str(part) for part in item["loc"]]
    parts = [part for before, part in zip(["", *loc], loc, strict=False) if part not in _TAGS.get(before, ())]
    key, where = ".".join(parts), places.of(parts)
    name = visible(key, 80)
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"{where}: {name}: unknown key, got {shown(item['input'])}. {suggest(key, loc)}"
    if kind == "missing":
        return f"{where}: {name}: missing. Add it; `distill keys {parts[0]}` explains it."
    if kind == "model_type":
        section = ".".join(part for part in parts if not part.isdecimal())
        lists = f"`distill keys {section}` lists them" if section else "`distill keys` lists them"
        return f"{where}: {name}: should be a section with keys of its own, got {shown(item['input'])}. {lists}."
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        named = re.match(r"[a-z_]+(?:\.[a-z_]+)+", message)
        if named and named.group().startswith(f"{key}." if key else ""):  # the message names the key inside this section
            where, name = places.of(named.group().split(".")), ""
        if parts and parts[-1] == "trainer_args":  # the message starts with the field it is about
            where = places.of([*parts, message.split()[0]])
        return f"{where}: {name + ': ' if name else ''}{message.rstrip('.?')}{'?' if message.endswith('?') else '.'}"
    explains = f"`distill keys {parts[0]}` explains it" if parts else "`distill keys` lists all"
    return f"{where}: {name}: {message}, got {shown(item['input'])}. {explains}."
