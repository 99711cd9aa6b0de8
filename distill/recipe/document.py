"""A recipe's text as plain values, each read as its key takes it, and the line in which each key stands.

YAML 1.2 through ruamel.yaml: `1e-5` is a number, `no` is text, a repeated key is an error. Only its nodes are taken from there, and
the values made here, because it depends on the key what a word is: `revision: 1234567` and `run_dir: 2026-01-31` are text, as they
stand. What is given on the command line for a key that takes text is no YAML at all: `####` and `Q: {prompt}` are what they are.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from distill.errors import RecipeError, shown, visible
from distill.recipe.takes import Takes, takes_of_recipe

LONGEST_BYTES = 2**19  # of a recipe; the parser, which is written in Python, takes a second for it
DEEPEST = 50  # levels
_MOST_VALUES = 10_000  # aliases counted as often as they are used
_LARGEST_INT = 2**63
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_TAG = "tag:yaml.org,2002:"


class Document(NamedTuple):
    """What a recipe's file says."""

    values: dict[str, Any]
    lines: dict[tuple[str, ...], int]
    """Of each key by its path, from 1."""


def read_document(path: Path) -> Document:
    """What a file says.

    Raises:
        RecipeError: it can't be read, or is no recipe; names the line.
    """
    text = _text_of(path)
    reader = _Reader(str(path))
    node = reader.compose(text)
    if not isinstance(node, MappingNode):
        kind = {SequenceNode: "a list", ScalarNode: "a text"}.get(type(node), "nothing")
        raise RecipeError(f"{path}: holds {kind}, not a mapping. A recipe starts with `name: ...`.")
    values = reader.value(node, takes_of_recipe(()))
    return Document(values, reader.lines)


