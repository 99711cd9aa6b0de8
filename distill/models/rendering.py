"""A conversation as a chat template is given it: calls in the manner that this one takes, text of data between marks.

Templates want the arguments of a call as an object or as text, an id of any form or of nine letters. Which it is shows when one is tried.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, mark_control_tokens

from distill.errors import ModelError, visible
from distill.run.schema import Message, spoken

TODAY = datetime(2024, 7, 26)
"""The date of every rendering: another each day would make other rows of the same traces, and other ids in each stage. It is the one
that Llama's templates take where they can't know it."""

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_WORDS = {"name": "probedname", "argument": "probedargument", "value": "probedvalue", "result": "probedresult"}
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Manner:
    """How a template takes calls."""

    short_ids: bool = False
    """Whether each call must have an id, of nine letters (Mistral's)."""
    arguments_as_text: bool = False
    """Whether arguments are JSON in a text (DeepSeek's); else an object."""

    def told(self, turns: Turns) -> Turns:
        """Turns in this manner."""
        waiting: list[str] = []
        found = []
        for place, turn in enumerate(turns):
            told = dict(turn)
            if "tool_calls" in turn:
                told["tool_calls"] = [self._call(call, f"{place}/{number}") for number, call in enumerate(turn["tool_calls"])]
                waiting = [call["id"] for call in told["tool_calls"] if "id" in call]
            elif self.short_ids and turn["role"] == "tool":
                own = turn.get("tool_call_id")
                told["tool_call_id"] = _short(own) if own is not None else waiting[0] if waiting else _short(str(place))
                waiting = [name for name in waiting if name != told["tool_call_id"]]
            found.append(told)
        return found

    def _call(self, call: dict[str, Any], place: str) -> dict[str, Any]:
        told = {**call, "function": dict(call["function"])}
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if self.short_ids:  # of a call without one it is a function of the call, and not the same in all conversations
            told["id"] = _short(call.get("id") or f"{place} {call['function']['name']} {arguments}")
        if self.arguments_as_text:
            told["function"]["arguments"] = arguments
        return told


def _short(name: str) -> str:
    return name if _SHORT_ID.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:9]


_MANNERS = [Manner(*flags) for flags in product((False, True), repeat=2)]
_FOUND: dict[tuple[str, str], Manner] = {}


def manner_of(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> Manner:
    """How a template takes calls: the first manner in which it writes a call and its result; the plain one where it writes none."""
    key = str(tokenizer.get_chat_template()), repr(sorted(kwargs.items()))
    if key not in _FOUND:
        function = {"name": _WORDS["name"], "arguments": {_WORDS["argument"]: _WORDS["value"]}}
        call = {"id": "call_1", "type": "function", "function": function}
        turns: Turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": _WORDS["result"], "tool_call_id": "call_1", "name": _WORDS["name"]},
        ]
        fits = (manner for manner in _MANNERS if _writes_all(tokenizer, manner.told(turns), kwargs))
        _FOUND[key] = next(fits, Manner())
    return _FOUND[key]


def _writes_all(tokenizer: PreTrainedTokenizerBase, turns: Turns, kwargs: dict[str, Any]) -> bool:
    try:
        text = _applied(tokenizer, turns, None, kwargs, True)
    except ModelError:
        return False
    return all(word in text for word in _WORDS.values())


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    kwargs: dict[str, Any],
    *,
    prompt: bool = True,
    controls: re.Pattern[str] | None = None,
) -> str:
    """The conversation as text; as a prompt up to where the assistant begins to write.

    Args:
        tokenizer: With a template.
        messages: Turns, with their extras.
        kwargs: Of the template.
        prompt: Whether the assistant is to begin.
        controls: What is put between marks wherever the data hold it, so that it stays text; null marks nothing.

    Raises:
        ModelError: the template refuses it, or can't be read.
    """
    turns, tools = spoken(messages)
    if controls is not None:
        turns, tools = _marked(turns, controls), _marked(tools, controls)
    if any("tool_calls" in turn or turn["role"] == "tool" for turn in turns):
        turns = manner_of(tokenizer, kwargs).told(turns)
    return _applied(tokenizer, turns, tools, kwargs, prompt)


def _marked(value: Any, controls: re.Pattern[str]) -> Any:
    """Any text in a value between marks: that of keys, too, which are the names of arguments."""
    if isinstance(value, dict):
        return {mark_control_tokens(name, controls): _marked(inner, controls) for name, inner in value.items()}
    return [_marked(inner, controls) for inner in value] if isinstance(value, list) else mark_control_tokens(value, controls)


def _applied(tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: list[Any] | None, kwargs: dict[str, Any], prompt: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
        # The compiled template is kept by the library, so that whoever renders in this process meets the same date.
        _compile_jinja_template(template).globals["strftime_now"] = TODAY.strftime
        return str(tokenizer.apply_chat_template(turns, tools, tokenize=False, add_generation_prompt=prompt, **kwargs))
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(_roles(turns))
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template refuses a conversation of {roles}: {visible(str(error), 200).rstrip('.')}. "
            f"{_advice(turns)}, correct chat_template_kwargs, or give another template with the key chat_template of this model."
        ) from None


def _advice(turns: Turns) -> str:
    if any("tool_calls" in turn or turn["role"] == "tool" for turn in turns):
        return "Leave such conversations out, write calls and results into the turns of user and assistant as text"
    return "Put a system turn's text into prompts.template, bring turns in the order it takes"


def _roles(turns: Turns) -> Iterator[str]:
    for turn in turns:
        calls = len(turn.get("tool_calls") or ())
        yield visible(turn["role"], 20) + (f" ({calls} calls)" if calls > 1 else " (a call)" if calls else "")
