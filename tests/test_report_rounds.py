"""The report of runs without curated traces: a student judged while it writes, and on-policy rounds from the base or after traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fabricated import change_manifest, facts, make_run, recipe_for, trace

from distill.recipe.experiment import Recipe
from distill.reporting.summary import bytes_text, summarise
from distill.reporting.tables import funnel
from distill.run.folder import StageFolder
from distill.run.schema import PROMPT, TRACE
from distill.stages import folders_to_show, report

TEACHER = {"model": "Qwen/Qwen3-8B", "revision": "feedc0de1234", "parameters": 8_190_735_360}
MASSES = {"1": 0.81, "8": 0.97, "64": 0.995}


def write_prompts(run_dir: Path) -> None:
    rows = [trace(index, f"What is {index} + 0?", "") for index in range(40)]
    with StageFolder(run_dir / "prompts", "prompts", {}) as out:
        out.write_table("train", [{"prompt_id": r["prompt_id"], "messages": r["messages"], "reference": "1"} for r in rows], PROMPT)
        out.write_table("heldout", [], PROMPT)
        out.finish(rows_in=40, rows_kept=40, facts=facts())


def write_student(place: Path, inputs: list[Path], settings: dict[str, Any], lines: list[dict[str, Any]], **more: Any) -> None:
    with StageFolder(place, "train", settings, inputs) as out:
        (out.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out.path / "adapter").mkdir()
        (out.path / "adapter" / "weights").write_text("stand-in")
        known = {"steps": 20, "tokens": 9_000, "trainable_parameters": 1_000_000, "precision": "bf16"}
        weights, logged = [out.path / "adapter" / "weights"], [out.path / "metrics.jsonl"]
        drops = {"too_long": 2}
        out.finish(rows_in=40, rows_kept=38, drops=drops, files=weights, records=logged, facts=facts(**known, **more))


def write_round(run_dir: Path, number: int, *, stop: str = "", bare: bool = False) -> None:
    """A round, or only the rollouts that stopped it; bare leaves every fact out that a report could do without."""
    place = run_dir / "rounds" / f"{number:02d}"
    rows = [trace(index, f"What is {index} + 0?", f"<think>\nOwn thoughts {number}.\n</think>\n\n{index}") for index in range(20)]
    wrote = {} if bare else {"tokens": 20 * 55, "finish_reasons": {"stop": 15, "length": 5}, "horizon": 128 * number}
    with StageFolder(place / "rollouts", "rollouts", {}, [run_dir / "prompts"]) as out:
        out.write_table("traces", [row | {"author": "student"} for row in rows], TRACE)
        out.finish(rows_in=20, rows_kept=20, facts=facts(**wrote, **({"stop": stop} if stop else {})))
    if stop:
        return
    scored = (
        {} if bare else {"bytes": 3_500_000, "bytes_per_token": 260.0, "positions": 1_100, "captured_mass": MASSES, "aligned_share": 0.99}
    )
    with StageFolder(place / "targets", "score", {}, [place / "rollouts"]) as out:
        out.finish(rows_in=20, rows_kept=20, facts=facts(author=TEACHER, licence="Apache-2.0", **scored))
    lines = [
        {"step": step, "loss": 0.5 / number / step, **({} if bare else {"kl_lower_bound": 0.4 / number / step})} for step in range(1, 21)
    ]
    write_student(place / "student", [place / "rollouts", place / "targets"], {"train": {"method": "kd"}}, lines)


def rounds_recipe(run_dir: Path, number: int, **changes: Any) -> Recipe:
    sections: dict[str, Any] = {"score": {}, "rounds": number, "rollouts": {"start": "base"}, "generate": None, "evaluate": None}
    return recipe_for(run_dir, **(sections | changes))


def pages(recipe: Recipe) -> tuple[str, str]:
    place = Path(str(recipe.run_dir)) / "report"
    report.run(recipe)
    return (place / "report.html").read_text(), (place / "report.md").read_text().replace("\\", "")


def test_a_student_judged_while_it_writes(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    recipe = recipe_for(tmp_path, train={"method": "on_policy"}, generate=None, evaluate=None)
    settings = {"train": {"method": "on_policy"}, "teacher": {"model": "Qwen/Qwen3-8B"}}
    write_student(tmp_path / "student", [tmp_path / "prompts"], settings, [{"step": 1, "loss": 0.2}, {"step": 2, "loss": -0.001}])
    for page in pages(recipe):
        for expected in (
            "It learned from its own answers to 38 of 40 prompts, judged by Qwen/Qwen3-8B as it wrote them, in 20 optimizer steps.",
            "judged by",
            "on_policy (reverse_kl), lora, 1M trained parameters",
            "Apache-2.0",
            "This method keeps no traces.",
            "with room for an answer",
            "too_long",
        ):
            assert expected in page, expected
        assert "On-policy rounds" not in page and "Stored distributions" not in page and "terms of the traces" not in page


def test_rounds_from_the_base_stand_in_a_table(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    for number in (1, 2):
        write_round(tmp_path, number)
    write_round(tmp_path, 3, stop="60 % of the rollouts were cut off, over rollouts.stop_truncation_rate (50 %).")
    recipe = rounds_recipe(tmp_path, 5)
    html, markdown = pages(recipe)
    for page in (html, markdown):
        for expected in (
            "It learned in 2 on-policy rounds from 40 answers of its own, in 40 optimizer steps.",
            "The rounds ended early: 60 % of the rollouts were cut off",
            "round 2 score",
            "top 1: 81.0 %, top 8: 97.0 %, top 64: 99.5 %",
            "3.3 MiB",
            "written in round 3, ended by: stop",
            "Own thoughts 3.",
            "distributions of",
            "kd, 2 on-policy rounds",
        ):
            assert expected in page, expected
        assert "terms of the traces" not in page and "None" not in page
    assert "| 1 | 20 | 55 | 128 | 25.0 % | 0.4000 | 0.0200 | 20 |" in markdown
    assert "Training loss of round 2 and divergence from the teacher" in html and "forward KL" in html
    summary = summarise(*folders_to_show(recipe), {})
    assert summary.wall_s == pytest.approx(65.5 * (1 + 3 + 3 + 1)) and "8 min 44 s" in html
    assert funnel(summary, recipe) == []


def test_rounds_after_traces_come_behind_them(tmp_path: Path) -> None:
    make_run(tmp_path)
    write_round(tmp_path, 1, bare=True)
    html, markdown = pages(rounds_recipe(tmp_path, 1, generate={}, rollouts={}, evaluate={}))
    for page in (html, markdown):
        assert (
            "It learned from 27 of 40 traces by Qwen/Qwen3-8B, in 160 optimizer steps. It then learned in 1 on-policy round from 20" in page
        )
        assert "| 1 |  |" in markdown and "Adding nothing to" in page
        assert page.index("round 1 train") < page.index(">evaluate<" if page is html else "| evaluate |")


def test_distributions_at_the_tokens_of_traces_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, evaluated=False)
    with StageFolder(tmp_path / "targets", "score", {}, [tmp_path / "curated"]) as out:
        out.finish(rows_in=30, rows_kept=30, facts=facts(author=TEACHER, licence="Apache-2.0", bytes=900))
    change_manifest(tmp_path / "student", lambda manifest: manifest.update(settings={"train": {"method": "kd"}}))
    html, markdown = pages(recipe_for(tmp_path, train={"method": "kd"}, score={}, evaluate=None))
    assert "27 of 40 traces by Qwen/Qwen3-8B and its distributions at their tokens" in html and "900 bytes" in markdown


def test_sizes_as_people_write_them() -> None:
    assert [bytes_text(count) for count in (None, 12, 2048, 3_500_000, 5 * 2**30)] == ["", "12 bytes", "2.0 KiB", "3.3 MiB", "5.0 GiB"]


def test_the_card_names_everyone_who_was_learned_from(tmp_path: Path) -> None:
    """Brought traces and a teacher that scores them are two authors with two licences; a live teacher is the only one."""
    from distill.recipe.results import Export
    from distill.stages.export import _terms

    make_run(tmp_path)
    change_manifest(tmp_path / "traces", lambda manifest: manifest["facts"].update({"author": {"model": "somebody"}, "licence": "MIT"}))
    both = recipe_for(tmp_path, train={"method": "kd"}, score={})
    assert _terms(both, Export())[:2] == ("somebody and Qwen/Qwen3-8B", "MIT and Apache-2.0")
    live = recipe_for(tmp_path, train={"method": "on_policy"}, generate=None)
    assert _terms(live, Export())[:2] == ("Qwen/Qwen3-8B", "Apache-2.0")
