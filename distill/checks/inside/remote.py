"""Things of the answer's code as the tests see them: what is done with one is done in the code's own process, and data comes back.

What is true is decided here. A thing that is no data equals nothing but itself: its `__eq__` could say anything. Only between two things
whose class the tests themselves name is the code asked, because there its comparison is what is being tested; one that equals a text which
nobody can expect equals nothing. Tests that do nothing but compare such things with each other take the code's word for it.
"""

from __future__ import annotations

import builtins
import importlib
import random
import threading
from collections.abc import Callable
from typing import Any

from . import values
from .channel import Channel, Closed


class Unsupported(BaseException):
    """The tests do something with the code that can't be done from another process: nothing is found out about the code."""

    met: Unsupported | None = None
    """The last one, whatever the tests made of it."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        Unsupported.met = self


class Link:
    """The way to the code's process, and what is known of the things there."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._things: dict[int, Any] = {}
        self._functions: list[Callable[..., Any]] = []
        self.named: set[int] = set()
        """Classes that the tests name."""
        self.used = False
        """Whether the code was asked for anything but its names."""
        self.raised: BaseException | None = None
        """The last error that the code raised."""
        self.closed: Closed | None = None
        """Set where the code's process has ended, whatever the tests made of that."""
        self._one_at_a_time = threading.RLock()  # tests may have threads

    def lookup(self, name: str) -> Any:
        """A global of the code.

        Raises:
            NameError: it has none of this name.
            ImportError: it is a module that is not there for the tests.
        """
        answer = self._ask({"do": "name", "name": name})
        if "module" in answer:
            return importlib.import_module(str(answer["module"]))  # this process's own
        if answer.get("missing"):
            raise NameError(f"name {name!r} is not defined")
        value = values.unpack(answer["value"], self.resolve)
        if isinstance(value, type) and id(value) in _NUMBERS:
            self.named.add(_NUMBERS[id(value)])
        return value

    def do(self, what: str, thing: int, *given: Any, **named: Any) -> Any:
        """What comes of an operation in the code's process; its arguments are changed as they were changed there."""
        self.used = True
        packed = {name: values.pack(item, self.refer) for name, item in named.items()}
        request = {"do": what, "of": thing, "given": [values.pack(item, self.refer) for item in given], "named": packed}
        answer = self._ask(request)
        arguments: dict[Any, Any] = {**dict(enumerate(given)), **named}
        for place, item in answer.get("changed", ()):
            if values.mutable(arguments.get(place)):
                values.update(arguments[place], values.unpack(item, self.resolve))
        return arguments[answer["same"]] if "same" in answer else values.unpack(answer["value"], self.resolve)

    def functions(self) -> list[str]:
        """Names of the functions that the code defines, in its order."""
        return [str(name) for name in self._ask({"do": "functions"})["functions"]]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with self._one_at_a_time:
                self._channel.send(request)
                while "call" in (answer := self._channel.receive()):
                    self._channel.send(self._called_back(answer))
        except Closed as error:
            self.closed = error
            raise
        if answer.get("printed"):
            print(answer["printed"], end="")
        if "error" in answer:
            self.raised = self._error(answer["error"])
            if isinstance(self.raised, StopIteration) and request["do"] != "__next__":  # it would end a `map` of the tests unseen
                self.raised = RuntimeError("StopIteration")
            raise self.raised
        return answer

    def _called_back(self, asked: dict[str, Any]) -> dict[str, Any]:
        given = [values.unpack(item, self.resolve) for item in asked["given"]]
        named = {name: values.unpack(item, self.resolve) for name, item in asked["named"].items()}
        try:
            return {"done": values.pack(self._functions[asked["call"]](*given, **named), self.refer)}
        except (Closed, Unsupported):
            raise
        except Exception as error:
            return {"error": type(error).__name__}

    def _error(self, held: dict[str, Any]) -> BaseException:
        """The code's error, as one of Python's own or of a class of the code; never more than an `Exception`, which ends a test."""
        given = [values.unpack(item, self.resolve) for item in held["args"]]
        kind = self.resolve(held["class"]) if held["class"] else getattr(builtins, str(held["builtin"]), Exception)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
            kind = RuntimeError
        error: BaseException = kind.__new__(kind, *given)
        error.args = tuple(given)
        return error

    def refer(self, thing: Any) -> dict[str, Any]:
        """How the code's process calls a thing of its own, or a function of the tests."""
        number = (
            _NUMBERS.get(id(thing))
            if isinstance(thing, type)
            else object.__getattribute__(thing, "_thing_number")
            if _is_ours(thing)
            else None
        )
        if number is not None:
            return {"number": number}
        if not callable(thing) or isinstance(thing, type):
            raise Unsupported(f"a {type(thing).__name__} of the tests")
        self._functions.append(thing)
        return {"theirs": len(self._functions) - 1}

    def resolve(self, held: dict[str, Any]) -> Any:
        """The thing here that stands for one there, always the same one."""
        if "theirs" in held:
            return self._functions[held["theirs"]]
        number = int(held["number"])
        if number not in self._things:
            if "awaited" in held:
                self._things[number] = self._awaited(number)
            else:
                self._things[number] = self._class(number, held["class"]) if "class" in held else self._instance(number, held)
        return self._things[number]

    async def _awaited(self, number: int) -> Any:
        return self.do("await", number)

    def _instance(self, number: int, held: dict[str, Any]) -> Any:
        of = held["of"]
        kind = self.resolve(of) if of else Thing
        if not (isinstance(kind, type) and issubclass(kind, Thing)):
            kind = Thing
        thing = object.__new__(kind)
        object.__setattr__(thing, "_thing_link", self)
        object.__setattr__(thing, "_thing_number", number)
        object.__setattr__(thing, "_thing_kind", int(of["number"]) if of else None)
        object.__setattr__(thing, "_thing_foreign", bool(held.get("foreign")))
        return thing

    def _class(self, number: int, held: dict[str, Any]) -> type:
        bases = tuple(self.resolve(base) for base in held["bases"])
        error = getattr(builtins, str(held["error"]), None)
        if isinstance(error, type) and issubclass(error, Exception):
            kind: type = type(str(held["name"]), bases or (error,), {})
        else:
            kind = _ThingClass(str(held["name"]), bases or (Thing,), {"_class_link": self, "_class_number": number})
        _NUMBERS[id(kind)] = number
        self._things[number] = kind  # held, so that no other class gets its id
        return kind


