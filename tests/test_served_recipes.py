"""What a recipe with servers may say, and what of it makes another run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from batch_host import BatchHost
from pydantic import ValidationError
from test_shards_of_traces import recipe

from distill.errors import ServerError
from distill.recipe.models import ModelSpec, Student
from distill.recipe.servers import Price, Server
from distill.recipe.traces import Generate
from distill.servers import Call, Usage
from distill.servers.addresses import Addresses
from distill.servers.hosts import BatchHost as Host
from distill.servers.sending import Sender
from distill.servers.spending import Spending, shared
from distill.stages import train


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"kind": "openai", "batch": True, "price": {"input": 1.0, "output": 1.0}, "max_cost": 1.0}, "max_cost"),
        ({"kind": "openai", "batch": True, "max_tokens": 100}, "max_tokens"),
        ({"kind": "openai", "batch": True, "concurrency": 4}, "concurrency"),
        ({"kind": "vllm", "args": ["--api-key", "abc"]}, "--api-key"),
        ({"kind": "vllm", "args": ["--hf-token=abc"]}, "--hf-token"),
    ],
)
def test_what_could_not_be_kept_to_is_refused(server: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Server.model_validate(server)


def test_arguments_that_count_tokens_are_no_secrets() -> None:
    assert Server(kind="vllm", args=["--max-num-batched-tokens", "8192"]).args[1] == "8192"


@pytest.mark.parametrize("server", [{"kind": "vllm", "url": "http://127.0.0.1:8000"}, {"kind": "deepseek"}])
def test_a_student_is_served_only_by_what_is_started_with_its_training(server: dict[str, Any]) -> None:
    """A server that is there would answer as the model before training, and nobody would notice."""
    with pytest.raises(ValidationError, match="no training changes"):
        Student.model_validate({"model": "a/b", "server": server})
    assert Student.model_validate({"model": "a/b", "server": {"kind": "vllm"}}).server is not None


def test_a_recipe_without_servers_says_what_it_said_before_there_were_any() -> None:
    assert "server" not in ModelSpec(model="a/b").identity() and "logprobs" not in Generate().identity()
    assert ModelSpec(model="a/b", server=Server(kind="vllm")).identity()["server"] == {"kind": "vllm", "model": None, "body": {}}
    assert Generate(logprobs=5).identity()["logprobs"] == 5


def test_where_a_student_is_served_does_not_train_it_anew(tmp_path: Path, tiny_model_dir: Path) -> None:
    here = recipe(tmp_path, tiny_model_dir, "http://127.0.0.1:1")
    served = here.model_copy(update={"student": here.student.model_copy(update={"server": Server(kind="vllm")})})
    assert train.plan(here).settings == train.plan(served).settings
    assert here.student.identity() != served.student.identity()


def test_other_weights_in_a_gguf_file_are_another_model(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"one")
    spec = ModelSpec(model=str(file), tokenizer="a/b", server=Server(kind="llama_cpp"))
    before = spec.identity()
    file.write_bytes(b"two")
    assert spec.identity() != before


def test_a_host_of_batches_gets_a_key_and_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with BatchHost() as host:
        server = Server(kind="openai", url=host.url, batch=True)
        with pytest.raises(ServerError, match="OPENAI_API_KEY"):
            Host(server)
        monkeypatch.setenv("OPENAI_API_KEY", "very-secret\n")
        with pytest.raises(ServerError, match=r"401.*\*\*\*") as error:
            Host(server)._raise(401, b'{"error": {"message": "Incorrect API key provided: very-secret"}}')
    assert "very-secret" not in str(error.value)


@pytest.mark.parametrize(("key", "left"), [("none", "none"), ("EMPTY", "EMPTY"), ("not-needed", "not-needed"), ("sk-4f5e6d7c", "***")])
def test_a_key_goes_into_no_answer_and_a_word_that_stands_for_one_stays(key: str, left: str) -> None:
    """Whoever needs no key sets one all the same, and it may be a word of the answers."""

    async def parsed() -> Any:
        sender = Sender(Server(kind="vllm", url="http://127.0.0.1:1"), key)
        await sender.close()
        return sender._parsed(json.dumps({"content": f"I have {key}.", "index": None}).encode())

    assert asyncio.run(parsed()) == {"content": f"I have {left}.", "index": None}


def test_an_address_that_is_writing_its_first_answer_is_not_given_up() -> None:
    async def ask() -> None:
        addresses, call = Addresses(["http://127.0.0.1:1"], patience_s=0.01, pause_s=0.001), Call("/", {})
        addresses.fell(await addresses.pick(call), "refused")
        trial = await addresses.pick(call)
        trial.in_flight, trial.until_s = 1, float("inf")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(addresses.pick(call), 0.2)
        addresses.answered(trial)
        assert await addresses.pick(call) is trial
        trial.in_flight = 0
        addresses.fell(trial, "refused")
        trial.until_s = float("inf")
        with pytest.raises(ServerError, match="no server answers"):
            await asyncio.wait_for(addresses.pick(call), 5)

    asyncio.run(ask())


def test_processes_that_share_a_folder_count_apart_and_are_summed(tmp_path: Path) -> None:
    """One file for all would lose what another has used, and be taken away from under it."""
    server = Server(kind="vllm", url="http://127.0.0.1:1", price=Price(input=1.0, output=2.0), max_tokens=100)
    first, second = (Spending(tmp_path, "teacher", shared(server, 2), f"{number}-of-2") for number in (1, 2))
    for _ in range(3):
        first.add(Usage(input_tokens=5, output_tokens=10, requests=1))
        second.add(Usage(input_tokens=5, requests=1))
    assert not first.is_exhausted and not second.is_exhausted
    first.add(Usage(input_tokens=5))
    assert first.is_exhausted and not second.is_exhausted
    first.keep()
    told = second.facts_of_all()
    assert (told["requests"], told["input_tokens"], told["output_tokens"]) == (6, 35, 30) and told["cost_usd"] == 95e-6
    assert Spending(tmp_path, "teacher", server, "1-of-2").usage == first.usage
    for file in tmp_path.glob("server-spending-*"):
        file.unlink()  # as a stage that finishes
    second.keep()
    assert not list(tmp_path.iterdir())
