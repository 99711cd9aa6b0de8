"""Time limits of requests: what is silent is ended, what speaks is not, and a cancellation by another stays one."""

from __future__ import annotations

import asyncio
import time

import pytest

from distill.servers.deadlines import Deadline, Deadlines


async def never() -> None:
    await asyncio.Event().wait()


def test_what_is_silent_is_ended_and_the_task_goes_on() -> None:
    async def work() -> tuple[float, int]:
        deadlines, start_s = Deadlines(0.05), time.monotonic()
        for _ in range(2):
            with pytest.raises(TimeoutError), Deadline(deadlines):
                await never()
        task = asyncio.current_task()
        assert task is not None
        return time.monotonic() - start_s, task.cancelling()

    took_s, cancelling = asyncio.run(work())
    assert took_s >= 0.1 and cancelling == 0


def test_a_server_that_speaks_has_more_time_but_not_for_ever() -> None:
    async def work() -> None:
        deadlines = Deadlines(1000.0)
        with Deadline(deadlines) as whole, Deadline(deadlines, 3) as stream:
            first_s, latest_s = whole.until_s, stream.until_s + 2000.0
            whole.heard()
            stream.heard()
            assert whole.until_s == first_s and first_s < stream.until_s < latest_s

            deadlines.silence_s = 5000.0  # as if that much time had gone by
            stream.heard()
            assert stream.until_s == pytest.approx(latest_s)

    asyncio.run(work())


def test_a_cancellation_by_another_stays_one_also_when_the_limit_is_over() -> None:
    async def work(late: bool) -> bool:
        async def one() -> None:
            with Deadline(Deadlines(0.05)) as deadline:
                opened.set_result(deadline)
                await never()

        opened: asyncio.Future[Deadline] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(one())
        deadline = await opened
        if late:
            deadline.expire()
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(work(False)) and asyncio.run(work(True))
