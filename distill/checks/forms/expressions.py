r"""Expressions: which plain texts are one, and whether two are equal, by math-verify's parser and sympy.

Exact where everything is: two expressions of whole numbers differ though they differ by 1e-600. A decimal may stand for a value that had to
be computed, to 1e-9 of it. May never return: see `distill/checks/math.py`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import Any

from distill.checks.forms.numbers import TOLERANCE, close
from distill.checks.forms.scales import GREEK

_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt gcd lcm max min abs " + " ".join(sorted(GREEK))
_FUNCTIONS = frozenset(_NAMES.split())
_MORE = (
    "frac cdot times pm mp infty binom delta epsilon zeta eta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega sum prod int lim to lfloor rfloor lceil rceil lvert rvert vert mod pmod bmod "
    "operatorname le ge ne"
)
_COMMANDS = _FUNCTIONS | frozenset(_MORE.split())
_OTHER = re.compile(
    rf"\w'|\.\.|\d\.\d+\.|\\\\|[A-Za-z]\d|\d (?!(?:{_NAMES.replace(' ', '|')}) )[A-Za-z]+ \d|\d \d"
)  # primes, what goes on, addresses, rows, codes, sentences
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_RUN = re.compile(r"[A-Za-z]+")
_ALLOWED = re.compile(r"[A-Za-z0-9°\s+\-*/^_{}()\[\]|!.,'=<>\\]*")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?:[eE]([+-]?\d+))?(?![\d.])")
_STEPS = [
    (re.compile(old), new)
    for old, new in {
        r"\*\*": "^",
        r"(?<![\\A-Za-z])(sqrt)\s*\(([^()]*)\)": r"\\sqrt{\2}",
        rf"(?<![\\A-Za-z])({'|'.join(sorted(GREEK))}|infty)(?![A-Za-z])": r"\\\1 ",
        r"(?<![\\A-Za-z])(a?rc?(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm)(?![A-Za-z])": r"\\\1",
        r"\^\s*(-?\d+)": r"^{\1}",
        r"\^\s*\(([^()]*)\)": r"^{\1}",
        r"(\d+)\s*°": r"(\\frac{\1\\pi}{180})",
        r"(?<=\d)\s*\(": r"\\cdot (",
        r"(?<!\\)\*": r"\\cdot ",
        r"(?<=\d),(?=\d{3}(?!\d))": "",
    }.items()
]
_INDEX = re.compile(r"_ ?(\d) ?(?=\d)")
_POINTS = 8
_DIGITS = 40


def is_expression(text: str) -> bool:
    """Whether a plain text is mathematics: something besides letters, and no words."""
    if not _ALLOWED.fullmatch(text) or not re.search(r"\d|[+*/^=<>!|]|\\[A-Za-z]|[A-Za-z]\s*\(|-", text):
        return False
    text = _INDEX.sub(r"_{\1}", text)
    if any(command not in _COMMANDS for command in _COMMAND.findall(text)) or _OTHER.search(_COMMAND.sub("@", text)):
        return False
    return all(len(run) == 1 or (len(run) <= 3 and run.islower()) for run in _runs(text))


def has_words(text: str) -> bool:
    """Whether letters stand together in an expression, so that it may be a name too, like `sku-12`."""
    return any(len(run) > 1 for run in _runs(text))


def is_letters(text: str) -> bool:
    """Whether a side of an equation is an expression, a single letter among them."""
    return re.fullmatch(r"[A-Za-z]", text) is not None or is_expression(text)


def equal(one: str, other: str) -> bool:
    """Whether two expressions are equal for all values of their letters, by as many as tell others apart."""
    if _is_anagram(one, other):
        return False
    first, second = parsed(one), parsed(other)
    if first is None or second is None:
        return False
    return _same(first, second, rounds="." in one or "." in other)


def equal_to(one: str, value: Fraction, *, is_decimal: bool) -> bool:
    """Whether an expression has a value.

    Args:
        one: The expression.
        value: A number that stands beside it.
        is_decimal: Whether the number may be rounded.
    """
    import sympy

    first = parsed(one)
    return first is not None and _same(first, sympy.Rational(value.numerator, value.denominator), rounds=is_decimal or "." in one)


def equations_equal(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two equations say the same: their sides differ by the same, but for a factor that is not 0."""
    if _is_anagram("=".join(one), "=".join(other)):
        return False
    sides = [parsed(side) for side in (*one, *other)]
    if any(side is None for side in sides):
        return False
    import sympy

    first, second = sympy.sympify(sides[0] - sides[1]), sympy.sympify(sides[2] - sides[3])
    letters = sorted(first.free_symbols | second.free_symbols, key=str)
    if not letters or first.free_symbols != second.free_symbols:
        return False
    ratios = set()
    for values in _points(letters):
        above, below = _value(first.subs(values)), _value(second.subs(values))
        if above is None or below is None or not below or not above:
            continue
        ratios.add(sympy.N(above / below, 20))
    return len(ratios) == 1 or (len(ratios) > 1 and all(abs(ratio - next(iter(ratios))) < 1e-15 * abs(ratio) for ratio in ratios))


