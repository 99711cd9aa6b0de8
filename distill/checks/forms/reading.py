r"""Reads a plain text as the forms it can have: the first kind that fits, and with it what else the same letters can say."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from distill.checks.forms import locales
from distill.checks.forms.cases import cased
from distill.checks.forms.dates import clock, days
from distill.checks.forms.expressions import has_words, is_expression, is_letters
from distill.checks.forms.intervals import intervals
from distill.checks.forms.numbers import Number, exactly, leading, number, with_decimal_comma
from distill.checks.forms.plain import as_words, exact_key, text_key, trimmed
from distill.checks.forms.scales import POWERS, divisor_in, scaled
from distill.checks.forms.shapes import Data, Equation, Expression, Form, Formula, Group, Labelled, Quantity, Ratio, Readings, Table, Text
from distill.checks.forms.splitting import bracketed, split
from distill.checks.forms.units import MONEY_SIGN, converted, is_measure, unit_in
from distill.checks.forms.words import spelled

_DEPTH = 5
_MOST = 200  # parts of a list
_LONG = 2000  # characters; what is longer is text
_SCORE = re.compile(r"\d+(?:-\d+)+")
"""A score, a range, a telephone number: no difference that somebody left to be computed."""
_AND = r"\s*\\text\{\s*(?:and|or)\s*\}\s*"
_LIST = re.compile(rf"\s*[,;]\s*(?:and |or |{_AND})?|\s+(?:and|or|&)\s+|{_AND}|\s*(?:和|与|與|或|または|、)\s*")
_ELSEWHERE = re.compile(r"(?<=[\d)\]}])\s+([^\s\d]{1,6})\s+(?=[-\d(\[]|\\[a-z]|[A-Za-z](?:_\d)? ?=)")
"""The word between two numbers or brackets, which joins them in some language."""
_CALLED = r"(?:[Oo]ption|[Cc]hoice|[Oo]pci[óo]n|[Oo]pção|[Aa]ntwort|[Rr]éponse|[Вв]ариант|选项|選項|选择|選択肢|보기)\s*"
_LABELLED = re.compile(
    rf"(?:{_CALLED})?(?:\(([A-Za-z])\)|([A-Z])[.):]|\\text\{{\s*\(?([A-Z])\)?[.:]?\s*\}})"
    r"(?:\s*(?![-+*/^_=,;&]|and\b|or\b|\\(?:cdot|times)\b|\\text\{\s*(?:and|or)\b)|\s+(?=-\d))(\S.*)"
)
_OPTION = re.compile(rf"(?:answer\s+|选|{_CALLED})\(?([A-Za-z])\)?|([A-Za-z])(?:\)|\s*选项)", re.IGNORECASE)
_GOES_ON = re.compile(r"(,.*[^\s.,;(\[{])\s*\.\.\.$")
"""A list that goes on, without a comma before what says so."""
_BELOW = re.compile(r"(?:(.*) )?below zero", re.IGNORECASE)
_DECADE = re.compile(r"(?:the )?(\d{3}0s)", re.IGNORECASE)
_INFINITE = re.compile(r"(-|minus |negative )?(?:\+|positive )?(?:\\infty|infinity|inf)", re.IGNORECASE)
_EMPTY = re.compile(
    r"\\emptyset|\\\{ ?\\\}|\{\}|(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|(?:the )?empty set|[无無]解|解なし",
    re.IGNORECASE,
)
_TERM = r"\d*(?:[A-Z][a-z]?\d*|[(\[]|[)\]]\d*)+(?:\^\d*[+-])?"
_FORMULA = re.compile(rf"{_TERM}(?:(?:\+|\\to){_TERM})*")
_MANY = {"k": 10**3, "m": 10**6, "mn": 10**6, "mio": 10**6, "b": 10**9, "bn": 10**9}
_MATRIX = re.compile(r"\\begin\s*\{([pbvBV]?matrix|array)\}(?:\s*\{[lcr| ]*\})?(.*)\\end\s*\{\1\}")
_NAME = re.compile(  # x, a_2, f(2); (x, y), Area; an angle, a derivative
    r"(?:[A-Za-z]|\\(?!frac)[A-Za-z]+(?: ?\{?[A-Za-z]{1,3}\}?)?)(?:_\{?\w+\}?|')?(?:\^ ?\{ ?-1 ?\})?(?:\s*[(\[][^()]*[)\]])?"
    r"|\([A-Za-z], ?[A-Za-z](?:, ?[A-Za-z])?\)|[^\W\d_][\w ]{1,40}|\\text\{[^{}]*\}"
    r"|m? ?\\angle ?[A-Z]{1,3}|\\frac\{d ?[a-z]?\}\{d ?[a-z]\}"
)
_MEMBER = re.compile(r"([A-Za-z](?:_\{?\w\}?)?) ?\\in ?(\\\{.*\\\})")
_PARTS = re.compile(r"(?<=[A-Za-z'\".])(?:,? and |, | )(?=\d)|(?<=[^\x00-\x7f])(?=\d)")
_COMMA_HEAD = re.compile(r"-?(?:\d{1,3}(?:[. ]\d{3})+|\d+),\d{1,2}(?![\d,.]\d)(?!\d)")
_PLAIN_TAIL = re.compile(r"(.*[\d})a-z])\s+([A-Za-zμΩ]\S*)")
_TAIL_UNIT = re.compile(r"(.*\S)\s*(\\text\s*\{\s*([^{}]+?)\s*\}(?:\s*\^\s*\{?\s*-?\d\s*\}?)?|[%°])")


@lru_cache(maxsize=4096)
def read(text: str, depth: int = 0) -> Readings:
    """The forms of a plain text, the likeliest first; there is always one.

    Args:
        text: As `plain` leaves it.
        depth: How many lists it stands in.
    """
    found = tuple(dict.fromkeys(_forms(text, depth))) if depth < _DEPTH and len(text) <= _LONG else ()
    return found or (Text(text_key(text), cased(text)),)


def _forms(text: str, depth: int) -> Iterator[Form]:
    if (whole := data(text)) is not None:
        yield whole
        return
    words = as_words(text)
    if said := _named(words):
        yield said
        return
    if day := days(words):
        yield from day
        return
    if (time := clock(words)) is not None:
        yield time
        return
    literal = number(words)
    if literal is not None:
        yield literal
        yield from _thousands_as_list(text, depth)
        return
    for reader in (_decimal_comma, _ratio, _labelled, _quantity, _member, _intervals, _matrix, _group, _list, _equation):
        forms = [form for form in reader(text, depth) if form is not None]
        yield from forms
        if forms:
            return
    yield from _computed(text, words, depth)


def _computed(text: str, words: str, depth: int) -> Iterator[Form]:
    """An expression, whole or in brackets of its own."""
    inner = bracketed(text)
    if inner is not None and inner[0] + inner[2] in ("()", "[]"):
        yield from read(trimmed(inner[1]), depth + 1)
    elif text in ("e", "i", "pi"):
        yield from (Text(text), Expression(text))
    elif is_expression(words if "\\text" in text else text) and not _SCORE.fullmatch(words):
        yield Expression(text)
        if has_words(text) or "\\to" in text:
            yield Text(text_key(text), cased(text))
    if (found := _formula(text)) is not None:
        yield from (found, Text(text_key(text), cased(text)))


def _named(words: str) -> Text | None:
    """What has a name of its own: an infinity, a decade, what does not exist."""
    if found := _INFINITE.fullmatch(words):
        return Text("-\\infty" if found[1] else "\\infty")
    if found := _DECADE.fullmatch(words):
        return Text(found[1].lower())
    return Text("does not exist") if words.lower() == "dne" else None


def _formula(text: str) -> Formula | None:
    """A formula of chemistry: capital letters with numbers, whether they are set low or not."""
    bare = re.sub(r"\\text(?![a-z])|[\s_{}]", "", text[:200])
    return Formula(bare) if len(text) < 200 and _FORMULA.fullmatch(bare) and re.search(r"\d|\^", bare) else None


def data(text: str) -> Data | None:
    """An object or list in JSON that holds more than numbers, keys in order; null for other text."""
    if text[:1] not in "{[" or text[-1:] not in "}]" or not ('"' in text or "'" in text):
        return None
    try:
        found = json.loads(text, parse_float=_whole_if_it_is)
    except (ValueError, RecursionError):
        found = _python(text)
    return None if found is None else Data(json.dumps(found, sort_keys=True, ensure_ascii=False))


def _whole_if_it_is(digits: str) -> float | int:
    value = float(digits)
    return int(value) if value.is_integer() else value


def _python(text: str) -> object:
    """A list or dictionary as Python writes it, of what JSON can hold; null for other text."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of its spelling
            found = ast.literal_eval(text)
        json.dumps(found, sort_keys=True)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return found if isinstance(found, dict | list) else None


