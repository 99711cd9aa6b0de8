"""What a run cost, by its manifests: every figure against one made by hand; prices of a file, of one's own, and unknown ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fabricated import change_manifest, make_run
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import DataError, MissingStageError
from distill.measure.scores import DIFFERENCE, P_VALUE
from distill.pipeline import costs_of
from distill.recipe.results import Evaluate
from distill.reporting.prices import SHIPPED, Rates, rates_of, read_prices
from distill.run.files import read_json
from distill.run.folder import StageFolder, delete_stage
from distill.run.manifest import MANIFEST
from distill.run.schema import SCORE, TRACE
from distill.run.tables import read_rows

HOUR = 3.6  # dollars: a thousandth of one a second


def change(place: Path, **facts: Any) -> None:
    change_manifest(place, lambda made: made["facts"].update(facts))


def measured(run: Path, gain: tuple[float, float, float], chance: float = 0.001) -> None:
    """Adds the difference of student and base to the scores of a fabricated run."""
    rows, facts = read_rows(run / "eval", "scores"), read_json(run / "eval" / MANIFEST)["facts"]
    delete_stage(run / "eval")
    same = {"set": "heldout", "num_prompts": 300, "samples_per_prompt": 1, "model_role": "student-base"}
    rows.append({**same, "metric": DIFFERENCE, **dict(zip(("value", "low", "high"), gain, strict=True))})
    rows.append({**same, "metric": P_VALUE, "value": chance})
    with StageFolder(run / "eval", "evaluate", {}, [run / "prompts", run / "student"]) as out:
        out.write_table("scores", rows, SCORE)
        out.finish(rows_in=900, rows_kept=900, facts=facts)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Seconds by hand: prompts, curate 10 (CPU); traces 200 on a GPU; training 100 on four; evaluation 50 on one."""
    place = tmp_path / "run"
    make_run(place)
    measured(place, (0.46, 0.40, 0.50))
    for name in ("prompts", "curated"):
        change(place / name, wall_s=10.0)
    change(place / "traces", wall_s=200.0, gpu="NVIDIA GeForce RTX 4090")
    change(place / "student", wall_s=100.0, world_size=4, device="cuda:0", gpu="NVIDIA GeForce RTX 4090")
    writing = {
        "student": {"tokens": 1204, "seconds": 2.0, "device": "cuda:0"},
        "teacher": {"tokens": 1204, "seconds": 20.0, "device": "cuda:0"},
    }
    change(place / "eval", wall_s=50.0, device="cuda:0", gpu="NVIDIA GeForce RTX 4090", writing=writing)
    return place


def found(run: Path, *hosts: str, **rates: Any) -> dict[str, Any]:
    return dict(json.loads(costs_of(run, rates_of(**rates), hosts, as_json=True)))


def test_every_figure_is_as_by_hand(run: Path) -> None:
    told = found(run, "gpt-5.4-mini", gpu_hour=HOUR, cpu_hour=0.0)
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert {name: stage["device_s"] for name, stage in stages.items()} == {
        "prompts": 10, "generate": 200, "curate": 10, "train": 400, "evaluate": 50,
    }  # fmt: skip
    assert [round(stage["cost"]["usd"], 6) for stage in told["stages"]] == [0, 0.2, 0, 0.4, 0.05]
    assert (told["making"]["usd"], told["total"]["usd"]) == (pytest.approx(0.6), pytest.approx(0.65)) and not told["total"]["missing"]
    assert (stages["generate"]["tokens_in"], stages["generate"]["tokens_out"]) == (None, 1600)
    assert (stages["train"]["tokens_in"], stages["evaluate"]["tokens_out"]) == (123_456, 108_000)
    traces = told["accepted_trace"]
    assert (traces["kept"], traces["written"]) == (30, 40)
    assert traces["each"]["usd"] == pytest.approx(0.2 / 30) and traces["lost"]["usd"] == pytest.approx(0.2 * 10 / 40)
    assert told["point_of_accuracy"]["cost"]["usd"] == pytest.approx(0.6 / 46)
    # 120.4 tokens an answer: at 602 tokens a second 0.2 s, at 60.2 2 s, of a thousandth of a dollar a second.
    answers = told["answers_1000"]
    assert answers["student"]["usd"] == pytest.approx(0.2) and answers["teacher"]["usd"] == pytest.approx(2.0)
    teacher, host = told["against"]
    assert teacher["cheaper"] == pytest.approx(0.9) and teacher["break_even"] == pytest.approx(0.65 / 1.8 * 1000)
    assert teacher["month"] == pytest.approx(HOUR * 730 / 2.0 * 1000) and teacher["capacity"] == pytest.approx(730 * 3600 / 0.2)
    assert host["other"]["usd"] == pytest.approx(1000 * 120.4 * 4.5 / 1e6)  # prompts' tokens are not known, and count as none
    assert "tokens of prompts are not known" in host["other"]["because"] and "2026-06-01" in host["other"]["because"]


def test_people_read_the_same_with_what_it_rests_on(run: Path) -> None:
    result = CliRunner().invoke(app, ["costs", str(run), "--gpu-hour", str(HOUR), "--cpu-hour", "0", "--api", "gpt-5.4-mini"])
    said = result.stdout
    assert result.exit_code == 0, result.output
    assert "making the student: $0.60; with measuring it: $0.65" in said
    assert "an accepted trace: $0.0067 (30 kept of 40 written" in said and "not kept: $0.0500" in said
    assert "a point of accuracy: $0.0130 [$0.0120, $0.0150] (46.0 points [40.0, 50.0] gained over the base)" in said
    assert "the student's answers are 90 % cheaper than the teacher's, by these figures" in said
    assert "break-even: 361 answers in all pay for the run ($0.65)" in said
    assert "602.0 tokens a second on one device in evaluate, always busy; $3.6 an hour of a GPU, as given" in said


