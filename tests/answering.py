"""A server that answers at once, on 127.0.0.1, as vLLM or as a host of OpenAI's protocol does; for tests of what is asked of one."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

ANSWER = "<think>\nFour and three.\n</think>\n\n\\boxed{7}"


@dataclass
class Answering:
    """A context manager; `url` is where it answers. Fields say what it does wrong."""

    model: str = "tiny"
    context: int = 4096
    repeats: bool = True
    """Whether an answer follows from its seed."""
    logprobs: int = 64
    """Most alternatives that it tells, written or read."""
    more_prompt_tokens: int = 0
    """Tokens that its template adds to a prompt."""
    prompt_tokens: int | None = None
    """Of every prompt that comes as messages."""
    tokens: int = 12
    """Of every answer, unless fewer are allowed."""
    reasoning_field: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of all requests for answers."""

    def __enter__(self) -> Answering:
        ready = threading.Event()
        self._count = 0

        async def serve() -> None:
            self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
            app = web.Application()
            routes = [web.get("/v1/models", self._models), web.post("/v1/completions", self._completion)]
            app.add_routes([*routes, web.post("/v1/chat/completions", self._chat)])
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
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

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "max_model_len": self.context}]})

    def _written(self, body: dict[str, Any]) -> tuple[str, int, str]:
        """Text, tokens, and why it ended."""
        self._count += 1
        mark = body.get("seed") if self.repeats else self._count
        longest = body.get("max_tokens") or body.get("max_completion_tokens")
        cut = self.tokens > longest
        return f"{ANSWER} {mark}", min(self.tokens, longest), "length" if cut else "stop"

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        ids = [*body["prompt"], *([0] * self.more_prompt_tokens)]
        text, tokens, finish = self._written(body)
        usage = {"prompt_tokens": len(ids), "completion_tokens": tokens, "total_tokens": len(ids) + tokens}
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish, "prompt_token_ids": ids, "token_ids": [7] * tokens}
        if "prompt_logprobs" in body:
            k = min(body["prompt_logprobs"], self.logprobs)
            entries = {str(token): {"logprob": -1.0 - token, "rank": token + 1} for token in range(k)}
            choice["prompt_logprobs"] = [None, *([entries] * (len(ids) - 1))] if k else None
        if body.get("logprobs"):
            top = {f"token_id:{token}": -1.0 - token for token in range(min(body["logprobs"], self.logprobs))}
            values = {"token_logprobs": [-1.0] * tokens, "tokens": ["token_id:7"] * tokens, "top_logprobs": [top] * tokens}
            choice["logprobs"] = values if self.logprobs else None
        choices = [choice | {"index": index} for index in range(body.get("n", 1))]
        told = {"id": "x", "object": "text_completion", "model": self.model, "choices": choices, "usage": usage}
        return await self._reply(request, told, bool(body.get("stream")))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        text, tokens, finish = self._written(body)
        message = {"role": "assistant", "content": text}
        if self.reasoning_field:
            thought, _, rest = text.removeprefix("<think>").partition("</think>")
            message |= {"content": rest, self.reasoning_field: thought}
        read = self.prompt_tokens or 10
        usage = {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}
        name = "delta" if body.get("stream") else "message"
        choices = [{"index": index, name: message, "finish_reason": finish} for index in range(body.get("n", 1))]
        return await self._reply(request, {"id": "x", "model": self.model, "choices": choices, "usage": usage}, bool(body.get("stream")))

    async def _reply(self, request: web.Request, told: dict[str, Any], streams: bool) -> web.StreamResponse:
        if not streams:
            return web.json_response(told)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(f"data: {json.dumps(told)}\n\ndata: [DONE]\n\n".encode())
        await response.write_eof()
        return response
