"""What code passes which tests: functions, classes, programs; what is found where nothing can be found out."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from code_forms import FORMS

from distill.checks import Verdict
from distill.checks.code import Runs, Tests, code_of, judge_code, read_tests
from distill.checks.sandbox import place_for
from distill.recipe.code import CodeSettings
from distill.run import early

SETTINGS = CodeSettings(timeout_s=20, memory_mib=256)


@pytest.fixture
def sandbox() -> None:
    place = place_for(SETTINGS)
    if isinstance(place, str):
        pytest.skip(f"no sandbox here: {place}")


def judged(code: str, tests: Tests, **settings: Any) -> Verdict:
    return judge_code(f"<think>\nok\n</think>\n\n```python\n{code}\n```", tests, SETTINGS.model_copy(update=settings))


DOUBLE = "assert double(2) == 4\nassert double(-1) == -2"
KILLS = "import os\nos.kill(os.getppid(), 9)\ndef double(x):\n    return 2 * x"
EQUALS = "class R:\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return R()"


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("code", "passed", "reason"),
    [
        ("def double(x):\n    return 2 * x", True, "tests_passed"),
        ("def double(x):\n    return x ** 2", False, "wrong_result"),
        ("def double(x):\n    while True:\n        pass", False, "timed_out"),
        (KILLS, False, "code_failed"),
        ("double = lambda x: x + x", True, "tests_passed"),
        (EQUALS, False, "wrong_result"),
        ("def double(x):\n    raise ValueError(x)", False, "code_raised"),
        ("def twice(x):\n    return 2 * x", False, "name_missing"),
        ("def double(x)\n    return 2 * x", False, "code_failed"),
        ("import nothing_of_this_name\ndef double(x):\n    return 2 * x", None, "module_missing"),
        ("from nothing_of_this_name.at import all\ndef double(x):\n    return 2 * x", None, "module_missing"),
        ("raise ModuleNotFoundError('x')\ndef double(x):\n    return 3", False, "code_failed"),
        ("raise ModuleNotFoundError('x', name='nothing_of_this_name')", False, "code_failed"),
        ("import solution.nothing", False, "code_failed"),
        ("import os.nothing", False, "code_failed"),
        ("def double(x):\n    return 2 * x\nimport sys\nsys.exit(1)", True, "tests_passed"),
        ("import os\nos._exit(1)", False, "code_ended"),
    ],
)
def test_functions_are_judged_by_asserts(code: str, passed: bool | None, reason: str) -> None:
    assert judged(code, DOUBLE, timeout_s=2.0 if reason == "timed_out" else 20.0) == ("code", passed, reason)


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(("code", "tests"), [form[1:] for form in FORMS], ids=[form.name for form in FORMS])
def test_tests_have_many_forms(code: str, tests: Tests) -> None:
    assert judged(code, tests) == ("code", True, "tests_passed")


VALUES = [
    *("None", "True", "2 ** 70", "-1.5", "float('inf')", "1 + 2j", "'é\\ud800'", "b'x'", "bytearray(b'x')", "[10 ** 5000]"),
    *("(1, (2,))", "{1: {2}}", "{(1, 2): [3]}", "frozenset({1})", "range(1, 9, 2)", "Decimal('1.10')", "Fraction(1, 3)"),
    *("datetime(2020, 1, 2, 3)", "date(2020, 1, 2)", "timedelta(1, 2)", "Counter('abb')", "OrderedDict(a=1)", "deque([1, 2], 3)"),
    *("int", "ValueError", "namedtuple('P', 'x y')(1, 2)"),
]
IMPORTS = """
from collections import *
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
"""


@pytest.mark.usefixtures("sandbox")
def test_values_go_there_and_back() -> None:
    checks = [f"assert f(n) == ({value}) and type(f(n)).__name__ == type({value}).__name__, n" for value in VALUES]
    tests = IMPORTS + "".join(f"n = {number}\n{check}\n" for number, check in enumerate(checks))
    assert judged(f"{IMPORTS}def f(n):\n    return [{', '.join(VALUES)}][n]", tests) == ("code", True, "tests_passed")
    there = IMPORTS + "".join(f"assert f({value}) == {value!r}\n" for value in VALUES if "namedtuple" not in value)
    echo = IMPORTS + "def f(x):\n    return next((text for text in texts if eval(text) == x and type(eval(text)) is type(x)), None)\n"
    assert judged(f"{echo}texts = {[value for value in VALUES if 'namedtuple' not in value]!r}", there) == ("code", True, "tests_passed")


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert 1 + 1 == 2", "tests_call_nothing"),
        ("x = 1 +", "tests_unreadable"),
        ("import nothing_of_this_name\nassert f(1)", "tests_unsupported"),
        ("class D(C):\n    pass\nassert D()", "tests_unsupported"),
        ("def test(fixture):\n    assert f(1)", "tests_unsupported"),
        ("class Mine:\n    pass\ntry:\n    f(Mine())\nexcept BaseException:\n    pass", "tests_unsupported"),
        ("assert 1 in C()", "tests_unsupported"),
        ("import os\nassert f(1)\nos._exit(0)", "tests_ended"),
    ],
)
def test_where_the_tests_are_to_blame_nothing_is_found_out(tests: str, reason: str) -> None:
    assert judged("class C:\n    pass\ndef f(x):\n    return x", tests) == ("code", None, reason)


@pytest.mark.usefixtures("sandbox")
def test_a_module_that_is_not_there_leaves_it_open() -> None:
    assert judged("import numpy\ndef f(x):\n    return numpy.abs(x)", "assert f(-1) == 1") == ("code", None, "module_missing")


ADD = "a, b = map(int, input().split())\nprint(a + b)"
EXAMPLES: list[dict[str, Any]] = [{"input": "1 2\n", "output": "3\n"}, {"input": "-1 1", "output": "0"}]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("code", "passed", "reason"),
    [
        (ADD, True, "tests_passed"),
        (
            "def main():\n    print(sum(int(x) for x in open(0).read().split()))\nif __name__ == '__main__':\n    main()",
            True,
            "tests_passed",
        ),
        ("print(sum(int(x) for x in open('/dev/stdin').read().split()), '\\n')", True, "tests_passed"),
        ("print(3)", False, "wrong_output"),
        (ADD + "\nraise SystemExit(2)", False, "code_raised"),
        ("print('a draft')\n```\nbetter:\n```python\n" + ADD, True, "tests_passed"),
        ("import sys\nprint(sys.stdin.read())", False, "wrong_output"),
        ("print('x' * 10 ** 8)", False, "too_much_output"),
    ],
)
def test_programs_are_judged_by_what_they_print(code: str, passed: bool, reason: str) -> None:
    assert judged(code, EXAMPLES) == ("code", passed, reason)


def test_blocks_are_found() -> None:
    assert code_of("a\n```py\nx\n```\nb\n```\n$ run\n```\n~~~python title=a\ny\n~~~") == ["x\n", "y\n"]
    assert code_of("```\nx\n```\n```bash\nls\n```") == ["x\n"]
    assert code_of("```python\nx = '''\n  ```'''\n") == ["x = '''\n  ```'''\n"]
    assert code_of("x = 1") == ["x = 1"]
    assert code_of("```bash\nls\n```") == [] == code_of("  ")


def test_tests_are_read_as_people_keep_them() -> None:
    examples = [("1\n2", "3"), ("4", "5")]
    lists = {"inputs": ["1\n2", "4"], "outputs": ["3", "5"]}
    for tests in (lists, json.dumps(lists), [{"input": "1\n2", "output": "3"}, {"input": "4", "output": "5"}]):
        assert read_tests(tests) == examples
    assert read_tests("[f(1)]\nassert f(2)") == "[f(1)]\nassert f(2)"
    assert read_tests(json.dumps(["assert f(1)", "assert f(2)"])) == "assert f(1)\nassert f(2)"
    for tests in (None, "", " ", [], {}, {"inputs": ["1"], "outputs": []}, [{"input": 1}], {"fn_name": "f", "inputs": [], "outputs": []}):
        assert read_tests(tests) is None  # type: ignore[arg-type]


def test_what_can_be_said_without_running_is() -> None:
    assert judge_code("```python\nx\n```", None, SETTINGS) == ("code", None, "no_tests")
    assert judge_code("```python\nx\n```", [{"input": 1}], SETTINGS) == ("code", None, "tests_unreadable")
    assert judge_code("<think>for ever", "assert f(1)", SETTINGS) == ("code", False, "no_answer")
    assert judge_code("<think>x</think>\n```bash\nls\n```", "assert f(1)", SETTINGS) == ("code", False, "no_code")


@pytest.mark.usefixtures("sandbox")
def test_many_rows_are_judged_side_by_side() -> None:
    """A row that runs until its limit holds up no other."""

    def answer(number: int) -> str:
        return f"def f():\n    {'while True: pass' if number == 1 else f'return {number % 4}'}"

    rows = [(number, (answer(number), "assert f() == 2")) for number in range(12)]
    settings = SETTINGS.model_copy(update={"timeout_s": 3.0})
    with Runs(2) as runs:
        keyed = [one for number, (code, tests) in rows for one in runs.add((number, "code"), code, tests, settings)]
        keyed += runs.rest()
    found = [(number, verdict) for (number, _), verdict in keyed]
    assert sorted(number for number, _ in found) == list(range(12))
    assert {number for number, verdict in found if verdict.passed} == {2, 6, 10}
    assert dict(found)[1].reason == "timed_out"


POOL = """
from multiprocessing import Pool
def g(x):
    return x * x
if __name__ == "__main__":
    with Pool(2) as pool:
        print(sum(pool.map(g, range(int(input())))))
"""


@pytest.mark.usefixtures("sandbox")
def test_signals_to_all_of_a_job_do_not_reach_the_code() -> None:
    """What Ctrl-C and a scheduler send to every process; pools of processes of the code's own work all the same."""
    source = "import signal\nprint(sorted(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    blocked = sorted([int(signal.SIGINT), int(signal.SIGUSR1)])
    assert judged(source, [{"input": "", "output": str(blocked)}]) == ("code", True, "tests_passed")
    assert judged(POOL, [{"input": "4", "output": "14"}]) == ("code", True, "tests_passed")


@pytest.mark.usefixtures("sandbox")
def test_code_that_fails_while_its_job_is_ended_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early._asked, "name", "SIGTERM")
    assert judged("def double(x):\n    return 2 * x", DOUBLE).passed
    with pytest.raises(early.EndedEarly):
        judged("def double(x):\n    return x", DOUBLE)