def test_a_gain_within_the_noise_has_no_price(run: Path) -> None:
    measured(run, (0.02, -0.01, 0.05))
    assert "within the noise" in found(run, gpu_hour=HOUR)["point_of_accuracy"]["why_not"]
    measured(run, (0.02, 0.01, 0.05), chance=0.2)
    assert found(run, gpu_hour=HOUR)["point_of_accuracy"]["cost"] is None


def test_prices_are_by_the_gpu_that_a_manifest_names_and_unknown_ones_stay_so(run: Path, tmp_path: Path) -> None:
    assert found(run)["stages"][1]["cost"]["usd"] == pytest.approx(200 / 3600 * 0.29)
    change(run / "traces", gpu="NVIDIA Fantasy 9000")
    told = found(run)
    assert told["stages"][1]["cost"] == {"usd": None, "missing": ["generate"]} and told["total"]["missing"] == [
        "prompts",
        "generate",
        "curate",
    ]
    assert "at least" in costs_of(run, rates_of()) and "generate: not priced: the price of an hour of NVIDIA Fantasy 9000" in costs_of(
        run, rates_of()
    )
    own = tmp_path / "own.yaml"
    own.write_text("gpus: {Fantasy 9000: {usd_per_hour: 36, source: mine, read: 2026-11-01}}\n")
    assert found(run, file=own)["stages"][1]["cost"]["usd"] == pytest.approx(2.0)
    assert found(run, gpu="h100 sxm")["stages"][3]["cost"]["usd"] == pytest.approx(400 / 3600 * 3.99)
    for text, expected in (("gpus: {x: {usd_per_hour: -1}}", "usd_per_hour"), ("gpus: [", "can't be read"), ("cards: {}", "cards")):
        own.write_text(text)
        read_prices.cache_clear()
        with pytest.raises(DataError, match=expected):
            rates_of(own)
    with pytest.raises(DataError, match="no price is known for 'RTX 1'"):
        rates_of(gpu="RTX 1")


def test_servers_cost_what_the_recipe_says_or_the_gpus_behind_them(run: Path) -> None:
    spent = {"requests": 40, "retries": 3, "input_tokens": 4000, "cached_tokens": 0, "output_tokens": 1600, "cost_usd": 1.5}
    change(run / "traces", device="server (openai, 1)", server=spent)
    stage = found(run, gpu_hour=HOUR)["stages"][1]
    assert (stage["cost"]["usd"], stage["device_s"], stage["tokens_in"], stage["retries"]) == (1.5, None, 4000, 3)
    assert "3 requests were sent again" in costs_of(run, rates_of(gpu_hour=HOUR))
    change(run / "traces", server=spent | {"cost_usd": None})
    assert "a price of its server's tokens" in found(run, gpu_hour=HOUR)["stages"][1]["notes"][0]
    change(run / "traces", device="server (vllm, 2)")
    assert found(run, gpu_hour=HOUR)["stages"][1]["cost"]["usd"] is None
    assert found(run, gpu_hour=HOUR, server_gpus=4)["stages"][1]["cost"]["usd"] == pytest.approx(200 * 2 * 4 / 3600 * HOUR)
    price = {"input": 1.0, "output": 10.0}
    change_manifest(run / "traces", lambda made: made.update(made_with={"teacher": {"server": {"price": price}}}))
    # 100 tokens a request, and 120.4 written
    assert found(run, gpu_hour=HOUR)["answers_1000"]["teacher"]["usd"] == pytest.approx((100 * 1 + 120.4 * 10) / 1000)


def test_a_run_that_has_only_begun_and_a_folder_that_is_none(tmp_path: Path) -> None:
    make_run(tmp_path / "run", evaluated=False)
    told = found(tmp_path / "run", gpu_hour=HOUR)
    assert told["point_of_accuracy"] is None and told["answers_1000"]["teacher"]["tokens"] == 40 and told["against"] == []
    with pytest.raises(MissingStageError, match="holds no finished stage"):
        costs_of(tmp_path, Rates(read_prices()))


def test_every_shipped_price_has_its_source_and_date() -> None:
    prices = read_prices(SHIPPED)
    entries = [*prices.gpus.values(), *prices.api.values()]
    assert len(prices.gpus) >= 5 and len(prices.api) >= 3 and all(entry.source and entry.read for entry in entries)
    rates = Rates(prices)
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA H200"):  # as torch says them
        assert rates.gpu_price(name) is not None, name
    assert rates.gpu_price("NVIDIA L4") is None and rates.gpu_price(None) is None


def test_how_fast_models_answered_is_told_only_where_all_was_written_at_once(tmp_path: Path) -> None:
    """Of answers that were there before an interruption nobody knows the seconds."""
    from distill.engines.traces import TraceTable

    def table(out: StageFolder) -> TraceTable:
        return TraceTable(out.table("traces", TRACE, resume=True), out.journal(), Evaluate(), 0)

    with StageFolder(tmp_path / "eval", "evaluate", {}) as out:
        assert table(out).is_new
        out.journal().append([{"author": "student"}])
        assert not table(out).is_new
