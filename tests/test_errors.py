"""What a user sees when something is wrong: one message, which controls nothing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from distill.errors import DistillError, RecipeError, StorageError, plain_storage_errors, shown, visible
from distill.run import failures
from distill.run.failures import one_message, works_on

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202etxt", r"abc\u202etxt"),
        ("a\rb", r"a\rb"),
        ("\ud800", r"\ud800"),
        ("Zeile\n\tzwei", "Zeile\n\tzwei"),
        ("नी\u200dक", "नी\u200dक"),
    ],
)
def test_foreign_text_controls_no_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_what_is_cut_is_counted() -> None:
    assert visible("x" * 1000, limit=3) == "xxx... (1,000 characters)"


def test_a_value_is_shown_short_and_without_controls() -> None:
    assert shown("a\x1b[2J\n") == r"'a\x1b[2J\n'" and len(shown("x" * 2_000_000)) < 120


def ends(capsys: pytest.CaptureFixture[str], error: BaseException) -> tuple[int, str]:
    """Exit code and message of a command that ends with an error."""
    with pytest.raises(SystemExit) as caught, one_message():
        raise error
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("error: ") and "Traceback" not in written.err
    return int(str(caught.value.code)), written.err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(failures, "_runs", [])
    works_on(tmp_path / "run")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_what_nobody_foresaw_says_how_to_go_on_and_what_to_send(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["distill", "run", "r.yaml", "--train.trainer_args.hub_token", "hf_abc", "--student.api_key=abc"])
    code, message = ends(capsys, KeyError("a\x1bb"))
    (record,) = run.glob("failed-*.log")
    assert code == 1 and len(message) < 600 and "\x1b" not in message
    assert f"What is finished in {run} is kept: the same command goes on from there." in message and f"report it with {record}" in message
    text = record.read_text()
    assert "Traceback" in text and "KeyError" in text and "torch" in text and "abc" not in text and "run r.yaml" in text


def test_without_a_run_the_record_is_a_temporary_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_runs", [tmp_path / "absent"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, message = ends(capsys, ZeroDivisionError())
    (record,) = tmp_path.glob("failed-*.log")
    assert str(record) in message and "No run was begun" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/d/x"), ["/d/x", "no space left", "Free some space"]),
        (OSError(30, "Read-only file system", "/d/x"), ["/d/x", "read-only", "Set run_dir"]),
        (NotADirectoryError(20, "Not a directory", "a/b"), ["a/b", "file where a folder should be"]),
        (FileExistsError(17, "File exists", "a/b"), ["a/b", "move it away"]),
        (OSError(36, "File name too long", "x" * 2000), ["too long", "shorter"]),
        (OSError(40, "Too many levels of symbolic links", "a"), ["leads back to itself"]),
        (PermissionError(13, "Permission denied", b"a"), ["a: permission denied", "permissions"]),
        (OSError(24, "Too many open files"), ["ulimit -n"]),
        (MemoryError(), ["memory was not enough"]),
        (RecursionError("maximum recursion depth exceeded"), ["not foreseen", "RecursionError"]),
        (OSError("can't load this or that"), ["not foreseen", "can't load this or that"]),
        (DistillError("here: wrong. Do that."), ["here: wrong. Do that."]),
    ],
)
def test_every_error_ends_in_one_short_message(error: Exception, words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = ends(capsys, error)
    assert code == 1 and len(message) < 1000 and all(word in message for word in words), message


def test_processes_of_a_launch_say_of_their_recipe_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(failures, "_LAST_WORD_S", 0)
    with pytest.raises(SystemExit) as caught, one_message():
        raise RecipeError("recipe.yaml: wrong.")
    assert caught.value.code == 1 and capsys.readouterr().err == ""
    assert "gone" in ends(capsys, DistillError("this one's file is gone."))[1]


def test_the_keyboard_stops_without_a_word_about_an_error_of_the_kit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = ends(capsys, KeyboardInterrupt())
    assert code == 130 and "goes on from there" in message and not list(run.iterdir())


def test_a_library_gets_errors_of_the_kit(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = distill.load_recipe("quickstart", {"run_dir": tmp_path / "file" / "run", "prompts.max_prompts": 5})
    with pytest.raises(StorageError, match="file where a folder should be"):
        distill.run_stage("prompts", recipe)
    with plain_storage_errors(), pytest.raises(OSError, match="of a library"):
        raise OSError("of a library")


def command(*words: str | bytes, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("more", {})}  # type: ignore[dict-item]
    line = [sys.executable, *words]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def test_a_disk_that_takes_no_more_is_one_message(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    result = command("-m", "distill", "prompts", "quickstart", "--run_dir", str(tmp_path / "run"), preexec_fn=limit)
    assert result.returncode == 1 and result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert f"error: a file of {tmp_path / 'run'}: file too large" in result.stderr and "ulimit -f" in result.stderr


def test_a_folder_that_is_gone_under_the_command_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    code = f"import os; os.rmdir({str(folder)!r}); from distill.cli import main; main()"
    result = command("-c", code, "prompts", "quickstart", cwd=folder)
    assert result.returncode == 1 and result.stderr == "error: the folder this command is run in was deleted. Change into another one.\n"


def test_an_ascii_terminal_shows_what_it_can(tmp_path: Path) -> None:
    more = {"PYTHONIOENCODING": "ascii"}
    words = ("--config", "quickstart", "--name", "größe", "--run_dir", str(tmp_path))
    for line in (("-m", "distill", "check", "--quick", *words[1:]), ("-m", "distill.train", *words)):
        result = command(*line, more=more)
        assert result.returncode == 1 and result.stderr.startswith("error: command line: name:") and "Traceback" not in result.stderr
    assert command("-m", "distill", "recipes", more=more).returncode == 0
