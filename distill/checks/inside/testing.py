"""The process of a row's tests: runs them on the answer's code, which is in another process, and says what came of it.

The tests are run as they stand, as a program in which the names of the answer's code are there; then its functions `test_*`, its cases of
unittest, and `check(candidate)` where nothing has called it.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from .channel import Channel, Closed
from .confine import MIB, read_job
from .remote import Link, Unsupported

_MODULES = ("solution", "submission", "answer", "candidate", "main")
"""What tests may import the answer's code as."""
_OWN = frozenset(
    (
        *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "io", "itertools", "json"),
        *("math", "operator", "os", "random", "re", "statistics", "string", "sys", "typing", "unittest"),
    )
)
"""Modules that tests use without importing them: they are Python's, never something of the code that is called so."""
_SHORT = {"np": "numpy", "pd": "pandas"}
_CANDIDATES = 8  # functions of the code that `check(candidate)` is tried on

Found = tuple[bool | None, str]  # passed, reason


def run_tests(job_fd: int, channel_fd: int, verdict_fd: int) -> None:
    """Runs a job's tests and writes the verdict as JSON."""
    job = read_job(job_fd)
    passed, reason = _judged(job["tests"], Channel(channel_fd, job["output_mib"] * MIB))
    with os.fdopen(verdict_fd, "w") as file:
        json.dump([passed, reason], file)
    os._exit(0)  # whatever threads the tests have left


def _judged(tests: str, channel: Channel) -> Found:
    try:
        tree = ast.parse(tests)
        code = compile(tree, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, "tests_unreadable"
    link = Link(channel)
    failed: Any = "code_ended"
    try:
        failed = channel.receive().get("failed")
        _run(code, _space(tree, link), link)
    except BaseException as error:
        return _blamed(Unsupported.met or link.closed or error, link, failed)
    if Unsupported.met or link.closed:
        return _blamed(Unsupported.met or link.closed, link, failed)
    return (True, "tests_passed") if link.used else (None, "tests_call_nothing")


def _blamed(error: BaseException | None, link: Link, failed: Any) -> Found:
    """Whose fault it is that the tests did not pass."""
    if isinstance(error, Unsupported):
        return None, "tests_unsupported"
    if failed == "ModuleNotFoundError":
        return None, "module_missing"
    if isinstance(error, Closed):
        return False, "code_ended"
    if failed:
        return False, "code_failed"
    if error is link.raised:
        return False, "code_raised"
    if isinstance(error, NameError):
        return False, "name_missing"
    if isinstance(error, ImportError):
        return None, "tests_unsupported"
    return False, "wrong_result"


def _space(tree: ast.Module, link: Link) -> dict[str, Any]:
    """The globals of the tests: what they use and the code has. Nothing else of the code gets there, so it replaces nothing."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    space = vars(module)
    sys.argv = ["tests.py"]
    for name in _MODULES:
        sys.modules[name] = _Solution(name, link)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    owners = {node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    for name in sorted(used):
        if (name in _OWN or name in _SHORT) and name in owners:
            with contextlib.suppress(ImportError):
                space[name] = importlib.import_module(_SHORT.get(name, name))
        elif not hasattr(builtins, name) and not name.startswith("__"):
            _take(space, name, link)
    if not space.keys() & used:
        for name in _tested_builtin(tree):
            _take(space, name, link)
    return space


def _take(space: dict[str, Any], name: str, link: Link) -> None:
    try:
        space[name] = link.lookup(name)
    except (NameError, ImportError):  # one of the tests' own, or it is missing, which they will find out
        return


def _tested_builtin(tree: ast.Module) -> set[str]:
    """The function under test where it is called like one of Python's (`assert sum(1, 2) == 3`): what every assert calls and compares.

    Only then may the code have it: an `all` of the code, in tests of something else, could make them true.
    """
    asserts = [node.test for node in tree.body if isinstance(node, ast.Assert)]
    lefts = [test.left for test in asserts if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq)]
    names = {call.func.id for call in lefts if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    return names if len(names) == 1 and len(lefts) == len(asserts) else set()


class _Solution(types.ModuleType):
    """The answer's code as a module."""

    def __init__(self, name: str, link: Link) -> None:
        super().__init__(name)
        self.__dict__["_link"] = link

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.__dict__["_link"].lookup(name)
        except NameError as error:
            raise AttributeError(name) from error


def _run(code: types.CodeType, space: dict[str, Any], link: Link) -> None:
    """Runs tests of all forms; returns where they pass, raises where one fails."""
    try:
        exec(code, space)
    except SystemExit as error:
        if error.code not in (None, 0, False):
            raise
    own = [value for value in list(space.values()) if getattr(value, "__module__", None) == "__main__"]
    for function in own:
        if isinstance(function, types.FunctionType) and function.__name__.startswith("test"):
            _run_test(function)
    for case in [value for value in own if isinstance(value, type)]:
        if any(base.__module__ == "unittest.case" for base in case.__mro__):
            _run_case(case)
        elif case.__name__.startswith("Test"):
            _run_methods(case)
    check = space.get("check")
    if not link.used and isinstance(check, types.FunctionType) and check in own and _needs(check) == 1:
        _try_each(check, link)


def _run_test(test: Callable[[], Any]) -> None:
    given = 1 if isinstance(test, types.MethodType) else 0
    if _needs(getattr(test, "__func__", test)) > given:
        raise Unsupported("a test with arguments")
    result = test()
    if isinstance(result, types.CoroutineType):
        import asyncio  # takes longer than all else here together

        asyncio.run(result)
    elif isinstance(result, types.GeneratorType):
        raise Unsupported("a test that is a generator")


def _needs(function: Any) -> int:
    """Arguments that a function must be given."""
    code: types.CodeType = function.__code__
    return code.co_argcount - len(function.__defaults__ or ()) + code.co_kwonlyargcount - len(function.__kwdefaults__ or {})


def _run_case(case: type) -> None:
    import unittest  # the tests have done so

    result = unittest.TestResult()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    suite.run(result)
    if result.skipped or result.expectedFailures or result.unexpectedSuccesses:
        raise Unsupported("a test that is skipped, or meant to fail")
    if not result.wasSuccessful():
        raise AssertionError((result.failures + result.errors)[0][1])


def _run_methods(case: type) -> None:
    """Runs the tests of a class as pytest does, each on an instance of its own."""
    for name in [name for name in dir(case) if name.startswith("test")]:
        instance = case()
        if hasattr(instance, "setup_method"):
            instance.setup_method()
        _run_test(getattr(instance, name))


def _try_each(check: types.FunctionType, link: Link) -> None:
    """Calls `check(candidate)` with one function of the code after the other, until it passes: which is meant, nobody says."""
    failure: Exception = NameError("no function")
    for name in link.functions()[:_CANDIDATES]:
        try:
            check(link.lookup(name))
        except Exception as error:
            failure = error
        else:
            return
    raise failure
