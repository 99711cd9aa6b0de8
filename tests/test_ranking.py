"""The student reads candidate traces: the Rank-Surprisal Ratio against its definition, and curate's choice by it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch

from distill.cluster.chain import Wanted, jobs_of
from distill.cluster.site import Site
from distill.engines import ranking
from distill.engines.ranking import RANK_LIMIT, RankReader, Ranks
from distill.measure.suited import compare, sentences
from distill.models.chat import IGNORE
from distill.models.loading import load_chat_format, load_model
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run.early import EndedEarly
from distill.run.folder import StageFolder
from distill.run.journal import Journal
from distill.run.schema import TRACE
from distill.run.tables import read_rows
from distill.stages import Step
from distill.stages.curate import run

STUDENT = {"model": "embedded:student", "dtype": "float32"}


def traces(number: int = 6, samples: int = 5) -> list[dict[str, Any]]:
    draw = random.Random(3)
    rows = []
    for prompt in range(number):
        for sample in range(samples):
            steps = "".join(f"{draw.randint(1, 99)} + {draw.randint(1, 99)}\n" for _ in range(draw.randint(1, 6)))
            rows.append(
                {
                    "prompt_id": f"p{prompt}",
                    "sample_index": sample,
                    "author": "teacher",
                    "messages": [{"role": "user", "content": f"What is {prompt} + {prompt}?"}],
                    "completion": f"<think>\n{steps}</think>\n\nIt is {2 * prompt}.",
                    "finish_reason": draw.choice(["stop", None]),
                }
            )
    return rows


def recipe_of(run_dir: Path, **sections: Any) -> Recipe:
    curate = {"checks": ["finish"], "prefer": "rank_surprisal", "max_per_prompt": 2, "workers": 1}
    plain = {"prompts": {"source": "x.jsonl"}, "traces": {"source": "x.jsonl"}, "evaluate": None, "export": None}
    return Recipe.model_validate({"name": "test", "run_dir": str(run_dir), "student": STUDENT, "curate": curate, **plain, **sections})


def naive(rows: list[dict[str, Any]]) -> list[Ranks]:
    """Each row alone through the whole vocabulary in float64, and the ranks by sorting it."""
    chat = load_chat_format(ModelSpec(**STUDENT))
    model = load_model(ModelSpec(**STUDENT), torch.device("cpu")).double()
    size = len(chat.tokenizer)
    found = []
    for row in rows:
        ids, labels = chat.trace_row(row)
        places = [place for place, label in enumerate(labels) if label != IGNORE]
        assert ids[places[-1]] == chat.end_of_turn_id
        with torch.no_grad():
            log_q = model(torch.tensor([ids])).logits[0, :, :size].log_softmax(-1)
        ranks, surprisal = [], 0.0
        for place in places[:-1]:
            order = log_q[place - 1].argsort(descending=True).tolist()
            ranks.append(min(order.index(ids[place]) + 1, 100))
            surprisal -= float(log_q[place - 1, ids[place]])
        found.append(Ranks(len(ranks), float(sum(ranks)), surprisal))
    return found


def test_ratios_are_those_of_the_definition_whatever_is_read_beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of all lengths, in windows of 64 (padded together) and one by one."""
    rows = traces()
    expected, reader = naive(rows), RankReader(recipe_of(tmp_path))
    assert max(found.rank / found.tokens for found in expected) > 2  # else nothing is tested of ranks
    for at_once in (64, 1):
        monkeypatch.setattr(ranking, "_AT_ONCE", at_once)
        read = [found for window in reader.read(rows) for _, found in window]
        for found, wanted in zip(read, expected, strict=True):
            assert found is not None and (found.tokens, found.rank) == (wanted.tokens, wanted.rank)
            assert found.ratio == pytest.approx(wanted.rank / wanted.surprisal, rel=1e-4)


def test_ranks_beyond_the_limit_count_as_it() -> None:
    opinion = ranking.Opinion(np.array([-1.0, -3.0]), np.zeros(2, np.int32), np.array([1, 5000], np.int32), np.full(2, np.nan))
    assert ranking.ranks_of(opinion) == Ranks(2, 1 + RANK_LIMIT, 4.0) and ranking.ranks_of(opinion).ratio == 101 / 4
    assert Ranks(2, 2.0, 0.0).ratio == float("inf")


