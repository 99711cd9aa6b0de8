"""One request over HTTP: what is sent, what comes back as JSON or as events, and what it means if neither does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import hdrs

from distill.errors import ServerError, visible
from distill.recipe.servers import Server
from distill.servers import Call
from distill.servers.deadlines import Deadline, Deadlines
from distill.servers.events import Events
from distill.servers.faults import Fault, fault_of

_MOST_BYTES = 512 * 2**20  # of an answer: 8,192 tokens of a prompt with 128 alternatives each take about 100 MiB
_CONNECT_S = 20.0
_STREAM_FACTOR = 24  # a stream may take so many times `timeout_s` in all: a server that never ends must not hold a place for ever
_END_S = 1.0  # that a server may take to end a stream behind `[DONE]`
_LONGEST_REST_S = 600.0
_encoded = json.JSONEncoder(check_circular=False).encode
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class UnansweredError(Exception):
    """A request came to nothing.

    Args:
        fault: What that means.
        at: `address` that can't be reached; `server` that is broken; `load` that is too much for it; else null.
        rest_s: How long it asked to be left alone.
    """

    def __init__(self, fault: Fault, at: str | None = None, rest_s: float | None = None) -> None:
        super().__init__(fault.reason)
        self.fault, self.at, self.rest_s = fault, at, rest_s


def key_of(server: Server) -> str | None:
    """The key, from the environment.

    Raises:
        ServerError: the variable is not set, or holds what can't be a key.
    """
    name = server.key_variable
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ServerError(f"server.api_key_env: the environment variable {name} is not set. Put the key for {server.kind} into it.")
    if not (key.isascii() and key.isprintable()):
        raise ServerError(f"server.api_key_env: the environment variable {name} holds characters that no key has. Set it anew.")
    return key


def _is_drawn(key: str) -> bool:
    """Whether somebody drew a key, so that no text holds it by chance, as it may hold the word (`none`, `EMPTY`) of who needs none."""
    return len(key) >= 8 and any(sign.isdigit() for sign in key)


class Sender:
    """Sends requests through one session; made and closed in its event loop.

    Args:
        server: With time limits.
        key: Goes into a header, and nowhere else.
    """

    def __init__(self, server: Server, key: str | None) -> None:
        self._server, self._key = server, key
        self._key_bytes = key.encode() if key and _is_drawn(key) else b""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= {"Content-Type": "application/json", "User-Agent": "distill"}
        # The environment's proxies lead to addresses that the recipe gives: of its own servers' and a cluster's they know nothing.
        away = any((urlsplit(url).hostname or "") not in _LOOPBACK for url in server.urls)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),  # as many as are in flight, which `Pace` bounds
            headers=headers,
            timeout=aiohttp.ClientTimeout(sock_connect=min(_CONNECT_S, server.timeout_s)),  # the others are `Deadlines`
            trust_env=away,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._deadlines = Deadlines(server.timeout_s)

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    def redacted(self, text: str) -> str:
        """A text without the key, should a server have echoed it."""
        return visible(text.replace(self._key, "***") if self._key else text)

    async def send(self, url: str, call: Call) -> Any:
        """Parsed JSON; of a stream what `call.streams` made of its events, or their list where none was asked for.

        Raises:
            UnansweredError: neither came whole.
        """
        method, data = ("GET", None) if call.body is None else ("POST", _encoded(call.body).encode())
        try:
            with Deadline(self._deadlines, _STREAM_FACTOR if call.streams else 1) as deadline:
                response = await self._session.request(method, url + call.path, data=data, allow_redirects=False)
                deadline.heard()
                try:
                    if response.status >= 300:
                        raise self._refusal(response.status, response.headers, await _bytes_of(response, 2**20, deadline))
                    if response.headers.get(hdrs.CONTENT_TYPE, "").lower().startswith("text/event-stream"):
                        return await self._streamed(response, call, deadline)
                    content = await _bytes_of(response, _MOST_BYTES, deadline)
                finally:
                    response.release()
        except aiohttp.ClientConnectorError as error:
            raise UnansweredError(self._fault("unreachable", error), "address") from None
        except aiohttp.ConnectionTimeoutError as error:
            raise UnansweredError(self._fault("unreachable", error), "address") from None
        except TimeoutError:
            words = f"nothing was said for {self._server.timeout_s:g} s" if call.streams else f"no answer in {self._server.timeout_s:g} s"
            raise UnansweredError(Fault("retry", "timeout", words), "load") from None
        except (aiohttp.InvalidURL, aiohttp.ServerFingerprintMismatch, UnicodeError) as error:
            raise UnansweredError(self._fault("address", error, "stage"), None) from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnansweredError(self._fault("connection", error), "server") from None
        return self._parsed(content)

    async def _streamed(self, response: aiohttp.ClientResponse, call: Call, deadline: Deadline) -> Any:
        """A stream up to `[DONE]`; each event is read when it comes, so that no more is held than the answer."""
        events, size = Events(), 0
        listed: list[Any] = []
        stream = call.streams() if call.streams is not None else None
        add = stream.add if stream is not None else listed.append
        async for chunk in response.content.iter_any():
            deadline.heard()
            size = _bounded(size + len(chunk), _MOST_BYTES)
            for data in events.feed(chunk):
                add(self._parsed(data))
            if events.is_done:
                with contextlib.suppress(TimeoutError):  # read to its end, a connection can be used again
                    async with asyncio.timeout(_END_S):
                        await response.content.readany()
                break
        for data in events.end():
            add(self._parsed(data))
        return listed if stream is None else stream

    def _parsed(self, content: bytes) -> Any:
        if self._key_bytes and self._key_bytes in content:  # it goes into no file, whatever a server says
            content = content.replace(self._key_bytes, b"***")
        try:
            return json.loads(content.decode())  # UTF-8, as RFC 8259 has it: to find another out costs time at every answer
        except (ValueError, RecursionError):
            words = visible(content[:200].decode("utf-8", "replace"))
            raise UnansweredError(Fault("retry", "broken_answer", f"no whole JSON came: {words}"), "server") from None

    def _fault(self, reason: str, error: BaseException, verdict: Any = "retry") -> Fault:
        words = visible(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 300)
        return Fault(verdict, reason, self.redacted(words), "Look at server.url")

    def _refusal(self, status: int, headers: Any, content: bytes) -> UnansweredError:
        """What a status of no success means; the key is cut out before the server's words are cut to length."""
        words = self.redacted(content.decode("utf-8", "replace"))
        fault = fault_of(status, words, self._server.key_variable)
        at = "load" if status in (408, 429, 503, 529) else "server" if status >= 500 else None
        return UnansweredError(fault, at, _rest_s(headers.get("Retry-After")))


async def _bytes_of(response: aiohttp.ClientResponse, most: int, deadline: Deadline) -> bytes:
    """The body, of no more than so many bytes."""
    if response.content_length is not None and response.content_length <= most:
        return await response.read()
    found = bytearray()
    async for chunk in response.content.iter_any():
        deadline.heard()
        found += chunk
        _bounded(len(found), most)
    return bytes(found)


def _bounded(size: int, most: int) -> int:
    if size > most:
        raise UnansweredError(Fault("row", "too_large", f"the answer has over {most:,} bytes"))
    return size


def _rest_s(told: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number of them or a date."""
    if not told:
        return None
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), _LONGEST_REST_S) if seconds == seconds else None  # not NaN


async def paused(attempt: int, base_s: float, rest_s: float | None) -> None:
    """The pause before a request is sent again: what the server asked for, else growing to a minute, with jitter."""
    if rest_s is not None:
        await asyncio.sleep(rest_s * random.uniform(1.0, 1.1))
    else:
        await asyncio.sleep(min(base_s * 2**attempt, 60.0) * random.uniform(0.5, 1.0))
