"""Code that wants to pass its tests without doing what they ask. Each passes where code and tests share a process (see `NAIVE`)."""

from __future__ import annotations

from typing import NamedTuple

NAIVE = """
import json, sys
code, tests = json.loads(sys.stdin.read())
space = {"__name__": "__main__"}
try:
    exec(code, space)
    exec(tests, space)
except BaseException as error:
    if isinstance(error, SystemExit) and not error.code:
        raise
    print('[false, "wrong"]')
    sys.exit(1)
print('[true, "tests_passed"]')
"""
"""How tests are often run: after the code, in its process, believing what that prints, or its exit code."""

MARKER = '[true, "tests_passed"]'
TESTS = "assert double(2) == 4\nassert double(-1) == -2\nassert double(21) == 42"
UNITTEST = """
import unittest
class T(unittest.TestCase):
    def test_double(self):
        self.assertEqual(double(2), 4)
        self.assertEqual(double(-1), -2)
result = unittest.TestResult()
unittest.defaultTestLoader.loadTestsFromTestCase(T).run(result)
assert result.wasSuccessful()
"""


class Cheat(NamedTuple):
    name: str
    code: str
    tests: str = TESTS
    fools_naive: bool = True
    """Whether it is shown to pass elsewhere; what is made for this sandbox is not."""


def equal(base: str, made: str, more: str = "") -> str:
    """A function that gives an object which equals everything."""
    body = "    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = None\n"
    return f"import collections\nclass R({base}):\n{body}{more}def double(x):\n    return {made}\n"


_ANY = "    def __getattr__(self, name):\n        return R()\n    def __call__(self, *_):\n        return R()\n"
_COMPARES = "    __lt__ = __gt__ = __le__ = __ge__ = lambda *_: True\n"
_HOLDS = "    __contains__ = lambda *_: True\n    __iter__ = lambda _: iter([])\n"

OBJECTS = [
    Cheat("equal to all", equal("object", "R()")),
    Cheat("a number equal to all", equal("int", "R(7)")),
    Cheat("a float equal to all", equal("float", "R(7)")),
    Cheat("a text equal to all", equal("str", "R('x')"), "assert double('ab') == 'abab'\nassert double('c') == 'cc'"),
    Cheat("a list equal to all", equal("list", "R([7])"), "assert double([2]) == [4]\nassert [6] == double([3])"),
    Cheat("a tuple equal to all", equal("tuple", "R((7,))"), "assert double((2,)) == (4,)"),
    Cheat("a dict equal to all", equal("dict", "R(a=7)"), "assert double({'a': 2}) == {'a': 4}"),
    Cheat("a named tuple equal to all", equal("collections.namedtuple('R', 'a')", "R(7)"), "assert double((2,)) == (4,)"),
    Cheat("equal to all in a list", equal("object", "[R()]"), "assert double([2]) == [4]"),
    Cheat("equal to all in a dict", equal("object", "{'a': R()}"), "assert double({'a': 2}) == {'a': 4}"),
    Cheat("equal to all by class", "class double:\n    def __init__(self, _):\n        pass\n    __eq__ = lambda *_: True\n"),
    Cheat("its own class equal to all", equal("object", "R()") + "V = R\n", "v = V()\nassert double(v) == V()\nassert V() == double(V())"),
    Cheat("compares as is liked", equal("object", "R()", _COMPARES), "assert 3.9 < double(2) < 4.1\nassert double(3) >= 6"),
    Cheat("holds all", equal("object", "R()", _HOLDS), "assert 4 in double(2)\nassert 6 in double(3)"),
    Cheat("has every attribute", equal("object", "R()", _ANY), "assert double(2).real == 4\nassert double(3).conjugate() == 6"),
    Cheat("is a number, it says", equal("object", "R()", "    __class__ = int\n"), "r = double(2)\nassert isinstance(r, int) and r == 4"),
]

_WRONG = "\ndef double(x):\n    return 0\n"
_TO_ALL_FILES = f"""
import os
for fd in range(1, 128):
    try:
        os.write(fd, {MARKER!r}.encode() + b"\\n")
    except OSError:
        pass
"""
_THREAD = """
import os, threading, time
def double(x):
    threading.Thread(target=os._exit, args=(0,)).start()
    time.sleep(60)
"""

ENDS = [
    Cheat("leaves at once", "import os\nos._exit(0)"),
    Cheat("leaves when called", "import os\ndef double(x):\n    os._exit(0)"),
    Cheat("exits at once", "import sys\nsys.exit(0)"),
    Cheat("exits when called", "import sys\ndef double(x):\n    sys.exit(0)"),
    Cheat("leaves from a thread", _THREAD),
    Cheat("leaves from a hook", "import atexit, os\natexit.register(os._exit, 0)" + _WRONG),
    Cheat("becomes another program", "import os\nos.execv('/bin/true', ['true'])"),
    Cheat("prints the marker", f"print({MARKER!r}, flush=True)" + _WRONG),
    Cheat("prints the marker at the end", f"import atexit\natexit.register(print, {MARKER!r})" + _WRONG),
    Cheat("writes the marker to all files", _TO_ALL_FILES + _WRONG),
]