def _thousands_as_list(text: str, depth: int) -> Iterator[Form]:
    """`125,216,343` may be three numbers as well."""
    if "," in text and not re.search(r",0", text):
        yield from _list(text, depth)


def _decimal_comma(text: str, depth: int) -> Iterator[Form]:
    value = with_decimal_comma(text)
    if value is not None:
        yield value
        yield from _list(text, depth)


def _ratio(text: str, depth: int) -> Iterator[Form]:
    if ":" in text or " to " in as_words(text):
        terms = [number(part.strip()) for part in re.split(r":|\bto\b", as_words(text))]
        if 2 <= len(terms) <= 10 and all(term is not None for term in terms):
            yield Ratio(tuple(term for term in terms if term is not None))


def _quantity(text: str, depth: int) -> Iterator[Form]:
    """A number with a unit: money before it, or a unit behind it; else an expression with upright text behind it."""
    if (amount := _money(text)) is not None:
        yield from amount
        return
    for candidate in dict.fromkeys([text, as_words(text)]):
        if found := _leading(candidate):
            value, rest = _scaled(*found)
            unit = unit_in(rest)
            if rest.strip() and unit is not None:
                yield Quantity(value, unit)
                return
            if rest != found[1] and not rest.strip():
                yield value
                return
            if power := POWERS.get(rest.strip().lower()):
                yield Expression(f"({candidate[: -len(rest)].strip()}){power}")
                return
    if (total := _compound(as_words(text))) is not None:
        yield total
        return
    if (said := spelled(as_words(text))) is not None and not said[1][:1].isupper() and (unit := unit_in(" " + said[1])) is not None:
        yield Quantity(exactly(said[0]), unit)
        return
    yield from _expression_with_unit(text)


