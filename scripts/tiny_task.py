"""The embedded task: multi-step arithmetic whose worked solutions have real choices.

A problem is an expression of one to four operations on whole numbers, put in one of several wordings; its solution
takes the operations in any order that the brackets allow, splits sums and products in one of several ways, words each
step in one of several ways, and sometimes checks itself. So the distribution of the next token, given a problem, is
wide: one trace shows one way, the teacher's probabilities show all of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Tom")
THINGS = ("pens", "eggs", "cards", "coins", "books", "apples")
OPENERS = ("First", "Next", "Then", "Now", "So")
LIMIT = 999  # no number of a problem or of its solution is larger


class Problem(NamedTuple):
    """A question, its expression as text, and its answer."""

    question: str
    expression: str
    answer: int

    @property
    def operations(self) -> int:
        """How many operations its expression has."""
        return sum(self.expression.count(sign) for sign in "+-*")


@dataclass(frozen=True)
class Node:
    """An operation on two expressions, or a number."""

    value: int
    sign: str = ""
    left: Node | None = None
    right: Node | None = None

    @property
    def is_number(self) -> bool:
        """Whether nothing is left to compute here."""
        return not self.sign

    def text(self, parent: str = "", is_right: bool = False) -> str:
        """The expression with the brackets it needs, and no others."""
        if self.left is None or self.right is None:
            return str(self.value)
        inner = f"{self.left.text(self.sign)}{self.sign}{self.right.text(self.sign, True)}"
        needs = (parent == "*" and self.sign != "*") or (is_right and parent == "-" and self.sign != "*")
        return f"({inner})" if needs or (is_right and parent == self.sign) else inner


def problem(rng: random.Random, operations: int) -> Problem:
    """A random problem with so many operations."""
    if operations in (2, 3) and rng.random() < 0.25:
        return _story(rng, operations)
    while True:
        tree = _tree(rng, operations)
        if tree is not None:
            text = tree.text()
            wording = rng.choice(("What is {}?", "Compute {}.", "Work out {}.", "{}=?"))
            return Problem(wording.format(text), text, tree.value)


def solution(rng: random.Random, expression: str) -> str:
    """A worked solution: reasoning between think tags, then the answer in a box."""
    start, written = parse(expression), lines(rng, expression)
    if rng.random() < 0.25 and start.left is not None and start.right is not None and start.sign in "+-":
        written.append(_check(start))
    ending = rng.choice(("The answer is ", "So it is ", ""))
    return "<think>\n" + "\n".join(written) + f"\n</think>\n\n{ending}\\boxed{{{start.value}}}"


def lines(rng: random.Random, expression: str) -> list[str]:
    """The working of a solution: each line works one operation and says what is left."""
    tree = parse(expression)
    written: list[str] = []
    while not tree.is_number:
        line, tree = _line(rng, tree, first=not written)
        written.append(line)
    return written


def guess(answer: int) -> str:
    """An answer without reasoning."""
    return f"<think>\n</think>\n\n\\boxed{{{answer}}}"


def parse(expression: str) -> Node:
    """The tree of an expression; brackets, `*` before `+` and `-`, from the left."""
    import ast

    signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}

    def build(node: ast.expr) -> Node:
        if isinstance(node, ast.BinOp):
            return _apply(signs[type(node.op)], build(node.left), build(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return Node(node.value)

    return build(ast.parse(expression, mode="eval").body)


def _apply(sign: str, left: Node, right: Node) -> Node:
    value = {"+": left.value + right.value, "-": left.value - right.value, "*": left.value * right.value}[sign]
    return Node(value, sign, left, right)


def _tree(rng: random.Random, operations: int) -> Node | None:
    """A random expression, or null where a number came out negative, too large or too hard."""
    if operations == 0:
        return Node(rng.randint(2, 60) if rng.random() < 0.6 else rng.randint(2, 9))
    left_operations = rng.randint(0, operations - 1)
    left, right = _tree(rng, left_operations), _tree(rng, operations - 1 - left_operations)
    if left is None or right is None:
        return None
    sign = rng.choice("++--*")
    if sign == "*" and (min(left.value, right.value) > 9 or max(left.value, right.value) > 60 or min(left.value, right.value) < 2):
        return None
    node = _apply(sign, left, right)
    return node if 0 <= node.value <= LIMIT else None


def _story(rng: random.Random, operations: int) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start, boxes, size = rng.randint(2, 60), rng.randint(2, 9), rng.randint(2, 12)
    text = f"{start}+{boxes}*{size}"
    question = f"{name} has {start} {thing} and buys {boxes} boxes of {size}."
    if operations == 3:
        gone = rng.randint(2, start + boxes * size)
        text += f"-{gone}"
        question += f" {name} gives {gone} away."
    return Problem(f"{question} How many {thing} now?", text, parse(text).value)


def _line(rng: random.Random, tree: Node, *, first: bool) -> tuple[str, Node]:
    """A line that works one operation, and the tree that is left."""
    place = rng.choice(_ready(tree))
    node = _at(tree, place)
    opener = "First" if first and rng.random() < 0.5 else rng.choice(OPENERS[1:])
    step = _step(rng, node)
    line = f"{opener} {step}." if rng.random() < 0.6 else f"{step}."
    tree = _put(tree, place, Node(node.value))
    return (line if tree.is_number else f"{line} Left: {tree.text()}."), tree


def _ready(tree: Node, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Paths to the operations whose two sides are numbers."""
    if tree.left is None or tree.right is None:
        return []
    if tree.left.is_number and tree.right.is_number:
        return [path]
    return _ready(tree.left, (*path, 0)) + _ready(tree.right, (*path, 1))


def _at(tree: Node, path: tuple[int, ...]) -> Node:
    for side in path:
        tree = tree.left if side == 0 else tree.right  # type: ignore[assignment]
    return tree


def _put(tree: Node, path: tuple[int, ...], new: Node) -> Node:
    if not path:
        return new
    assert tree.left is not None and tree.right is not None
    sides = [tree.left, tree.right]
    sides[path[0]] = _put(sides[path[0]], path[1:], new)
    return Node(tree.value, tree.sign, sides[0], sides[1])


def _step(rng: random.Random, node: Node) -> str:
    """One operation, worked in one of the ways there are for it."""
    assert node.left is not None and node.right is not None
    a, b, sign, value = node.left.value, node.right.value, node.sign, node.value
    whole = f"{a}{sign}{b}={value}"
    tens, ones = b - b % 10, b % 10
    if sign == "*":
        factor, other = (a, b) if a <= b else (b, a)
        if other < 10:
            return whole
        high, low = other - other % 10, other % 10
        if not low:
            return whole
        parts = rng.sample([high, low], 2)
        products = ", ".join(f"{factor}*{part}={factor * part}" for part in parts)
        return f"{products}, {factor * parts[0]}+{factor * parts[1]}={value}"
    if a < 10 or not tens or not ones:
        return whole
    step = 1 if sign == "+" else -1
    ways = [(part, b - part) for part in (tens, ones) if 0 <= a + step * part <= LIMIT]
    part, rest = rng.choice(ways)
    between = a + step * part
    return f"{a}{sign}{part}={between}, {between}{sign}{rest}={value}"


def _check(tree: Node) -> str:
    assert tree.left is not None and tree.right is not None
    a, b, value = tree.left.value, tree.right.value, tree.value
    return f"Check: {value}-{b}={a}." if tree.sign == "+" else f"Check: {value}+{b}={a}."
