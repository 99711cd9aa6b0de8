"""The frame and the table of `scripts/bench_gpu.py`, and all of it in a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from gpu_sections import memory, steps
from gpu_sections.frame import CUT, ITSELF, Bench, Case, Cases, Figures, Row, Run, Section, against, load_runs, run_sections, save_runs
from gpu_sections.table import write_table

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SECTIONS = [Section("step", "a step", 1, lambda bench: iter(())), Section("loss", "the loss alone", 1, lambda bench: iter(()))]  # type: ignore


def run_on(card: str, *rows: Row, date: str = "2026-11-26", revision: str | None = "abc123") -> Run:
    return Run(card, 79.6, "580.1", {"torch": "2.11.0", "triton": "3.6.0"}, revision, date, list(rows))


def table(tmp_path: Path, *runs: Run) -> str:
    write_table(tmp_path / "deep" / "bench.md", SECTIONS, runs)
    return (tmp_path / "deep" / "bench.md").read_text()


def part(text: str, heading: str, card: str) -> str:
    """What stands below a card's heading in a section."""
    section = text.split(f"\n## {heading}")[1].split("\n## ")[0]
    return section.split(f"\n### {card}\n")[1].split("\n### ")[0].strip()


def section(name: str, cases: Callable[[Bench], Cases], share: float = 1) -> Section:
    return Section(name, name, share, cases)


def rows_of(*sections: Section, minutes: float = 60) -> list[Row]:
    rows: list[Row] = []
    run_sections(sections, CPU, True, minutes, rows.append)
    return rows


def fail(message: str) -> Figures:
    raise ValueError(message)


def test_a_table_without_runs_says_how_to_make_one(tmp_path: Path) -> None:
    for runs in ([], [run_on("H100")]):
        text = table(tmp_path, *runs)
        assert "No card yet" in text and "python scripts/bench_gpu.py" in text and "##" not in text


def test_every_card_has_a_table_in_every_section(tmp_path: Path) -> None:
    slow = run_on("T4", Row("step", "SFT", {"step_ms": 1234.5}, 1))
    fast = run_on(
        "H100", Row("step", "SFT", {"step_ms": 98.76, "tokens_per_s": 151_936.0}, 1), Row("loss", "ours", {"time_of_trl": 0.5}, 1)
    )
    text = table(tmp_path, slow, fast)
    assert text.index("## A step") < text.index("## The loss alone") < text.index("## Runs")
    assert part(text, "A step", "T4").splitlines() == ["| case | step, ms |", "| --- | ---: |", "| SFT | 1,234 |"]
    assert part(text, "A step", "H100").splitlines()[2] == "| SFT | 98.76 | 151,936 |"
    assert part(text, "The loss alone", "T4") == "not measured yet"
    assert part(text, "The loss alone", "H100").splitlines()[0] == "| case | time, of TRL |"
    assert "| 1 | T4 | 79.6 | 580.1 | 2026-11-26 | abc123 | torch 2.11.0, triton 3.6.0 |" in text


def test_the_newest_row_of_a_case_is_shown_and_other_old_ones_stay(tmp_path: Path) -> None:
    old = run_on("H100", Row("step", "SFT", {"step_ms": 100.5}, 1), Row("step", "KD", {"step_ms": 110.5}, 1), Row("step", "x", {}, 1, CUT))
    other = run_on("T4", Row("step", "KD", {"step_ms": 999.5}, 1))
    new = run_on("H100", Row("step", "KD", {"peak_gib": 20.25}, 1), Row("step", "SFT", {}, 0, CUT), revision=None)
    lines = part(table(tmp_path, old, other, new), "A step", "H100").splitlines()
    assert lines[0] == "| case | step, ms | peak, GiB | why not | run |"
    assert lines[2:] == ["| SFT | 100.5 |  |  | 1 |", "| KD |  | 20.25 |  | 3 |", f"| x |  |  | {CUT} | 1 |"]


def test_a_failure_says_why_and_breaks_no_table(tmp_path: Path) -> None:
    old = run_on("H100", Row("step", "KD", {"step_ms": 1.0}, 1), Row("step", ITSELF, {}, 1, "gone by now"))
    new = run_on("H100", Row("step", "KD", {}, 1, "Error: a | b\n\nc \\ d"), Row("step", "SFT", {"step_ms": float("inf")}, 1))
    text = table(tmp_path, old, new)
    assert part(text, "A step", "H100").splitlines()[2:] == ["| KD |  | Error: a \\| b c \\\\ d |", "| SFT | inf |  |"]
    assert "gone by now" not in text


def test_names_become_heads_and_numbers_keep_what_counts(tmp_path: Path) -> None:
    figures = {
        "step_ms": 12.0,
        "step_of_trl": 1.256,
        "peak_gib": 0.01234,
        "of_bare": 0.9123,
        "bare_tokens_per_s": 12_345.6,
        "bytes_per_token": 7.0,
        "writer_share": 0.0,
        "loss_of_kd": 123.45,
        "gib_per_1k_tokens": -1.6e-8,
        "tokens_in_24_gib": 130_048.0,
    }
    head, _, row = part(table(tmp_path, run_on("H100", Row("step", "a", figures, 1))), "A step", "H100").splitlines()
    assert head.split(" | ")[1:] == [
        *("step, ms", "step, of TRL", "peak, GiB", "of bare"),
        *("bare tokens/s", "bytes/token", "writer share", "loss, of KD", "GiB/1k tokens", "tokens in 24 GiB |"),
    ]
    assert row.split(" | ")[1:] == ["12", "1.26", "0.0123", "0.912", "12,346", "7", "0", "123.5", "0", "130,048 |"]


