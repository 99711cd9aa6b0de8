"""Stages whose models stand behind a server: what a server takes and what a recipe allows are kept to, and nothing is paid twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import commands
import pytest
from faulty import Faulty
from test_shards_of_traces import recipe

from distill.errors import BudgetError
from distill.recipe.servers import Server
from distill.run.manifest import MANIFEST
from distill.run.tables import read_rows
from distill.stages import generate, prompts


def test_a_limit_ends_the_stage_and_a_higher_one_goes_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Faulty() as server:
        low = recipe(tmp_path, tiny_model_dir, server.url, concurrency=2, max_tokens=400)
        prompts.run(low)
        with pytest.raises(BudgetError, match=r"max_tokens.*[Rr]aise"):
            generate.run(low)
        paid = sum(server.asked.values())
        assert 0 < paid < 42 and not (tmp_path / "run/traces" / MANIFEST).exists()
        with pytest.raises(BudgetError):  # counted over restarts: nothing more is asked
            generate.run(low)
        assert sum(server.asked.values()) == paid
        made = generate.run(recipe(tmp_path, tiny_model_dir, server.url, concurrency=2, max_tokens=10**6))
    assert made.rows_kept == 42 and max(server.asked.values()) == 1
    spent = made.facts["server"]
    assert spent["requests"] == 42 and spent["output_tokens"] == made.facts["tokens"]


def test_prompts_beyond_the_context_are_dropped_before_anything_is_sent(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Faulty() as server:
        asked = recipe(tmp_path, tiny_model_dir, server.url, max_failed=1.0)
        source = tmp_path / "p.jsonl"
        long = [f"Number {number}. " + "How much? " * 300 for number in range(12)]  # more than are held out
        source.write_text(source.read_text() + "".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in long))
        prompts.run(asked)
        made = generate.run(asked)
        rows = read_rows(tmp_path / "run/prompts", "train")
    there = sum(len(row["messages"][0]["content"]) > 1000 for row in rows)
    assert there and made.drops == {"too_long": 2 * there}
    assert len(server.asked) == made.rows_kept == 2 * (len(rows) - there)


def test_another_address_makes_no_other_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Faulty() as server, Faulty() as other:
        first = recipe(tmp_path, tiny_model_dir, server.url)
        prompts.run(first)
        made = generate.run(first)
        assert generate.run(recipe(tmp_path, tiny_model_dir, other.url, concurrency=3, timeout_s=9.0)).digest == made.digest
        assert not other.asked


def test_arguments_that_change_weights_make_another_run_and_others_do_not() -> None:
    def identity(*args: str) -> dict[str, object]:
        return Server(kind="vllm", args=list(args)).identity()

    assert identity() == identity("--tensor-parallel-size", "2") == identity("--max-num-seqs=8")
    assert len({str(identity(*args)) for args in ((), ("--quantization", "fp8"), ("--quantization", "awq"), ("--dtype=half",))}) == 4


MORTAL = """
import asyncio, os, sys
from pathlib import Path
from aiohttp import web
sys.path.insert(0, {tests!r})
from faulty import answer_of
place, lives, asked = Path({place!r}), 0, 0
port = int(sys.argv[sys.argv.index("--port") + 1])
(place / "lives").open("a").write("x")
async def answer(request):
    global asked
    asked += 1
    if asked > {requests} and len((place / "lives").read_text()) <= {deaths}:
        print("CUDA out of memory, say", flush=True)
        os._exit(9)
    return web.json_response(answer_of(await request.json()))
async def health(_):
    return web.json_response({{"data": [{{"id": "stub", "max_model_len": 512}}]}})
app = web.Application()
app.add_routes([web.post("/v1/completions", answer), web.get("/health", health), web.get("/v1/models", health)])
web.run_app(app, host="127.0.0.1", port=port, print=None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 9])
def test_a_server_that_dies_at_work_is_started_again_a_few_times(deaths: int, tmp_path: Path, tiny_model_dir: Path) -> None:
    """With one death the stage ends as if nothing had been; with one each time in an error with the last words, and nothing is lost."""
    program = tmp_path / "mortal.py"
    program.write_text(MORTAL.format(tests=str(Path(__file__).parent), place=str(tmp_path), requests=10, deaths=deaths))
    mortal = {"kind": "vllm", "command": [sys.executable, str(program)], "concurrency": 2}
    asked = recipe(tmp_path, tiny_model_dir, "http://127.0.0.1:9").model_dump(mode="json", exclude_unset=True)
    asked["teacher"]["server"] = mortal
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked))
    assert commands.run(["-m", "distill", "prompts", tmp_path / "recipe.yaml"]).returncode == 0
    ended = commands.run(["-m", "distill", "generate", tmp_path / "recipe.yaml"])
    lives = len((tmp_path / "lives").read_text())
    if deaths == 1:
        assert ended.returncode == 0 and lives == 2 and "started again" in ended.stdout, ended.stderr
        assert len(read_rows(tmp_path / "run/traces", "traces")) == 42
    else:
        assert ended.returncode == 1 and lives == 3 and "CUDA out of memory, say" in ended.stderr and "Traceback" not in ended.stderr
        assert sum(1 for _ in (tmp_path / "run/traces/journal.jsonl").open()) >= 3


def test_more_samples_are_added_to_those_that_a_server_wrote(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Faulty() as server:
        asked = recipe(tmp_path, tiny_model_dir, server.url)
        prompts.run(asked)
        generate.run(asked)
        assert asked.generate is not None
        more = asked.model_copy(update={"generate": asked.generate.model_copy(update={"samples_per_prompt": 3})})
        grown = generate.run(more)
    assert grown.rows_kept == 63 and len(server.asked) == 63 and set(server.asked.values()) == {1}
