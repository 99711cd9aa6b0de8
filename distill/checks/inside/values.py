"""Values as JSON, between the process of an answer's code and that of the tests: data by value, all else by a number.

Nothing that comes over is run. What is read here is made of plain types alone, whatever the other side claims, so that comparing it asks
none of the other side's code. Subclasses of numbers, texts and containers arrive as the plain ones, named tuples as named tuples.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import enum
import fractions
from collections.abc import Callable
from typing import Any

_SMALL = 1 << 53  # longer whole numbers go as hexadecimal text, whose length is not limited and whose time is linear

Refer = Callable[[Any], Any]
"""From something that is no data to how it is called in JSON, or back."""


def pack(value: Any, refer: Refer) -> Any:
    """A value in JSON's types.

    Args:
        value: Anything; containers are looked into.
        refer: What stands for something that is no data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, type) and value is not type(None):
        name = value.__name__
        return {"builtin": name} if getattr(builtins, name, None) is value else {"object": refer(value)}
    if isinstance(value, enum.Enum) and not isinstance(value, int | str):
        return {"object": refer(value)}
    for kind, write in _WRITERS:
        if isinstance(value, kind):
            return write(value, refer)
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        return _write_array(value) if type(value).__name__ == "ndarray" else pack(value.item(), refer)
    return {"object": refer(value)}


def unpack(packed: Any, refer: Refer) -> Any:
    """A value from what `pack` made of it.

    Raises:
        ValueError, TypeError, KeyError: the other side wrote something else.
    """
    if isinstance(packed, list):
        return [unpack(item, refer) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, held),) = packed.items()
    if kind == "object":
        return refer(held)
    return _READERS[kind](held, refer)


def _write_int(value: int, _: Refer) -> Any:
    value = int(value)
    return value if -_SMALL < value < _SMALL else {"int": hex(value)}


def _write_dict(value: dict[Any, Any], refer: Refer) -> Any:
    kinds: list[tuple[type, str]] = [(collections.Counter, "counter"), (collections.OrderedDict, "ordered")]
    name = next((name for kind, name in kinds if isinstance(value, kind)), "dict")
    return {name: [[pack(key, refer), pack(item, refer)] for key, item in dict.items(value)]}


def _write_tuple(value: tuple[Any, ...], refer: Refer) -> Any:
    items = [pack(item, refer) for item in tuple.__iter__(value)]
    fields = getattr(type(value), "_fields", None)
    if fields and len(fields) == len(items):
        return {"named": [type(value).__name__, list(fields), items]}
    return {"tuple": items}


def _write_array(value: Any) -> Any:
    if value.dtype.hasobject:
        raise TypeError("an array of objects")
    return {"array": [value.dtype.str, list(value.shape), value.tobytes().hex()]}


def _items(name: str, kind: Any) -> Callable[[Any, Refer], Any]:
    return lambda value, refer: {name: [pack(item, refer) for item in kind.__iter__(value)]}


_WRITERS: list[tuple[Any, Callable[[Any, Refer], Any]]] = [
    (int, _write_int),
    (float, lambda value, _: float(value)),
    (str, lambda value, _: str.__getitem__(value, slice(None)) + ""),
    (complex, lambda value, _: {"complex": [complex(value).real, complex(value).imag]}),
    (list, lambda value, refer: [pack(item, refer) for item in list.__iter__(value)]),
    (tuple, _write_tuple),
    (dict, _write_dict),
    (set, _items("set", set)),
    (frozenset, _items("frozenset", frozenset)),
    (bytes, lambda value, _: {"bytes": bytes.hex(value)}),
    (bytearray, lambda value, _: {"bytearray": bytearray.hex(value)}),
    (range, lambda value, _: {"range": [hex(value.start), hex(value.stop), hex(value.step)]}),
    (slice, lambda value, refer: {"slice": [pack(item, refer) for item in (value.start, value.stop, value.step)]}),
    (collections.deque, lambda value, refer: {"deque": [[pack(item, refer) for item in value], value.maxlen]}),
    (decimal.Decimal, lambda value, _: {"decimal": str(value)}),
    (fractions.Fraction, lambda value, _: {"fraction": [hex(value.numerator), hex(value.denominator)]}),
    (datetime.datetime, lambda value, _: {"datetime": value.isoformat()}),
    (datetime.date, lambda value, _: {"date": value.isoformat()}),
    (datetime.time, lambda value, _: {"time": value.isoformat()}),
    (datetime.timedelta, lambda value, _: {"timedelta": [value.days, value.seconds, value.microseconds]}),
]


