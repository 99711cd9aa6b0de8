"""Calls of tools in a completion, in the kit's own form: that of Hermes and Qwen, behind the text. Families have their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from distill.run.schema import THINK_CLOSE, THINK_OPEN

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
_DECODER = json.JSONDecoder()


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """As the field `tool_calls` of a turn lists it."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def written(call: Call) -> str:
    """A call in the kit's form."""
    return written_raw(call.name, json.dumps(call.arguments, ensure_ascii=False))


def written_raw(name: str, arguments: str) -> str:
    """The same of arguments that are text already, and may be no JSON, as a model has written them."""
    return f'{CALL_OPEN}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n{CALL_CLOSE}'


def with_calls(text: str, calls: Sequence[str]) -> str:
    """A completion: its text, if any, and calls in the kit's form behind it."""
    if not calls:
        return text
    space = "" if not text else "\n\n" if text.rstrip().endswith(THINK_CLOSE) else "\n"
    return f"{text.rstrip()}{space}" + "\n".join(calls)


def parted(completion: str) -> tuple[str, list[Call]]:
    """The text of a completion, reasoning included, and the calls behind it; all of it and none, where no well-formed ones end it."""
    start = completion.find(CALL_OPEN)
    while start >= 0:
        text = completion[:start]
        is_thought = text.rfind(THINK_OPEN) > text.rfind(THINK_CLOSE)
        if not is_thought and (calls := _calls(completion, start)):
            return text, calls
        start = completion.find(CALL_OPEN, start + 1)
    return completion, []


def _calls(text: str, place: int) -> list[Call]:
    """Calls from a place to the end of a text; none where there is something else."""
    found: list[Call] = []
    while place < len(text):
        if not text.startswith(CALL_OPEN, place):
            return []
        try:
            value, place = _DECODER.raw_decode(text, _behind_space(text, place + len(CALL_OPEN)))
        except (ValueError, RecursionError):
            return []
        place = _behind_space(text, place)
        if not isinstance(value, dict) or not text.startswith(CALL_CLOSE, place):
            return []
        name, arguments = value.get("name"), value.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        found.append(Call(name, arguments))
        place = _behind_space(text, place + len(CALL_CLOSE))
    return found


def _behind_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
