"""The client against a real server that does everything wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.errors import BudgetError, ServerError
from distill.recipe.base import Sampling
from distill.recipe.servers import Price, Server
from distill.servers import Answer, Call, Failure, Usage
from distill.servers.client import Client
from distill.servers.protocols import protocol_of
from distill.servers.spending import Spending
from tests.faulty import FAULTS, Faulty, faulty

PLAIN = Sampling(max_new_tokens=12, temperature=1.0)


def server_at(*urls: str, **settings: Any) -> Server:
    return Server(**{"kind": "vllm", "url": list(urls), "timeout_s": 5.0, "max_retries": 12} | settings)


def calls_of(server: Server, number: int, *, streams: bool = True) -> list[tuple[int, Call]]:
    protocol = protocol_of(server, "tiny")
    calls = [(n, protocol.writing([5, n // 4, 7], PLAIN, n)) for n in range(number)]
    streaming = ("stream", "stream_options")
    plain = [(n, Call(call.path, {k: v for k, v in (call.body or {}).items() if k not in streaming})) for n, call in calls]
    return calls if streams else plain


def written(server: Server, number: int, *, streams: bool = True, **options: Any) -> dict[int, Answer | Failure]:
    found: dict[int, Answer | Failure] = {}
    protocol = protocol_of(server, "tiny")
    with Client(server, server.urls, **({"pause_s": 0.002} | options)) as client:
        for n, answer in client.run(iter(calls_of(server, number, streams=streams)), protocol.answer, lambda answer: answer.usage):
            assert n not in found, "doubled"
            found[n] = answer
    return found


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "distill-client"]


@pytest.mark.parametrize("streams", [True, False])
def test_2000_requests_through_faults_are_those_of_an_undisturbed_run(streams: bool) -> None:
    number = 2000 if streams else 400
    with faulty() as calm:
        expected = written(server_at(calm.url, concurrency=64), number, streams=streams)
    assert len(expected) == number and all(isinstance(answer, Answer) for answer in expected.values())
    quick = tuple(fault for fault in FAULTS if fault not in ("slow", "endless"))
    with faulty(share=0.2, faults=quick) as wild:
        assert written(server_at(wild.url, concurrency=64), number, streams=streams) == expected
        assert wild.asked.total() > number


def test_slow_and_endless_answers_are_asked_again() -> None:
    with faulty() as calm:
        expected = written(server_at(calm.url), 40)
    with faulty(share=0.2, faults=("slow", "endless")) as wild:
        assert written(server_at(wild.url, timeout_s=0.2, concurrency=40), 40) == expected


def test_as_many_are_in_flight_as_asked_and_requests_are_made_as_there_is_room() -> None:
    made = [0]

    def source(server: Server) -> Iterator[tuple[int, Call]]:
        for pair in calls_of(server, 500):
            made[0] += 1
            yield pair

    with faulty(delay_s=0.01) as calm:
        server = server_at(calm.url, concurrency=7)
        protocol = protocol_of(server, "tiny")
        with Client(server, server.urls) as client:
            answers = client.run(source(server), protocol.answer, lambda answer: answer.usage)
            taken = [next(answers) for _ in range(20)]
            assert made[0] < 120
            answers.close()  # type: ignore[attr-defined]
            assert len(taken) == 20 and calm.most_in_flight == 7
            assert client.ask(protocol.models())["data"][0]["id"] == "tiny"


def test_without_a_number_it_finds_how_many() -> None:
    with faulty(delay_s=0.02) as calm:
        assert len(written(server_at(calm.url), 600)) == 600
        assert calm.most_in_flight > 16


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, '{"error": {"message": "bad {key}"}}', "SECRET_OF_MINE"),
        (402, '{"error": {"message": "pay {key}"}}', "add credit"),
        (404, "no such model {key}", "server.model"),
        (400, '{"error": {"message": "unknown field {key}"}}', "unknown field"),
    ],
)
def test_what_no_row_could_make_right_ends_at_once_and_shows_no_key(
    status: int, body: str, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "sk-very-secret-0123")
    with faulty(never=(status, body)) as wrong:
        server = server_at(wrong.url, api_key_env="SECRET_OF_MINE", concurrency=4)
        with pytest.raises(ServerError, match=words) as caught:
            written(server, 1000)
        assert wrong.asked.total() < 20 and wrong.url in str(caught.value)
        assert wrong.keys == {"Bearer sk-very-secret-0123"}
    assert "sk-very" not in str(caught.value) + repr(caught.value.__context__) + "".join(capfd.readouterr())


def test_a_missing_key_is_named_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    with pytest.raises(ServerError, match="DEEPSEEK_API_KEY is not set"):
        Client(Server(kind="deepseek"), ["http://127.0.0.1:9"])


def test_what_is_wrong_with_a_row_fails_that_row() -> None:
    with faulty(never=(400, '{"error": {"message": "This model\'s maximum context length is 512 tokens"}}')) as wrong:
        found = written(server_at(wrong.url), 30)
        assert {answer.reason for answer in found.values() if isinstance(answer, Failure)} == {"too_long"} and len(found) == 30
        assert wrong.asked.total() == 30


def test_failures_for_good_are_failures_and_all_alike_end_the_stage() -> None:
    with faulty(share=1.0, faults=("no_choices",)) as wrong:
        server = server_at(wrong.url, max_retries=1, concurrency=4)
        found = written(server, 5)
        assert {answer.reason for answer in found.values() if isinstance(answer, Failure)} == {"no_choice"} and len(found) == 5
        before = wrong.asked.total()
        with pytest.raises(ServerError, match="failed alike"):
            written(server, 10_000)
        assert wrong.asked.total() - before < 100


def test_retry_after_is_kept() -> None:
    with faulty(share=1.0, faults=("429_after",)) as wrong:
        wrong.retry_after = "0.3"
        server, start_s = server_at(wrong.url, max_retries=2, concurrency=1), time.monotonic()
        found = written(server, 1, pause_s=0.0)
        assert time.monotonic() - start_s >= 0.6 and wrong.asked.total() == 3
        assert isinstance(found[0], Failure) and found[0].reason == "http_429"


def test_a_dead_address_among_two_is_left_out_and_one_that_comes_back_is_used() -> None:
    with faulty() as dead, faulty(delay_s=0.005) as alive:
        dead.shut()
        server = server_at(dead.url, alive.url, concurrency=8)
        protocol, found = protocol_of(server, "tiny"), {}
        with Client(server, server.urls, pause_s=0.01) as client:
            for n, answer in client.run(calls_of(server, 600), protocol.answer, lambda answer: answer.usage):
                found[n] = answer
                if len(found) == 100:
                    dead.open()
        assert all(isinstance(answer, Answer) for answer in found.values()) and len(found) == 600
        assert dead.asked.total() > 20 and alive.asked.total() > 100


def test_samples_of_a_prompt_go_to_one_address() -> None:
    with faulty() as one, faulty() as other:
        assert len(written(server_at(one.url, other.url, concurrency=4), 400)) == 400
        shared = {json.loads(name)[0][1] for name in one.asked} & {json.loads(name)[0][1] for name in other.asked}
        assert len(shared) < 10 and one.asked and other.asked


def test_a_server_that_restarts_loses_nothing() -> None:
    with faulty(delay_s=0.01) as calm:
        server = server_at(calm.url, concurrency=8)
        protocol, found = protocol_of(server, "tiny"), {}
        with Client(server, server.urls, pause_s=0.02) as client:
            for n, answer in client.run(calls_of(server, 200), protocol.answer, lambda answer: answer.usage):
                found[n] = answer
                if len(found) in (50, 120):
                    calm.shut()
                    threading.Timer(0.1, calm.open).start()
        assert len(found) == 200 and all(isinstance(answer, Answer) for answer in found.values())


def test_no_server_at_all_is_an_error() -> None:
    with Faulty() as gone:
        gone.shut()
        with pytest.raises(ServerError, match="no server answers"):
            written(server_at(gone.url, timeout_s=0.3), 5, pause_s=0.01)


def test_an_error_of_the_caller_and_of_the_reader_end_it() -> None:
    def broken(_: Any, call: Call) -> Answer:
        raise ZeroDivisionError

    def source() -> Iterator[tuple[int, Call]]:
        yield from calls_of(server, 3)
        raise KeyboardInterrupt

    with faulty() as calm:
        server = server_at(calm.url)
        with Client(server, server.urls) as client:
            with pytest.raises(ZeroDivisionError):
                list(client.run(calls_of(server, 50), broken, lambda answer: answer.usage))
            with pytest.raises(KeyboardInterrupt):
                list(client.run(source(), protocol_of(server, "tiny").answer, lambda answer: answer.usage))


def test_base_and_student_share_the_limits_of_their_section(tmp_path: Path) -> None:
    server = Server.model_validate({"kind": "vllm", "url": "http://localhost:1", "max_tokens": 100})
    base = Spending(tmp_path, "base", server)
    base.add(Usage(input_tokens=60, output_tokens=30, requests=1))
    base.keep()
    student, teacher = (Spending(tmp_path, role, server) for role in ("student", "teacher"))
    student.add(Usage(input_tokens=5, output_tokens=4, requests=1))
    student.check()
    for one in (student, teacher):
        one.add(Usage(input_tokens=1, output_tokens=0, requests=1))
    teacher.check()
    with pytest.raises(BudgetError, match=r"student\.server\.max_tokens: 100 is reached: 100 tokens in 3 requests"):
        student.check()
    assert student.facts()["requests"] == 2


@pytest.mark.parametrize("limit", [{"max_tokens": 400}, {"max_cost": 0.004, "price": Price(input=1.0, output=10.0)}])
def test_a_limit_ends_cleanly_and_goes_on_when_it_is_raised(limit: dict[str, Any], tmp_path: Path) -> None:
    with faulty() as calm:
        server = server_at(calm.url, concurrency=4, **limit)
        protocol, found = protocol_of(server, "tiny"), {}

        def go_on(server: Server) -> dict[str, Any]:
            spending = Spending(tmp_path, "teacher", server)
            with Client(server, server.urls, spending) as client:
                todo = [pair for pair in calls_of(server, 200) if pair[0] not in found]
                for n, answer in client.run(todo, protocol.answer, lambda answer: answer.usage):
                    assert n not in found
                    found[n] = answer
            return spending.facts()

        with pytest.raises(BudgetError, match=next(iter(limit))):
            go_on(server)
        some = len(found)
        assert 10 < some < 150 and calm.asked.total() == some, "what was in flight was handed over"
        with pytest.raises(BudgetError):
            go_on(server)
        assert calm.asked.total() == some, "nothing more is sent"
        facts = go_on(server.model_copy(update={"max_tokens": None, "max_cost": None}))
        assert facts["requests"] == 200 == len(found) == calm.asked.total()
        assert facts["output_tokens"] == sum(answer.usage.output_tokens for answer in found.values() if isinstance(answer, Answer))


def test_a_question_between_answers_does_not_wait_for_room() -> None:
    with faulty() as calm:
        server = server_at(calm.url, concurrency=1)
        protocol = protocol_of(server, "tiny")
        with Client(server, server.urls) as client:
            answers = client.run(calls_of(server, 50), protocol.answer, lambda answer: answer.usage)
            next(answers)
            assert client.ask(protocol.models())["data"]
            assert len(list(answers)) == 49


@pytest.mark.parametrize("streams", [True, False])
def test_tokens_of_answers_that_are_of_no_use_are_counted(streams: bool) -> None:
    with faulty(share=0.5, faults=("no_choices",)) as server:
        spending = Spending(None, "teacher", server_at(server.url))
        found = written(server_at(server.url), 40, streams=streams, spending=spending)
        asked = server.asked
    used = {
        json.dumps([call.body["prompt"], call.body["seed"]]): number for number, call in calls_of(server_at(server.url), 40) if call.body
    }
    answers = {name: found[number] for name, number in used.items()}
    assert all(isinstance(answer, Answer) for answer in answers.values()) and asked.total() > 40
    expected = sum(asked[name] * answer.usage.output_tokens for name, answer in answers.items() if isinstance(answer, Answer))
    assert spending.usage.output_tokens == expected and spending.usage.requests == 40


def test_a_caller_that_is_not_done_with_answers_holds_requests_up() -> None:
    """A kill loses at most what is in flight and as many answers: whoever writes them down may be slow."""
    with faulty() as calm:
        server = server_at(calm.url, concurrency=3)
        protocol = protocol_of(server, "tiny")
        with Client(server, server.urls) as client:
            answers = client.run(calls_of(server, 100), protocol.answer, lambda answer: answer.usage)
            next(answers)
            for _ in range(50):
                client.ask(protocol.models())
            assert calm.asked.total() <= 2 * 3
            assert len(list(answers)) == 99