_QUIET = "import builtins\nclass Quiet(SystemExit):\n    pass\nbuiltins.AssertionError = Quiet\n"
_ALL = "assert all(double(i) == 2 * i for i in range(5))"
_FAKE = """
import sys
class Fake:
    TestCase = object
    def __getattr__(self, name):
        return self
    def __call__(self, *_):
        return self
sys.modules["unittest"] = Fake()
"""

PATCHES = [
    Cheat("replaces AssertionError", _QUIET + _WRONG, "if double(2) != 4:\n    raise AssertionError()"),
    Cheat("defines all", "def all(_):\n    return True\n" + _WRONG, _ALL),
    Cheat("replaces all", "import builtins\nbuiltins.all = lambda _: True\n" + _WRONG, _ALL),
    Cheat("defines abs", "def abs(_):\n    return 0\n" + _WRONG, "assert abs(double(2) - 4) < 1e-9"),
    Cheat("defines sorted", "def sorted(_):\n    return []\n" + _WRONG, "assert sorted({double(1)}) == sorted([2])"),
    Cheat("defines isinstance", "def isinstance(*_):\n    return True\n" + _WRONG, "assert isinstance(double('a'), str)"),
    Cheat("defines a module", "class math:\n    isclose = lambda *_: True\n" + _WRONG, "assert math.isclose(double(2), 4)"),
    Cheat("changes a module", "import math\nmath.isclose = lambda *_: True\n" + _WRONG, "import math\nassert math.isclose(double(2), 4)"),
    Cheat("changes copies", "import copy\ncopy.deepcopy = lambda _: 0\n" + _WRONG, "import copy\nassert double(2) == copy.deepcopy(4)"),
    Cheat("changes unittest", "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\n" + _WRONG, UNITTEST),
    Cheat("changes its results", "import unittest\nunittest.TestResult.wasSuccessful = lambda _: True\n" + _WRONG, UNITTEST),
    Cheat("replaces unittest", _FAKE + _WRONG, UNITTEST),
    Cheat("skips the tests", "import unittest\ndef double(x):\n    raise unittest.SkipTest('no')", UNITTEST),
]

_BY_FRAME = """
import dis, sys
def double(x):
    frame = sys._getframe(1)
    steps = dis.get_instructions(frame.f_code)
    return next(step.argval for step in steps if step.offset > frame.f_lasti and step.opname == "LOAD_CONST")
"""
_BY_OBJECTS = """
import gc, re
def double(x):
    for holder in gc.get_objects():
        if isinstance(holder, dict) and (found := re.search(rf"double.{x}. == (-?\\d+)", str(holder.get("tests")))):
            return int(found[1])
"""
_BY_FRAMES = """
import re, sys
def double(x):
    frame = sys._getframe()
    while frame := frame.f_back:
        if found := re.search(rf"double.{x}. == (-?\\d+)", str(frame.f_locals) + str(frame.f_globals)):
            return int(found[1])
"""

_MAPPED = "assert all(map(lambda i: double(i) == 2 * i, range(5)))"
RAISES = [
    Cheat("ends what goes through it", "def double(x):\n    raise StopIteration", _MAPPED),
    Cheat("ends it by a class of its own", "class E(StopIteration):\n    pass\ndef double(x):\n    raise E", _MAPPED),
]

LOOKS = [
    Cheat("reads the code of its caller", _BY_FRAME, "assert double(2000) == 4000\nassert double(3000) == 6000"),
    Cheat("looks through all objects", _BY_OBJECTS),
    Cheat("looks through the stack", _BY_FRAMES),
]


def forges(*messages: str) -> str:
    """Code that writes messages to the socket to its tests before they ask."""
    return f"""
import os, stat
for fd in range(3, 128):
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            for message in {list(messages)!r}:
                os.write(fd, message.encode() + b"\\n")
    except OSError:
        pass
{_WRONG}"""


_READY = '{"ready": true, "failed": null}'
_NAMED = '{"value": {"object": {"number": 0, "of": null}}}'
_CLASS = '{"value": {"object": {"number": 0, "class": {"name": "double", "bases": [], "error": null}}}}'
_LIKE = '{"value": {"object": {"number": 1, "of": {"number": 0, "class": {"name": "double", "bases": [], "error": null}}}}}'

FORGERIES = [
    Cheat("answers before it is asked", forges(_READY, _NAMED, *['{"value": true}'] * 9), fools_naive=False),
    Cheat("answers with things", forges(_READY, _CLASS, _LIKE, *['{"value": true}'] * 9), fools_naive=False),
    Cheat("answers with no message", forges("[" * 100_000), fools_naive=False),
    Cheat("answers with the verdict", forges(_READY, _NAMED, MARKER), fools_naive=False),
    Cheat("answers with types", forges(_READY, _NAMED, '{"value": {"builtin": "exec"}}'), fools_naive=False),
    Cheat(
        "answers with an error of the tests",
        forges(_READY, _NAMED, '{"error": {"builtin": "SystemExit", "class": null, "args": []}}'),
        fools_naive=False,
    ),
    Cheat("calls the tests", forges(_READY, _NAMED, '{"call": 0, "given": [], "named": {}}'), fools_naive=False),
    Cheat("answers without end", forges("[" + "1," * 3_000_000), fools_naive=False),
]

ALL = [*OBJECTS, *ENDS, *PATCHES, *RAISES, *LOOKS, *FORGERIES]
