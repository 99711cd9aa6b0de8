"""A server on 127.0.0.1 that answers like vLLM and like a host of chats, and does wrong what it is told to."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from aiohttp import web

FAULTS = ("429", "429_after", "500", "529", "cut", "cut_half", "half_json", "no_choices", "slow", "endless")


class Faulty:
    """Deterministic answers, a function of prompt and seed; faults by share, each time drawn anew.

    Args:
        share: Of requests that go wrong.
        faults: Which ways.
        never: Path of an error that every request gets: (status, body).
        delay_s: Before each answer.
    """

    def __init__(self, share: float = 0.0, faults: tuple[str, ...] = FAULTS, never: tuple[int, str] | None = None, delay_s: float = 0.0):
        self.share, self.faults, self.never, self.delay_s = share, faults, never, delay_s
        self.retry_after = "0"
        self.model: str | None = None
        self.asked: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = 0
        self.port = 0
        self._rng = random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> Faulty:
        """Listens, on the port it had before if it had one."""
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def shut(self) -> None:
        """Cuts all connections, and listens no more."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result(10)

    def __enter__(self) -> Faulty:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _open(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": 512}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.keys.add(request.headers.get("Authorization", ""))
            body = await request.json()
            name = json.dumps([body.get("prompt") or body.get("messages"), body.get("seed")])
            self.asked[name] += 1
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.never is not None:
                return web.Response(status=self.never[0], text=self.never[1].replace("{key}", request.headers.get("Authorization", "")))
            fault = self._rng.choice(self.faults) if self._rng.random() < self.share else None
            return await self._with(fault, request, body)
        finally:
            self.in_flight -= 1

    async def _with(self, fault: str | None, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        whole = answer_of(body, self.model)
        if fault in ("429", "429_after"):
            headers = {"Retry-After": self.retry_after} if fault == "429_after" else {}
            return web.json_response({"error": {"message": "rate limit"}}, status=429, headers=headers)
        if fault in ("500", "529"):
            return web.json_response({"error": {"message": "overloaded"}}, status=int(fault))
        if fault == "cut":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "no_choices":
            return web.json_response({"id": "x", "model": "tiny", "usage": whole["usage"]})
        if fault == "half_json":
            return web.Response(text=json.dumps(whole)[:-9], content_type="application/json")
        streams = bool(body.get("stream"))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream" if streams else "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        pieces = _pieces(whole) if streams else [json.dumps(whole).encode()]
        if fault in ("cut_half", "slow", "endless"):
            await response.write(pieces[0][: len(pieces[0]) // 2])
            if fault == "cut_half":
                assert request.transport is not None
                request.transport.abort()
                return response
            for _ in range(1 if fault == "slow" else 10_000):
                await asyncio.sleep(5.0 if fault == "slow" else 0.02)
                await response.write(b": still here\n\n" if streams else b" ")
        with contextlib.suppress(ConnectionError):
            await response.write(b"".join(pieces))
            await response.write_eof()
        return response


def answer_of(body: dict[str, Any], model: str | None = None) -> dict[str, Any]:
    """The whole answer to a request, of either shape."""
    prompt = body.get("prompt") if "prompt" in body else body.get("messages")
    rng = random.Random(zlib.crc32(json.dumps([prompt, body.get("seed")]).encode()))
    longest = body.get("max_tokens") or body.get("max_completion_tokens") or 8
    ids = [rng.randrange(20, 200) for _ in range(rng.randrange(1, min(longest, 12) + 1))]
    read = len(prompt) if isinstance(prompt, list) else 1
    told: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if "messages" in body:
        told["message"] = {"role": "assistant", "content": " ".join(map(str, ids))}
    else:
        told |= {"text": " ".join(map(str, ids)), "token_ids": ids, "prompt_token_ids": prompt}
    usage = {"prompt_tokens": read, "completion_tokens": len(ids), "total_tokens": read + len(ids)}
    return {"id": "x", "model": model or body.get("model"), "choices": [told], "usage": usage}


def _pieces(whole: dict[str, Any]) -> list[bytes]:
    """An answer as events, with comments and blank lines between them."""
    choice, rest = whole["choices"][0], {name: whole[name] for name in ("id", "model")}
    first = dict(choice, finish_reason=None)
    if "message" in choice:
        first["delta"] = first.pop("message")
    last = {"index": 0, "finish_reason": choice["finish_reason"], **({"delta": {}} if "message" in choice else {"text": ""})}
    events = [rest | {"choices": [first]}, rest | {"choices": [last]}, rest | {"choices": [], "usage": whole["usage"]}]
    return [b"data: " + json.dumps(event).encode() + b"\n\n: keep-alive\n\n" for event in events] + [b"data: [DONE]\n\n"]


@contextlib.contextmanager
def faulty(**settings: Any) -> Iterator[Faulty]:
    """A server for as long as the context lasts."""
    with Faulty(**settings) as server:
        yield server


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--delay_s", type=float, default=0.0)
    parser.add_argument("--faults", nargs="+", default=FAULTS)
    asked = parser.parse_args()
    with faulty(share=asked.share, delay_s=asked.delay_s, faults=tuple(asked.faults)) as here:
        print(here.url, flush=True)
        threading.Event().wait()
