"""What a teacher behind a server thinks is what it thinks in this process: a real server, in the shapes of vLLM and of SGLang."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from test_score import folder_of, load, other_model_dir, traces
from transformers import AutoTokenizer

from distill.engines.scoring import score_rows
from distill.errors import DistillError, IntegrityError, ModelError, RecipeError, ServerError
from distill.models.chat import chat_format
from distill.models.vocabulary import align, vocabulary_map
from distill.recipe.servers import Server
from distill.servers.client import Client
from distill.servers.protocols import protocol_of
from distill.servers.reading import ServerScorer
from distill.servers.told import Told, scored_row
from distill.targets.spec import ChosenToken, TargetSpec, TopK

__all__ = ["folder_of", "other_model_dir"]


class Reader:
    """Reads prompts with a model, and tells of it in disorder."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size, self.damage = model, size, ""
        self.in_flight = self.most = 0

    async def vllm(self, request: web.Request) -> web.Response:
        asked = await request.json()
        ids, k = asked["prompt"], asked["prompt_logprobs"]
        if self.damage == "refused":
            words = "Requested prompt logprobs of 64, which is greater than max allowed: 20"
            return web.json_response({"error": {"message": words, "type": "BadRequestError", "code": 400}}, status=400)
        self.in_flight += len(ids)
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0)
        log_probs = self._log_probs(ids)
        self.in_flight -= len(ids)
        entries: list[Any] = [None]
        for place in range(1, len(ids)):
            told = self._best(log_probs[place - 1], k)
            written = float(log_probs[place - 1, ids[place]])
            told.setdefault(ids[place], (written, int((log_probs[place - 1] > written).sum()) + 1))
            items = list(told.items())
            random.Random(place).shuffle(items)
            entries.append({str(i): {"logprob": value, "rank": rank, "decoded_token": "?"} for i, (value, rank) in items})
        if self.damage == "short":
            entries.pop()
        if self.damage == "shifted":
            entries = [None, *entries[2:], entries[1]]
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}
        return web.json_response({"model": "m", "choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}})

    async def sglang(self, request: web.Request) -> web.Response:
        asked = await request.json()
        ids, k, begin = asked["input_ids"], asked["top_logprobs_num"], asked["logprob_start_len"]
        log_probs = self._log_probs(ids)
        written: list[Any] = [[None, ids[begin], None]]
        best: list[Any] = [None]
        for place in range(begin + 1, len(ids)):
            written.append([float(log_probs[place - 1, ids[place]]), ids[place], None])
            best.append([[value, i, None] for i, (value, _) in self._best(log_probs[place - 1], k).items()])
        meta = {"prompt_tokens": len(ids), "completion_tokens": 1, "finish_reason": {"type": "length", "length": 1}}
        return web.json_response({"text": "x", "meta_info": meta | {"input_token_logprobs": written, "input_top_logprobs": best}})

    def _log_probs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0, :, : self.size].log_softmax(-1)  # type: ignore[no-any-return]

    def _best(self, log_probs: torch.Tensor, k: int) -> dict[int, tuple[float, int]]:
        best = log_probs.topk(k)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return {i: (value * (2 if self.damage == "tempered" else 1), n) for n, (i, value) in enumerate(pairs, start=1)}


@contextmanager
def serving(reader: Reader) -> Iterator[str]:
    """The reader at an address of this machine, in a thread."""
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), []

    async def start() -> web.AppRunner:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", reader.vllm), web.post("/generate", reader.sglang)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.append(runner.addresses[0][1])
        ready.set()
        return runner

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@contextmanager
def scoring(
    kind: str, teacher_dir: Path, student_dir: Path, target: TargetSpec
) -> Iterator[tuple[Reader, ServerScorer, list[Any], list[Any]]]:
    """A reader, a scorer that asks it, rows, and what the teacher thinks of them in this process."""
    model, teacher = load(teacher_dir)
    student = chat_format(AutoTokenizer.from_pretrained(student_dir))
    vocabulary = vocabulary_map(teacher, student)
    rows = [align(trace, teacher, student, vocabulary) for trace in traces(6)]
    reader = Reader(model, vocabulary.teacher_size)
    with serving(reader) as url:
        server = Server.model_validate({"kind": kind, "url": url, "max_retries": 0})
        with Client(server, [url]) as client:
            scorer = ServerScorer(client, protocol_of(server, "m"), target, vocabulary)
            yield reader, scorer, rows, score_rows(model, rows, target, vocabulary)


