"""What the client of servers costs beside a bare loop: the same requests by aiohttp alone, and by `distill.servers.client`.

A stub in a process of its own answers at once, in raw asyncio. Both sides post the same JSON, keep as many in flight, and parse each
answer. They take turns, because machines are shared; wall time and the processor time of this process (all its threads) are compared,
and its resident memory is sampled through ours.

    python scripts/bench_client.py [--requests 100000] [--in_flight 256] [--repeats 3]
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

from distill.recipe.servers import Server
from distill.servers import Call, Failure, Usage
from distill.servers.client import Client

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


def bare(url: str, requests: int, in_flight: int) -> None:
    """The bare loop: as many tasks as are in flight, each posting and parsing."""

    async def run() -> None:
        left = iter(range(requests))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers={"Content-Type": "application/json"}) as session:

            async def work() -> None:
                for _ in left:
                    async with session.post(url + "/v1/completions", data=json.dumps(BODY).encode()) as response:
                        assert json.loads(await response.read())["choices"]

            await asyncio.gather(*(work() for _ in range(in_flight)))

    asyncio.run(run())


def ours(url: str, requests: int, in_flight: int, samples: list[float] | None = None) -> None:
    """The client of the kit; resident MiB is sampled at each twentieth of the way."""
    server = Server(kind="vllm", url=url, concurrency=in_flight)
    calls: Iterator[tuple[int, Call]] = ((n, Call("/v1/completions", BODY)) for n in range(requests))

    def read(body: Any, _: Call) -> Usage:
        used = body["usage"]
        return Usage(used["prompt_tokens"], 0, used["completion_tokens"], requests=1)

    def usage_of(usage: Usage) -> Usage:
        return usage

    with Client(server, [url]) as client:
        answers = client.run(calls, read, usage_of)
        for number, (_, answer) in enumerate(answers, start=1):
            assert not isinstance(answer, Failure)
            if samples is not None and number % max(1, requests // 20) == 0:
                samples.append(resident_mib())


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
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    here, there = multiprocessing.Pipe()
    stub = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    stub.start()
    url, samples = f"http://127.0.0.1:{here.recv()}", list[float]()
    both: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for _ in range(asked.repeats):
        both.append(
            (
                timed(lambda: bare(url, asked.requests, asked.in_flight)),
                timed(lambda: ours(url, asked.requests, asked.in_flight, samples)),
            )
        )
    print(f"{asked.requests:,} requests, {asked.in_flight} in flight, medians of {asked.repeats}")
    for index, name in enumerate(("wall", "processor")):
        one, other = (statistics.median(pair[side][index] for pair in both) * 1e6 / asked.requests for side in (0, 1))
        ratio = statistics.median(pair[1][index] / pair[0][index] for pair in both)
        print(f"{name:<10} bare {one:7.1f} us a request   client {other:7.1f} us   ratio {ratio:.3f}")
    print("resident MiB:", " ".join(f"{sample:.0f}" for sample in samples))
    stub.terminate()


if __name__ == "__main__":
    main()
