"""Checks of traces: their form, and whether the answer equals the reference, whatever the answer does to the checker."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.checks import Verdict
from distill.checks.form import answer_of, check_finish, check_think
from distill.checks.math import MathJudge, Pair

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"  # sympy tries to write the number out


@pytest.mark.parametrize(
    ("finish_reason", "completion", "passed", "reason"),
    [
        (None, "\u200b", False, "empty"),
        (None, "<think>\nadd", False, "truncated"),
        (None, "<think>add</think>The answer is \\boxed{", False, "truncated"),
        (None, "<think>a</think>\\boxed{\\frac{1}{2}", False, "truncated"),
        (None, "<think>\\boxed{ or so</think>\\boxed{\\{1\\}}", True, "brought"),
        (None, "```python\nx = 1", False, "truncated"),
        (None, "<think>add</think>\n\n" + "!" * 500, False, "loops"),
        ("stop", "so " + "and on " * 40, False, "loops"),
        ("stop", "1" + "0" * 100, True, "ended"),
        ("length", "!" * 500, False, "truncated"),
        ("stop", "x", True, "ended"),
        ("length", "x", False, "truncated"),
        ("error", "x", False, "error"),
        (None, "x", True, "brought"),
        (None, " \n", False, "empty"),
    ],
)
def test_finish(finish_reason: str | None, completion: str, passed: bool, reason: str) -> None:
    assert check_finish(finish_reason, completion) == Verdict("finish", passed, reason)


@pytest.mark.parametrize(
    ("answer", "is_final"),
    [
        ("We add 4 and 4. That gives 8, hence the", False),
        ("We add 1 and 1. That gives 2 and so", False),
        ("We add 1 and 1.\n\nThat gives 2.", False),
        ("The answer to this is found by adding 4 and 4 first and then", False),
        ("That gives 6.\n\n\\boxed{6}", True),
        ("So \\fbox{6} it is.", True),
        ("The answer is 8.", True),
        ("The answer is 8, because 4 and 4 are eight.", True),
        ("\u6240\u4ee5\u7b54\u6848\u662f\uff1a8", True),
        ("Also lautet die Antwort: 8", True),
        ("That gives **8**.", True),
        ("8", True),
        ("8 red apples", True),
        ('{"item": "lamp", "number": 3, "day": 1}', True),
        ("Here it is:\n\n```python\nprint(8)\n```", True),
        ("<answer>8</answer>", True),
    ],
)
def test_a_brought_trace_of_which_nobody_says_how_it_ended_has_its_answer_last(answer: str, is_final: bool) -> None:
    completion = f"<think>add</think>\n\n{answer}"
    expected = Verdict("finish", True, "brought") if is_final else Verdict("finish", False, "no_final_answer")
    assert check_finish(None, completion, asks_final=True) == expected
    assert check_finish(None, completion).passed and check_finish("stop", completion, asks_final=True).passed


THINK = {
    "<think>\na\n</think>\n\nb": "well_formed",
    " \n<think>a</think>b": "well_formed",
    "b": "no_reasoning",
    "a</think>b": "no_reasoning",
    "": "no_reasoning",
    "First <think>a</think>b": "text_before_reasoning",
    "<think>a": "reasoning_not_closed",
    "<think>a<think>b</think>c": "several_reasonings",
    "<think>a</think>b</think>c": "several_reasonings",
    "<think>a</think>b<think>c</think>d": "several_reasonings",
    "<think> \n</think>b": "empty_reasoning",
    "<think>\u200b\n</think>b": "empty_reasoning",
    "<think>a</think>\u2060": "no_answer",
    "\ufeff<think>a</think>b": "well_formed",
    "<think>a</think>\n ": "no_answer",
}


@pytest.mark.parametrize("completion", THINK)
def test_think(completion: str) -> None:
    assert check_think(completion) == Verdict("think", THINK[completion] == "well_formed", THINK[completion])


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),  # the template has opened the reasoning
        ("b", "b"),
        ("<think>a", None),
        ("<think>a</think>b<think>c", None),
        ("<think>a</think>b<think>c</think>d", "d"),
    ],
)
def test_the_answer_stands_after_the_reasoning(completion: str, answer: str | None) -> None:
    assert answer_of(completion) == answer


EQUAL = [
    ("72", r"\boxed{72}"),
    ("72", "The answer is 72."),
    ("72", r"It was 80 at first, so \boxed{72} of the 90 are left."),
    ("72", r"\boxed{73} was wrong. " + "We go through all of it once more, from the beginning to the very end. " * 2 + r"\boxed{72}"),
    ("5,600", r"\boxed{5600}"),
    ("5600", r"\boxed{5,600}"),
    ("1,234,567", r"\boxed{1234567}"),
    ("1500", r"\boxed{1\,500}"),
    ("1500", r"\boxed{1{,}500}"),
    ("1500", r"\boxed{1 500}"),
    ("1500", r"\boxed{1,\!500}"),
    ("1\\,500\\,000", r"\boxed{1,500,000}"),
    ("$18", r"\boxed{18}"),
    ("18", r"\boxed{\$18.00}"),
    ("18.", r"\boxed{18}"),
    ("-5", r"\boxed{-5}"),
    ("1/2", r"\boxed{0.5}"),
    ("1/2", r"\boxed{\frac{1}{2}}"),
    ("$\\frac12$", r"\boxed{0.5}"),
    ("50%", r"\boxed{50\%}"),
    ("3:30", r"\boxed{3:30}"),
    ("x=5", r"\boxed{5}"),
    ("5", r"\boxed{x=5}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    ("x+1", r"\boxed{1+x}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ("(1,2)", r"\boxed{(1,2)}"),
    (r"Thus \boxed{7}.", r"\boxed{7}"),
    ("Paris", r"\boxed{\text{Paris}}"),
    ("2^{10}", r"\boxed{1024}"),
]
DIFFERENT = [
    ("72", r"\boxed{73}"),
    ("72", r"72 or \boxed{?}"),  # the box is the answer, though it can't be read
    ("72", r"\boxed{72} or \boxed{73}"),  # guesses
    ("501", r"\boxed{1\,500}"),  # not 1 + 500
    ("501", r"\boxed{1 500}"),
    ("5", r"\boxed{-5}"),
    ("12345678901234567890", r"\boxed{12345678901234567891}"),
    ("3:30", r"\boxed{3:45}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("Paris", r"\boxed{London}"),
    ("2\\sqrt{3}", r"\boxed{2}"),
]
OTHER: list[tuple[Pair, Verdict]] = [
    (("<think>so 72</think>\\boxed{72}", None), Verdict("math", None, "no_reference")),
    (("<think>so \\boxed{72}", "72"), Verdict("math", False, "no_answer")),
    (("<think>so \\boxed{72}</think>", "72"), Verdict("math", False, "no_answer")),
    (("<think>so \\boxed{72}</think>I do not know.", "72"), Verdict("math", False, "no_answer")),
    (("<think>not 73</think>\\boxed{72}", "72"), Verdict("math", True, "right")),
    (("<think>\\boxed{72}</think>\\boxed{73}", "72"), Verdict("math", False, "wrong_answer")),
    (("<think>a</think>\\boxed{72}", "#"), Verdict("math", False, "wrong_answer")),
    (("<think>a</think>\\boxed{#}", "#"), Verdict("math", True, "right")),
    (("<think>a</think>\\boxed{72}", ""), Verdict("math", None, "no_reference")),
]


def test_what_is_equal_what_is_not_and_what_cannot_be_judged() -> None:
    pairs: list[Pair] = [(answer, reference) for reference, answer in EQUAL + DIFFERENT] + [pair for pair, _ in OTHER]
    expected = [Verdict("math", True, "right")] * len(EQUAL)
    expected += [Verdict("math", False, "wrong_answer")] * len(DIFFERENT)
    expected += [verdict for _, verdict in OTHER]
    calls = []
    with MathJudge(timeout_s=30, workers=1) as math:
        verdicts = math.judge(pairs, lambda: calls.append(1))
        assert math.judge([]) == []
    wrong = [(pair, got, wanted) for pair, got, wanted in zip(pairs, verdicts, expected, strict=True) if got != wanted]
    assert wrong == []
    assert len(calls) == len(pairs)


def test_an_endless_check_is_killed_and_its_neighbours_are_judged() -> None:
    """A neighbour waits for the kill and for a new worker longer than its limit, which is for its own check alone."""
    pairs: list[Pair] = [(r"\boxed{1}", "1"), (ENDLESS, "5"), (r"\boxed{2}", "2"), (ENDLESS, "6"), (r"\boxed{3}", "4")]
    with MathJudge(timeout_s=1, workers=1) as math:
        verdicts = math.judge(pairs)
        assert [(verdict.passed, verdict.reason) for verdict in verdicts] == [
            (True, "right"),
            (None, "checker_timed_out"),
            (True, "right"),
            (None, "checker_timed_out"),
            (False, "wrong_answer"),
        ]
        assert math.judge(pairs[:1]) == verdicts[:1]  # the pool goes on


def test_a_slow_answer_holds_nothing_up_and_the_source_is_read_only_so_far_ahead() -> None:
    """One of two workers is busy for long; meanwhile the other judges far more than was on the way when that began."""
    taken, ahead, order = 0, [], []

    def pairs() -> Iterator[tuple[int, Pair]]:
        nonlocal taken
        for number in range(601):
            taken += 1
            yield number, ((ENDLESS if number == 3 else f"\\boxed{{{number}}}"), str(number))

    with MathJudge(timeout_s=4, workers=2) as math:
        for number, verdict in math.stream(pairs()):
            order.append(number)
            ahead.append(taken - len(order))
            assert (verdict.passed, verdict.reason) == ((None, "checker_timed_out") if number == 3 else (True, "right"))
    assert sorted(order) == list(range(601)) and order.index(3) > 4 * 32
    assert max(ahead) <= 4 * 32  # for each worker what it has been given, and what will be next


def test_a_stream_that_is_left_leaves_no_answer_to_the_next() -> None:
    with MathJudge(timeout_s=30, workers=1) as math:
        stream = math.stream((number, (f"\\boxed{{{number}}}", "0")) for number in range(100))
        assert next(stream) == (0, Verdict("math", True, "right"))
        stream.close()
        assert math.judge([("1", "2")]) == [Verdict("math", False, "wrong_answer")]


def test_a_checker_that_cannot_start_is_an_error() -> None:
    """A worker that dies before it has begun, as when no memory is left: no endless row of new ones."""
    code = """
