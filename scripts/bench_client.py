"""What the client of servers costs beside a bare loop: the same requests by aiohttp alone, and by `distill.servers.client`.

A stub in a process of its own answers at once, in raw asyncio. Both sides post the same JSON, keep as many in flight, and parse each
answer; ours also counts what each used, as a stage has it. Because machines are shared they take short turns, each beginning every other
one, and keep their connections over all turns; wall time and the processor time of this process (all its threads) are compared turn by
turn, and resident memory is sampled through ours.

    python scripts/bench_client.py [--requests 100000] [--in_flight 256] [--turns 20]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from distill.recipe.servers import Server
from distill.servers import Call, Failure, Usage
from distill.servers.client import Client
from distill.servers.spending import Spending

ANSWER = {
    "id": "x",
    "model": "tiny",
    "choices": [{"index": 0, "text": " word" * 64, "finish_reason": "stop", "token_ids": list(range(64))}],
    "usage": {"prompt_tokens": 64, "completion_tokens": 64, "total_tokens": 128},
}
BODY = {"model": "tiny", "prompt": list(range(64)), "max_tokens": 64, "temperature": 1.0}


class Stub(asyncio.Protocol):
    """Answers every request that arrives whole, without looking at it."""

    _body = json.dumps(ANSWER).encode()
    _answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_body) + _body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the connection."""
        self._transport, self._held = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answers each whole request: its head tells its length."""
        self._held += data
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            head = self._held[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self._held) < end + 4 + length:
                return
            self._held = self._held[end + 4 + length :]
            assert isinstance(self._transport, asyncio.WriteTransport)
            self._transport.write(self._answer)


def serve(told: Connection) -> None:
    """Runs the stub for ever, and tells its port."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


class Bare:
    """The bare loop: as many tasks as are in flight, each posting and parsing."""

    def __init__(self, url: str, in_flight: int) -> None:
        self._url, self._in_flight, self._loop = url, in_flight, asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(self._opened())

    async def _opened(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers={"Content-Type": "application/json"})

    def take_turn(self, requests: int) -> None:
        """Sends so many, and reads the answers."""
        self._loop.run_until_complete(self._run(requests))

    async def _run(self, requests: int) -> None:
        left = iter(range(requests))

        async def work() -> None:
            for _ in left:
                async with self._session.post(self._url + "/v1/completions", data=json.dumps(BODY).encode()) as response:
                    assert json.loads(await response.read())["choices"]

        await asyncio.gather(*(work() for _ in range(self._in_flight)))

    def close(self) -> None:
        """Closes the connections."""
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


class Ours:
    """The client of the kit; resident MiB is noted after each turn."""

    def __init__(self, url: str, in_flight: int) -> None:
        server = Server(kind="vllm", url=url, concurrency=in_flight)
        self._spending = Spending(None, "teacher", server)
        self._client = Client(server, [url], self._spending)
        self.resident_mib: list[float] = []

    def take_turn(self, requests: int) -> None:
        """Sends so many, and takes the answers."""
        calls: Iterator[tuple[int, Call]] = ((n, Call("/v1/completions", BODY)) for n in range(requests))

        def read(body: Any, _: Call) -> Usage:
            assert body["choices"]
            used = body["usage"]
            return Usage(used["prompt_tokens"], 0, used["completion_tokens"], requests=1)

        answered = self._spending.usage.requests
        for _, answer in self._client.run(calls, read, lambda usage: usage):
            assert not isinstance(answer, Failure)
        assert self._spending.usage.requests == answered + requests
        self.resident_mib.append(resident_mib())

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


def resident_mib() -> float:
    """Memory of this process that is in RAM, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds of some work."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--in_flight", type=int, default=256)
    parser.add_argument("--turns", type=int, default=20)
    asked = parser.parse_args()
    here, there = multiprocessing.Pipe()
    stub = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    stub.start()
    url, each = f"http://127.0.0.1:{here.recv()}", asked.requests // asked.turns
    bare, ours = Bare(url, asked.in_flight), Ours(url, asked.in_flight)
    for side in (bare, ours):
        side.take_turn(4 * asked.in_flight)  # opens the connections
    turns: list[dict[Bare | Ours, tuple[float, float]]] = []
    for turn in range(asked.turns):
        sides = (bare, ours) if turn % 2 else (ours, bare)
        turns.append({side: timed(partial(side.take_turn, each)) for side in sides})
    print(f"{each * asked.turns:,} requests of each, {asked.in_flight} in flight, in {asked.turns} turns")
    for index, name in enumerate(("wall", "processor")):
        one, other = (statistics.median(turn[side][index] for turn in turns) * 1e6 / each for side in (bare, ours))
        ratios = [turn[ours][index] / turn[bare][index] for turn in turns]
        low, middle, high = statistics.quantiles(ratios, n=4)
        whole = sum(turn[ours][index] for turn in turns) / sum(turn[bare][index] for turn in turns)
        print(f"{name:<10} bare {one:.1f} us a request, client {other:.1f} us (medians); ratio of all turns {whole:.3f}, ", end="")
        print(f"median of turns {middle:.3f}, quartiles {low:.3f} and {high:.3f}")
    print("resident MiB after each turn:", " ".join(f"{sample:.0f}" for sample in ours.resident_mib))
    for side in (bare, ours):
        side.close()
    stub.terminate()


if __name__ == "__main__":
    main()