@pytest.mark.parametrize("pair", ["one tokenizer", "other teacher", "other student"])
@pytest.mark.parametrize("target", [TopK(k=8), TopK(k=30, min_probability=0.01), ChosenToken()], ids=["top_k", "probable", "chosen"])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_thinks_as_the_model_in_this_process(
    kind: str, target: TargetSpec, pair: str, tiny_model_dir: Path, other_model_dir: Path
) -> None:
    teacher = other_model_dir if pair == "other teacher" else tiny_model_dir
    student = other_model_dir if pair == "other student" else tiny_model_dir
    with scoring(kind, teacher, student, target) as (_, scorer, rows, expected):
        found = [row for part in scorer.read([rows[:4], rows[4:]]) for row in part]
    assert [row.key for row in found] == [row.key for row in expected]
    for one, other in zip(found, expected, strict=True):
        left, right = one.targets, other.targets
        width = min(left.log_probs.shape[1], right.log_probs.shape[1])
        np.testing.assert_array_equal(left.ids[:, :width], right.ids[:, :width])
        assert (left.ids[:, width:] == -1).all() and (right.ids[:, width:] == -1).all()
        np.testing.assert_allclose(left.log_probs[:, :width], right.log_probs[:, :width], atol=2e-5)
        np.testing.assert_allclose(np.exp(left.log_rest), np.exp(right.log_rest), atol=1e-5)
        mine, theirs = one.statistics, other.statistics
        assert (mine.tokens, mine.positions, mine.aligned, mine.stored) == (theirs.tokens, theirs.positions, theirs.aligned, theirs.stored)
        assert mine.carried - 1e-3 <= theirs.carried <= mine.carried + mine.unseen + 1e-3
        np.testing.assert_allclose(mine.profile, theirs.profile[: len(mine.profile)], rtol=1e-4)
        assert (mine.unseen > 0) == (pair == "other student")  # which lacks <think>


@pytest.mark.parametrize(
    ("damage", "expected", "error"),
    [
        ("short", "is not of the", IntegrityError),
        ("shifted", "is not of the", IntegrityError),
        ("refused", "--max-logprobs", ServerError),
    ],
)
def test_what_a_server_says_wrongly_is_noticed(damage: str, expected: str, error: type[DistillError], tiny_model_dir: Path) -> None:
    with scoring("vllm", tiny_model_dir, tiny_model_dir, TopK(k=8)) as (reader, scorer, rows, _):
        reader.damage = damage
        with pytest.raises(error, match=expected):
            list(scorer.read([rows[:2]]))


def test_what_is_no_probability_is_no_candidate(tiny_model_dir: Path) -> None:
    """NaN and the floor, as servers have them among the least probable; and probabilities of more than 1."""
    chat = load(tiny_model_dir)[1]
    row = align(traces(1)[0], chat, chat, vocabulary_map(chat, chat))
    n = int((row.positions >= 0).sum())
    ids = np.tile(np.array([5, 6, 7, 8], np.int32), (n, 1))
    log_probs = np.tile(np.array([-9999.0, np.log(0.2), np.nan, np.log(0.7)]), (n, 1))
    told = Told(ids, log_probs, np.full(n, -1.0), 4)
    found = scored_row(row, TopK(k=4), told, all_shared=True, vocab_size=261, tokens=9).targets
    assert found.ids.tolist() == [[8, 6]] * n
    np.testing.assert_allclose(np.exp(found.log_rest), 0.1, atol=1e-6)
    with pytest.raises(IntegrityError, match="more than 1"):
        scored_row(row, TopK(k=4), Told(ids, log_probs / 4, told.written_n, 4), all_shared=True, vocab_size=261, tokens=9)
    with pytest.raises(ModelError, match="NaN"):
        scored_row(row, TopK(k=4), Told(ids, log_probs * np.nan, told.written_n, 4), all_shared=True, vocab_size=261, tokens=9)


