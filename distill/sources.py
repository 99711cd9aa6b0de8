"""Reads rows from files or the Hub, and maps them to prompts. Imports no torch.

A value that can't be used is an error that names the file and the row; what is merely empty is dropped and counted.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from distill import embedded
from distill.errors import DataError
from distill.recipe import Columns, Prompts
from distill.schema import Message, prompt_id
from distill.storage import digest_file

Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


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
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet":
        try:
            yield from pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read as parquet: {error}.") from None
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8", newline="") as file:
        try:
            if kind == ".jsonl":
                yield from _read_json_lines(path, file)
            elif kind == ".json":
                yield from _read_json(path, file)
            elif kind == ".csv":
                yield from csv.DictReader(file)
            else:
                raise DataError(f"{path}: its kind is not known by its name. Use {', '.join(_SUFFIXES)}.")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text (byte {error.start}). Convert it first.") from None


def _read_json_lines(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}. Correct or remove the line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: holds {type(row).__name__}, not an object with columns.")
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
        text = as_text(column(row, self._columns.prompt, self._name, number))
        if text is None or not text.strip():
            return None
        return [*self._system(), {"role": "user", "content": self._prompts.template.replace("{prompt}", text)}]

    def prompt_row(self, row: Row, number: int) -> tuple[Row, str | None]:
        """A PROMPT row, and the reason to drop it or null."""
        messages = self.messages(row, number)
        reference = self._reference(row, number)
        tags = column(row, self._columns.tags, self._name, number) if self._columns.tags else []
        mapped: Row = {
            "prompt_id": prompt_id(messages or []),
            "messages": messages or [],
            "reference": reference,
            "source": self._name,
            "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [str(tags)],
        }
        if messages is None:
            return mapped, "empty_prompt"
        if reference is not None and self._prompts.answer_pattern is not None:
            matches = re.findall(self._prompts.answer_pattern, reference)
            if not matches:
                return mapped, "no_answer_match"
            mapped["reference"] = matches[-1].strip()
        return mapped, None

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self._prompts.system_prompt}] if self._prompts.system_prompt is not None else []

    def _reference(self, row: Row, number: int) -> str | None:
        if self._columns.reference is None:
            return None
        text = as_text(column(row, self._columns.reference, self._name, number))
        return text.strip() if text and text.strip() else None

    def _from_messages(self, row: Row, number: int) -> list[Message] | None:
        """Turns up to the last of the user's; what an assistant answered to it is no part of the prompt."""
        turns = column(row, self._columns.messages or "", self._name, number)
        if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns):
            raise DataError(f"{self._name}: row {number}: {self._columns.messages} must be a list of {{role, content}}, got {turns!r:.80}.")
        users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        if not users or not str(turns[users[-1]]["content"]).strip():
            return None
        kept: list[Message] = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns[: users[-1] + 1]]
        kept[-1]["content"] = self._prompts.template.replace("{prompt}", kept[-1]["content"])
        return kept if kept[0]["role"] == "system" else [*self._system(), *kept]


def column(row: Row, name: str, source: str, number: int) -> Any:
    """A row's value in a column.

    Raises:
        DataError: there is no such column; names those there are, and the nearest.
    """
    if name not in row:
        close = difflib.get_close_matches(name, row, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{source}: row {number}: there is no column {name!r}, only {', '.join(map(repr, row))}.{hint}")
    return row[name]


def as_text(value: Any) -> str | None:
    """A value as text: whole floats without their `.0`, null as null."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