def _money(text: str) -> tuple[Quantity, ...] | None:
    """The amount of money that a text is, its sign before it, or none where something else follows; null for other text."""
    negative = text.startswith("-")
    body = text.removeprefix("-").lstrip()
    sign = MONEY_SIGN.match(body)
    found = _leading(body[sign.end() :]) if sign else None
    if sign is None or found is None:
        return None
    value, rest = _scaled(found[0].scaled(-1) if negative else found[0], found[1])
    if rest.strip().lower() in _MANY:
        value, rest = value.scaled(_MANY[rest.strip().lower()]), ""
    return (Quantity(value, sign.group().strip() + rest),) if not rest.strip() or unit_in(rest) is not None else ()


def _leading(text: str) -> tuple[Number, str] | None:
    """The number before a unit, decimals behind a comma too: there it is no list."""
    if (found := leading(text)) is not None:
        return found
    head = _COMMA_HEAD.match(text)
    value = with_decimal_comma(head.group().replace(" ", "")) if head else None
    return None if head is None or value is None else (value, text[head.end() :])


def _expression_with_unit(text: str) -> Iterator[Form]:
    r"""`2\sqrt{3} cm`, and with `\text{ cm}`."""
    head, unit = "", None
    if tail := _TAIL_UNIT.fullmatch(text):
        head, unit = tail[1].strip("~ "), unit_in(tail[2].replace("\\text", " \\text"), alone=True)
    elif (tail := _PLAIN_TAIL.fullmatch(text)) and is_measure(tail[2]):
        head, unit = tail[1], tail[2]
    if (inner := bracketed(head)) is not None and inner[0] == "(":
        head = inner[1]
    if unit is None or (unit == "°" and re.search(r"\\(?:sin|cos|tan)", head)):
        return
    if is_expression(head) and split(head, _LIST) == [head] and "=" not in head:
        yield Quantity(Expression(head), unit)


def _compound(text: str) -> Quantity | None:
    """`5 ft 3 in` and `2 hours and 30 minutes`, in the first unit; null for other text."""
    total, first = Fraction(0), ""
    for part in _PARTS.split(text):
        found = leading(part)
        if found is None or found[0].value is None or (unit := unit_in(found[1])) is None:
            return None
        value = converted(found[0].value, unit, first or unit)
        if value is None:
            return None
        total, first = total + value, first or unit
    return Quantity(Number(total), first)


