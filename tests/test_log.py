"""What is said while work goes on: bars on a terminal, lines elsewhere, nothing quietly; and seconds over a kill."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.run import clock, log
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.log import progress, say
from distill.run.manifest import CLOCK

ROOT = Path(__file__).resolve().parent.parent
TIME = r"^\d\d:\d\d:\d\d "


class Seconds:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (log, clock):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    monkeypatch.delenv("DISTILL_QUIET", raising=False)
    return Seconds(monkeypatch)


def work(seconds: Seconds, steps: int, each_s: float, **options: int) -> None:
    with progress(steps, "traces", "generate", **options) as bar:
        for number in range(options.get("done", 0), steps):
            seconds.pass_by(each_s)
            bar.update()
            bar.set_postfix_str(f"loss {number}")


def test_short_work_has_a_line_at_its_start_and_its_end(seconds: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    work(seconds, 100, 0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and re.match(TIME + "generate: 100 traces$", lines[0])
    assert re.match(TIME + r"generate: 100 of 100 traces \(100%\), 10.0 traces/s, took 10.0 s, loss 99$", lines[1])


def test_long_work_has_one_for_every_tenth_or_five_minutes(seconds: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    work(seconds, 1000, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 + 9
    assert re.match(TIME + r"generate: 500 of 1,000 traces \(50%\), 2.0 traces/s, 4 min 10 s left, loss 498$", lines[5])
    work(seconds, 100, 600)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 + 99 and "600.0 s each" in lines[50]
    work(seconds, 100, 4)
    assert len(capsys.readouterr().err.splitlines()) == 2 + 9
    work(seconds, 10, 1)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_work_that_goes_on_counts_its_rate_from_there(seconds: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    work(seconds, 100, 1, done=80)
    first, last = capsys.readouterr().err.splitlines()
    assert "100 traces, going on from 80" in first and "1.0 traces/s, took 20.0 s" in last


def test_passing_work_is_said_only_where_it_took_time(seconds: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    for each_s, lines in ((0.001, 0), (1.0, 1)):
        with progress(10, "rows", "read", passing=True) as bar:
            seconds.pass_by(10 * each_s)
            bar.update(10)
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_quiet_says_results_alone(seconds: Seconds, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_QUIET", "1")
    work(seconds, 100, 60)
    say("a note")
    say("a result", result=True)
    assert capsys.readouterr() == ("a result\n", "")
    monkeypatch.setenv("RANK", "1")
    say("a result", result=True)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar_and_a_file_has_none(tmp_path: Path) -> None:
    code = "from distill.run.log import progress, say\nwith progress(3, 'traces', 'generate') as bar:\n  bar.update(3)\n  say('between')"
    command = [sys.executable, "-c", code]
    ours, theirs = pty.openpty()
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT)
    assert shown.stdout == "between\n" and b"\r" in os.read(ours, 10_000)
    os.close(ours), os.close(theirs)
    logged = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert logged.stdout == "between\n" and "\r" not in logged.stderr and logged.stderr.count("\n") == 2


def test_the_seconds_of_all_pieces_count(seconds: Seconds, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    first = Clock(tmp_path / "stage")
    work(seconds, 10, 10.0)
    del first  # killed
    seconds.pass_by(1000)
    second = Clock(tmp_path / "stage")
    assert second.wall_s == 100.0
    seconds.pass_by(7)
    assert second.facts()["wall_s"] == 107.0
    assert Clock().wall_s == 0.0


def test_a_finished_stage_keeps_no_clock_and_one_that_made_nothing_is_no_stage(seconds: Seconds, tmp_path: Path) -> None:
    with StageFolder(tmp_path / "stage", "curate", {"a": 1}) as out:
        running = Clock(out.path)
        work(seconds, 10, 10.0)
        assert (out.path / CLOCK).exists() and running.wall_s == 100.0
    with StageFolder(tmp_path / "stage", "curate", {"a": 2}) as out:  # not refused: nothing was made of a = 1
        assert Clock(out.path).wall_s == 0.0
        running = Clock(out.path)
        work(seconds, 10, 10.0)
        out.finish(facts=running.facts())
    work(seconds, 10, 10.0)
    assert not (tmp_path / "stage" / CLOCK).exists()


@pytest.mark.parametrize("words", ["--quiet prompts quickstart", "prompts --quiet quickstart", "prompts quickstart --seed 1 --quiet"])
def test_the_command_is_quiet_wherever_the_word_stands(words: str, tmp_path: Path) -> None:
    code = "import os\nfrom distill.run.log import say\nimport distill.pipeline\nimport distill.cli\n"
    code += "distill.pipeline.run_stage = lambda *a, **k: (say('note'), say('result', result=True), print(os.environ['DISTILL_QUIET']))\n"
    code += "distill.cli.main()"
    result = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "result\n1\n" and result.returncode == 0, result.stderr
