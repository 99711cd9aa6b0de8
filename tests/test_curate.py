"""The stage `curate`: checks in order, drops with their first reason, a choice per prompt, and a kill half-way."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import commands
import pytest

from distill.checks import Verdict
from distill.checks.choice import Evidence, choose
from distill.errors import DataError, IntegrityError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Curate
from distill.run.folder import StageFolder
from distill.run.manifest import JOURNAL, MANIFEST, Manifest
from distill.run.schema import TRACE
from distill.run.tables import read_rows
from distill.stages.curate import run

ROOT = Path(__file__).resolve().parent.parent
RIGHT = "<think>\n1+1=2\n</think>\n\n\\boxed{2}"


def trace(completion: str = RIGHT, prompt: str = "p", sample: int = 0, **more: Any) -> dict[str, Any]:
    row = {
        "prompt_id": prompt,
        "sample_index": sample,
        "author": "teacher",
        "messages": [{"role": "user", "content": "1+1?"}],
        "reference": "2",
        "completion": completion,
        "completion_ids": [1, 2, 3],
        "finish_reason": "stop",
    }
    return {**row, **more}


def recipe(run_dir: Path, **curate: Any) -> Recipe:
    sections = {"student": {"model": "none"}, "prompts": {"source": "x.jsonl"}, "traces": {"source": "x.jsonl"}, "evaluate": None}
    return Recipe.model_validate({"name": "test", "run_dir": str(run_dir), **sections, "curate": {"workers": 1, **curate}})


def write_traces(run_dir: Path, rows: list[dict[str, Any]], facts: dict[str, Any] | None = None) -> None:
    with StageFolder(run_dir / "traces", "generate", {}) as out:
        out.write_table("traces", rows, TRACE)
        out.finish(facts=facts)


def curated(run_dir: Path, rows: list[dict[str, Any]], **curate: Any) -> tuple[Manifest, dict[str, list[dict[str, Any]]]]:
    write_traces(run_dir, rows, {"author": {"model": "t"}, "licence": "MIT", "device": "cpu"})
    manifest = run(recipe(run_dir, **curate))
    tables = {table: read_rows(run_dir / "curated", table) for table in ("curated", "dropped", "verdicts")}
    assert manifest.rows_in == len(rows) == (manifest.rows_kept or 0) + sum(manifest.drops.values())
    assert (manifest.rows_kept, sum(manifest.drops.values())) == (len(tables["curated"]), len(tables["dropped"]))
    return manifest, tables


def test_the_first_failing_check_is_the_reason(tmp_path: Path) -> None:
    rows = [
        trace(sample=0),
        trace("<think>\nso", sample=1, finish_reason="length"),  # fails all three
        trace("\\boxed{3}", sample=2),  # fails think and math
        trace(RIGHT.replace("{2}", "{3}"), sample=3),
        trace(sample=4, reference=None),
        trace(sample=5),
    ]
    manifest, tables = curated(tmp_path, rows)
    assert [row["sample_index"] for row in tables["curated"]] == [0]
    assert {row["sample_index"]: row["reason"] for row in tables["dropped"]} == {
        1: "finish:truncated",
        2: "think:no_reasoning",
        3: "math:wrong_answer",
        4: "math:no_reference",
        5: "duplicate",
    }
    assert manifest.facts["verdicts"] == {
        "finish": {"passed": 5, "failed": 1, "unjudged": 0},
        "think": {"passed": 4, "failed": 2, "unjudged": 0},
        "math": {"passed": 2, "failed": 3, "unjudged": 1},
    }
    of_second = [(row["check"], row["passed"], row["reason"]) for row in tables["verdicts"] if row["sample_index"] == 1]
    assert of_second == [("finish", False, "truncated"), ("think", False, "reasoning_not_closed"), ("math", False, "no_answer")]
    assert len(tables["verdicts"]) == 3 * len(rows)
    assert (manifest.facts["author"], manifest.facts["licence"], manifest.facts["tokens"]) == ({"model": "t"}, "MIT", 3)


def test_a_trace_with_a_control_token_inside_goes(tmp_path: Path) -> None:
    """Whatever is checked: its text looks like any other's."""
    ids = [[5, 6, 9], [5, 7, 9], None, [], [8], [6]]
    rows = [trace(f"{number}", sample=number, completion_ids=drawn) for number, drawn in enumerate(ids)]
    write_traces(tmp_path, rows, {"control_ids": [7, 8]})
    manifest = run(recipe(tmp_path, checks=["finish"], max_per_prompt=9))
    assert [row["sample_index"] for row in read_rows(tmp_path / "curated", "dropped")] == [1, 4]
    assert manifest.drops == {"control_token_inside": 2}