def test_a_failing_case_is_a_row_and_the_next_goes_on() -> None:
    def cases(bench: Bench) -> Cases:
        yield Case("bad", lambda: fail("first\nsecond"))
        yield Case("empty", lambda: next(iter([])))
        yield Case("good", lambda: {"x_ms": 1.23456})
        fail("between")

    rows = rows_of(section("a", cases), section("b", lambda bench: (Case("b", lambda: {}) for _ in range(1))))
    assert [(row.section, row.case, row.figures) for row in rows] == [
        *(("a", "bad", {}), ("a", "empty", {}), ("a", "good", {"x_ms": 1.235}), ("a", ITSELF, {}), ("b", "b", {})),
    ]
    assert [row.problem for row in rows] == ["ValueError: first second", "StopIteration: ", None, "ValueError: between", None]


def test_what_a_case_found_is_sent_and_rows_are_kept_as_they_come() -> None:
    events: list[object] = []

    def measure(name: str) -> Figures:
        events.append(f"measures {name}")
        return {"x_ms": 2.0} if name != "second" else fail("no")

    def cases(bench: Bench) -> Cases:
        for name in ("first", "second", "third"):
            events.append((yield Case(name, lambda name=name: measure(name))))  # type: ignore[misc]

    run_sections([section("a", cases)], CPU, True, 60, lambda row: events.append(f"keeps {row.case}"))
    assert events == [
        *("measures first", "keeps first", {"x_ms": 2.0}),
        *("measures second", "keeps second", None),
        *("measures third", "keeps third", {"x_ms": 2.0}),
    ]
    assert against({"x_ms": 2.0, "of_y": 1.0}, {"x_ms": 4.0}, "z") == {"x_ms": 2.0, "of_y": 1.0, "x_of_z": 0.5}
    assert against({"x_ms": 2.0}, None, "z") == against({"x_ms": 2.0}, {"x_ms": 0.0}, "z") == {"x_ms": 2.0}


def test_without_time_every_case_says_so_and_none_is_measured() -> None:
    def cases(bench: Bench) -> Cases:
        for name in ("first", "second"):
            assert (yield Case(name, lambda: fail("was measured"))) is None

    rows = rows_of(section("a", cases), section("b", cases), minutes=0)
    assert [(row.section, row.case, row.problem) for row in rows] == [(name, case, CUT) for name in "ab" for case in ("first", "second")]


def test_time_that_is_left_over_goes_to_the_sections_behind() -> None:
    left: dict[str, float] = {}

    def noting(name: str) -> Section:
        def cases(bench: Bench) -> Cases:
            left[name] = bench.allowance.left_s
            yield Case(name, lambda: {})

        return section(name, cases, share=3 if name == "c" else 1)

    rows_of(*map(noting, "abc"), minutes=1000)
    assert [round(seconds / 1000) for seconds in left.values()] == [12, 15, 60]  # of 60,000 s: a fifth, a fourth, all


def test_runs_come_back_as_they_were_written(tmp_path: Path) -> None:
    runs = [run_on("H100", Row("step", "SFT", {"step_ms": 1.5}, 2.0), Row("step", "KD", {}, 0.0, "no"), revision=None), run_on("T4")]
    assert load_runs(tmp_path / "runs.json") == []
    save_runs(tmp_path / "runs.json", runs)
    assert load_runs(tmp_path / "runs.json") == runs
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]


def test_a_length_that_finds_no_memory_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[set[str]] = []

    def make_trainer(who: steps.Who, model: Any, *rest: Any, **options: Any) -> Any:
        given.append({name for name, _ in model.named_parameters()})
        trainer = steps.make_trainer(who, model, *rest, **options)
        if len(given) == 1:  # the adapter is on the model
            raise torch.OutOfMemoryError
        return trainer

    monkeypatch.setattr(memory, "make_trainer", make_trainer)
    trial = memory._Trial(Bench(CPU, rehearse=True), "1.5B", in_4_bits=False)
    assert trial.longest(None, {"base_gib": 0.0, "gib_per_1k_tokens": 1.0}, 24)["tokens"] == int(memory.SHARES[1] * 64)
    assert len(given) == 2 and given[0] == given[1]


@pytest.mark.slow
def test_the_rehearsal_measures_every_case(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench_gpu.py"),
        "--rehearse",
        "--minutes",
        "30",
        "--out",
        str(tmp_path / "rows.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = json.loads((tmp_path / "rows.json").read_text())
    assert {row["section"] for row in run["rows"]} == {"kd_step", "trl", "tests", "loss", "longest", "score", "generate", "fp16"}
    assert [row for row in run["rows"] if row["problem"] and not row["problem"].startswith("skipped: ")] == []
    text = (tmp_path / "rows.md").read_text()
    assert "not measured yet" not in text and all(row["case"] in text for row in run["rows"])