def _scaled(value: Number, rest: str) -> tuple[Number, str]:
    """The number times the words behind it that say thousands, millions or quarters, below zero or not, and what follows."""
    factor, rest_of_it = scaled(rest)
    first, _, behind = as_words(rest_of_it).partition(" ")
    if (divisor := divisor_in(first, is_one=value.value == 1)) is not None:
        factor, rest_of_it = factor / divisor, (" " + behind if behind else "")
    if found := _BELOW.fullmatch(as_words(rest_of_it)):
        factor, rest_of_it = -factor, found[1] or ""
    if factor == 1:
        return value, rest
    return value.scaled(factor), " " + rest_of_it if rest_of_it and rest_of_it[0].isalpha() else rest_of_it


def _labelled(text: str, depth: int) -> Iterator[Form]:
    if found := _OPTION.fullmatch(as_words(text)):
        yield Text((found[1] or found[2]).lower())
    elif found := _LABELLED.fullmatch(text):
        yield Labelled((found[1] or found[2] or found[3]).lower(), read(trimmed(found[4]), depth + 1))


def _intervals(text: str, depth: int) -> Iterator[Form]:
    return intervals(text, lambda end: read(trimmed(end), depth + 1))


def _matrix(text: str, depth: int) -> Iterator[Form]:
    if found := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", found[2].replace("\\hline", "")) if row.strip()]
        if sum(row.count("&") + 1 for row in rows) <= _MOST:
            cells = tuple(tuple(read(trimmed(cell), depth + 1) for cell in row.split("&")) for row in rows)
            yield Table(cells, found[1][0] if found[1][0] in "vV" else "")


def _group(text: str, depth: int) -> Iterator[Form]:
    if _EMPTY.fullmatch(as_words(text)):
        yield Group("\\{", "\\}", ())
    elif (found := bracketed(text)) is not None:
        opening, inner, closing = found
        parts = split(inner, _LIST)
        if 1 < len(parts) <= _MOST or (opening == "\\{" and parts != [""]):
            yield Group(opening, closing, tuple(read(trimmed(part), depth + 1) for part in parts))


def _list(text: str, depth: int) -> Iterator[Form]:
    text = _ELSEWHERE.sub(lambda found: ", " if found[1] in locales.joining() and found[1] != "of" else found.group(), text)
    parts = [part for part in split(_GOES_ON.sub(r"\1, ...", text), _LIST) if part]
    if 1 < len(parts) <= _MOST and not _is_prose(parts):
        found = tuple(read(trimmed(part), depth + 1) for part in parts)
        is_choice = re.search(r"\bor\b", text) is not None and any(isinstance(form, Text) for forms in found for form in forms)
        yield Group("", "or" if is_choice else "", found)
    elif "\\pm" in text and "\\mp" not in text and is_expression(text):
        left, equals, right = text.rpartition("=")
        signs = [trimmed(left + equals + right.replace("\\pm", sign)) for sign in ("+", "-")]
        yield Group("", "", tuple(read(re.sub(r"(^|=)\s*\+", r"\1", sign), depth + 1) for sign in signs))


def _is_prose(parts: list[str]) -> bool:
    """Whether parts between commas are clauses of a sentence, and no list."""
    return max(len(part.split()) for part in parts) > 8


def _member(text: str, depth: int) -> Iterator[Form]:
    r"""`x \in \{1, 2\}` says what `x = 1, x = 2` says."""
    if found := _MEMBER.fullmatch(text):
        yield Equation(exact_key(found[1]), read(trimmed(found[2]), depth + 1), (found[1], found[2]), True)


def _equation(text: str, depth: int) -> Iterator[Form]:
    sides = split(text, re.compile(r"\s*(?<![<>=!\\])=(?!=)\s*"))
    if len(sides) < 2 or not all(sides) or not all(is_letters(side) or number(side) is not None for side in sides[1:-1]):
        return
    left, right = sides[0], sides[-1]
    is_value = _NAME.fullmatch(left) is not None or not re.search(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", "", as_words(left)))
    if is_value or (is_expression(left) and is_expression(right)):
        yield Equation(exact_key(left), read(trimmed(right), depth + 1), (left, right), is_value)
