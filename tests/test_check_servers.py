"""`distill check` asks servers: what is as the recipe wants it is said, what is not is refuted, and little is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from answering import Answering
from test_pipeline import write_recipe

from distill.before import check, machine, quick
from distill.before.expected import Job, expected, jobs_of, lengths
from distill.before.findings import Findings
from distill.before.servers import check_servers, check_without_asking, is_loaded
from distill.before.tokens import load_chats
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe
from distill.recipe.servers import Price
from distill.run.files import write_json
from distill.servers.left import identity
from distill.stages.prompts import survey

KEY = "KEY_OF_A_TEST"


@pytest.fixture
def path(tmp_path: Path, tiny_model_dir: Path) -> Path:
    recipe = write_recipe(tmp_path, tiny_model_dir)
    recipe.write_text(recipe.read_text() + f"run_dir: {tmp_path / 'run'}\n")
    return recipe


def recipe_of(path: Path, server: str, *more: str) -> Recipe:
    return load_recipe(path, ["--teacher.server", server, *more])


def asked(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> tuple[bool, str]:
    """The claims about servers alone, and whether all hold."""
    found = Findings()
    check_servers(recipe, load_chats(recipe, found), survey(recipe.prompts, recipe.seed, 8), found, here=False)
    return not found.refuted, capsys.readouterr().out


def said(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> tuple[bool, str]:
    holds = check.run(recipe)
    return holds, capsys.readouterr().out


def claims(text: str) -> dict[str, str]:
    """What is said of a server, by its claim."""
    lines = (line[8:] for line in text.splitlines() if "teacher's server: " in line[:40])
    return {line.split("teacher's server: ")[1].split("  ")[0].split(":")[0]: line for line in lines}


def test_a_server_of_ids_is_asked_and_what_it_can_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Answering() as server:
        holds, text = asked(recipe_of(path, f"{{kind: vllm, url: {server.url}, model: tiny, price: {{input: 1.0, output: 2.0}}}}"), capsys)
    assert holds, text
    told = claims(text)
    assert "4,096 tokens" in told["context"] and "the same" in told["tokens of a prompt"]
    assert "repeats an answer" in told["seed"] and "2 of 2" in told["samples of a request"]
    assert "20 of 20" in told["log-probabilities"] and "ids of an answer  come" in told["ids of an answer"]
    assert "think tags" in told["reasoning"] and "at 16 requests at once" in told["tokens a second"]
    assert "answers of 12 tokens" in told["hours and money"] and "$" in told["hours and money"]
    assert len(server.asked) < 40 and all(body["max_tokens"] <= 64 for body in server.asked)


@pytest.mark.parametrize(
    ("wrong", "keys", "words"),
    [
        ({"model": "another"}, "model: tiny", "tiny is not among them: it has another"),
        ({"context": 40}, "model: tiny", "no prompt has room"),
        ({"more_prompt_tokens": 3}, "model: tiny", "another model or tokenizer"),
    ],
)
def test_a_server_with_something_else_is_refuted(
    wrong: dict[str, Any], keys: str, words: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Answering(**wrong) as server:
        holds, text = asked(recipe_of(path, f"{{kind: vllm, url: {server.url}, {keys}}}"), capsys)
    assert not holds and words in text, text


def test_log_probabilities_that_are_asked_for_have_to_come(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Answering(logprobs=0) as server:
        holds, text = asked(recipe_of(path, f"{{kind: vllm, url: {server.url}, model: tiny}}", "--generate.logprobs", "4"), capsys)
    assert not holds and "0 of 4 asked for" in text, text


@pytest.mark.parametrize(("most", "holds"), [(64, True), (3, False)])
def test_a_server_that_scores_is_asked_for_a_prompt(most: int, holds: bool, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scoring = ("--score.target", "{kind: top_k, k: 8}", "--train.method", "kd")
    with Answering(logprobs=most) as server:
        found, text = asked(recipe_of(path, f"{{kind: vllm, url: {server.url}, model: tiny}}", *scoring), capsys)
    assert found is holds, text
    assert ("8 a token" in text) is holds and ("--max-logprobs 8" in text) is not holds


def test_a_host_is_sent_messages_and_its_differences_are_said(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "a-secret-that-nobody-shows")
    with Answering(reasoning_field="reasoning_content", repeats=False, prompt_tokens=3) as server:
        host = f"{{kind: openai, url: {server.url}/v1, model: tiny, api_key_env: {KEY}}}"
        holds, text = said(recipe_of(path, host, "--teacher.model", "absent/hosted"), capsys)
    assert holds, text
    told = claims(text)
    assert "does not repeat" in told["seed"] and "reasoning_content" in told["reasoning"]
    assert "can't be loaded from here" in text and "a-secret" not in text
    assert "rehearsal of generate" in text  # a miniature of the student stands for the host's model


def test_a_wrong_template_is_said(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "x")
    with Answering(prompt_tokens=3) as server:
        _, text = asked(recipe_of(path, f"{{kind: openai, url: {server.url}/v1, model: tiny, api_key_env: {KEY}}}"), capsys)
    assert "3 there, " in text and "its template or tokenizer is not that of" in text


def test_one_that_does_not_answer_is_refuted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Answering() as server:
        url = server.url
    holds, text = asked(recipe_of(path, f"{{kind: vllm, url: {url}, model: tiny}}"), capsys)
    assert not holds and f"teacher's server answers: nothing listens at {url}" in text
    with Answering() as server:
        holds, text = asked(recipe_of(path, f"{{kind: vllm, url: [{url}, {server.url}], model: tiny}}"), capsys)
    assert holds and f"nothing listens at {url}: the other addresses do all the work" in text and "at 16 requests at once" in text


def test_what_can_be_said_without_asking(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for server, words in (
        (f"{{kind: vllm, python: {tmp_path / 'absent'}}}", "is not there"),
        (f"{{kind: vllm, python: {sys.executable}}}", "has no package vllm"),
        ("{kind: llama_cpp, command: [no-such-program]}", "no-such-program is not there"),
        ("{kind: vllm, url: 'http://127.0.0.1:9'}", ""),
    ):
        found = Findings()
        check_without_asking(recipe_of(path, server), found)
        text = capsys.readouterr().out
        assert words in text and bool(found.refuted) is bool(words), text
    assert not quick.run(recipe_of(path, "{kind: deepseek}", "--generate.top_k", "20"), there=False)
    assert "generate.top_k" in capsys.readouterr().out
    assert not quick.run(recipe_of(path, "{kind: vllm, url: 'http://127.0.0.1:9'}", "--teacher.quantization", "nf4"), there=False)
    assert "teacher.quantization" in capsys.readouterr().out


def test_a_host_without_a_key_is_not_checked_here(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    holds, text = asked(recipe_of(path, "{kind: deepseek}"), capsys)
    assert holds and "not checked here, there is no key in DEEPSEEK_API_KEY" in text, text


def test_weights_behind_a_server_take_no_memory_here(path: Path) -> None:
    assert not is_loaded(recipe_of(path, "{kind: deepseek}"), "teacher") and is_loaded(recipe_of(path, "null"), "teacher")
    assert not machine._started_gib(recipe_of(path, "{kind: deepseek}"), torch.device("cpu"))
    half, whole = (
        sum(machine._started_gib(recipe_of(path, f"{{kind: vllm, memory_share: {share}}}"), torch.device("cpu")).values())
        for share in (0.5, 1.0)
    )
    assert half == pytest.approx(2 * whole) and whole > 0


def test_hours_and_money_are_a_range() -> None:
    answer = lengths([(100, False), (64, True)], 1000)
    assert answer == (82, 550)
    job = Job("generate", Sampling(max_new_tokens=1000), 10_000)
    text, least = expected(job, 50, answer, 1000.0, Price(input=1.0, output=2.0))
    assert least == pytest.approx(0.5 + 1.64) and "$2.14 to $11.50" in text and "10,000 answers of 82 to 550 tokens" in text


def test_stages_that_ask_a_server(path: Path) -> None:
    recipe = recipe_of(path, "{kind: deepseek}")
    assert jobs_of(recipe, "teacher", 10, 4)[0].stage == "generate"
    assert {job.stage for job in jobs_of(recipe, "student", 10, 4)} <= {"evaluate"}


def test_one_that_distill_serve_has_started_is_asked(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(path, f"{{kind: vllm, python: {sys.executable}}}")
    assert recipe.teacher is not None
    with Answering() as server:
        told = {"url": server.url, "model": "tiny", "holds": identity(recipe.teacher, None), "context": 100_000, "logprobs": 20}
        (tmp_path / "run" / "servers").mkdir(parents=True)
        write_json(tmp_path / "run" / "servers" / "teacher-7.json", told)
        holds, text = asked(recipe, capsys)
        assert holds and f"teacher's server, by distill serve  at {server.url}" in text and "at 16 requests at once" in text, text
        write_json(tmp_path / "run" / "servers" / "teacher-7.json", told | {"holds": "something else"})
        holds, text = asked(recipe, capsys)
        assert not holds and "it holds another model" in text


def test_a_template_that_is_not_there_is_found_in_a_second(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(path, ["--student.chat_template", str(tmp_path / "absent.jinja")])
    assert not quick.run(recipe, there=False)
    assert "student.chat_template: there is no file" in capsys.readouterr().out
