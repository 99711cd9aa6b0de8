"""A stream of events as the one body that it would have been."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from io import StringIO
from typing import Any

from distill.servers import Stream
from distill.servers.answers import BrokenAnswerError, text_in

_TEXTS = ("content", "reasoning_content", "reasoning", "thinking", "refusal")


class ChoiceStream:
    """Events of a chat or completion stream as one body: texts joined, lists chained, of the rest what came last.

    A stream is whole if it told why it ended, whether or not `[DONE]` follows: some servers send none. One with an error in it
    becomes a body with that error.
    """

    def __init__(self) -> None:
        self._body: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}
        self._error: Any = None

    def add(self, event: Any) -> None:
        """What an event says."""
        if self._error is not None or not isinstance(event, Mapping):
            return
        self._error = event.get("error") or None
        for name in ("model", "usage"):
            if event.get(name):
                self._body[name] = event[name]
        for piece in event.get("choices") or []:
            if isinstance(piece, Mapping):
                index = int(piece.get("index") or 0)
                self._choices.setdefault(index, _Choice(index)).add(piece)

    def whole(self) -> dict[str, Any]:
        """The one body.

        Raises:
            BrokenAnswerError: it stops before it says why it ended.
        """
        if self._error is not None:
            return {"error": self._error}
        whole = [self._choices[index].whole() for index in sorted(self._choices)]
        if not any(choice.get("finish_reason") for choice in whole):
            raise BrokenAnswerError("half_answer", "the stream stopped before it said why the answer ended")
        return self._body | {"choices": whole}


def folded(body: Any, kind: Callable[[], Stream] = ChoiceStream) -> Any:
    """A body whole: of a stream, or of the list of its events, the one that it would have been; any other as it is.

    Raises:
        BrokenAnswerError: the stream stopped before its end.
    """
    if not isinstance(body, list):
        return body if isinstance(body, Mapping) or not isinstance(body, Stream) else body.whole()
    stream = kind()
    for event in body:
        stream.add(event)
    return stream.whole()


class _Choice:
    """A choice that grows; its texts are joined as they come, because a long thought comes in tens of thousands of pieces."""

    def __init__(self, index: int) -> None:
        self._last: dict[str, Any] = {"index": index}
        self._texts: defaultdict[str, StringIO] = defaultdict(StringIO)
        self._message: defaultdict[str, StringIO] | None = None
        self._lists: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
        self._calls: list[_CallOfStream] = []

    def add(self, piece: Mapping[str, Any]) -> None:
        """What an event says of the choice."""
        for name, value in piece.items():
            if name in ("delta", "message") and isinstance(value, Mapping):
                self._add_message(value)
            elif name == "text" and isinstance(value, str):
                self._texts[name].write(value)
            elif name == "token_ids" and isinstance(value, list):
                self._lists["", name].extend(value)
            elif name == "logprobs" and isinstance(value, Mapping):
                for inner, entries in value.items():
                    if isinstance(entries, list):
                        self._lists[name, inner].extend(entries)
            elif value is not None:
                self._last[name] = value

    def _add_message(self, delta: Mapping[str, Any]) -> None:
        if self._message is None:
            self._message = defaultdict(StringIO)
        for name in _TEXTS:
            text = text_in(delta.get(name))
            if text is not None:
                self._message[name].write(text)
        if delta.get("reasoning_details"):
            self._lists["message", "reasoning_details"].extend(delta["reasoning_details"])
        for piece in delta.get("tool_calls") or []:
            if isinstance(piece, Mapping):
                self._add_call(piece)
        if isinstance(delta.get("function_call"), Mapping):  # as it was called before there could be several
            self._add_call({"function": delta["function_call"]})

    def _add_call(self, piece: Mapping[str, Any]) -> None:
        """A piece belongs to the call of its index, else to the last one, unless it brings an id that this one has not, or begins anew."""
        calls = self._calls
        index = piece.get("index", calls[-1].index if calls else 0)
        same = [call for call in calls if call.index == index]
        identity = piece.get("id") or ""
        other = bool(same and identity and same[-1].identity and identity != same[-1].identity)
        if not same or other or (not identity and same[-1].is_followed_by(piece.get("function"))):
            same = [_CallOfStream(index, identity)]
            calls += same
        same[-1].add(identity, piece.get("function"))

    def whole(self) -> dict[str, Any]:
        """The choice as a body that is no stream has it."""
        result = self._last | {name: text.getvalue() for name, text in self._texts.items()}
        if self._message is not None:
            result["message"] = {name: text.getvalue() for name, text in self._message.items()}
        if self._calls:
            result.setdefault("message", {})["tool_calls"] = [call.whole() for call in self._calls]
        for (place, name), entries in self._lists.items():
            (result.setdefault(place, {}) if place else result)[name] = entries
        return result


class _CallOfStream:
    """A call of a tool whose arguments come in pieces."""

    def __init__(self, index: Any, identity: str) -> None:
        self.index, self.identity = index, identity
        self._name = ""
        self._arguments: StringIO = StringIO()
        self._object: Any = None  # of hosts that send arguments whole, as no text

    def add(self, identity: str, function: Any) -> None:
        """What an event says of the call: some hosts say its name with every piece."""
        self.identity = self.identity or identity
        if not isinstance(function, Mapping):
            return
        self._name = self._name or str(function.get("name") or "")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            self._arguments.write(arguments)
        elif arguments is not None:
            self._object = arguments

    def is_followed_by(self, function: Any) -> bool:
        """Whether a piece with a name begins another call, because this one is whole: some hosts give neither indices nor ids."""
        if not isinstance(function, Mapping) or not function.get("name") or not self._name:
            return False
        arguments, so_far = function.get("arguments"), self._arguments.getvalue()
        if not isinstance(arguments, Mapping) and not str(arguments or "").lstrip().startswith("{"):
            return False
        try:
            return self._object is not None or isinstance(json.loads(so_far), dict)
        except ValueError:
            return False

    def whole(self) -> dict[str, Any]:
        """The call as a body that is no stream has it."""
        arguments = self._arguments.getvalue() if self._object is None else self._object
        return {"id": self.identity, "type": "function", "function": {"name": self._name, "arguments": arguments}}
