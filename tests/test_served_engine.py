"""A server as an engine: rows as the other engine's, killed and gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from distill.engines import Completion, Request, requests_for, write_traces
from distill.models.loading import load_chat_format
from distill.recipe.base import Sampling
from distill.recipe.models import ModelSpec
from distill.recipe.servers import Server
from distill.run.calls import Call, parted, with_calls, written
from distill.run.journal import Journal
from distill.servers import Failure
from distill.servers.client import Client
from distill.servers.protocols import protocol_of
from distill.servers.writing import ServerEngine
from tests.answering import Answering
from tests.faulty import faulty

SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, samples_per_prompt=4)
QUICK = ("429", "500", "529", "cut", "cut_half", "half_json", "no_choices")


def requests_of(number: int) -> list[Request]:
    rows = [
        {"prompt_id": f"p{n}", "messages": [{"role": "user", "content": f"What is {n} + {n}?"}], "reference": None} for n in range(number)
    ]
    return requests_for(rows, SAMPLING.samples_per_prompt, 0)


def rows_of(url: str, journal: Path, number: int, kind: str = "vllm") -> list[dict[str, Any]]:
    """Rows that a server writes; a process of its own calls this to be killed."""
    server = Server.model_validate({"kind": kind, "url": url, "concurrency": 16, "timeout_s": 5.0, "max_retries": 12})
    chat = load_chat_format(ModelSpec(model="embedded:teacher"))
    with Client(server, [url], pause_s=0.002) as client:
        engine = ServerEngine(client, protocol_of(server, "tiny"), chat, SAMPLING)
        return write_traces(engine, requests_of(number), SAMPLING, Journal(journal), "teacher", "test")


class Calling(Answering):
    """A host whose model calls a tool; its stream tells the arguments piece by piece."""

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "get_order", "arguments": ""}}
        pieces = [{"index": 0, "function": {"arguments": text}} for text in ('{"id"', ': "7"', "}")]
        deltas = [{"reasoning_content": "I look."}, {"content": "One moment."}, *({"tool_calls": [piece]} for piece in (call, *pieces))]
        events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        events.append(
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}
        )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(f"data: {json.dumps(event | {'model': self.model})}\n\n".encode())
        await response.write_eof(b"data: [DONE]\n\n")
        return response


def test_a_host_is_told_of_tools_and_its_calls_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    tools = [{"type": "function", "function": {"name": "get_order", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "c0", "type": "function", "function": {"name": "get_order", "arguments": {"id": "6"}}}
    messages = [
        {"role": "user", "content": "Where are orders 6 and 7?", "tools": json.dumps(tools)},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
        {"role": "tool", "content": "sent", "tool_call_id": "c0"},
    ]
    sampling = Sampling(max_new_tokens=12, samples_per_prompt=1)
    with Calling() as host:
        server = Server.model_validate({"kind": "openai", "url": f"{host.url}/v1"})
        with Client(server, [f"{host.url}/v1"], pause_s=0.002) as client:
            engine = ServerEngine(client, protocol_of(server, "tiny"), None, sampling)
            requests = requests_for([{"prompt_id": "p", "messages": messages, "reference": None}], 1, 0)
            [row] = write_traces(engine, requests, sampling, Journal(tmp_path / "j"), "teacher", "test")
    [asked] = host.asked
    assert asked["tools"] == tools and [turn["role"] for turn in asked["messages"]] == ["user", "assistant", "tool"]
    assert asked["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"id": "6"}' and asked["messages"][2]["tool_call_id"] == "c0"
    thought = "<think>\nI look.\n</think>\n\nOne moment."
    assert row["completion"] == with_calls(thought, [written(Call("get_order", {"id": "7"}))]) and row["finish_reason"] == "stop"
    assert parted(row["completion"])[1] == [Call("get_order", {"id": "7"})]


def test_rows_have_the_ids_that_were_sent_and_drawn(tmp_path: Path) -> None:
    chat, requests = load_chat_format(ModelSpec(model="embedded:teacher")), requests_of(20)
    with faulty(share=0.2, faults=QUICK) as wild:
        rows = rows_of(wild.url, tmp_path / "j", 20)
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [(one.prompt_id, one.sample_index) for one in requests]
    for row, request in zip(rows, requests, strict=True):
        assert row["prompt_ids"] == chat.prompt_ids(request.messages) and row["seed"] == request.seed
        assert row["completion"] == chat.text_of(row["completion_ids"], chat.opening(request.messages))
    assert len({tuple(row["completion_ids"]) for row in rows}) > 60, "samples of a prompt have seeds of their own"


def test_a_prompt_beyond_the_context_is_never_sent() -> None:
    with faulty() as calm:
        server = Server.model_validate({"kind": "vllm", "url": calm.url})
        chat, requests = load_chat_format(ModelSpec(model="embedded:teacher")), requests_of(3)
        room = len(chat.prompt_ids(requests[0].messages)) + SAMPLING.max_new_tokens
        long = Request("long", 0, [{"role": "user", "content": "1 + 1 " * 50}], None, 1)
        with Client(server, [calm.url]) as client:
            engine = ServerEngine(client, protocol_of(server, "tiny"), chat, SAMPLING, context=room + 4)
            for asked in ([long, *requests], [long]):
                found = dict(row for group in engine.write(asked) for row in group)
                assert len(found) == len(asked)
                assert isinstance(failed := found[0], Failure) and failed.reason == "too_long"
                assert all(isinstance(found[place], Completion) for place in range(1, len(asked)))
        assert calm.asked.total() == len(requests)


def test_a_host_is_sent_messages_and_another_model_is_noted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("A_KEY", "sk-0123456789")
    with faulty() as calm:
        calm.model = "cheaper"
        server = Server.model_validate({"kind": "openai", "url": f"{calm.url}/v1", "api_key_env": "A_KEY"})
        with Client(server, server.urls) as client:
            engine = ServerEngine(client, protocol_of(server, "tiny"), None, SAMPLING.plain())
            found = [told for group in engine.write(requests_of(2)) for _, told in group]
        assert all(isinstance(told, Completion) and told.completion_ids is None and told.text for told in found) and len(found) == 8
        assert engine.notes["model"] == 8 and capsys.readouterr().out.count("cheaper") == 1


@contextmanager
def wild_process() -> Iterator[str]:
    """The address of a server in a process of its own."""
    words = ["-m", "tests.faulty", "--share", "0.2", "--delay_s", "0.05", "--faults", *QUICK]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def killed_and_gone_on_with(folder: Path, kills: int, number: int) -> None:
    """A process that writes is killed at moments of its work, each time a new one goes on: nothing is lost, doubled or other."""
    rng, journal = random.Random(0), folder / "killed"
    with faulty() as calm:
        expected = rows_of(calm.url, folder / "whole", number)
    with wild_process() as url:
        for _ in range(kills):
            before = journal.stat().st_size if journal.exists() else 0
            pid = os.fork()  # what is imported is there already; no thread of this process but this one is at work
            if pid == 0:
                try:
                    rows_of(url, journal, number)
                finally:
                    os._exit(0)
            grows_by, until_s = rng.randrange(1, 6000), time.monotonic() + 60
            while (journal.stat().st_size if journal.exists() else 0) < before + grows_by:
                assert time.monotonic() < until_s, "it makes no progress"
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        there = len(list(Journal(journal).rows()))
        assert there < len(expected), "all kills were before its end"
        rows = rows_of(url, journal, number)
    assert rows == expected
    journalled = [(row["prompt_id"], row["sample_index"]) for row in Journal(journal).rows()]
    assert len(journalled) == len(set(journalled)) == len(expected), "none was written twice"


@pytest.mark.slow
def test_killed_twice_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    killed_and_gone_on_with(tmp_path, 2, 200)


@pytest.mark.nightly
def test_killed_50_times_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    killed_and_gone_on_with(tmp_path, 50, 800)
