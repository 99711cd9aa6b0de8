"""A stream cut anywhere on its way tells the same, and no more of it is held than what is not whole yet."""

from __future__ import annotations

import json

import pytest

from distill.servers.answers import BrokenAnswerError
from distill.servers.events import Events
from distill.servers.llama import LlamaStream
from distill.servers.streams import ChoiceStream

RAW = b': hello\n\ndata: {"a": 1}\n\nevent: x\r\ndata:{"b":\r\ndata:  2}\r\n\r\n\n\ndata: {"c": "data: [DONE]"}\n\ndata: [DONE]\n\n'
TOLD = [{"a": 1}, {"b": 2}, {"c": "data: [DONE]"}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, len(RAW)])
def test_however_it_is_cut_the_events_are_the_same(size: int) -> None:
    events, found = Events(), list[object]()
    for begin in range(0, len(RAW), size):
        found += map(json.loads, events.feed(RAW[begin : begin + size]))
    assert found == TOLD and events.is_done and not list(events.end())


def test_an_end_without_a_line_is_one() -> None:
    events = Events()
    assert list(events.feed(b'data: {"a": 1}\n\ndata: [DONE]')) == [b'{"a": 1}'] and events.is_done
    events = Events()
    assert not list(events.feed(b'data: {"a": 1}')) and not events.is_done
    assert list(events.end()) == [b'{"a": 1}']


def test_streams_put_texts_and_ids_together_and_say_when_they_stopped() -> None:
    choice, llama = ChoiceStream(), LlamaStream()
    for place in range(1000):
        choice.add({"model": "m", "choices": [{"index": 0, "text": f" {place}\r\n", "token_ids": [place]}]})
        llama.add({"content": f" {place}\r\n", "tokens": [place], "stop": False})
    for stream in (choice, llama):
        with pytest.raises(BrokenAnswerError, match="stopped before"):
            stream.whole()
    choice.add({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    llama.add({"content": "", "stop": True, "stop_type": "eos"})
    text, ids = "".join(f" {place}\r\n" for place in range(1000)), list(range(1000))
    told = choice.whole()
    assert told["model"] == "m" and told["choices"] == [{"index": 0, "text": text, "token_ids": ids, "finish_reason": "stop"}]
    assert llama.whole()["content"] == text and llama.whole()["tokens"] == ids
    choice.add({"error": {"message": "out of memory"}})
    assert choice.whole() == {"error": {"message": "out of memory"}}
