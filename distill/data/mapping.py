"""Rows of a source as prompts, as the recipe says. Imports no torch.

A value that can't be used is an error that names the file and the row; what is merely empty is a reason to drop it.
"""

from __future__ import annotations

import re
from typing import Any

from distill.data.files import Row
from distill.data.names import json_text, reference_at, text_at, value_at, whole_text
from distill.errors import DataError
from distill.recipe.prompts import Columns, Prompts
from distill.run.schema import Message, prompt_id


class PromptMapping:
    """Turns rows of a source into conversations, as the recipe's `prompts` section says.

    Args:
        prompts: System prompt and template.
        columns: Column names of this source.
        name: Of the source, for the record.
        with_fields: Whether it has the columns of `prompts.fields`, as one of traces has not.
    """

    def __init__(self, prompts: Prompts, columns: Columns, name: str, *, with_fields: bool = True) -> None:
        self._prompts = prompts
        self._columns = columns
        self._name = name
        self._fields = (prompts.fields or []) if with_fields else []

    @property
    def columns(self) -> list[str]:
        """Names that are looked up in a row."""
        named = (self._columns.prompt, self._columns.messages, self._columns.reference, self._columns.tags)
        return [name for name in (*named, *self._fields) if name is not None]

    def messages(self, row: Row, where: str) -> list[Message] | None:
        """The conversation of a row, or null where its prompt is empty.

        Args:
            row: Of the source.
            where: It stands, for errors.
        """
        if self._columns.messages is not None:
            return self._from_messages(row, self._columns.messages, where)
        assert self._columns.prompt is not None  # the recipe was validated
        text = text_at(row, self._columns.prompt, where)
        return [*self._system(), self._user(text)] if text else None

    def prompt_row(self, row: Row, where: str) -> tuple[Row, str | None]:
        """A PROMPT row, and the reason to drop it or null."""
        messages = self.messages(row, where)
        name, as_json = self._columns.reference, self._prompts.json_reference
        reference = reference_at(row, name, where, as_json=as_json) if name else None
        mapped: Row = {
            "prompt_id": prompt_id(messages or []),
            "messages": messages or [],
            "reference": reference.strip() if reference else None,
            "source": self._name,
            "tags": self._tags(row, where),
        }
        if self._fields:
            fields = {name: value_at(row, name, where) for name in self._fields}
            mapped["fields"] = json_text(fields, "prompts.fields", where)
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

    def _tags(self, row: Row, where: str) -> list[str]:
        name = self._columns.tags
        if name is None:
            return []
        value = value_at(row, name, where)
        tags = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(tag, str) for tag in tags):
            raise DataError(f"{where}: {name} must be a string or a list of strings, got {value!r:.80}.")
        return [whole_text(tag, name, where) for tag in tags]

    def _from_messages(self, row: Row, name: str, where: str) -> list[Message] | None:
        """Turns up to the last of the user's; what an assistant answered to it is no part of the prompt."""
        turns = value_at(row, name, where)
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns] if isinstance(turns, list) else []
        users = [place for place, role in enumerate(roles) if role == "user"]
        # What stands behind the last user turn may be calls and results, which have no text.
        if not isinstance(turns, list) or not all(map(_is_turn, turns[: users[-1] + 1] if users else turns)):
            raise DataError(f"{where}: {name} must be a list of {{role, content}} with text in both, got {turns!r:.80}.")
        if not users or not turns[users[-1]]["content"].strip():
            return None
        before: list[Message] = [{key: whole_text(turn[key], name, where) for key in ("role", "content")} for turn in turns[: users[-1]]]
        has_system = bool(before) and before[0]["role"] == "system"
        if has_system and self._prompts.system_prompt is not None:
            raise DataError(f"{where}: {name} has a system turn of its own, and prompts.system_prompt is set. Leave one of them out.")
        return [*self._system(), *before, self._user(whole_text(turns[users[-1]]["content"], name, where))]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
