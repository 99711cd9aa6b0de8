"""Stages, runs and servers that a signal ends: with exit code 75 and no traceback, and gone on with to the same rows."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import commands
import pytest
from ending import told
from test_rounds import teacher, write_recipe  # noqa: F401

import distill
from distill.errors import EARLY, MissingStageError
from distill.recipe.reading import load_recipe
from distill.run import early
from distill.run.early import EndedEarly
from distill.run.failures import one_message
from distill.run.manifest import MANIFEST, read_manifest
from distill.stages import folder, steps_of

HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, teacher: Path) -> Path:  # noqa: F811
    return write_recipe(tmp_path, tiny_model_dir, teacher)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM")])
def test_a_stage_ends_behind_a_unit_that_is_on_disk(number: int, name: str, recipe: Path) -> None:
    assert commands.run(["-m", "distill", "prompts", recipe]).returncode == 0
    ended = told(f"0:generate:{name}", ["generate", recipe, "--generate.batch_size", "4"], recipe.parent)
    run = recipe.parent / "run"
    assert ended.returncode == EARLY and "Traceback" not in ended.stderr
    said = ended.stderr.splitlines()[-1]
    assert said == f"ended early by {name}. What is finished in {run} is kept: the same command goes on from there."
    assert (run / "traces" / "journal.jsonl").stat().st_size and not (run / "traces" / MANIFEST).exists()
    gone_on = commands.run(["-m", "distill", "generate", recipe, "--generate.batch_size", "4"])
    assert gone_on.returncode == 0 and "going on from" in gone_on.stderr


@pytest.mark.slow
def test_a_run_that_is_told_to_end_in_every_stage_ends_with_the_same(recipe: Path, tmp_path: Path) -> None:
    """Each bar of progress moves on at least once; the training of a round among them."""
    bars = ["generate", "check_traces", "train", "round_1_rollouts", "score", "evaluate_base", "check_answers", "compare"]
    words = ["run", recipe, "--no-check", "--generate.batch_size", "4", "--score.batch_size", "4"]
    for place in bars:
        ended = told(f"0:{place}:SIGTERM 0:{place}:SIGUSR1", words, recipe.parent)
        assert ended.returncode == EARLY, (place, ended.stdout[-2000:], ended.stderr[-2000:])
        assert "Traceback" not in ended.stderr
    assert told("", words, recipe.parent).returncode == 0
    other = tmp_path / "other"
    assert commands.run(["-m", "distill", *words, "--run_dir", other]).returncode == 0
    asked, undisturbed = load_recipe(recipe), load_recipe(recipe, ["--run_dir", str(other)])
    for step in steps_of(asked):
        if step.stage in ("report", "export"):
            continue
        mine, theirs = read_manifest(folder(asked, *step)), read_manifest(folder(undisturbed, *step))
        assert mine.tables == theirs.tables and mine.drops == theirs.drops, step
        assert {name: digest for name, digest in mine.files.items() if step.stage in ("score", "train")} == {
            name: digest for name, digest in theirs.files.items() if step.stage in ("score", "train")
        }, step


def test_between_two_stages_a_run_ends(recipe: Path) -> None:
    """What came while a student's weights are written ends the run behind that stage; here behind the prompts, which have no bar."""
    ended = told("0:run_stage:SIGUSR1", ["run", recipe, "--no-check"], recipe.parent)
    assert ended.returncode == EARLY
    distill.read_table(recipe.parent / "run" / "prompts", "train")
    with pytest.raises(MissingStageError):
        distill.read_table(recipe.parent / "run" / "traces", "traces")


def test_from_python_no_signal_is_handled(recipe: Path) -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    distill.run_stage("prompts", distill.load_recipe(recipe))
    assert [signal.getsignal(number) for number in HANDLED] == before and early.asked() is None


def test_off_the_main_thread_nothing_is_handled() -> None:
    seen: list[object] = []

    def command() -> None:
        with one_message(), early.held(), early.released():
            seen.extend(signal.getsignal(number) for number in HANDLED)

    before = [signal.getsignal(number) for number in HANDLED]
    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert seen == before


def test_what_is_held_is_not_cut_and_what_hangs_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "UNIT_S", 1e-3)
    monkeypatch.setattr(early, "_LOST_S", 1e-3)
    before = [signal.getsignal(number) for number in HANDLED]
    with early.ends_on_signals(), pytest.raises(EndedEarly, match="ended early by SIGTERM"):  # whatever it is at when it comes
        with early.held():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGALRM)  # its time is over
            assert early.asked() == "SIGTERM"
            early.check()
            with pytest.raises(EndedEarly), early.released():
                early.check()
        signal.pause()
    assert [signal.getsignal(number) for number in HANDLED] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_process_that_was_forked_ignores_the_news_and_dies_of_the_end() -> None:
    with early.ends_on_signals():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert early.asked() is None


def test_a_terminal_that_is_gone_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end, early.ends_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert end.value.code == 128 + signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with early.ends_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
