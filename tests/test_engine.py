"""The transformers engine: the same trace whatever the batch or the restart, and exactly the distribution asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.engines import Completion, Request, TraceTable, request_seed, requests_for, write_traces
from distill.engines.batching import MemoryGuard, by_length
from distill.engines.drawing import drawn
from distill.engines.earlier import EarlierTraces
from distill.engines.hf import HFEngine
from distill.errors import IntegrityError
from distill.models.chat import ChatFormat
from distill.models.loading import load_chat_format, load_model
from distill.recipe.base import Sampling
from distill.recipe.models import ModelSpec
from distill.run import files
from distill.run.folder import StageFolder
from distill.run.journal import Journal
from distill.run.manifest import JOURNAL, read_manifest
from distill.run.plan import Growth
from distill.run.schema import TRACE, prompt_id
from distill.run.tables import read_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(tiny_model_dir: Path) -> ModelSpec:
    return ModelSpec(model=str(tiny_model_dir))


@pytest.fixture(scope="module")
def chat(spec: ModelSpec) -> ChatFormat:
    return load_chat_format(spec)


def engine(spec: ModelSpec, chat: ChatFormat, sampling: Sampling) -> HFEngine:
    return HFEngine(load_model(spec, CPU), chat, sampling)


def prompts(count: int) -> list[dict[str, object]]:
    texts = ["word " * (index % 7) + str(index) for index in range(count)]
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [{"prompt_id": prompt_id(m), "messages": m, "reference": None} for m in messages]


def test_a_trace_does_not_depend_on_its_batch(spec: ModelSpec, chat: ChatFormat, tmp_path: Path) -> None:
    requests = requests_for(prompts(10), 2, seed=1)
    written = []
    for batch_size in (1, 3, 20):
        sampling = Sampling(samples_per_prompt=2, max_new_tokens=24, temperature=1.0, top_p=1.0, batch_size=batch_size)
        rows = write_traces(engine(spec, chat, sampling), requests, sampling, Journal(tmp_path / str(batch_size)), "teacher", "test")
        written.append([row["completion_ids"] for row in rows])
    assert written[0] == written[1] == written[2]
    assert len({tuple(ids) for ids in written[0]}) > 15  # the samples of a prompt differ, and so do prompts


def test_a_restart_asks_only_for_what_is_missing(spec: ModelSpec, chat: ChatFormat, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=1.0, batch_size=4)
    requests = requests_for(prompts(12), 1, seed=1)
    whole = write_traces(engine(spec, chat, sampling), requests, sampling, Journal(tmp_path / "whole"), "teacher", "test")

    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[:2]) + lines[2][:50])  # killed while writing the third line
    there = len(list(Journal(tmp_path / "cut").rows()))
    again = Asked(load_model(spec, CPU), chat, sampling)
    assert write_traces(again, requests, sampling, Journal(tmp_path / "cut"), "teacher", "test") == whole
    assert len(again.asked) == 12 - there
    done = Asked(load_model(spec, CPU), chat, sampling)
    assert write_traces(done, requests, sampling, Journal(tmp_path / "whole"), "teacher", "test") == whole
    assert not done.asked


class Killed(BaseException):
    """A kill, as far as one can be raised."""


class Asked(HFEngine):
    """Counts what it is asked for, and is killed when so many completions have ended."""

    ends_after: int | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[Request] = []
        self.ended = 0

    def write(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion]]]:
        self.asked += requests
        for ended in super().write(requests):
            if self.ends_after is not None and self.ended >= self.ends_after:
                raise Killed
            self.ended += len(ended)
            yield ended


def fill(folder: Path, engine: HFEngine, sampling: Sampling, authors: Sequence[str] = ("teacher",)) -> list[dict[str, object]]:
    """Fills a stage's table with the traces of 12 prompts by each author, in windows of as many prompts as are set."""
    with StageFolder(folder, "generate", {}) as out:
        traces = TraceTable(out.table("traces", TRACE, resume=True), out.journal(), sampling, seed=1)
        for author in authors:
            traces.write(engine, iter(prompts(12)), 12, author, "test")
        assert not (folder / JOURNAL).exists()
        out.finish(facts={"tokens": traces.tokens, "reasons": dict(traces.finish_reasons)})
    return read_rows(folder, "traces")


def engine_killed_after(ended: int | None, spec: ModelSpec, chat: ChatFormat, sampling: Sampling) -> Asked:
    """An engine that is killed when so many completions have ended."""
    engine = Asked(load_model(spec, CPU), chat, sampling)
    engine.ends_after = ended
    return engine


