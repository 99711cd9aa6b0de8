"""The process of an answer's code: runs it, and does with it what the process of the tests asks for.

It is as trustworthy as the code in it, that is not at all: the code can write to the channel itself, replace whatever is below, and end
the process. What it can't do is find out more than it is asked: the tests are in another process, behind another sandbox.
"""

from __future__ import annotations

import builtins
import copy
import io
import operator
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

from . import values
from .channel import Channel, Closed
from .confine import MIB, read_job

_PRINTED = 1 << 20  # characters that one call may print

_OPERATORS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "invert", "contains", "getitem", "setitem", "delitem"),
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"),
)
_OPERATIONS: dict[str, Callable[..., Any]] = {f"__{name}__": getattr(operator, f"__{name}__") for name in _OPERATORS}
_OPERATIONS |= {
    f"__{function.__name__}__": function
    for function in (len, iter, next, bool, str, repr, hash, int, float, operator.index, abs, round, divmod)
}
_OPERATIONS |= {
    "call": lambda thing, *given, **named: thing(*given, **named),
    "get": getattr,
    "set": setattr,
    "delete": delattr,
    "await": lambda thing: _awaited(thing),
    "copy": copy.deepcopy,
    "__enter__": lambda thing: type(thing).__enter__(thing),
    "__exit__": lambda thing, *error: type(thing).__exit__(thing, None, None, None),
}


def _awaited(thing: Any) -> Any:
    import asyncio  # takes longer than all else here together

    async def wait() -> Any:
        return await thing

    return asyncio.run(wait())


class _Remote:
    """A function of the tests, which the code was given and may call."""

    def __init__(self, serve: Serve, number: int) -> None:
        self._serve, self._number = serve, number

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._serve.call_back(self._number, given, named)