def _all(items: Any, refer: Refer) -> list[Any]:
    return [unpack(item, refer) for item in items]


def _pairs(pairs: Any, refer: Refer) -> dict[Any, Any]:
    return {unpack(key, refer): unpack(item, refer) for key, item in pairs}


def _read_named(held: Any, refer: Refer) -> Any:
    name, fields, items = held
    return collections.namedtuple(name, fields)(*_all(items, refer))


def _read_array(held: Any, _: Refer) -> Any:
    import numpy as np  # where the interpreter has it

    kind, shape, content = held
    return np.frombuffer(bytes.fromhex(content), dtype=np.dtype(str(kind))).reshape(shape).copy()


def _read_builtin(held: Any, _: Refer) -> Any:
    kind = getattr(builtins, str(held))
    if not isinstance(kind, type):
        raise TypeError(f"{held} is no type")
    return kind


_READERS: dict[str, Callable[[Any, Refer], Any]] = {
    "int": lambda held, _: int(held, 16),
    "complex": lambda held, _: complex(*held),
    "tuple": lambda held, refer: tuple(_all(held, refer)),
    "named": _read_named,
    "dict": _pairs,
    "counter": lambda held, refer: collections.Counter(_pairs(held, refer)),
    "ordered": lambda held, refer: collections.OrderedDict(_pairs(held, refer)),
    "set": lambda held, refer: set(_all(held, refer)),
    "frozenset": lambda held, refer: frozenset(_all(held, refer)),
    "bytes": lambda held, _: bytes.fromhex(held),
    "bytearray": lambda held, _: bytearray.fromhex(held),
    "range": lambda held, _: range(*(int(number, 16) for number in held)),
    "deque": lambda held, refer: collections.deque(_all(held[0], refer), held[1]),
    "decimal": lambda held, _: decimal.Decimal(held),
    "fraction": lambda held, _: fractions.Fraction(*(int(number, 16) for number in held)),
    "datetime": lambda held, _: datetime.datetime.fromisoformat(held),
    "date": lambda held, _: datetime.date.fromisoformat(held),
    "time": lambda held, _: datetime.time.fromisoformat(held),
    "timedelta": lambda held, _: datetime.timedelta(*held),
    "slice": lambda held, refer: slice(*_all(held, refer)),
    "array": _read_array,
    "builtin": _read_builtin,
}


def update(old: Any, new: Any) -> None:
    """Makes a list, dict, set or bytearray what the other side made of its copy, in place, so that whoever holds it sees it.

    Args:
        old: What was sent.
        new: What came back; another kind of value changes nothing.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            if _alike(before, after):
                update(before, after)
            else:
                old[place] = after
    elif isinstance(old, list | bytearray) and _alike(old, new):
        old[:] = new
    elif isinstance(old, dict | set | collections.deque) and _alike(old, new):
        old.clear()
        getattr(old, "extend" if isinstance(old, collections.deque) else "update")(new)


def _alike(before: Any, after: Any) -> bool:
    return any(isinstance(before, kind) and isinstance(after, kind) for kind in _MUTABLE)


def mutable(value: Any) -> bool:
    """Whether a function can change a value that it is given."""
    return isinstance(value, _MUTABLE)


_MUTABLE = (list, dict, set, bytearray, collections.deque)
