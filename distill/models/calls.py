"""How a template writes the calls of an answer: what a student has to write in place of the kit's own form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.errors import ModelError
from distill.models.rendering import render
from distill.models.thoughts import opening_of
from distill.run.calls import Call, parted, written
from distill.run.schema import THINK_CLOSE, THINK_OPEN, Message

_PROBED = Call("probedname", {"probedargument": "probedvalue"})
_TEXT = "probedtext"
_USER: Message = {"role": "user", "content": "?"}
_EMPTY_THOUGHT = re.compile(rf"\s*(?:{THINK_OPEN}\s*{THINK_CLOSE})?\s*")


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls. Make it with `call_form`."""

    tokenizer: PreTrainedTokenizerBase
    kwargs: dict[str, Any]
    controls: dict[str, int]
    """Tokens that steer a conversation."""
    space: str | None
    """Between an answer's text and its calls; null where calls stay in the kit's form, because it is the template's or it knows none."""
    end_id: int
    """The token behind calls, which may be another than behind text (Llama's `<|eom_id|>`)."""

    def spelled(self, completion: str) -> tuple[str, str]:
        """An answer's text, and its calls as the template writes them, with marks around what of data is no token; else all of it as text.

        Raises:
            ModelError: the template refuses the calls.
        """
        if self.space is None:
            return completion, ""
        text, calls = parted(completion)
        if not calls:
            return completion, ""
        stripped = text.rstrip()
        if stripped and not stripped.endswith(THINK_CLOSE):
            text = stripped + self.space
        found = _calls_in(self.tokenizer, self.kwargs, calls, self.controls)
        assert found is not None  # it was, when it was tried
        return text, found[0]


def call_form(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], controls: dict[str, int], end_of_turn_id: int) -> CallForm:
    """Looks how a template writes a call.

    Args:
        tokenizer: With a template.
        kwargs: Of the template.
        controls: Tokens that steer a conversation, with their ids.
        end_of_turn_id: Behind a text.
    """
    try:
        found = _calls_in(tokenizer, kwargs, [_PROBED], controls)
        spaced = _calls_in(tokenizer, kwargs, [_PROBED], controls, _TEXT) if found is not None else None
    except ModelError:
        found = spaced = None
    if found is None or _PROBED.name not in found[0]:
        return CallForm(tokenizer, kwargs, controls, None, end_of_turn_id)
    text, end = found
    end_id = end_of_turn_id if end is None else end
    if text == written(_PROBED):
        return CallForm(tokenizer, kwargs, controls, None, end_id)
    behind = spaced[0].removeprefix(_TEXT) if spaced is not None and spaced[0].startswith(_TEXT) else ""
    space = behind[: len(behind) - len(behind.lstrip())] if behind.lstrip() == text else "\n\n"
    return CallForm(tokenizer, kwargs, controls, space, end_id)


def _calls_in(
    tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], calls: list[Call], controls: dict[str, int], text: str = ""
) -> tuple[str, int | None] | None:
    """What the template writes of an answer with calls, without an empty thought before, and the token behind it; null where it
    begins otherwise than a prompt ends.
    """
    answer: Message = {"role": "assistant", "content": text, "tool_calls": json.dumps([call.described() for call in calls])}
    pattern = pattern_of(controls)
    whole = render(tokenizer, [_USER, answer], kwargs, prompt=False, controls=pattern)
    prompt = render(tokenizer, [_USER], kwargs)
    prompt = prompt.removesuffix(opening_of(prompt))
    head = re.sub(rf"{THINK_OPEN}\s*{THINK_CLOSE}\s*\Z", "", prompt).rstrip()
    if not whole.startswith(head):
        return None
    rest = _EMPTY_THOUGHT.sub("", whole[len(head) :], count=1).rstrip()
    end = next((token for token in controls if rest.endswith(token)), None)
    return (rest, None) if end is None else (rest.removesuffix(end).rstrip(), controls[end])


def pattern_of(controls: dict[str, int]) -> re.Pattern[str]:
    """Matches control tokens where they stand in a text, the longest first."""
    longest_first = sorted(controls, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def same_parts(left: bytes, right: bytes, calls: Sequence[Call]) -> list[tuple[int, int, int]]:
    """Where two forms of some calls write the same, which is names and arguments: places in both, and lengths, in their order."""
    pairs = zip(_parts(left, calls), _parts(right, calls), strict=False)
    return [(one[0], other[0], one[1]) for one, other in pairs if one is not None and other is not None]


def _parts(text: bytes, calls: Sequence[Call]) -> Iterator[tuple[int, int] | None]:
    """Place and length of each call's name and arguments; null for a name that stands there several times. Ends where one is not found."""
    cursor = 0
    for call in calls:
        name, arguments = call.name.encode(), json.dumps(call.arguments, ensure_ascii=False).encode()
        place = text.find(arguments, cursor)
        before = text[cursor:place] if place >= 0 else text[cursor:]
        named = [found.start() for found in re.finditer(rb"(?<![\w.-])" + re.escape(name) + rb"(?![\w.-])", before)]
        yield (cursor + named[0], len(name)) if len(named) == 1 else None
        if place < 0:
            return
        yield place, len(arguments)
        cursor = place + len(arguments)
