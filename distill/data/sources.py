"""Reads rows from files or the Hub, and maps them to prompts. Imports no torch.

A value that can't be used is an error that names the file and the row; what is merely empty is dropped and counted.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from distill import embedded
from distill.errors import DataError
from distill.recipe.prompts import Columns, Prompts
from distill.run.files import digest_file
from distill.run.schema import Message, prompt_id

Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
csv.field_size_limit(sys.maxsize)  # a long trace is over the 128 KiB that the module allows for a field


def read_source(name: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """All rows of a file, of an embedded set, or of a split of a Hub data set.

    Args:
        name: Path of a jsonl, json, csv or parquet file (the first three also as `.gz`), `embedded:arithmetic`, or a Hub id.
        subset: Configuration of a Hub data set.
        split: Split of a Hub data set.

    Raises:
        DataError: it is absent, empty, or can't be read; names the line.
    """
    path = Path(embedded.resolve(name)).expanduser()
    if path.is_file():
        rows = list(_read_file(path))
    elif path.is_dir():
        raise DataError(f"{name}: is a folder. Name one file in it.")
    elif path.suffix in (*_SUFFIXES, ".gz") or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"{name}: there is no such file. Paths are relative to the folder the command is run in ({Path.cwd()}).")
    else:
        rows = _read_hub(name, subset, split)
    if not rows:
        raise DataError(f"{name}: holds no rows.")
    return rows


def source_digest(name: str) -> str | None:
    """SHA-256 of a local source; null for one on the Hub."""
    path = Path(embedded.resolve(name)).expanduser()
    return digest_file(path) if path.is_file() else None


def _read_file(path: Path) -> Iterator[Row]:
    packed = path.suffix == ".gz"
    kind = path.with_suffix("").suffix if packed else path.suffix
    if kind not in _SUFFIXES or (packed and kind == ".parquet"):
        raise DataError(f"{path}: its kind is not known by its name. Use {', '.join(_SUFFIXES)}; the first three also with .gz.")
    if kind == ".parquet":
        try:
            yield from pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read as parquet: {error}.") from None
        return
    reader = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}[kind]
    try:
        with gzip.open(path) if packed else path.open("rb") as data:
            # A byte-order mark, which spreadsheets write, is no part of the first column's name.
            yield from reader(path, io.TextIOWrapper(data, encoding="utf-8-sig", newline=""))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} {error.object[error.start]:#04x}). Convert it first.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {error}.") from None


def _read_json_lines(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}. Correct or remove the line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: holds {type(row).__name__}, not an object with columns. Correct or remove the line.")
        yield row


def _read_json(path: Path, file: IO[str]) -> Iterator[Row]:
    try:
        content = json.load(file)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}. One object a line belongs into a .jsonl file.") from None
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list) or not all(isinstance(row, dict) for row in lists[0]):
        raise DataError(f"{path}: must hold a list of objects, or an object with one such list.")
    yield from lists[0]


def _read_csv(path: Path, file: IO[str]) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: two columns have the same name, got {names!r:.200}. Rename one.")
        for row in reader:
            if None in row or None in row.values():  # how the module marks too many and too few fields
                raise DataError(f"{path}:{reader.line_num}: has not as many fields as there are columns ({len(names)}). Correct the line.")
            yield row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: not valid CSV: {error}. Correct the row that begins there.") from None


def _read_hub(name: str, subset: str | None, split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        return list(load_dataset(name, subset, split=split))
    except Exception as error:  # the library raises many kinds, of which the message alone tells
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name}: is no file here, and can't be loaded from the Hub (subset {subset!r}, split {split!r}): {reason}"
        ) from None


class PromptMapping:
    """Turns rows of a source into conversations, as the recipe's `prompts` section says.

    Args:
        prompts: System prompt and template.
        columns: Column names of this source.
        name: Of the source, for errors.
    """

    def __init__(self, prompts: Prompts, columns: Columns, name: str) -> None:
        self._prompts = prompts
        self._columns = columns
        self._name = name

    def messages(self, row: Row, number: int) -> list[Message] | None:
        """The conversation of a row, or null where its prompt is empty.

        Args:
            row: Of the source.
            number: Of the row, from 1, for errors.
        """
        if self._columns.messages is not None:
            return self._from_messages(row, number)
        assert self._columns.prompt is not None  # the recipe was validated
        text = text_in(row, self._columns.prompt, self._name, number)
        return [*self._system(), self._user(text)] if text else None

    def prompt_row(self, row: Row, number: int) -> tuple[Row, str | None]:
        """A PROMPT row, and the reason to drop it or null."""
        messages = self.messages(row, number)
        reference = text_in(row, self._columns.reference, self._name, number) if self._columns.reference else None
        mapped: Row = {
            "prompt_id": prompt_id(messages or []),
            "messages": messages or [],
            "reference": reference.strip() if reference else None,
            "source": self._name,
            "tags": self._tags(row, number),
        }
        if messages is None:
            return mapped, "empty_prompt"
        if reference is not None and self._prompts.answer_pattern is not None:
            matches = [match.strip() for match in re.findall(self._prompts.answer_pattern, reference)]
            if not matches or not matches[-1]:
                return mapped, "no_answer_match"
            mapped["reference"] = matches[-1]
        return mapped, None

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self._prompts.system_prompt}] if self._prompts.system_prompt is not None else []

    def _user(self, text: str) -> Message:
        return {"role": "user", "content": self._prompts.template.replace("{prompt}", text)}

    def _tags(self, row: Row, number: int) -> list[str]:
        if self._columns.tags is None:
            return []
        value = column(row, self._columns.tags, self._name, number)
        tags = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(tag, str) for tag in tags):
            raise DataError(f"{self._name}: row {number}: {self._columns.tags} must be a string or a list of strings, got {value!r:.80}.")
        return tags

    def _from_messages(self, row: Row, number: int) -> list[Message] | None:
        """Turns up to the last of the user's; what an assistant answered to it is no part of the prompt."""
        where = f"{self._name}: row {number}: {self._columns.messages}"
        turns = column(row, self._columns.messages or "", self._name, number)
        if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
            raise DataError(f"{where} must be a list of {{role, content}} with text in both, got {turns!r:.80}.")
        users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        if not users or not turns[users[-1]]["content"].strip():
            return None
        before: list[Message] = [{"role": turn["role"], "content": turn["content"]} for turn in turns[: users[-1]]]
        has_system = bool(before) and before[0]["role"] == "system"
        if has_system and self._prompts.system_prompt is not None:
            raise DataError(f"{where} has a system turn of its own, and prompts.system_prompt is set. Leave one of them out.")
        return [*self._system(), *before, self._user(turns[users[-1]]["content"])]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def column(row: Row, name: str, source: str, number: int) -> Any:
    """A row's value in a column.

    Raises:
        DataError: there is no such column; names those there are, and the nearest.
    """
    if name not in row:
        close = difflib.get_close_matches(name, row, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Name the right one in the recipe."
        raise DataError(f"{source}: row {number}: there is no column {name!r}, only {', '.join(map(repr, row))}. {hint}")
    return row[name]


def text_in(row: Row, name: str, source: str, number: int) -> str | None:
    """A row's text in a column; null where it is empty. Numbers become text, whole ones without `.0`.

    Raises:
        DataError: there is no such column, or it holds something else.
    """
    value = column(row, name, source, number)
    if value is None or value != value:  # not a number is how pandas writes an absent value
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise DataError(f"{source}: row {number}: {name} must be text or a number, got {type(value).__name__}: {value!r:.80}.")
    return str(value) if str(value).strip() else None