def test_the_order_of_the_recipe_counts_and_unjudged_can_be_kept(tmp_path: Path) -> None:
    rows = [trace("\\boxed{3}", sample=0), trace(sample=1, reference=None, completion_ids=None), trace(sample=2)]
    manifest, _ = curated(tmp_path / "a", rows, checks=["math", "finish", "think"])
    assert manifest.drops == {"math:wrong_answer": 1, "math:no_reference": 1}
    manifest, tables = curated(tmp_path / "b", rows, checks=["math"], keep_unjudged=True)
    assert [row["sample_index"] for row in tables["curated"]] == [1]
    assert manifest.drops == {"math:wrong_answer": 1, "duplicate": 1}
    assert "tokens" not in manifest.facts  # those of a brought trace are not known
    manifest, _ = curated(tmp_path / "c", rows, checks=["finish"])
    assert manifest.drops == {"duplicate": 1}


def test_reasons_without_number_are_told_apart_so_far() -> None:
    evidence = Evidence(70_000, ["mine"])
    for row in range(70_000):
        evidence.note(row, Verdict("mine", row % 2 == 0, f"reason {row}"))
    assert evidence.summary() == {"mine": {"passed": 35_000, "failed": 35_000, "unjudged": 0}}
    assert 1000 <= len(evidence.verdicts) <= 1003 and evidence.verdicts[0].reason == "reason 0"


