"""Rows of a source as prompts, as the recipe says. Imports no torch.

A value that can't be used is an error that names the file and the row; what is merely empty is a reason to drop it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from distill.data.calls import UnusableError, tools_of
from distill.data.files import Row
from distill.data.names import Spare, json_text, lines_at, reference_at, spare_at, text_at, value_at, whole_text
from distill.data.normal import normal_numbers
from distill.data.turns import answered, is_parts, is_turn, marked, reference_of, settled, text_of, turns_of, unmarked, with_tools
from distill.errors import DataError
from distill.recipe.prompts import Columns, Prompts, pieces_of
from distill.run.schema import Message, prompt_id

BEGINNING = "beginning"
"""Of a row that is one of several of its conversation: a number for how that begins."""
OWN = "own"
"""Of a row whose template names further columns: an `Own`."""


class Own(NamedTuple):
    """What a row has put into a template that names further columns."""

    question: str
    """In the place of `{prompt}`."""
    values: str
    """In all places, one behind the other."""


class Asked(NamedTuple):
    """What a row asks a model."""

    messages: list[Message]
    """The conversation up to where an assistant answers; empty where there is none."""
    answer: Message | None = None
    """The turn that the row has behind it, as it stands there; null where it has none."""
    reason: str | None = None
    """To drop it; null keeps it."""
    beginning: int | None = None
    """Equal for conversations that begin alike, in whatever spelling; null where each counts for itself."""
    own: Own | None = None
    """Of a template that names further columns; else null."""


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
        self._pieces = pieces_of(prompts.template)
        beside = columns.messages.rpartition(".")[0] if columns.messages is not None else None
        spare = {key: Spare(f"{beside}.{key}" if beside else key) for key in ("system", "tools", "functions") if beside is not None}
        self._system = columns.system or (spare.get("system") if prompts.system_prompt is None else None)
        self._tools = [columns.tools] if columns.tools is not None else [spare[key] for key in ("tools", "functions") if spare]

    @property
    def columns(self) -> list[str]:
        """Names that are looked up in a row."""
        filled_in = [piece.name for piece in self._pieces if piece.name != "prompt"]
        named = (self._columns.prompt, self._columns.messages, self._columns.reference, self._columns.tags, self._system, *self._tools)
        return [name for name in (*named, *self._fields, *filled_in) if name is not None]

    def asked(self, row: Row, where: str) -> list[Asked]:
        """What a row asks a model; at least one, be it nothing.

        Args:
            row: Of the source.
            where: It stands, for errors.
        """
        try:
            if self._columns.messages is not None:
                turns = self._turns(row, self._columns.messages, where)
                parts = self._supervised(turns, where)
                found = [self._of_conversation(before, answer, row, where) for before, answer in parts]
                beginning = None if self._prompts.turns == "last" else _beginning(unmarked(turns))
                return [asked._replace(beginning=beginning) for asked in found] or [Asked([], None, "no_supervised_turn", beginning)]
            assert self._columns.prompt is not None  # the recipe was validated
            text = self._text(row, self._columns.prompt, where)
            turns = self._with_context(row, [{"role": "user", "content": text}], where) if text else []
        except UnusableError as error:
            return [Asked([], reason=error.reason, beginning=None if self._prompts.turns == "last" else 0)]
        return [self._of_conversation(turns, None, row, where)]

    def prompt_rows(self, row: Row, where: str) -> list[tuple[Row, str | None]]:
        """PROMPT rows, and for each the reason to drop it or null."""
        told: Row = {"source": self._name, "tags": self._tags(row, where)}
        if self._fields:
            fields = {name: value_at(row, name, where) for name in self._fields}
            told["fields"] = json_text(fields, "prompts.fields", where)
        rows: list[tuple[Row, str | None]] = []
        parts = self.asked(row, where)
        for asked in parts:
            try:
                reference, reason = self._reference(row, asked, where, is_last=asked is parts[-1])
            except UnusableError as error:
                reference, reason = None, error.reason
            mapped: Row = {"prompt_id": prompt_id(asked.messages), "messages": asked.messages, "reference": reference, **told}
            if asked.beginning is not None:
                mapped[BEGINNING] = asked.beginning
            if asked.own is not None:
                mapped[OWN] = asked.own
            rows.append((mapped, asked.reason or reason))
        return rows

    def _reference(self, row: Row, asked: Asked, where: str, *, is_last: bool) -> tuple[str | None, str | None]:
        """The reference, and the reason to drop a row without one where one is looked for."""
        name = self._columns.reference
        found = None
        if name is not None and is_last:
            value, as_json = value_at(row, name, where), self._prompts.json_reference
            found = text_of(value, name, where) if is_parts(value) and not as_json else reference_at(row, name, where, as_json=as_json)
        elif name is None and self._prompts.answer_as_reference and asked.answer is not None:
            found = reference_of(asked.answer)
        if found is None or self._prompts.answer_pattern is None:
            return (found.strip() if found else None), None
        matches = [match.strip() for match in re.findall(self._prompts.answer_pattern, found)]
        return (matches[-1], None) if matches and matches[-1] else (found.strip() or None, "no_answer_match")

    def _supervised(self, turns: list[Message], where: str) -> list[tuple[list[Message], Message | None]]:
        """The parts of a conversation that a model is to go on with, each with the turn of the row's that does."""
        wanted = marked(turns) if self._prompts.turns == "teacher" else None
        if self._prompts.turns == "teacher" and wanted is None:
            raise DataError(
                f"{where}: no turn of an assistant says whether it is to be learned (weight, train or supervised), as prompts.turns: "
                "teacher wants. Mark them, or take last or all."
            )
        turns = unmarked(turns)
        parts: list[tuple[list[Message], Message | None]] = [*answered(turns)]
        if wanted is not None:
            return [part for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted]
        if not turns or turns[-1]["role"] != "assistant":
            parts.append((turns, None))
        return parts if self._prompts.turns == "all" else parts[-1:]

    def _of_conversation(self, turns: list[Message], answer: Message | None, row: Row, where: str) -> Asked:
        """A prompt of some turns: the system prompt before them, the template around the last of the user's."""
        users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        if not users or not turns[users[-1]]["content"].strip():
            return Asked([], answer, "empty_prompt")
        before, last, behind = turns[: users[-1]], turns[users[-1]], turns[users[-1] + 1 :]
        values = self._values(last["content"], row, where)
        templated = last | {"content": "".join(piece.text if piece.name is None else values[piece.name] for piece in self._pieces)}
        places = dict.fromkeys(piece.name for piece in self._pieces if piece.name is not None)
        own = Own(last["content"], "\n".join(values[name] for name in places)) if len(values) > 1 else None
        messages = [*map(settled, before), templated, *map(settled, behind)]
        if self._prompts.system_prompt is not None:
            if messages[0]["role"] == "system":
                name = self._system or self._columns.messages
                raise DataError(f"{where}: {name} has a system turn of its own, and prompts.system_prompt is set. Leave one of them out.")
            tools = messages[0].pop("tools", None)
            messages = with_tools([{"role": "system", "content": self._prompts.system_prompt}, *messages], tools)
        return Asked(messages, answer, own=own)

    def _values(self, text: str, row: Row, where: str) -> dict[str, str]:
        """What is put in the places of the template, all at once: what stands in a value is no place."""
        values = {"prompt": text}
        for piece in self._pieces:
            if piece.name is not None and piece.name not in values:
                try:
                    values[piece.name] = lines_at(row, piece.name, where)
                except DataError as error:
                    raise DataError(f"{error} The template names {piece.text}; as text it is written {{{piece.text}}}.") from None
        return values

    def _text(self, row: Row, name: str, where: str) -> str | None:
        value = value_at(row, name, where)
        if isinstance(value, list) and value and all(map(is_turn, value)):
            raise DataError(f"{where}: {name} is a conversation, not text. Name it in columns.messages, in place of columns.prompt.")
        return text_of(value, name, where) if is_parts(value) else text_at(row, name, where)

    def _turns(self, row: Row, name: str, where: str) -> list[Message]:
        """A row's conversation, with the system turn and the tools that it has beside that."""
        return self._with_context(row, turns_of(value_at(row, name, where), name, where), where)

    def _with_context(self, row: Row, turns: list[Message], where: str) -> list[Message]:
        name = self._system
        value = None if name is None else spare_at(row, name) if isinstance(name, Spare) else text_at(row, name, where)
        if isinstance(value, str) and value.strip():
            assert name is not None
            if not turns or turns[0]["role"] != "system":
                tools = turns[0].pop("tools", None) if turns else None
                turns = with_tools([{"role": "system", "content": whole_text(value, name, where)}, *turns], tools)
            elif not isinstance(name, Spare) and turns[0]["content"].strip() != value.strip():
                raise DataError(
                    f"{where}: the conversation has a system turn of its own, and {name} says another. Leave columns.system out."
                )
        for name in self._tools:
            turns = with_tools(turns, self._tools_at(row, name, turns, where))
        return turns

    def _tools_at(self, row: Row, name: str, turns: list[Message], where: str) -> str | None:
        """The tools of a column; what is called so by chance, in a conversation without calls, is none."""
        try:
            return tools_of(spare_at(row, name) if isinstance(name, Spare) else value_at(row, name, where), f"{where}: {name}")
        except DataError:
            if isinstance(name, Spare) and not any("tool_calls" in turn for turn in turns):
                return None
            raise

    def _tags(self, row: Row, where: str) -> list[str]:
        name = self._columns.tags
        if name is None:
            return []
        value = value_at(row, name, where)
        tags = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(tag, str) for tag in tags):
            raise DataError(f"{where}: {name} must be a string or a list of strings, got {value!r:.80}.")
        return [whole_text(tag, name, where) for tag in tags]


def _beginning(turns: list[Message]) -> int:
    """A number for a conversation up to the first turn of the user's: of two prompts that begin otherwise none is a part of the other."""
    users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    return int(normal_numbers([turns[: users[0] + 1] if users else turns])[0])
