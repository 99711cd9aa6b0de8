"""Pairs of code and tests that pass, one for each way in which people write tests."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    name: str
    code: str
    tests: str | list[str]


FORMS = [
    Form(
        "a class",
        """
class Empty(Exception):
    pass
class Stack:
    kind = "list"
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        if not self.items:
            raise Empty("nothing left")
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
    def __eq__(self, other):
        return isinstance(other, Stack) and self.items == other.items
    def __repr__(self):
        return f"Stack({self.items})"
    @classmethod
    def of(cls, *items):
        return cls(items)
class Deep(Stack):
    pass
""",
        """
s = Stack([1])
assert s.push(2) is s
assert len(s) == 2 and list(s) == [1, 2] and 2 in s and repr(s) == "Stack([1, 2])"
assert s == Stack([1, 2]) and s != Stack([1]) and s != [1, 2]
assert isinstance(Deep(), Stack) and isinstance(s, Stack) and not isinstance(s, Deep)
assert Stack.kind == "list" and Stack.of(7).pop() == 7
s.items = [5]
assert s.items == [5] and s.pop() == 5
try:
    s.pop()
    assert False
except Empty as error:
    assert str(error) == "nothing left"
""",
    ),
    Form(
        "unittest",
        """
def f(x):
    return x
""",
        """
import unittest
class T(unittest.TestCase):
    def test(self):
        self.assertEqual(f(1), 1)
""",
    ),
    Form(
        "its end",
        """
def f(x):
    return x
""",
        """
import unittest
class T(unittest.TestCase):
    def test(self):
        assert f(1)
unittest.main()
""",
    ),
    Form(
        "pytest",
        """
def f(x):
    return x
""",
        """
from solution import f
class TestF:
    def test_one(self):
        assert f(1) == 1
def test_f():
    assert f(2) == 2
""",
    ),
    Form(
        "check",
        """
def g():
    return 0
def f(x):
    return x + 1
""",
        """
def check(candidate):
    assert candidate(1) == 2
""",
    ),
    Form(
        "check that is called",
        """
def f(x):
    return x + 1
""",
        """
def check(candidate):
    assert candidate(1) == 2
check(f)
""",
    ),
    Form(
        "a list of asserts",
        """
def f(x):
    return x
""",
        ["assert f(1) == 1", "assert f('a') == 'a'"],
    ),
    Form(
        "in place",
        """
def f(x):
    x.sort()
""",
        """
x = [3, 1, 2]
assert f(x) is None
assert x == [1, 2, 3]
""",
    ),
    Form(
        "in place and back",
        """
def f(x):
    x[0].append(1)
    return x
""",
        """
x = [[], 2]
row = x[0]
assert f(x) is x
assert row == [1]
""",
    ),
    Form(
        "a function given",
        """
def f(g, x):
    return [g(i) for i in x]
""",
        "assert f(lambda i: i + 1, [1, 2]) == [2, 3]",
    ),
    Form(
        "a function back",
        """
def f(n):
    return lambda x: x + n
""",
        "assert f(2)(3) == 5",
    ),
    Form(
        "its own function",
        """
def g(x):
    return x + 1
def f(h):
    return h(1)
""",
        "assert f(g) == 2",
    ),
    Form(
        "a generator",
        """
def f():
    n = 0
    while True:
        yield n
        n += 1
""",
        """
g = f()
assert [next(g), next(g)] == [0, 1]
""",
    ),
    Form(
        "a coroutine",
        """
async def f(x):
    return x
""",
        """
import asyncio
assert asyncio.run(f(3)) == 3
""",
    ),
    Form(
        "an error",
        """
def f(x):
    raise KeyError(x)
""",
        """
try:
    f(1)
    assert False
except KeyError as error:
    assert error.args == (1,)
""",
    ),
    Form(
        "what it prints",
        """
def f():
    print('a')
""",
        """
import contextlib, io
out = io.StringIO()
with contextlib.redirect_stdout(out):
    f()
assert out.getvalue() == 'a\\n'
""",
    ),
    Form(
        "a name of Python's",
        """
def sum(a, b):
    return a + b
""",
        """
assert sum(1, 2) == 3
assert sum(0, 0) == 0
""",
    ),
    Form(
        "a module of the code",
        """
import math
def f(x):
    return math.sqrt(x)
""",
        "assert math.isclose(f(2) ** 2, 2)",
    ),
    Form(
        "an enumeration",
        """
import enum
class C(enum.Enum):
    A = 1
def f():
    return C.A
""",
        "assert f() == C.A and f() is C.A and C.A.value == 1 and C['A'] == f() and len(C) == 1",
    ),
    Form(
        "data classes",
        """
import dataclasses
@dataclasses.dataclass
class P:
    x: int
    def __add__(self, o):
        return P(self.x + o.x)
""",
        "assert P(1) + P(2) == P(3) and (P(1) + P(2)).x == 3",
    ),
    Form(
        "in a context",
        """
class C:
    n = 0
    def __enter__(self):
        self.n += 1
        return self
    def __exit__(self, *_):
        self.n += 1
""",
        """
with C() as c:
    assert c.n == 1
assert c.n == 2
""",
    ),
    Form(
        "in several blocks",
        """
a = 1
```
then
```python
def f():
    return a
""",
        "assert f() == 1",
    ),
]
