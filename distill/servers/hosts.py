"""Batch endpoints of hosts, as OpenAI's protocol has them: a file of requests goes up, a batch is asked after, answers come down."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from distill.errors import ServerError, visible
from distill.recipe.servers import Server
from distill.servers.faults import fault_of
from distill.servers.sending import key_of

T = TypeVar("T")
_PER_PAGE = 100
_LONGEST_PAUSE_S = 60.0
_PAGES = 20  # of a host's list that are looked through for a batch
_UPLOADS = {"together": ("/files/upload", "batch-api")}  # path and purpose, where they are not OpenAI's


class _MayPassError(Exception):
    """What may be otherwise a little later."""


class BatchHost:
    """A host's files and batches. Every call waits for its end; what may pass is tried again, with growing pauses.

    Args:
        server: Of the recipe.

    Raises:
        ServerError: the environment variable with the key is not set.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._url = server, server.urls[0]
        self._key = key_of(server)
        self._is_far = urlsplit(self._url).hostname not in ("127.0.0.1", "::1", "localhost")  # a proxy knows nothing of this machine's own

    def upload(self, lines: bytes) -> str:
        """Puts a JSONL file of requests there; returns its id."""
        path, purpose = _UPLOADS.get(self._server.kind, ("/files", "batch"))

        def form() -> aiohttp.FormData:
            data = aiohttp.FormData()
            data.add_field("purpose", purpose)
            if self._server.kind == "together":
                data.add_field("file_name", "requests.jsonl")
                data.add_field("file_type", "jsonl")
            data.add_field("file", lines, filename="requests.jsonl", content_type="application/jsonl")
            return data

        return str(_named(self._json("POST", path, form=form), "id"))

    def submit(self, file_id: str) -> str:
        """Begins a batch on an uploaded file, once: one that was begun by a request whose answer was lost is found. Returns its id."""
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        for attempt in range(self._server.max_retries + 1):
            if (known := self.find(file_id)) is not None:
                return known
            try:
                return str(_named(self._json("POST", "/batches", body=body, tries=1), "id"))
            except _MayPassError as error:
                if attempt == self._server.max_retries:
                    raise self._given_up(error) from None
                time.sleep(min(0.5 * 2**attempt, _LONGEST_PAUSE_S))
        raise AssertionError("unreachable")

    def find(self, file_id: str) -> str | None:
        """The batch that was begun on a file, by the host's own list."""
        after = ""
        for _ in range(_PAGES):
            page = self._json("GET", f"/batches?limit={_PER_PAGE}{after}")
            entries = page if isinstance(page, list) else page.get("data") or []
            for entry in entries:
                if entry.get("input_file_id") == file_id:
                    return str(entry["id"])
            if isinstance(page, list) or not page.get("has_more") or not entries:
                return None
            after = f"&after={entries[-1]['id']}"
        return None

    def state(self, batch_id: str) -> dict[str, Any]:
        """A batch as the host tells it, `status` in small letters."""
        told = self._json("GET", f"/batches/{batch_id}")
        told = told.get("job") or told
        return {**told, "status": str(told.get("status")).lower()}

    def lines(self, file_id: str) -> Iterator[dict[str, Any]]:
        """The lines of a file of answers; a broken one is passed over, so that its request counts as not answered."""

        async def read(response: aiohttp.ClientResponse) -> bytes:
            return await response.read()

        for line in self._run("GET", f"/files/{file_id}/content", read).splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if isinstance(told, dict):
                yield told

    def _json(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        form: Callable[[], aiohttp.FormData] | None = None,
        tries: int | None = None,
    ) -> Any:
        async def read(response: aiohttp.ClientResponse) -> Any:
            try:
                return await response.json(content_type=None)
            except ValueError as error:
                raise _MayPassError(f"no JSON came: {error}") from None

        return self._run(method, path, read, body=body, form=form, tries=tries)

    def _run(
        self,
        method: str,
        path: str,
        read: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        *,
        body: dict[str, Any] | None = None,
        form: Callable[[], aiohttp.FormData] | None = None,
        tries: int | None = None,
    ) -> T:
        """One request; with `tries` given, what may pass is left to the caller."""

        async def once() -> T:
            async with self._answered(method, path, body=body, form=form) as response:
                return await read(response)

        async def retried() -> T:
            waits = AsyncRetrying(
                retry=retry_if_exception_type(_MayPassError),
                stop=stop_after_attempt(tries or self._server.max_retries + 1),
                wait=wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
                reraise=True,
            )
            return await waits(once)

        try:
            return asyncio.run(retried())
        except _MayPassError as error:
            if tries is not None:
                raise
            raise self._given_up(error) from None

    @asynccontextmanager
    async def _answered(
        self, method: str, path: str, *, body: dict[str, Any] | None, form: Callable[[], aiohttp.FormData] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=self._server.timeout_s)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=self._is_far) as session,
                session.request(method, self._url + path, json=body, data=form() if form else None) as response,
            ):
                if response.status >= 400:
                    self._raise(response.status, await response.read())
                yield response
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise _MayPassError(visible(str(error) or type(error).__name__, 200)) from None

    def _raise(self, status: int, body: bytes) -> None:
        words = body.decode("utf-8", "replace")
        fault = fault_of(status, words.replace(self._key, "***") if self._key else words, self._server.key_variable)  # hosts echo it
        if fault.verdict == "retry":
            raise _MayPassError(f"{fault.reason}: {fault.detail}")
        raise ServerError(f"{self._url}: {fault.reason}: {fault.detail}. {fault.advice or 'Look at server.kind and server.batch'}.")

    def _given_up(self, error: Exception) -> ServerError:
        return ServerError(f"{self._url}: does not answer: {error}. Run this again later; it asks for the batches that it has submitted.")


def _named(told: Any, name: str) -> Any:
    """A value of an answer, or of the job in it."""
    inner = told.get("job") or told if isinstance(told, dict) else {}
    if name not in inner:
        raise ServerError(f"the host's answer has no {name}: {visible(str(told), 200)}. Look at server.kind and server.batch.")
    return inner[name]
