"""Whether the code of an answer does what its row's tests ask, found by running it in a sandbox.

Tests are either Python (asserts, functions `test_*`, unittest, `check(candidate)`) or inputs with the outputs that a program has to give.
The code is in one process and what is right in another: Python tests run beside it and get data back, outputs are compared here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, NamedTuple

from distill.checks import Verdict
from distill.checks.form import answer_of
from distill.checks.runs import Place, run_program, run_tests
from distill.checks.sandbox import place_for
from distill.errors import RecipeError
from distill.recipe.code import CodeSettings
from distill.run import early

Key = tuple[int, str]
"""Number of a trace, name of a check."""
Tests = str | list[str] | list[dict[str, Any]] | dict[str, Any] | None

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1`*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = {"python", "py", "python3", "py3"}


class _Example(NamedTuple):
    """What a program is given, and what it has to print."""

    given: str
    expected: str


def judge_code(completion: str, tests: Tests, settings: CodeSettings) -> Verdict:
    """Whether an answer's code passes the tests of its row. Waits for the run: seconds, at most `timeout_s` for each input.

    Args:
        completion: With or without reasoning; its blocks of Python are run, or all of it where it has no block.
        tests: Python, or a list of lines of it; or dicts with `input` and `output`; or a dict of lists `inputs` and `outputs`; or JSON of
            one of these.
        settings: Limits, and whether code may run without a sandbox.

    Raises:
        EndedEarly: SIGTERM came to this process, and so perhaps to the code, which has not passed.
    """
    asked = read_tests(tests)
    if asked is None:
        return Verdict("code", None, "no_tests" if not tests else "tests_unreadable")
    answer = answer_of(completion)
    blocks = code_of(answer) if answer is not None else []
    if not blocks:
        return Verdict("code", False, "no_answer" if not (answer or "").strip() else "no_code")
    place = place_for(settings)
    if isinstance(place, str):
        return Verdict("code", None, f"no_sandbox: {place}")
    passed, reason = _by_asserts(blocks, asked, settings, place) if isinstance(asked, str) else _by_output(blocks, asked, settings, place)
    if not passed and early.asked() == "SIGTERM":
        raise early.EndedEarly("SIGTERM")
    return Verdict("code", passed, reason)


class Runs:
    """Code of many answers, so many judged at once. Use as a context manager.

    Args:
        workers: Runs at once.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "code")
        self._running: dict[Future[Verdict], Key] = {}

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, key: Key, completion: str, tests: Tests, settings: CodeSettings) -> Iterator[tuple[Key, Verdict]]:
        """Begins to judge an answer, and yields what has been judged meanwhile, if no more may be begun."""
        self._running[self._pool.submit(judge_code, completion, tests, settings)] = key
        if len(self._running) > self._workers:
            yield from self._ended()

    def rest(self) -> Iterator[tuple[Key, Verdict]]:
        """What is still under way, as it ends."""
        while self._running:
            yield from self._ended()

    def _ended(self) -> Iterator[tuple[Key, Verdict]]:
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            yield self._running.pop(future), future.result()


def refuse_no_place(name: str, settings: CodeSettings) -> Place:
    """Where the code of a check is run.

    Raises:
        RecipeError: nowhere, with the reason.
    """
    place = place_for(settings)
    if isinstance(place, str):
        raise RecipeError(
            f"checks: {name}: no sandbox can be had on this machine, so no code is run: {place}. Install or permit bubblewrap "
            "(`python -m distill.checks.sandbox` says what holds), or set unprotected: true where the machine itself may be lost."
        )
    return place


def code_of(answer: str) -> list[str]:
    """Blocks of Python in an answer: those that say so, else those that say nothing, else the whole of an answer without blocks."""
    found = [(language.lower(), body) for _, language, body in _FENCE.findall(answer)]
    python = [body for language, body in found if language in _PYTHON]
    plain = [body for language, body in found if not language]
    return python or plain or ([answer] if not found and answer.strip() else [])


def read_tests(tests: Tests) -> str | list[_Example] | None:
    """Tests as Python or as examples; null where they are neither, or there are none."""
    if isinstance(tests, str):
        if tests.lstrip()[:1] in ("[", "{"):
            try:
                return read_tests(json.loads(tests))
            except ValueError:
                pass
        return tests if tests.strip() else None
    if isinstance(tests, dict):
        inputs, outputs = tests.get("inputs", tests.get("input")), tests.get("outputs", tests.get("output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or tests.get("fn_name"):
            return None
        tests = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]
    if not tests or not isinstance(tests, list):
        return None
    if all(isinstance(line, str) for line in tests):
        return "\n".join(tests)  # type: ignore[arg-type]
    examples = [_example(item) for item in tests]
    return None if None in examples else [example for example in examples if example is not None]


def _example(item: Any) -> _Example | None:
    given, expected = (item.get("input"), item.get("output")) if isinstance(item, dict) else (None, None)
    if isinstance(given, list) and isinstance(expected, list | str) and all(isinstance(line, str) for line in [*given, *expected]):
        given, expected = "\n".join(given), expected if isinstance(expected, str) else "\n".join(expected)
    return _Example(given, expected) if isinstance(given, str) and isinstance(expected, str) else None


def _by_asserts(blocks: list[str], tests: str, settings: CodeSettings, place: Place) -> tuple[bool | None, str]:
    outcome = run_tests(blocks, tests, settings, place)
    if outcome.limit:
        return False, outcome.limit
    try:
        passed, reason = json.loads(outcome.output)
    except ValueError:  # the tests have ended their own process
        return None, "tests_ended"
    return passed, str(reason)


def _by_output(blocks: list[str], examples: list[_Example], settings: CodeSettings, place: Place) -> tuple[bool | None, str]:
    """The last block is the program: those before it are drafts, as a rule."""
    for example in examples:
        outcome = run_program(blocks[-1], example.given, settings, place)
        if outcome.limit:
            return False, outcome.limit
        if outcome.exit_code != 0:
            return False, "code_raised"
        if _lines(outcome.output.decode(errors="replace")) != _lines(example.expected):
            return False, "wrong_output"
    return True, "tests_passed"


def _lines(text: str) -> list[str]:
    """Lines as they are compared: without blanks and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