@pytest.mark.parametrize("authors", [["teacher"], ["base", "student"]])
def test_a_table_is_filled_window_by_window_and_a_kill_repeats_nothing(
    authors: list[str], spec: ModelSpec, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rows a window are five prompts: 12 prompts make windows of 10, 10 and 4 rows."""
    monkeypatch.setattr("distill.engines.traces.ROWS_PER_SHARD", 10)
    sampling = Sampling(samples_per_prompt=2, max_new_tokens=6, temperature=1.0, batch_size=4)
    whole = fill(tmp_path / "whole", engine(spec, chat, sampling), sampling, authors)
    assert len(whole) == 24 * len(authors)
    shards = read_manifest(tmp_path / "whole").tables["traces"]
    assert [shard.rows for shard in shards] == [10, 10, 4] * len(authors)
    requests = requests_for(prompts(12), 2, seed=1)
    expected = [(request.prompt_id, request.sample_index, author) for author in authors for request in requests]
    assert [(row["prompt_id"], row["sample_index"], row["author"]) for row in whole] == expected
    for ended in (0, 5, 11, 19) if len(authors) == 1 else (13, 30):
        place = tmp_path / str(ended)
        first = engine_killed_after(ended, spec, chat, sampling)
        with pytest.raises(Killed):
            fill(place, first, sampling, authors)
        assert first.ended >= ended
        again = engine_killed_after(None, spec, chat, sampling)
        assert fill(place, again, sampling, authors) == whole
        assert again.ended == 24 * len(authors) - first.ended
        assert read_manifest(place).tables == read_manifest(tmp_path / "whole").tables
        assert read_manifest(place).facts == read_manifest(tmp_path / "whole").facts


def test_a_kill_between_a_windows_shard_and_its_journal_repeats_nothing(
    spec: ModelSpec, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window is cut into shards of 4 rows, and the kill comes after each of them: the journal is still there."""
    monkeypatch.setattr("distill.engines.traces.ROWS_PER_SHARD", 10)
    monkeypatch.setattr("distill.run.tables.ROWS_PER_SHARD", 4)
    sampling = Sampling(max_new_tokens=6, temperature=1.0, batch_size=4)
    whole = fill(tmp_path / "whole", engine(spec, chat, sampling), sampling)
    assert [shard.rows for shard in read_manifest(tmp_path / "whole").tables["traces"]] == [4, 4, 2, 2]
    for count in range(1, 5):
        commits: list[Path] = []
        place = tmp_path / str(count)

        def killed(temporary: Path, final: Path, commits: list[Path] = commits, count: int = count) -> None:
            if len(commits) == count:
                raise Killed
            commits.append(final)
            files.commit(temporary, final)

        with monkeypatch.context() as patch:
            patch.setattr("distill.run.tables.commit", killed)
            patch.setattr(Journal, "clear", lambda self: killed(self.path, self.path))  # after the last shard of a window
            with pytest.raises(Killed):
                fill(place, engine(spec, chat, sampling), sampling)
        again = engine_killed_after(None, spec, chat, sampling)
        assert fill(place, again, sampling) == whole
        assert again.ended == (2 if count < 4 else 0)  # the second window
        assert read_manifest(place).tables == read_manifest(tmp_path / "whole").tables


def test_a_damaged_shard_of_a_killed_run_is_an_error(tmp_path: Path) -> None:
    with StageFolder(tmp_path, "generate", {}) as out:
        (tmp_path / "traces-00000.parquet").write_bytes(b"PAR1 no more")
        with pytest.raises(IntegrityError, match=r"traces-00000\.parquet: was altered.*--redo"):
            out.table("traces", TRACE, resume=True)


def test_greedy_follows_the_argmax_and_stops_at_the_end_of_turn(spec: ModelSpec, chat: ChatFormat) -> None:
    model = load_model(spec, CPU)
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    request = requests_for(prompts(1), 1, seed=0)[0]
    [completion] = HFEngine(model, chat, sampling).complete([request])
    ids = chat.prompt_ids(request.messages)
    for token in completion.completion_ids:
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    assert completion.finish_reason == "length" and len(completion.completion_ids) == 12
    # Make the end of a turn the most probable token everywhere: the answer is that token alone.
    with torch.no_grad():
        hidden = model.model(torch.tensor([chat.prompt_ids(request.messages)])).last_hidden_state[0, -1]
        model.get_input_embeddings().weight[chat.end_of_turn_id] = 100 * hidden / hidden.norm()
    [stopped] = HFEngine(model, chat, sampling).complete([request])
    assert stopped.finish_reason == "stop"
    assert stopped.completion_ids[-1] == chat.end_of_turn_id and chat.tokenizer.eos_token not in stopped.text


def test_a_checkpoints_own_sampling_defaults_are_not_used(spec: ModelSpec, chat: ChatFormat) -> None:
    """Qwen2.5 ships repetition_penalty 1.05 in its generation_config: `generate` fills it in behind one's back."""
    sampling = Sampling(max_new_tokens=16, temperature=0.0)
    request = requests_for(prompts(1), 1, seed=0)[0]
    plain = load_model(spec, CPU)
    meddled = load_model(spec, CPU)
    meddled.generation_config.repetition_penalty = 5.0
    meddled.generation_config.min_new_tokens = 3
    assert HFEngine(plain, chat, sampling).complete([request]) == HFEngine(meddled, chat, sampling).complete([request])


def test_the_sampler_draws_from_the_distribution() -> None:
    """Chi-square over 20,000 draws from a known distribution with impossible tokens in it, at a fixed seed."""
    probabilities = np.array([0.0, 0.5, 0.25, 0.0, 0.2, 0.05, 0.0])
    draws = 20_000
    uniforms_BT = torch.from_numpy(np.random.default_rng(0).random((draws, 1), dtype=np.float32))
    with np.errstate(divide="ignore"):
        scores = torch.from_numpy(np.log(probabilities)).float().expand(draws, -1)
    tokens = drawn(scores, uniforms_BT[:, 0])
    counts = np.bincount(tokens.numpy(), minlength=7)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = draws * probabilities[possible]
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 16.27  # 0.999 quantile, 3 degrees of freedom


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 0.5])
def test_the_sampler_never_draws_an_impossible_token(uniform: float) -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    token = drawn(scores, torch.tensor([uniform]))
    assert int(token) in (1, 3)


