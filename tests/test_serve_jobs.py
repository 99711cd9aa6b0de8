"""Models served by jobs of a cluster: addresses that come and go, clients that wait for them, a server over several nodes, the script."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
from faulty import Faulty, faulty
from test_client import calls_of
from test_serving import RECIPE, by_hand, family, gone, tiny  # noqa: F401 (a fixture)

from distill.cluster.served import serving_jobs
from distill.errors import EARLY, RecipeError, ServerError
from distill.recipe.models import ModelSpec
from distill.recipe.reading import load_recipe
from distill.recipe.servers import Server
from distill.run.files import read_json, write_json
from distill.servers import Answer, alive
from distill.servers.client import Client
from distill.servers.commands import Command
from distill.servers.left import JOBS, SERVERS, WAIT, Watch, identity
from distill.servers.needs import ServerNeeds
from distill.servers.nodes import Nodes, nodes, own_address, replica
from distill.servers.pace import Pace
from distill.servers.protocols import protocol_of
from distill.servers.serving import serving
from distill.servers.spread import spread
from distill.stages import Step, steps_of

SPEC = ModelSpec(model="embedded:teacher", server=Server(kind="vllm", max_retries=12))
NEEDS = ServerNeeds(100)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("addresses._LOOK_S", "addresses._LOOK_DEAD_S", "left._EVERY_S", "left._FIRST_NOTE_S"):
        monkeypatch.setattr(f"distill.servers.{name}", 0.01)


def leave(run: Path, name: str, server: Faulty, **more: object) -> Path:
    """An address as `distill serve` leaves it."""
    file = run / "servers" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"url": server.url, "model": "tiny", "holds": identity(SPEC, None), "context": 200, "logprobs": 20}
    write_json(file, told | more)
    return file


def watch(run: Path) -> Watch:
    return Watch(SPEC, "teacher", run, None, NEEDS)


def use(run: Path) -> None:
    """What a stage begins with."""
    with serving(SPEC, "teacher", run, run, needs=NEEDS) as served:
        assert served.how == "found"


# Addresses


def test_all_that_answer_and_fit_are_used(tmp_path: Path) -> None:
    with faulty() as one, faulty() as two, faulty() as gone_, faulty() as other:
        gone_.shut()
        leave(tmp_path, "teacher", one)
        leave(tmp_path, "teacher-12_1", two)
        dead = leave(tmp_path, "teacher-12_2", gone_)
        leave(tmp_path, "teacher-12_3", other, model="another")  # whose port is somebody else's by now
        leave(tmp_path, "student-12", other)
        seen = watch(tmp_path)
        assert set(seen.urls()) == {one.url, two.url} and seen.model == "tiny"
        assert [file.name for file in seen.silent] == [dead.name, "teacher-12_3.json"]
        with serving(SPEC, "teacher", tmp_path, tmp_path, needs=NEEDS) as served:
            assert set(served.urls) == {one.url, two.url} and served.how == "found"
        leave(tmp_path, "teacher", one, holds="something else")
        assert seen.urls() == [two.url]
        leave(tmp_path, "teacher-12_1", two, context=50)
        message = r"(?s)can't be used for teacher: .*context of 50, and 100.*teacher.json: it holds another"
        with pytest.raises(ServerError, match=message):
            use(tmp_path)


class Switch:
    """Of a server that is turned off once."""

    def __init__(self, server: Faulty) -> None:
        self._server, self.open_ = server, True

    def off(self) -> None:
        self.open_ = False
        self._server.shut()


def write_through(run: Path, number: int, at: Callable[[int], None]) -> dict[int, object]:
    """Answers to so many requests, through whichever servers there are; `at` is called with the number of those that have come."""
    server, found = SPEC.server, {}
    assert server is not None
    seen = watch(run)
    protocol = protocol_of(server, "tiny")
    with Client(server, seen.urls(), pause_s=0.002, watch=seen) as client:
        for key, answer in client.run(iter(calls_of(server, number)), protocol.answer, lambda answer: answer.usage):
            found[key] = answer
            at(len(found))
    return found


def test_a_new_server_gets_work_and_one_that_goes_gets_none(tmp_path: Path) -> None:
    with faulty(delay_s=0.005) as one, faulty(delay_s=0.005) as two:
        first = leave(tmp_path, "teacher-12_1", one)

        def at(count: int) -> None:
            if count == 50:
                leave(tmp_path, "teacher-12_2", two)
            if two.asked and first.exists():
                first.unlink()
                one.shut()

        found = write_through(tmp_path, 1500, at)
        assert len(found) == 1500 and all(isinstance(answer, Answer) for answer in found.values())
        assert not first.exists() and two.asked.total() > 100


def test_where_all_have_died_one_that_comes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(WAIT, "60")
    vain = itertools.count()

    def answers(url: str) -> bool:
        if first and not first[0].open_ and next(vain) == 10:  # it was looked for in vain
            leave(tmp_path, "teacher-13", two)
        return alive.answers(url)

    first: list[Switch] = []
    monkeypatch.setattr("distill.servers.left.answers", answers)
    with faulty() as one, faulty() as two:
        leave(tmp_path, "teacher-12", one)
        first.append(Switch(one))
        assert len(write_through(tmp_path, 300, lambda count: first[0].off() if count == 20 else None)) == 300
        assert two.asked
    assert "no server of teacher answers any more" in capfd.readouterr().out


def test_where_none_comes_the_error_has_the_servers_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT, "0.05")
    with faulty() as one:
        leave(tmp_path, "teacher-12", one)
        (tmp_path / "servers" / "server-teacher-12.log").write_text("loading\nRuntimeError: no such weights\n")
        with pytest.raises(ServerError, match=r"(?s)no server answers, for .*RuntimeError: no such weights\n.*Start it again"):
            write_through(tmp_path, 300, lambda count: one.shut() if count == 20 else None)


# Waiting


def test_a_stage_waits_for_the_address_of_its_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(WAIT, "60")
    with faulty() as server:
        server.shut()
        leave(tmp_path, "teacher-12", server)
        asked: list[str] = []

        def answers(url: str) -> bool:
            asked.append(url)
            if len(asked) == 5:
                server.open()
            return alive.answers(url)

        monkeypatch.setattr("distill.servers.left.answers", answers)
        with serving(SPEC, "teacher", tmp_path, tmp_path, needs=NEEDS) as served:
            assert served.urls == [server.url] and served.how == "found"
    assert "waiting for a server of teacher" in capfd.readouterr().out


def test_one_that_never_comes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT, "0.05")
    with pytest.raises(ServerError, match=f"teacher: no server of it has answered for .*{WAIT}.*no job has begun to serve it .*squeue"):
        use(tmp_path)
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "server-teacher-12_3.log").write_text("loading\nRuntimeError: no such weights\n")
    with pytest.raises(ServerError, match=r"(?s)server-teacher-12_3.log\):\n.*RuntimeError: no such weights"):
        use(tmp_path)
    with faulty() as server:  # of the round before
        leave(tmp_path, "teacher-12", server, holds="something else")
        with pytest.raises(ServerError, match=r"teacher-12\.json: it holds another model"):
            use(tmp_path)
    monkeypatch.setenv(WAIT, "soon")
    with pytest.raises(RecipeError, match=f"{WAIT}: got 'soon'"):
        use(tmp_path)


def test_nobody_waits_for_jobs_that_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT, "600")
    monkeypatch.setenv(JOBS, "70,71")
    monkeypatch.setenv(SERVERS, "2")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    dies = json.dumps({"kind": "vllm", "command": [sys.executable, "-c", "raise SystemExit('no such weights')"]})
    words = ["-m", "distill", "serve", str(tmp_path / "recipe.yaml"), "--run_dir", str(tmp_path / "run"), "--teacher.server", dies]
    for task in ("1", "2"):
        job = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": task}
        watch(tmp_path / "run").refuse_to_wait()  # one of the two is left
        assert commands.run(words, environment={**os.environ, **job}).returncode == 1
    with pytest.raises(ServerError, match=r"(?s)the jobs that were to serve it \(70, 71\) have failed: .*no such weights"):
        watch(tmp_path / "run").wait()
    monkeypatch.setenv(JOBS, "80")  # of a new submission
    watch(tmp_path / "run").refuse_to_wait()


def test_as_many_requests_are_in_flight_as_servers_can_take() -> None:
    few = Pace(Server(kind="transformers"), 1)
    few.over(3)
    assert few.limit == 3
    few.over(1)
    assert few.limit == 1
    more = Pace(Server(kind="vllm"), 1)
    more.over(2)
    assert more.limit == 32
    fixed = Pace(Server(kind="vllm", concurrency=7), 1)
    fixed.over(2)
    assert fixed.limit == 7


# The job


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "73", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("in_a_job")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_is_reached_from_other_nodes_and_ends_early_on_a_signal(
    tiny: Path,  # noqa: F811
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    server = {"kind": "vllm", "command": [sys.executable, str(tiny)]}
    with by_hand(tmp_path, "--teacher.server", json.dumps(server), until="scancel 70_3 ends it") as (process, run, _):
        told = read_json(run / "servers" / "teacher-70_3.json")
        assert f"//{own_address()}:" in told["url"] and alive.answers(told["url"])
        living = family(read_json(run / "servers" / "server-teacher-70_3.json")["pid"])
        process.send_signal(number)
        process.send_signal(number)  # Slurm tells the script and its processes, and the script tells them, too
        assert process.wait(30) == EARLY
    assert gone(living) and not list((run / "servers").glob("*.json"))


def test_the_address_is_one_that_other_nodes_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\ncase $2 in hostnames) printf "n1\\nn2\\n";; *) echo "NodeName=n1 NodeAddr=127.9.8.7 Port=1";; esac\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    for name in ("getfqdn", "gethostname"):  # as Debian's /etc/hosts has it: 127.0.1.1
        monkeypatch.setattr(f"distill.servers.nodes.socket.{name}", lambda: "localhost")
    assert own_address() == "127.9.8.7"
    assert nodes() == Nodes()
    for name, value in {"DISTILL_SERVE_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "12", "SLURM_NODEID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert nodes() == Nodes(2, 1, "127.9.8.7", 20_012)
    assert replica() == "12"


def spread_words(kind: str, rank: int, *args: str, **more: str) -> list[str]:
    server = Server(kind=kind, args=list(args), **more)  # type: ignore[arg-type]
    command = Command(["serve", *args], "0.0.0.0", 8000, "m", {})
    return spread(command, server, "teacher", Nodes(2, rank, "n1", 20_012)).words


def test_a_server_over_two_nodes_has_a_command_for_each(tmp_path: Path) -> None:
    assert spread_words("sglang", 1) == ["serve", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "n1:20012"]
    first, second = spread_words("vllm", 0), spread_words("vllm", 1)
    assert second == [*(word if word != "0" else "1" for word in first), "--headless"]
    assert first[1:] == [
        "--nnodes",
        "2",
        "--node-rank",
        "0",
        "--master-addr",
        "n1",
        "--master-port",
        "20012",
        "--distributed-executor-backend",
        "mp",
    ]
    with pytest.raises(ServerError, match=r"teacher\.server\.kind llama_cpp: can't be spread over 2 nodes"):
        spread_words("llama_cpp", 0)
    python = tmp_path / "python"
    python.touch()
    (tmp_path / "vllm").touch()
    first, second = (spread_words("vllm", rank, "--distributed-executor-backend", "ray", python=str(python)) for rank in (0, 1))
    assert second == [str(tmp_path / "ray"), "start", "--block", "--address=n1:20012"]
    assert first[:2] == ["bash", "-c"] and "ray start --head --port=20012 --node-ip-address=n1 && exec" in first[2]
    assert first[4:] == ["serve", "--distributed-executor-backend", "ray"]


# Which steps ask one


MORE = """
score: {target: {kind: top_k, k: 8}}
rounds: 2
rollouts: {prompts_per_round: 8, max_new_tokens: 64}
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--teacher.server", "{kind: vllm}"], {"generate": "teacher", "round 1 score": "teacher", "round 2 score": "teacher"}),
        (["--teacher.server", "{kind: vllm}", "--score.source", "process"], {"generate": "teacher"}),
        (["--teacher.server", "{kind: vllm, url: 'http://n1:8000'}"], {}),
        (["--teacher.server", "{kind: deepseek}", "--score.source", "process"], {}),
        (["--student.server", "{kind: vllm}"], {"round 1 rollouts": "student", "round 2 rollouts": "student"}),
    ],
)
def test_steps_that_ask_a_job_and_its_role(tmp_path: Path, words: list[str], expected: dict[str, str]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + MORE)
    recipe = load_recipe(tmp_path / "recipe.yaml", words)
    steps = steps_of(recipe)
    assert {str(step): role for step, role in serving_jobs(recipe, steps).items()} == expected
    assert serving_jobs(recipe, [Step("evaluate")]) == {}