def chosen_of(
    rows: list[dict[str, Any]], verdicts: list[list[Verdict]], curate: Curate
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that are kept, and the others with their reason."""
    evidence = Evidence(len(rows), [verdict.check for verdict in verdicts[0]])
    for place, (row, found) in enumerate(zip(rows, verdicts, strict=True)):
        evidence.describe(place, row)
        for verdict in found:
            evidence.note(place, verdict)
    choice = choose(evidence, curate)
    reasons = [choice.reasons[code] for code in choice.codes_R]
    dropped = [{**row, "reason": reason} for row, reason in zip(rows, reasons, strict=True) if reason is not None]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    assert choice.num_kept == len(kept) and choice.drops == Counter(row["reason"] for row in dropped)
    return kept, dropped


@pytest.mark.parametrize(("prefer", "kept"), [("first", [0, 1]), ("shortest", [1, 4]), ("longest", [2, 3])])
def test_so_many_of_a_prompt_are_kept(prefer: str, kept: list[int]) -> None:
    lengths = [7, 3, 9, 9, 5]
    rows = [trace("x" * (length - 1) + str(index), sample=index) for index, length in enumerate(lengths)]
    rows.append(trace("another prompt's", prompt="q", sample=0))
    verdicts = [[Verdict("finish", True, "ended")]] * len(rows)
    chosen, dropped = chosen_of(rows, verdicts, Curate.model_validate({"max_per_prompt": 2, "prefer": prefer}))
    assert [row["sample_index"] for row in chosen if row["prompt_id"] == "p"] == kept
    assert [row["sample_index"] for row in chosen if row["prompt_id"] == "q"] == [0]
    assert {row["reason"] for row in dropped} == {"over_max_per_prompt"} and len(dropped) == 3


def naive(rows: list[dict[str, Any]], verdicts: list[list[Verdict]], curate: Curate) -> list[str | None]:
    """The reason of each row, or None, prompt by prompt as the recipe's page says it."""
    reasons: list[str | None] = []
    for row, found in zip(rows, verdicts, strict=True):
        failing = [v for v in found if v.passed is False or (v.passed is None and not curate.keep_unjudged)]
        before = [other for other, reason in zip(rows, reasons, strict=False) if reason is None and other["prompt_id"] == row["prompt_id"]]
        duplicate = "duplicate" if row["completion"] in [other["completion"] for other in before] else None
        reasons.append(f"{failing[0].check}:{failing[0].reason}" if failing else duplicate)
    for prompt in {row["prompt_id"] for row in rows}:
        mine = [place for place, row in enumerate(rows) if row["prompt_id"] == prompt and reasons[place] is None]
        for _ in range(len(mine) - curate.max_per_prompt):
            length = {
                "first": lambda p: 0,
                "shortest": lambda p: len(rows[p]["completion"]),
                "longest": lambda p: -len(rows[p]["completion"]),
            }
            last = max(mine, key=lambda p: (length[curate.prefer](p), rows[p]["sample_index"], p))
            reasons[last] = "over_max_per_prompt"
            mine.remove(last)
    return reasons


@pytest.mark.parametrize("prefer", ["first", "shortest", "longest"])
@pytest.mark.parametrize("keep_unjudged", [True, False])
def test_the_choice_is_that_of_going_through_them_one_by_one(prefer: str, keep_unjudged: bool) -> None:
    draw = random.Random(7)
    kinds = [[Verdict(check, passed, f"{passed}") for passed in (True, True, True, False, None)] for check in ("finish", "math")]
    for _ in range(20):
        rows = [trace("x" * draw.randint(1, 6), draw.choice("pqr"), draw.randint(0, 4), mark=index) for index in range(60)]
        verdicts = [[draw.choice(kind) for kind in kinds] for _ in rows]
        curate = Curate.model_validate({"max_per_prompt": 2, "prefer": prefer, "keep_unjudged": keep_unjudged})
        kept, dropped = chosen_of(rows, verdicts, curate)
        found = {row["mark"]: row.get("reason") for row in kept + dropped}
        assert [found[index] for index in range(60)] == naive(rows, verdicts, curate)


def test_a_duplicate_takes_no_place_from_others_and_a_failing_one_none_from_a_passing_one() -> None:
    rows = [trace("a", sample=0), trace("a", sample=1), trace("b", sample=2), trace("a", prompt="q"), trace("b", sample=3)]
    passed = [True, True, False, True, True]
    verdicts = [[Verdict("math", value, "x")] for value in passed]
    chosen, dropped = chosen_of(rows, verdicts, Curate(max_per_prompt=2))
    assert [(row["prompt_id"], row["sample_index"]) for row in chosen] == [("p", 0), ("q", 0), ("p", 3)]
    assert [(row["sample_index"], row["reason"]) for row in dropped] == [(1, "duplicate"), (2, "math:x")]


def test_none_kept_is_an_error_that_counts_the_reasons_and_loses_nothing(tmp_path: Path) -> None:
    write_traces(tmp_path, [trace("\\boxed{3}", sample=index) for index in range(3)] + [trace("\\boxed{2}", sample=3, reference=None)])
    with pytest.raises(DataError, match=r"none of 4 traces is kept: 1 math:no_reference, 3 math:wrong_answer.*curate\.keep_unjudged"):
        run(recipe(tmp_path, checks=["math"]))
    assert (tmp_path / "curated" / JOURNAL).exists() and not (tmp_path / "curated" / MANIFEST).exists()
    with pytest.raises(StageConflictError, match=r"curate\.keep_unjudged is False there and True here.*--redo"):
        run(recipe(tmp_path, checks=["math"], keep_unjudged=True))


def test_the_number_of_workers_makes_no_other_stage(tmp_path: Path) -> None:
    first, _ = curated(tmp_path, [trace()])
    assert run(recipe(tmp_path, workers=2)) == first


def test_a_killed_curation_ends_with_the_same_rows_and_redoes_no_finished_batch(tmp_path: Path) -> None:
    """Every 20th answer is wrong, 1 in 50 has no reference; the batches that the killed run finished are taken as they are."""
    rows = []
    for index in range(400):
        right = index if index % 20 else index + 1
        text = f"<think>\nIt is {index}.\n</think>\n\n\\boxed{{{right}}}"
        rows.append(trace(text, prompt=f"p{index}", reference=None if index % 50 == 7 else str(index)))
    write_traces(tmp_path / "run", rows)
    (tmp_path / "recipe.yaml").write_text(
        "name: test\nstudent: {model: none}\nprompts: {source: x.jsonl}\ntraces: {source: x.jsonl}\nevaluate: null\n"
    )
    words = ["-m", "distill", "curate", tmp_path / "recipe.yaml", "--curate.workers", "1", "--run_dir"]
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert commands.run([*words, tmp_path / "whole"]).returncode == 0
    journal = tmp_path / "run" / "curated" / JOURNAL
    with commands.Command([*words, tmp_path / "run"]) as process:
        process.until(lambda: journal.exists() and b"\n" in journal.read_bytes())
    assert not (tmp_path / "run" / "curated" / MANIFEST).exists(), "it ended before it was killed"
    before = journal.read_bytes()
    finished = before[: before.rfind(b"\n") + 1].count(b"\n")
    assert 0 < finished < 7
    result = commands.run([*words, tmp_path / "run"])
    assert result.returncode == 0, result.stderr[-2000:]
    counted = [int(found[0] or found[1]) for found in re.findall(r"going on from (\d+)|(\d+) of 400 traces", result.stderr)]
    assert (counted[0], counted[-1]) == (64 * finished, 400)
    for table in ("curated", "dropped", "verdicts"):
        assert read_rows(tmp_path / "run" / "curated", table) == read_rows(tmp_path / "whole" / "curated", table)
    assert [row["reason"] for row in read_rows(tmp_path / "run" / "curated", "dropped")].count("math:no_reference") == 8
    assert len(read_rows(tmp_path / "run" / "curated", "curated")) == 400 - 20 - 8


def test_a_damaged_line_of_the_journal_is_judged_again_as_its_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever line it is, no verdict moves to another trace."""
    rows = [trace("2", prompt=f"p{index}", reference=None) for index in range(130)]
    rows[::7] = [trace("<think>\n\n</think>", prompt=f"p{index}") for index in range(0, 130, 7)]
    write_traces(tmp_path / "whole", rows)
    asked = {"checks": ["math"], "keep_unjudged": True}
    undisturbed = run(recipe(tmp_path / "whole", **asked))
    assert set(undisturbed.drops) == {"math:no_answer"}
    for line in range(3):
        target = tmp_path / f"run{line}"
        write_traces(target, rows)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr("distill.stages.curate._write", lambda *_: 1 // 0)
            run(recipe(target, **asked))
        journal = target / "curated" / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        assert len(lines) == 3
        lines[line] = lines[line].replace(b"passed", b"parsed", 1)
        journal.write_bytes(b"".join(lines))
        with pytest.raises(IntegrityError, match=rf"journal\.jsonl:{line + 1}: .*Delete the line"):
            run(recipe(target, **asked))
        del lines[line]
        journal.write_bytes(b"".join(lines))
        assert run(recipe(target, **asked)).digest == undisturbed.digest