def test_what_the_student_would_not_train_on_is_not_read(tmp_path: Path) -> None:
    rows = traces(1, 3)
    rows[0]["completion"] = "<think>\nnever closed"
    chat = load_chat_format(ModelSpec(**STUDENT))
    length = len(chat.trace_row(rows[1])[0])
    rows[2]["completion"] += " Indeed." * length
    short, cut = ({"train": {"max_length": length, "overlong": overlong}} for overlong in ("drop", "cut"))
    found = [[there for window in RankReader(recipe_of(tmp_path, **train)).read(rows) for _, there in window] for train in (short, cut)]
    assert [there is not None for there in found[0]] == [False, True, False]
    assert [there is not None for there in found[1]] == [False, True, True]
    assert found[0][1] == found[1][1]


def given(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    with StageFolder(run_dir / "traces", "generate", {}) as out:
        out.write_table("traces", rows, TRACE)
        out.finish()


def kept(run_dir: Path) -> set[tuple[str, int]]:
    return {(row["prompt_id"], row["sample_index"]) for row in read_rows(run_dir / "curated", "curated")}


def test_curate_keeps_the_lowest_and_a_kill_half_way_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt with two traces has nothing to choose, so that they are not read."""
    rows = [*traces(), *(row | {"prompt_id": "few"} for row in traces(1, 2))]
    ratios = {(row["prompt_id"], row["sample_index"]): ranks.ratio for row, ranks in zip(rows, naive(rows), strict=True)}
    wanted = {("few", 0), ("few", 1)}
    for prompt in range(6):
        mine = sorted((ratio, key) for key, ratio in ratios.items() if key[0] == f"p{prompt}")
        wanted |= {key for _, key in mine[:2]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(tmp_path / "whole").model_dump(mode="json")))
    given(tmp_path / "whole", rows)
    done = commands.run(["-m", "distill", "curate", tmp_path / "recipe.yaml"])
    assert done.returncode == 0 and "student reads" in done.stderr, done.stderr[-2000:]
    assert kept(tmp_path / "whole") == wanted
    table = read_rows(tmp_path / "whole" / "curated", "ranks")
    assert {(row["prompt_id"], row["sample_index"]) for row in table} == {key for key in ratios if key[0] != "few"}
    assert all(row["rank"] / row["surprisal"] == pytest.approx(ratios[row["prompt_id"], row["sample_index"]], rel=1e-4) for row in table)

    monkeypatch.setattr(ranking, "_AT_ONCE", 7)
    given(tmp_path / "one", rows)
    run(recipe_of(tmp_path / "one"))
    given(tmp_path / "killed", rows)
    append, written = Journal.append, []

    def killed(journal: Journal, batch: list[dict[str, Any]]) -> None:
        if batch and len(written) == 2:
            raise EndedEarly("SIGTERM")
        append(journal, batch)
        written.extend(batch[:1])

    monkeypatch.setattr(Journal, "append", killed)
    with pytest.raises(EndedEarly):
        run(recipe_of(tmp_path / "killed"))
    monkeypatch.setattr(Journal, "append", append)
    read: list[int] = []
    row_of = RankReader._row
    monkeypatch.setattr(RankReader, "_row", lambda reader, trace: (read.append(trace["row"]), row_of(reader, trace))[1])
    run(recipe_of(tmp_path / "killed"))
    assert len(read) == 30 - 2 * 7
    for name in ("curated", "dropped", "ranks"):
        assert read_rows(tmp_path / "killed" / "curated", name) == read_rows(tmp_path / "one" / "curated", name)


def test_what_was_read_before_a_growth_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = traces(2)
    given(tmp_path, rows)
    run(recipe_of(tmp_path))
    read: list[int] = []
    monkeypatch.setattr(RankReader, "_row", lambda reader, trace: read.append(trace["row"]))
    more = recipe_of(tmp_path).model_dump(mode="json")
    more["curate"]["max_per_prompt"] = 3
    assert run(Recipe.model_validate(more)).rows_kept == 6 and not read


def test_the_ratio_of_many_traces_is_that_of_their_mean_ranks_and_surprisals() -> None:
    """Against loops over resampled prompts; and of two teachers on prompts that both have, of which chance is the same."""
    draw = np.random.default_rng(1)
    one = {f"p{number}": (float(draw.uniform(2, 4)), float(draw.uniform(1, 2))) for number in range(40)}
    other = {prompt: (rank + 0.5, surprisal) for prompt, (rank, surprisal) in list(one.items())[:30]}
    low, high = compare([one, other], seed=0)
    assert low.ratio.value == pytest.approx(sum(rank for rank, _ in one.values()) / sum(surprisal for _, surprisal in one.values()))
    values = np.array(list(one.values()))
    drawn = [values[draw.integers(0, 40, 40)].mean(0) for _ in range(4000)]
    wanted = np.quantile([rank / surprisal for rank, surprisal in drawn], [0.025, 0.975])
    assert [low.ratio.low, low.ratio.high] == pytest.approx(wanted.tolist(), abs=0.02)
    assert low.above_lowest is None and high.above_lowest is not None
    assert high.above_lowest.value == pytest.approx(0.5 / np.mean([surprisal for _, surprisal in other.values()]))
    assert (high.above_lowest.high or 0) - (high.above_lowest.low or 0) < 0.05  # paired: what they share is no noise
    assert "is above it by" in sentences(["a", "b"], [low, high])[1]
    apart = compare([one, {"q0": (9.0, 1.0), "q1": (8.0, 1.0)}], seed=0)
    assert apart[1].above_lowest is None and "compare the intervals" in sentences(["a", "b"], apart)[1]


def test_pair_says_whose_traces_suit_and_does_not_read_them_twice(tmp_path: Path) -> None:
    """A run's folder and a file of the same prompts: the student's own greedy answers would surprise it least; nonsense is ranked low."""
    rows = traces(8, 2)
    given(tmp_path / "run", rows)
    nonsense = [
        {"question": row["messages"][0]["content"], "completion": "<think>\n}{ ~^ %% zq\n</think>\n\n@@ ## |~"} for row in rows[::2]
    ]
    file = tmp_path / "nonsense.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in nonsense))
    recipe = recipe_of(tmp_path / "run", prompts={"source": "x.jsonl", "columns": {"prompt": "question"}})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    command = ["-m", "distill", "pair", tmp_path / "recipe.yaml", "--traces", tmp_path / "run", "--traces", file, "--prompts", "6"]
    first = commands.run(command)
    assert first.returncode == 0 and f"best suited by this measure: {tmp_path / 'run'}" in first.stdout.replace("\n", " "), first.stderr
    found = json.loads((tmp_path / "run" / "teachers" / "findings.json").read_text())
    table = read_rows(tmp_path / "run" / "teachers", "ranks")
    assert [one["read"] for one in found["teachers"]] == [6, 6] and len(table) == 12
    for one in found["teachers"]:
        mine = [row for row in table if row["traces"] == one["traces"]]
        rank, surprisal = (np.mean([row[name] / row["tokens"] for row in mine]) for name in ("rank", "surprisal"))
        assert one["ratio"]["value"] == pytest.approx(rank / surprisal) and one["ratio"]["low"] <= one["ratio"]["value"]
    mine = {row["prompt_id"]: row for row in table if row["traces"] == str(tmp_path / "run")}
    expected = naive([row for row in rows if row["sample_index"] == 0 and row["prompt_id"] in mine])
    assert sorted(row["rank"] for row in mine.values()) == sorted(one.rank for one in expected)
    second = commands.run(command)
    assert second.returncode == 0 and "student reads" not in second.stderr and found["verdict"][0] in second.stdout.replace("\n", " ")
    other = commands.run([*command[:-1], "5"])
    assert other.returncode == 1 and "num_prompts is 6 there and 5 here" in other.stderr and "--redo" in other.stderr


def test_on_a_cluster_curate_takes_a_gpu_where_the_student_reads(tmp_path: Path) -> None:
    plain = recipe_of(tmp_path, curate={"checks": ["finish"]})
    for recipe, gpus in ((recipe_of(tmp_path), 1), (plain, 0)):
        jobs = jobs_of(recipe, tmp_path / "recipe.yaml", [Step("curate")], Wanted(gpus=8), Site(), {})
        assert [job.gpus for job in jobs] == [gpus]