class Serve:
    """The objects of the code by number, and what is done with them."""

    def __init__(self, channel: Channel, module: types.ModuleType) -> None:
        self._channel = channel
        self._module = module
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def forever(self, failed: str | None) -> None:
        """Says that the code was run, then answers until nobody asks any more."""
        self._channel.send({"ready": True, "failed": failed})
        while True:
            self._channel.send(self._answer(self._channel.receive()))

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        printed = io.StringIO()
        outside, sys.stdout = sys.stdout, printed
        try:
            if asked["do"] == "name":
                answer = self._named(asked["name"])
            elif asked["do"] == "functions":
                own = [name for name, value in vars(self._module).items() if isinstance(value, types.FunctionType)]
                answer = {"functions": own}
            else:
                answer = self._done(asked)
        except Closed:
            raise
        except BaseException as error:
            answer = {"error": self._raised(error)}
        finally:
            sys.stdout = outside
        return {**answer, "printed": printed.getvalue()[:_PRINTED]}

    def _named(self, name: str) -> dict[str, Any]:
        """A global of the code. Modules are only named: the tests take their own."""
        if name not in vars(self._module):
            return {"missing": True}
        found = vars(self._module)[name]
        if isinstance(found, types.ModuleType):
            return {"module": found.__name__}
        return {"value": values.pack(found, self.refer)}

    def _done(self, asked: dict[str, Any]) -> dict[str, Any]:
        given = [values.unpack(item, self._resolve) for item in asked["given"]]
        named = {name: values.unpack(item, self._resolve) for name, item in asked["named"].items()}
        result = _OPERATIONS[asked["do"]](self._objects[asked["of"]], *given, **named)
        places = [(place, item) for place, item in [*enumerate(given), *named.items()] if values.mutable(item)]
        same = next((place for place, item in places if item is result), None)
        changed = [(place, values.pack(item, self.refer)) for place, item in places]
        before = {**dict(enumerate(asked["given"])), **asked["named"]}
        answer: dict[str, Any] = {"changed": [[place, item] for place, item in changed if item != before[place]]}
        return answer | ({"same": same} if same is not None else {"value": values.pack(result, self.refer)})

    def refer(self, thing: Any) -> dict[str, Any]:
        """How the tests may call something that is no data."""
        if isinstance(thing, _Remote):
            return {"theirs": thing._number}
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(self._objects)
            self._objects.append(thing)  # held, so that no other thing gets its id
        number = self._numbers[id(thing)]
        if isinstance(thing, type):
            return {"number": number, "class": self._described(thing)}
        if isinstance(thing, types.CoroutineType):
            return {"number": number, "awaited": True}
        origin = str(getattr(type(thing), "__module__", "")).split(".")[0]
        foreign = origin not in sys.stdlib_module_names and not self._is_own(type(thing))
        return {"number": number, "of": self.refer(type(thing)) if self._is_own(type(thing)) else None, "foreign": foreign}

    def _described(self, kind: type) -> dict[str, Any]:
        bases = [self.refer(base) for base in kind.__bases__ if self._is_own(base)]
        return {"name": kind.__name__, "bases": bases, "error": _builtin_error(kind)}

    def _is_own(self, kind: type) -> bool:
        return getattr(kind, "__module__", None) == self._module.__name__

    def _resolve(self, held: dict[str, Any]) -> Any:
        return _Remote(self, held["theirs"]) if "theirs" in held else self._objects[held["number"]]

    def _raised(self, error: BaseException) -> dict[str, Any]:
        try:
            given = [values.pack(item, self.refer) for item in error.args]
        except Exception:
            given = []
        kind = self.refer(type(error)) if self._is_own(type(error)) else None
        return {"builtin": _builtin_error(type(error)), "class": kind, "args": given}

    def call_back(self, number: int, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What a function of the tests says."""
        packed = {name: values.pack(item, self.refer) for name, item in named.items()}
        self._channel.send({"call": number, "given": [values.pack(item, self.refer) for item in given], "named": packed})
        while "done" not in (asked := self._channel.receive()):  # it may use the code's objects in its turn
            self._channel.send(self._answer(asked))
        if "error" in asked:
            kind = getattr(builtins, asked["error"], RuntimeError)
            raise kind("in a function of the tests")
        return values.unpack(asked["done"], self._resolve)


def _builtin_error(kind: type) -> str | None:
    """The nearest error of Python's own that a class derives from."""
    return next((base.__name__ for base in kind.__mro__ if issubclass(base, BaseException) and base.__module__ == "builtins"), None)


def _run_blocks(blocks: list[str], module: types.ModuleType) -> str | None:
    """Runs blocks of code one after the other, as in a notebook, and returns the kind of the first error; later blocks run all the same."""
    failed = None
    for block in blocks:
        try:
            exec(compile(block, "<answer>", "exec", dont_inherit=True), vars(module))
        except BaseException as error:
            kind = _builtin_error(type(error)) or "Exception"
            failed = failed or (kind if kind != "ModuleNotFoundError" or _is_missing(error, block) else "ImportError")
    return failed


def _is_missing(error: BaseException, block: str) -> bool:
    """Whether a module is not to be had here that an import statement of a block asks for; what the code raises itself says nothing."""
    import ast  # seldom needed, as the next
    import importlib.util

    name = getattr(error, "name", None)
    if type(error) is not ModuleNotFoundError or not isinstance(name, str):
        return False
    package = name.partition(".")[0]
    asked: set[str] = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            asked |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            asked.add(node.module.partition(".")[0])
    return package in asked and package not in sys.modules and importlib.util.find_spec(package) is None


def _own_job(job_fd: int) -> dict[str, Any]:
    """The job of this process, which from now on hears SIGTERM: pools of processes end their workers by it."""
    job = read_job(job_fd)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return job


def serve(job_fd: int, channel_fd: int) -> None:
    """Runs the code of a job and answers to the tests."""
    job = _own_job(job_fd)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    failed = _run_blocks(job["blocks"], module)
    try:
        Serve(Channel(channel_fd, job["output_mib"] * MIB), module).forever(failed)
    except Closed:
        os._exit(0)


def program(job_fd: int) -> None:
    """Runs the code of a job as a program: its input and output are this process's own."""
    source = _own_job(job_fd)["blocks"][-1]
    sys.argv = ["answer.py"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(source, "answer.py", "exec", dont_inherit=True), vars(main))
