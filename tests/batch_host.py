"""A host with OpenAI's files and batches, on 127.0.0.1, for tests: it answers every request with the length of its prompt."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

Line = dict[str, Any]


def answered(line: Line) -> Line:
    """A line of the output file."""
    content = f"{len(line['body']['messages'][0]['content'])} letters"
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    body = {"id": "x", "object": "chat.completion", "model": line["body"]["model"], "choices": [choice], "usage": usage}
    return {"id": "r", "custom_id": line["custom_id"], "response": {"status_code": 200, "request_id": "q", "body": body}, "error": None}


class BatchHost:
    """Holds files and batches; a context manager.

    Args:
        polls: Times that a batch is asked after before it ends.
        answer: What becomes of a line in the how-manieth batch: one of the output file, or none, which expires.
        lost: Answers to a submission that are cut off, though the batch was begun.
        together: Speak as Together does: another path and purpose of files, a `job` around a new batch, states in capitals, a bare list.
    """

    def __init__(
        self, polls: int = 2, answer: Callable[[Line, int], Line | None] | None = None, lost: int = 0, together: bool = False
    ) -> None:
        self.files: dict[str, list[Line]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.keys: set[str | None] = set()
        self.asked = threading.Event()
        """Set as soon as somebody asks after a batch."""
        self._polls, self._answer, self._lost = polls, answer or (lambda line, _: answered(line)), lost
        self._together = together

    def __enter__(self) -> BatchHost:
        ready = threading.Event()

        async def serve() -> None:
            self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
            app = web.Application(client_max_size=2**28)
            app.add_routes(
                [
                    web.post("/v1/files/upload" if self._together else "/v1/files", self._upload),
                    web.post("/v1/batches", self._submit),
                    web.get("/v1/batches", self._list),
                    web.get("/v1/batches/{id}", self._state),
                    web.get("/v1/files/{id}/content", self._content),
                ]
            )
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            ready.set()
            await self._stopped.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)

    async def _upload(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        form = await request.post()
        assert form["purpose"] == ("batch-api" if self._together else "batch")
        content = form["file"].file.read()  # type: ignore[union-attr]
        name = f"file-{len(self.files)}"
        self.files[name] = [json.loads(line) for line in content.splitlines()]
        return web.json_response({"id": name, "object": "file", "purpose": "batch"})

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        assert asked["endpoint"] == "/v1/chat/completions" and asked["completion_window"] == "24h"
        number = len(self.batches)
        name = f"batch-{number}"
        self.batches[name] = {"id": name, "input_file_id": asked["input_file_id"], "number": number, "polls": 0, "status": "in_progress"}
        if number < self._lost and request.transport is not None:
            request.transport.abort()
        return web.json_response({"job": self.batches[name]} if self._together else self.batches[name])

    async def _list(self, request: web.Request) -> web.Response:
        if self._together:
            return web.json_response(list(self.batches.values()))
        return web.json_response({"object": "list", "data": list(self.batches.values()), "has_more": False})

    async def _state(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["id"]]
        batch["polls"] += 1
        self.asked.set()
        if batch["polls"] > self._polls and batch["status"] == "in_progress":
            self._end(batch)
        return web.json_response(batch | ({"status": batch["status"].upper()} if self._together else {}))

    def _end(self, batch: dict[str, Any]) -> None:
        lines = self.files[batch["input_file_id"]]
        told = [(line, self._answer(line, batch["number"])) for line in lines]
        expired = [
            {"custom_id": line["custom_id"], "response": None, "error": {"code": "batch_expired", "message": "not in time"}}
            for line, one in told
            if one is None
        ]
        output, errors = f"{batch['id']}-output", f"{batch['id']}-errors"
        self.files[output] = [one for _, one in reversed(told) if one is not None]
        self.files[errors] = expired
        batch |= {"status": "expired" if expired else "completed", "output_file_id": output, "error_file_id": errors}
        batch["request_counts"] = {"total": len(lines), "completed": len(self.files[output]), "failed": len(expired)}

    async def _content(self, request: web.Request) -> web.Response:
        return web.Response(text="".join(json.dumps(line) + "\n" for line in self.files[request.match_info["id"]]))
