"""Batch endpoints: every request is answered once, and nothing is paid for twice, whatever is cut off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from batch_host import BatchHost, Line, answered

from distill.engines import Completion, Failure, requests_for
from distill.errors import ServerError
from distill.recipe.base import Sampling
from distill.recipe.servers import Server
from distill.servers import Usage
from distill.servers.batches import STATE, BatchEngine
from distill.servers.protocols import protocol_of

SECRET = "sk-only-in-the-environment"
PROMPTS = [
    {"prompt_id": f"{number:016x}", "messages": [{"role": "user", "content": "a" * number}], "reference": None} for number in range(1, 9)
]
REQUESTS = requests_for(PROMPTS, 2, 0)
WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_batches import REQUESTS, engine
place = Path(sys.argv[2])
with open(sys.argv[3], "a") as out:
    for rows in engine(sys.argv[1], place).write(REQUESTS):
        out.writelines(json.dumps([number, row.text]) + "\\n" for number, row in rows)
        out.flush()
"""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def engine(url: str, place: Path, **more: Any) -> BatchEngine:
    server = Server(kind="openai", url=url, model="m", batch=True, max_retries=3)
    return BatchEngine(server, protocol_of(server, "m"), Sampling(top_p=1.0, max_new_tokens=16), place / STATE, pause_s=0.01, **more)


def written(engine: BatchEngine) -> dict[int, Completion | Failure]:
    rows = [row for rows in engine.write(REQUESTS) for row in rows]
    assert len(rows) == len(dict(rows)), "a row came twice"
    return dict(rows)


def test_every_request_is_answered_once(tmp_path: Path) -> None:
    used: list[Usage] = []
    with BatchHost() as host:
        rows = written(engine(host.url, tmp_path, spent=used.append))
    assert {number: row.text for number, row in rows.items() if isinstance(row, Completion)} == {
        number: f"{len(request.messages[0]['content'])} letters" for number, request in enumerate(REQUESTS)
    }
    assert len(host.batches) == 1 and host.keys == {f"Bearer {SECRET}"}
    assert sum(use.output_tokens for use in used) == 2 * len(REQUESTS)
    assert not (tmp_path / STATE).exists()
    assert all("stream" not in line["body"] for line in host.files["file-0"])


def test_together_speaks_a_little_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOGETHER_API_KEY", SECRET)
    with BatchHost(together=True, lost=1) as host:
        server = Server(kind="together", url=host.url, model="m", batch=True)
        rows = written(BatchEngine(server, protocol_of(server, "m"), Sampling(), tmp_path / STATE, pause_s=0.01))
    assert len(rows) == len(REQUESTS) and len(host.batches) == 1 and host.keys == {f"Bearer {SECRET}"}


def test_what_expired_is_asked_again_and_what_was_refused_has_failed(tmp_path: Path) -> None:
    refused = {"code": "content_filter", "message": "flagged by the content filter"}

    def answer(line: Line, batch: int) -> Line | None:
        length = len(line["body"]["messages"][0]["content"])
        if length == 3:
            return {"custom_id": line["custom_id"], "response": {"status_code": 400, "body": {"error": refused}}, "error": None}
        return None if batch == 0 and length > 5 else answered(line)

    with BatchHost(answer=answer) as host:
        rows = written(engine(host.url, tmp_path))
    failed = {number: row.reason for number, row in rows.items() if isinstance(row, Failure)}
    assert failed == {4: "content_filter", 5: "content_filter"} and len(rows) == len(REQUESTS)
    assert [len(host.files[batch["input_file_id"]]) for batch in host.batches.values()] == [16, 6]


def test_what_never_is_answered_has_failed_in_the_end(tmp_path: Path) -> None:
    with BatchHost(answer=lambda *_: None) as host:
        rows = written(engine(host.url, tmp_path))
    assert {row.reason for row in rows.values() if isinstance(row, Failure)} == {"unanswered"} and len(rows) == len(REQUESTS)
    assert len(host.batches) == 3


def test_a_submission_whose_answer_was_lost_is_not_repeated(tmp_path: Path) -> None:
    with BatchHost(lost=1) as host:
        rows = written(engine(host.url, tmp_path))
    assert len(host.batches) == 1 and len(rows) == len(REQUESTS)


@pytest.mark.parametrize("forgotten", [(), ("batch",)])
def test_a_kill_between_submission_and_answers_pays_once(tmp_path: Path, forgotten: tuple[str, ...]) -> None:
    """Also one that came between the submission and the note of it."""
    out = tmp_path / "rows.jsonl"
    with BatchHost(polls=10**9) as host:
        words = [sys.executable, "-c", WORKER, host.url, str(tmp_path), str(out), str(Path(__file__).parent)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        assert host.asked.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = tmp_path / STATE
        assert state.exists() and SECRET not in state.read_text() and not out.read_text()
        if forgotten:
            from distill.run.files import read_json, write_json

            told = read_json(state)
            write_json(state, {"batches": [note | dict.fromkeys(forgotten) for note in told["batches"]]})
        host._polls = 0
        result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(number for number, _ in rows) == list(range(len(REQUESTS)))
    assert len(host.batches) == 1 and SECRET not in result.stdout + result.stderr


def test_rows_on_disk_are_not_asked_again_after_a_kill(tmp_path: Path) -> None:
    """The batch is asked after for the rest alone."""
    with BatchHost(polls=0) as host:
        first = engine(host.url, tmp_path).write(REQUESTS)
        done = {number for number, _ in next(first)}
        first.close()
        assert (tmp_path / STATE).exists()
        left = [request for number, request in enumerate(REQUESTS) if number not in set(list(done)[:10])]
        rest = [row for rows in engine(host.url, tmp_path).write(left) for row in rows]
    assert len(rest) == len(left) == 6 and len(host.batches) == 1


def test_a_wrong_key_ends_at_once_without_showing_it(tmp_path: Path) -> None:
    with BatchHost() as host:
        wrong = Server(kind="openai", url=host.url + "/absent", model="m", batch=True)
        bad = BatchEngine(wrong, protocol_of(wrong, "m"), Sampling(top_p=1.0), tmp_path / STATE)
        with pytest.raises(ServerError, match="http_404") as error:
            written(bad)
    assert SECRET not in str(error.value)