import multiprocessing.spawn, sys
from distill.checks.math import MathJudge
multiprocessing.spawn.set_executable("/bin/false")
with MathJudge(1, 1) as math:
    math.judge([("1", "1")])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "math check: its process can't start, got exit code 1." in result.stderr


# Judges an endless answer and one more in a process of its own, which says so once its worker has computed for 0.05 s.
WATCHED = f"""
import os, signal, sys, threading
from pathlib import Path
from distill.checks.math import MathJudge

def worker():
    children = [int(p) for task in Path("/proc/self/task").iterdir() for p in (task / "children").read_text().split()]
    return next(p for p in children if b"spawn_main" in Path(f"/proc/{{p}}/cmdline").read_bytes())

def cpu_s(pid):
    return int(Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")

def watch(pid, then):
    before = cpu_s(pid)
    while cpu_s(pid) < before + 0.05: pass
    print("busy", pid, flush=True)
    if then == "kill": os.kill(pid, signal.SIGKILL)

if __name__ == "__main__":
    with MathJudge(timeout_s=float(sys.argv[1]), workers=1) as math:
        math.judge([("1", "1")])
        threading.Thread(target=watch, args=[worker(), sys.argv[2]], daemon=True).start()
        print([v.reason for v in math.judge([({ENDLESS!r}, "5"), ("2", "2")])])
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker through /proc")


@needs_proc
def test_a_checker_that_dies_has_not_judged() -> None:
    result = subprocess.run([sys.executable, "-c", WATCHED, "60", "kill"], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[1:] == ["['checker_failed', 'right']"], result.stderr[-2000:]


@needs_proc
def test_a_worker_does_not_outlive_a_killed_stage() -> None:
    """The stage is killed while its worker computes for ever: nobody is left to kill the worker, so it must end itself."""
    process = subprocess.Popen([sys.executable, "-c", WATCHED, "2", "wait"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    word, worker = process.stdout.readline().split()
    assert word == "busy"
    os.kill(process.pid, signal.SIGKILL)
    try:
        process.communicate(timeout=60)  # returns when the last process that has the pipe open is gone
    except subprocess.TimeoutExpired:
        os.kill(int(worker), signal.SIGKILL)
        pytest.fail("the worker goes on")


def test_the_checker_imports_no_torch() -> None:
    code = "import sys, distill.checks.math as m; print(m.compare('1', '1'), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "(True, 'right') False"


def test_worked_answers_pass_and_fail_with_one_digit_changed(shared: Path) -> None:
    """A slice of what tests/test_gsm8k.py does with the whole set."""
    draw = random.Random(0)
    right: list[Pair] = []
    wrong: list[Pair] = []
    with (shared / "data" / "gsm8k" / "train.jsonl").open() as file:
        for line in draw.sample(list(file), 150):
            reasoning, _, number = json.loads(line)["answer"].rpartition("####")
            number = number.strip()
            place = draw.choice([match.start() for match in re.finditer(r"\d", number)])
            other = draw.choice([digit for digit in "0123456789" if digit != number[place]])
            for pairs, final in ((right, number), (wrong, number[:place] + other + number[place + 1 :])):
                pairs.append((f"<think>\n{reasoning.strip()}\n</think>\n\n\\boxed{{{final}}}", number))
    with MathJudge(timeout_s=30, workers=1) as math:
        assert {verdict.passed for verdict in math.judge(right)} == {True}
        assert {verdict.passed for verdict in math.judge(wrong)} == {False}
