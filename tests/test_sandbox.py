"""What the sandbox says of itself, where it is not to be had, and that it ends with whoever started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import attacks
import psutil
import pytest

from distill.checks import bubblewrap, sandbox
from distill.checks.code import judge_code
from distill.checks.runs import Place
from distill.checks.sandbox import place_for
from distill.checks.seccomp import seccomp_filter
from distill.recipe.code import CodeSettings

ROOT = Path(__file__).resolve().parent.parent
RIGHT = "```python\ndef double(x):\n    return 2 * x\n```"
TESTS = "assert double(2) == 4"


@pytest.fixture
def protected() -> Place:
    place = place_for(CodeSettings())
    if isinstance(place, str):
        pytest.skip(f"no sandbox here: {place}")
    return place


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without bubblewrap."""
    monkeypatch.setattr(bubblewrap, "_bwrap", lambda: None)


def test_every_protection_is_proved(protected: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert sandbox.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said] == [
        ["holds", name] for name in ("start", "files", "network", "processes", "memory", "file", "output", "time")
    ]


def test_the_proofs_can_fail() -> None:
    """Without the sandbox files and network are there, and more is forked than may be."""
    place = Place(bubblewrap.interpreter_of(None), protected=False)
    broken = {proof.name for proof in sandbox.proofs(place) if not proof.holds}
    assert {"files", "network", "processes"} <= broken


@pytest.mark.usefixtures("without")
def test_without_a_sandbox_code_is_run_only_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge_code(RIGHT, TESTS, CodeSettings()) == ("code", None, "no_sandbox: bubblewrap (bwrap) is not installed")
    assert judge_code(RIGHT, TESTS, CodeSettings(unprotected=True)) == ("code", True, "tests_passed")
    assert sandbox.main() == 1 and "not installed" in capsys.readouterr().out


def test_a_broken_protection_is_no_sandbox(monkeypatch: pytest.MonkeyPatch, protected: Place) -> None:
    """Processes that no limit holds: what RLIMIT_NPROC is for root."""
    sandbox._broken.cache_clear()
    limits = bubblewrap._limits
    monkeypatch.setattr(bubblewrap, "_limits", lambda settings, protected: limits(settings, protected) | {"processes": 500})
    try:
        verdict = judge_code(RIGHT, TESTS, CodeSettings())
    finally:
        sandbox._broken.cache_clear()
    assert verdict.passed is None and verdict.reason.startswith("no_sandbox: processes: 40 of 40 forks went through")


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/true"])
def test_an_interpreter_that_is_none_is_named(python: str) -> None:
    verdict = judge_code(RIGHT, TESTS, CodeSettings(python=python))
    assert verdict.passed is None and python in verdict.reason


def test_an_interpreter_brings_its_packages(protected: Place) -> None:
    code = "```python\nimport numpy as np\ndef f(x):\n    return np.arange(x)\ndef g(x):\n    return np.float32(x)\n```"
    tests = "import numpy as np\nassert f(3).sum() == 3 and (f(3) == np.array([0, 1, 2])).all() and g(2) == 2"
    assert judge_code(code, tests, CodeSettings(python=sys.executable, timeout_s=60)) == ("code", True, "tests_passed")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_ends_in_an_answer_whichever_way_it_takes(machine: str) -> None:
    """Each jump of the filter stays in it, as the kernel asks, and no step is behind its end."""
    rules = seccomp_filter(machine)
    assert rules is not None and len(rules) % 8 == 0 and len(rules) // 8 < 4096
    steps = [(rules[i] | rules[i + 1] << 8, rules[i + 2], rules[i + 3]) for i in range(0, len(rules), 8)]
    for place, (code, yes, no) in enumerate(steps):
        if code & 7 == 5:  # a jump
            assert place + 1 + max(yes, no) < len(steps)
    assert steps[-1][0] == 6
    assert seccomp_filter("riscv64") is None


WATCHED = """
import sys
from distill.checks.runs import run_program
from distill.checks.sandbox import place_for
from distill.recipe.code import CodeSettings
settings = CodeSettings(timeout_s=600)
place = place_for(settings)
print("ready", flush=True)
run_program(sys.argv[1], "", settings, place)
"""


@pytest.mark.slow
def test_a_killed_kit_leaves_nothing_running(protected: Place, tmp_path: Path) -> None:
    name = f"left{tmp_path.stat().st_ino}"[:15]
    source = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n{attacks.CHILDREN}"
    kit = subprocess.Popen([sys.executable, "-c", WATCHED, source], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        while len(called(name)) < 4:
            assert kit.poll() is None
    finally:
        kit.kill()
        kit.communicate()
    assert psutil.wait_procs(called(name), timeout=20)[1] == []


def called(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == name:
                found.append(process)
        except psutil.Error:
            continue
    return found