def test_seeds_differ_by_prompt_sample_and_run() -> None:
    seeds = {request_seed(seed, prompt, index) for seed in (0, 1) for prompt in ("a", "b") for index in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)


def test_batches_are_sorted_and_complete() -> None:
    items = [3, 1, 4, 1, 5, 9, 2, 6]
    batches = by_length(items, lambda item: item, 3)
    assert batches == [[9, 6, 5], [4, 3, 2], [1, 1]]


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    sizes = []

    def work(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return [item * 10 for item in batch]

    freed = []
    guard = MemoryGuard(work, lambda: freed.append(1))
    assert list(guard.run(list(range(10)))) == [item * 10 for item in range(10)]
    assert sizes == [10, 5, 2, 2, 2, 2, 2] and len(freed) == 2
    sizes.clear()
    assert list(guard.run([1, 2, 3])) == [10, 20, 30]
    assert sizes == [2, 1]  # remembers what fitted


def test_out_of_memory_for_one_sequence_is_an_error() -> None:
    def work(batch: list[int]) -> list[int]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(MemoryGuard(work, lambda: None).run([1, 2]))


class Counting:
    """An engine whose completions say what was asked; it dies when it has been asked so often."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self._dies_after = dies_after

    def write(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion]]]:
        for place, request in enumerate(requests):
            if self._dies_after is not None and len(self.asked) >= self._dies_after:
                raise KeyboardInterrupt
            self.asked.append((request.prompt_id, request.sample_index))
            yield [(place, Completion(str(request.seed), [1], [2, request.sample_index], "stop"))]


@pytest.mark.parametrize("dies_after", [0, 4, 9, 21])
def test_a_table_that_grows_asks_only_for_what_is_new(tmp_path: Path, dies_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts and more samples, killed on the way: in the end it is what one run would have written, and nothing was asked twice."""
    monkeypatch.setattr("distill.engines.traces._LEAST_ROWS", 8)
    monkeypatch.setattr("distill.engines.traces._TOKENS_PER_WINDOW", 8)

    def grown(place: str, samples: int, count: int, dies_after: int | None = None) -> list[tuple[str, int]]:
        sampling = Sampling(samples_per_prompt=samples, max_new_tokens=1, batch_size=3)
        engine = Counting(dies_after)
        growth = Growth({"samples": 0, "count": 0})
        with StageFolder(tmp_path / place, "generate", {"samples": samples, "count": count}, growth=growth) as out:
            earlier = EarlierTraces(out.earlier, {"teacher"}) if out.earlier else None
            table = TraceTable(out.table("traces", TRACE, resume=True), out.journal(), sampling, 1, earlier)
            try:
                table.write(engine, prompts(count), count, "teacher", "test")
                out.finish()
            except KeyboardInterrupt:
                pass
        return engine.asked

    few = grown("grown", 2, 9)
    killed = grown("grown", 3, 15, dies_after)
    rest = grown("grown", 3, 15)
    assert len(few) == 18 and set(few).isdisjoint(killed) and set(few).isdisjoint(rest) and set(killed).isdisjoint(rest)
    whole = grown("whole", 3, 15)
    assert sorted([*few, *killed, *rest]) == sorted(whole)
    assert read_rows(tmp_path / "grown", "traces") == read_rows(tmp_path / "whole", "traces")