def test_tokens_in_flight_are_bounded(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.servers.reading.TOKENS_IN_FLIGHT", 150)
    with scoring("vllm", tiny_model_dir, tiny_model_dir, TopK(k=8)) as (reader, scorer, rows, _):
        assert sum(len(row) for row in (part for part in scorer.read([rows]))) == len(rows)
        assert reader.most <= max(150, *(len(row.teacher_ids) for row in rows))


def test_the_stage_scores_through_a_server(tmp_path: Path, tiny_model_dir: Path) -> None:
    from test_score import rows_of, same_targets, score
    from transformers import AutoModelForCausalLM

    from distill.run.folder import StageFolder
    from distill.run.manifest import read_manifest
    from distill.run.schema import TRACE

    reader = Reader(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval(), 261)
    with serving(reader) as url:
        for name, server in (("here", ""), ("served", f", server: {{kind: vllm, url: '{url}', model: m}}")):
            with StageFolder(tmp_path / name / "curated", "curate", {}) as out:
                out.write_table("curated", traces(12), TRACE)
                out.finish(rows_in=12, rows_kept=12)
            (tmp_path / f"{name}.yaml").write_text(
                f"name: {name}\nrun_dir: {tmp_path / name}\nteacher: {{model: {tiny_model_dir}{server}}}\n"
                f"student: {{model: {tiny_model_dir}}}\nprompts: {{source: none.jsonl}}\ngenerate: {{}}\n"
                "score: {target: {kind: top_k, k: 8}}\ntrain: {method: kd, max_length: 256}\n"
            )
            said = score(tmp_path / f"{name}.yaml")
            assert "read 8 traces once more" in said
    here, served = tmp_path / "here.yaml", tmp_path / "served.yaml"
    same_targets(rows_of(served), rows_of(here))
    facts = read_manifest(folder_of(served)).facts
    assert facts["device"] == "server (vllm)" and facts["verification"]["rows"] == 8 and "127.0.0.1" not in str(facts)
    assert set(facts["captured_mass"]) == {"1", "2", "4", "8"} and facts["distinct_ids"] == {} and facts["carried_mass"] == 1


class Writer(Reader):
    """Writes, too, with the engine of this process."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.chat = load(folder)[1]
        super().__init__(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), 261)

    async def vllm(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if "prompt_logprobs" in asked:
            return await super().vllm(request)
        from distill.engines.decoding import Decoder, Job
        from distill.engines.drawing import Sampler
        from distill.recipe.base import Sampling

        sampler = Sampler(Sampling(temperature=0.0, top_p=0.95), 261)
        decoder = Decoder(self.model, sampler, asked["stop_token_ids"], self.chat.pad_id, asked["max_tokens"], 1)
        [[(_, ids)]] = list(decoder.run([Job(asked["prompt"], 0)]))
        finish = "stop" if ids[-1] in asked["stop_token_ids"] else "length"
        choice = {"index": 0, "text": "x", "finish_reason": finish, "token_ids": ids, "prompt_token_ids": asked["prompt"]}
        return web.json_response(
            {"model": "m", "choices": [choice], "usage": {"prompt_tokens": len(asked["prompt"]), "completion_tokens": len(ids)}}
        )


def test_a_pair_is_judged_alike_behind_a_server(tmp_path: Path, tiny_model_dir: Path) -> None:
    from distill.before import pair
    from distill.recipe.experiment import Recipe

    rows = "".join(json.dumps({"question": f"How much is {number} and 1?", "answer": str(number + 1)}) + "\n" for number in range(12))
    (tmp_path / "p.jsonl").write_text(rows)
    found = {}
    with serving(Writer(tiny_model_dir)) as url:
        for name, server in (("here", None), ("served", {"kind": "vllm", "url": url, "model": "m"})):
            asked = {
                "name": "test",
                "run_dir": str(tmp_path / name),
                "teacher": {"model": str(tiny_model_dir), "server": server},
                "student": {"model": str(tiny_model_dir)},
                "prompts": {"source": str(tmp_path / "p.jsonl"), "heldout_size": 4},
                "generate": {"max_new_tokens": 12, "temperature": 0.0},
            }
            pair.run(Recipe.model_validate(asked), 4)
            found[name] = json.loads((tmp_path / name / "pair" / "findings.json").read_text())
    for part in ("on_student", "on_teacher"):
        for key in ("divergence", "overlap", "shared_mass_student", "shared_mass_teacher", "tokens"):
            assert found["served"][part][key] == pytest.approx(found["here"][part][key], abs=1e-4), (part, key)
    assert found["served"]["teacher"] == found["here"]["teacher"] and found["served"]["carried_mass"] == 1


def test_a_pair_with_a_host_is_refused_before_anything_is_asked(tmp_path: Path, tiny_model_dir: Path) -> None:
    from distill.before import pair
    from distill.recipe.experiment import Recipe

    hosted = {"model": "deepseek-ai/DeepSeek-V3", "server": {"kind": "deepseek"}}
    asked = {
        "name": "test",
        "run_dir": str(tmp_path),
        "teacher": hosted,
        "student": {"model": "m"},
        "prompts": {"source": "p"},
        "generate": {},
    }
    with pytest.raises(RecipeError, match="tells nothing of what it thinks"):
        pair.run(Recipe.model_validate(asked), 4)
