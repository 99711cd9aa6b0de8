"""A stream of events as the one body that it would have been."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distill.servers.answers import BrokenAnswerError, text_in

_TEXTS = ("content", "reasoning_content", "reasoning", "thinking", "refusal")
_LISTS = ("reasoning_details", "tool_calls")


def folded(events: Iterable[Any]) -> dict[str, Any]:
    """Events of a chat or completion stream as one body: texts joined, lists chained, of the rest what came last.

    A stream is whole if it told why it ended, whether or not `[DONE]` follows: some servers send none.

    Raises:
        BrokenAnswerError: it holds an error, or stops before it says why it ended.
    """
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if not isinstance(event, Mapping):
            continue  # `[DONE]`, or a comment that keeps a connection open
        if event.get("error"):
            return dict(event) | {"choices": list(choices.values())}
        for name in ("model", "usage"):
            if event.get(name):
                body[name] = event[name]
        for piece in event.get("choices") or []:
            if isinstance(piece, Mapping):
                _add(choices.setdefault(int(piece.get("index") or 0), {}), piece)
    if not any(choice.get("finish_reason") for choice in choices.values()):
        raise BrokenAnswerError("half_answer", "the stream stopped before it said why the answer ended")
    return body | {"choices": [choices[index] | {"index": index} for index in sorted(choices)]}


def _add(choice: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Adds what an event says of a choice."""
    for name, value in piece.items():
        if name in ("delta", "message"):
            if isinstance(value, Mapping):
                _add_message(choice.setdefault("message", {}), value)
        elif value is None or name == "index":
            continue
        elif name in ("text", "token_ids"):
            choice[name] = choice[name] + value if name in choice else value
        elif name == "logprobs":
            _add_lists(choice.setdefault("logprobs", {}), value)
        else:
            choice[name] = value


def _add_message(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for name in _TEXTS:
        text = text_in(delta.get(name))
        if text is not None:
            message[name] = message.get(name, "") + text
    for name in _LISTS:
        if delta.get(name):
            message[name] = [*message.get(name, []), *delta[name]]


def _add_lists(there: dict[str, Any], more: Any) -> None:
    for name, value in (more if isinstance(more, Mapping) else {}).items():
        if isinstance(value, list):
            there[name] = [*there.get(name, []), *value]