def read_override(text: str, key: str) -> Any:
    """The value of a word on the command line: for a key that takes text as it stands, else as YAML.

    Args:
        text: The word.
        key: Dotted.

    Raises:
        RecipeError: it holds what can't be in a recipe.
    """
    where, takes = f"command line: {key}", takes_of_recipe(tuple(key.split(".")))
    if takes.null and text == "null":
        return None
    if takes.text and not takes.sections:
        return _whole(text, where)
    reader = _Reader(where)
    try:
        node = reader.compose(text)
    except _NotYamlError:  # the recipe says what is wrong with it as a text
        return _whole(text, where)
    if isinstance(node, MappingNode | SequenceNode):
        return reader.value(node, takes)
    if takes.text or node is None:
        return _whole(text, where)
    # A word is all of it, and not what stands before a `#`.
    return reader.value(node if node.style else reader.scalar(text.strip(), node), takes)


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value given from Python as a recipe holds it: paths become text.

    Raises:
        RecipeError: it holds itself, or what can't be in a recipe.
    """
    if depth > DEEPEST:
        raise RecipeError(f"{where}: is nested more than {DEEPEST} levels deep, or holds itself. Write it flatter.")
    if isinstance(value, dict):
        return {str(key): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, float):
        return _finite(value, where)
    return _whole(value, where) if isinstance(value, str) else value


class _NotYamlError(RecipeError):
    """A text is no YAML."""


def _text_of(path: Path) -> str:
    try:
        status = path.stat()
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is not None:  # opening a pipe or a device may wait for ever
            raise RecipeError(f"{path}: is {kind}, not a file. Give the path of a recipe, e.g. recipes/quickstart.yaml.")
        if status.st_size > LONGEST_BYTES:
            raise RecipeError(
                f"{path}: has {status.st_size:,} bytes, and a recipe at most {LONGEST_BYTES:,}. Give the path of a recipe; long texts "
                "and data belong into files of their own."
            )
        with path.open("rb") as file:
            content = file.read(LONGEST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}. Give the path of a recipe, e.g. recipes/quickstart.yaml.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not a text file in UTF-8. Give the path of a recipe, or convert it.") from None


class _Reader:
    """Nodes and values of one text.

    Args:
        name: What its errors begin with.
    """

    def __init__(self, name: str) -> None:
        self.lines: dict[tuple[str, ...], int] = {}
        self._name, self._is_file = name, not name.startswith("command line")
        self._yaml = YAML(typ="safe", pure=True)
        self._yaml.max_depth = DEEPEST
        self._yaml.composer.warn_double_anchors = False
        self._count = 0

    def compose(self, text: str) -> Any:
        """The node at the root; null for an empty text.

        Raises:
            RecipeError: it is no YAML.
        """
        try:
            return self._yaml.compose(text)
        except MaxDepthExceededError as error:
            raise RecipeError(f"{self._at_mark(error)}: is nested more than {DEEPEST} levels deep. Write it flatter.") from None
        except MarkedYAMLError as error:
            problem = visible(f"{error.problem or 'it ends too early'}. {error.context or ''}".rstrip(), 200)
            raise _NotYamlError(f"{self._at_mark(error)}: not valid YAML: {problem}") from None
        except ReaderError as error:
            where = self._at(text.count("\n", 0, error.position))
            sign = visible(chr(error.character)) if isinstance(error.character, int) else shown(error.character)
            raise _NotYamlError(f"{where}: not valid YAML: holds the control character {sign}. Remove it.") from None
        except (YAMLError, ValueError, RecursionError) as error:
            raise _NotYamlError(f"{self._name}: not valid YAML: {visible(str(error).split(chr(10))[0], 200)}") from None

    def scalar(self, text: str, like: ScalarNode) -> ScalarNode:
        """A node for all of a text, where `like` may be for a part of it."""
        if str(like.value) == text or str(like.tag) != str(self._yaml.resolver.resolve(ScalarNode, like.value, (True, False))):
            return like
        return ScalarNode(self._yaml.resolver.resolve(ScalarNode, text, (True, False)), text, like.start_mark, like.end_mark)

    def value(self, node: Node, takes: Takes, path: tuple[str, ...] = ()) -> Any:
        """What a node stands for, where something of this kind is taken.

        Raises:
            RecipeError: it can't be in a recipe; names the line.
        """
        where = self._at(node.start_mark.line)
        self._count += 1
        if self._count > _MOST_VALUES:
            raise RecipeError(
                f"{where}: holds more than {_MOST_VALUES:,} values, each alias counted as often as it is used. Write less into a recipe."
            )
        if len(path) > DEEPEST:
            raise RecipeError(f"{where}: is nested more than {DEEPEST} levels deep, or an alias stands inside what it names.")
        tag = str(node.tag).removeprefix(_TAG)
        if isinstance(node, ScalarNode):
            return self._scalar(node, tag, takes, where)
        if tag not in ("map", "seq"):
            raise RecipeError(f"{where}: the tag {shown(tag)} has no meaning in a recipe. Remove it.")
        if not isinstance(node, MappingNode):
            return [self.value(item, takes.item(), (*path, str(place))) for place, item in enumerate(node.value)]
        return self._mapping(node, takes, path)

    def _mapping(self, node: MappingNode, takes: Takes, path: tuple[str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, item in node.value:
            where = self._at(key_node.start_mark.line)
            if not isinstance(key_node, ScalarNode):
                raise RecipeError(f"{where}: a key must be a word, and here it is a list or a mapping.")
            if str(key_node.tag) == f"{_TAG}merge":
                merged = {**self._merged(item, takes, path, where), **merged}
                continue
            name = _whole(key_node.value, where)
            if name in found:
                before = self.lines[*path, name]
                raise RecipeError(f"{where}: not valid YAML: the key {shown(name)} is there twice, first in line {before}. Remove one.")
            self.lines[*path, name] = key_node.start_mark.line + 1
            found[name] = self.value(item, takes.under(name), (*path, name))
        return {**merged, **found}

    def _merged(self, node: Node, takes: Takes, path: tuple[str, ...], where: str) -> dict[str, Any]:
        """What `<<` brings in: of several mappings the first wins."""
        found: dict[str, Any] = {}
        for part in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(part, MappingNode):
                raise RecipeError(f"{where}: `<<` takes a mapping, or a list of mappings.")
            found = {**self.value(part, takes, path), **found}
        return found

    def _scalar(self, node: ScalarNode, tag: str, takes: Takes, where: str) -> Any:
        text = _whole(node.value, where)
        if tag in ("str", "timestamp", "merge", "value"):  # JSON and YAML 1.2 know no dates
            return text
        if tag == "null":
            return None
        if takes.text or tag not in ("int", "float", "bool"):
            if tag not in ("int", "float", "bool"):
                raise RecipeError(f"{where}: the tag {shown(tag)} has no meaning in a recipe. Remove it.")
            return text
        try:
            value = getattr(self._yaml.constructor, f"construct_yaml_{tag}")(node)
        except (ValueError, KeyError, IndexError, OverflowError):
            raise RecipeError(f"{where}: {shown(text)} can't be read as a number ({tag}). Put it between quotes if it is text.") from None
        if isinstance(value, int) and not -_LARGEST_INT <= value < _LARGEST_INT:
            raise RecipeError(f"{where}: {shown(text)} is too large a number. Put it between quotes if it is text.")
        return _finite(float(value), where) if isinstance(value, float) else value

    def _at(self, line: int) -> str:
        return f"{self._name}:{line + 1}" if self._is_file else self._name

    def _at_mark(self, error: MarkedYAMLError) -> str:
        mark = error.problem_mark or error.context_mark
        return self._at(mark.line) if mark is not None else self._name


def _whole(text: str, where: str) -> str:
    """A text, if it can be written to a file and given to the operating system."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{where}: {shown(text)} is no text: character {error.start + 1:,} is half of a surrogate pair, or a byte that is not UTF-8. "
            "Correct it."
        ) from None
    if "\0" in text:
        raise RecipeError(f"{where}: {shown(text)} holds a NUL character, which no file and no name can. Remove it.")
    return text


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise RecipeError(f"{where}: {value} is not a finite number. Give one, or leave the key out.")
    return value