_NUMBERS: dict[int, int] = {}
"""Classes that stand for some of the code, by id."""


def _is_ours(thing: Any) -> bool:
    return issubclass(type(thing), Thing)


class _ThingClass(type):
    """Class of the classes that stand for some of the code: calling one makes an instance there."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _ThingClass:
        if "_class_link" not in namespace:
            raise Unsupported("a class of the tests that derives from one of the code")
        return super().__new__(cls, name, bases, namespace)

    def __call__(cls, *given: Any, **named: Any) -> Any:
        return cls._class_link.do("call", cls._class_number, *given, **named)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls._class_link.do("get", cls._class_number, name)

    def __iter__(cls) -> Any:  # of an enumeration
        return cls._class_link.do("__iter__", cls._class_number)

    def __len__(cls) -> int:
        return int(cls._class_link.do("__len__", cls._class_number))

    def __bool__(cls) -> bool:
        return True

    def __getitem__(cls, name: Any) -> Any:
        return cls._class_link.do("__getitem__", cls._class_number, name)


class Thing:
    """Something of the code that is no data."""

    _thing_link: Link
    _thing_number: int
    _thing_kind: int | None
    _thing_foreign: bool

    def _thing_do(self, what: str, *given: Any, **named: Any) -> Any:
        return self._thing_link.do(what, self._thing_number, *given, **named)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Calls it there."""
        return self._thing_do("call", *given, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__", "__wrapped__"):
            raise AttributeError(name)
        return self._thing_do("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._thing_do("set", name, value)

    def __delattr__(self, name: str) -> None:
        self._thing_do("delete", name)

    def __deepcopy__(self, _: Any) -> Any:
        return self._thing_do("copy")

    def _thing_decides(self, other: Any = None) -> bool:
        """Whether the code may say what is true of a thing: its class is one that the tests name, and so is the other's."""
        mine = self._thing_kind in self._thing_link.named
        return mine and (other is None or (_is_ours(other) and object.__getattribute__(other, "_thing_kind") in self._thing_link.named))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if self._thing_foreign:
            raise Unsupported("a value of a library's own type")
        if not self._thing_decides(other) or self._thing_do("__eq__", other) is not True:
            return False
        return self._thing_do("__eq__", f"nothing equals this: {random.random()}") is not True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int(self._thing_do("__hash__")) if self._thing_decides() else object.__hash__(self)

    def __contains__(self, item: Any) -> bool:
        try:
            return any(item == held for held in self)
        except TypeError as error:
            raise Unsupported("whether something is in a thing that can't be gone through") from error

    def __iter__(self) -> Any:
        return self._thing_do("__iter__")


def _forward(name: str) -> Callable[..., Any]:
    return lambda self, *given: self._thing_do(name, *given)


def _backward(name: str) -> Callable[..., Any]:
    def reflected(self: Thing, other: Any) -> Any:
        raise Unsupported(f"{name} with a value of the tests on its left")

    return reflected


def _compared(name: str) -> Callable[[Thing, Any], Any]:
    return lambda self, other: self._thing_do(name, other) is True if self._thing_decides(other) else NotImplemented


_UNARY = ("next", "bool", "len", "str", "repr", "int", "float", "index", "abs", "round", "enter", "exit", "neg", "pos", "invert")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "divmod", "and", "or", "xor", "lshift", "rshift")
for _name in (*_UNARY, *_ARITHMETIC, "getitem", "setitem", "delitem"):
    setattr(Thing, f"__{_name}__", _forward(f"__{_name}__"))
for _name in _ARITHMETIC:
    setattr(Thing, f"__r{_name}__", _backward(f"__r{_name}__"))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Thing, f"__{_name}__", _compared(f"__{_name}__"))