@lru_cache(maxsize=1024)
def parsed(text: str) -> Any:
    """The expression as sympy has it; null where it can't be read, or is a relation or a set."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    for pattern, new in _STEPS:
        text = pattern.sub(new, text)
    text = _DECIMAL.sub(_as_fraction, text)
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    try:
        found = latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=config)
    except MemoryError:  # not judged, which is not the same as unreadable
        raise
    except Exception:  # its grammar and sympy raise what they like on what they can't read
        return None
    if not isinstance(found, sympy.Expr):
        return None
    return found.subs({symbol: sympy.I for symbol in found.free_symbols if str(symbol) == "i"})


def prepare() -> None:
    """Loads what takes a second the first time: imports, patterns, the grammar."""
    equal(r"\frac{x}{2}+\sqrt{3}", "0.5x+3^{0.5}")


def _runs(text: str) -> list[str]:
    """Letters that stand together and name no function."""
    return [run for run in _RUN.findall(_COMMAND.sub(" ", text)) if run.lower() not in _FUNCTIONS]


def _as_fraction(found: re.Match[str]) -> str:
    exponent = int(found[3] or 0) - len(found[2])
    digits = (found[1] + found[2]).lstrip("0") or "0"
    return f"\\frac{{{digits}}}{{10^{{{-exponent}}}}}"


def _is_anagram(one: str, other: str) -> bool:
    """Whether letters that stand together stand in another order in the other text, or commands in another case: no products."""
    commands = set(_COMMAND.findall(one)) ^ set(_COMMAND.findall(other))
    if len({command.lower() for command in commands}) < len(commands):
        return True
    first, second = ({run for run in _runs(text) if len(run) > 1} for text in (one, other))
    spelled = {tuple(sorted(Counter(run).items())) for run in first - second}
    return any(tuple(sorted(Counter(run).items())) in spelled for run in second - first)


def _same(first: Any, second: Any, *, rounds: bool) -> bool:
    import sympy

    if first == second:
        return True
    letters = sorted(first.free_symbols | second.free_symbols, key=str)
    if not letters:
        return _same_value(first, second, rounds)
    difference = first - second
    agreed = 0
    for values in _points(letters):
        one, other = _value(first.subs(values)), _value(second.subs(values))
        if one is None or other is None:
            continue
        if abs(one - other) > 10 ** (8 - _DIGITS) * max(abs(one), abs(other)):
            return False
        agreed += 1
    return agreed >= 3 or bool(sympy.simplify(difference) == 0)


def _same_value(first: Any, second: Any, rounds: bool) -> bool:
    import sympy

    first, second = sympy.sympify(first).doit(), sympy.sympify(second).doit()
    if first == second:
        return True
    if first.is_Rational and second.is_Rational:
        return rounds and close(Fraction(int(first.p), int(first.q)), Fraction(int(second.p), int(second.q)))
    one, other = _value(first), _value(second)
    if one is None or other is None:
        return False
    bound = max(abs(one), abs(other)) * (sympy.Rational(1, TOLERANCE.denominator) if rounds else sympy.Rational(1, 10 ** (_DIGITS - 8)))
    return bool(abs(one - other) <= bound)


def _value(expression: Any) -> Any:
    """The finite number that an expression without letters is, or null."""
    found = expression.doit().evalf(_DIGITS)
    return found if found.is_number and found.is_finite and not found.has_free() and found.as_real_imag()[0].is_Float is not None else None


def _points(letters: list[Any]) -> list[dict[Any, Any]]:
    """Values for letters, the same for the same letters, of both signs."""
    import sympy

    draw = random.Random(len(letters))
    return [
        {letter: sympy.Rational(draw.randint(-4000, 4000) * 2 + 1, 997 * (1 + number % 3)) for letter in letters}
        for number in range(_POINTS)
    ]
