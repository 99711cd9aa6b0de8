r"""Reads a plain text as the forms it can have: the first kind that fits, and with it what else the same letters can say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from distill.checks.forms.dates import clock, days
from distill.checks.forms.expressions import has_words, is_expression, is_letters
from distill.checks.forms.intervals import intervals
from distill.checks.forms.numbers import Number, leading, number, with_decimal_comma
from distill.checks.forms.plain import as_words, exact_key, text_key, trimmed
from distill.checks.forms.shapes import Data, Equation, Expression, Form, Group, Labelled, Quantity, Ratio, Readings, Table, Text
from distill.checks.forms.splitting import bracketed, split
from distill.checks.forms.units import MONEY_SIGN, SCALES, converted, is_measure, unit_in

_DEPTH = 5
_MOST = 200  # parts of a list
_LONG = 2000  # characters; what is longer is text
_SCORE = re.compile(r"\d+(?:-\d+)+")
"""A score, a range, a telephone number: no difference that somebody left to be computed."""
_AND = r"\s*\\text\{\s*(?:and|or)\s*\}\s*"
_LIST = re.compile(rf"\s*[,;]\s*(?:and |or |{_AND})?|\s+(?:and|or|&)\s+|{_AND}|\s*(?:和|与|或|、)\s*")
_LABELLED = re.compile(r"(?:[Oo]ption |[Cc]hoice )?(?:\(([A-Za-z])\)|([A-Z])[.):]|\\text\{\s*\(?([A-Z])\)?[.:]?\s*\})\s*(\S.*)")
_OPTION = re.compile(r"(?:option|choice|answer)\s+\(?([A-Za-z])\)?", re.IGNORECASE)
_MATRIX = re.compile(r"\\begin\s*\{([pbvBV]?matrix|array)\}(?:\s*\{[lcr| ]*\})?(.*)\\end\s*\{\1\}")
_NAME = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?|')?(?:\s*\([^()=]*\))?"  # x, a_2, f(2)
    r"|\([A-Za-z], ?[A-Za-z](?:, ?[A-Za-z])?\)|[^\W\d_][\w ]{1,40}|\\text\{[^{}]*\}"  # (x, y), Area
)
_PARTS = re.compile(r"(?<=[A-Za-z'\".])(?:,? and |, | )(?=\d)")
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
    return found or (Text(text_key(text)),)


def _forms(text: str, depth: int) -> Iterator[Form]:
    if (whole := data(text)) is not None:
        yield whole
        return
    words = as_words(text)
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
    for reader in (_decimal_comma, _ratio, _quantity, _labelled, _intervals, _matrix, _group, _list, _equation):
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
    elif text in ("e", "i"):
        yield from (Text(text), Expression(text))
    elif is_expression(words if "\\text" in text else text) and not _SCORE.fullmatch(words):
        yield Expression(text)
        if has_words(text):
            yield Text(text_key(text))


def data(text: str) -> Data | None:
    """An object or list in JSON that holds more than numbers, keys in order; null for other text."""
    if text[:1] not in "{[" or text[-1:] not in "}]" or '"' not in text:
        return None
    try:
        return Data(json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False))
    except (ValueError, RecursionError):
        return None


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
    if ":" in text:
        terms = [number(part.strip()) for part in as_words(text).split(":")]
        if 2 <= len(terms) <= 10 and all(term is not None for term in terms):
            yield Ratio(tuple(term for term in terms if term is not None))


def _quantity(text: str, depth: int) -> Iterator[Form]:
    """A number with a unit: money before it, or a unit behind it; else an expression with upright text behind it."""
    negative = text.startswith("-")
    body = text.removeprefix("-").lstrip()
    if (sign := MONEY_SIGN.match(body)) and (found := _leading(body[sign.end() :])):
        value, rest = found
        value, rest = _scaled(value.scaled(-1) if negative else value, rest)
        if not rest.strip() or unit_in(rest) is not None:
            yield Quantity(value, sign.group().strip() + rest)
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
    if (total := _compound(as_words(text))) is not None:
        yield total
        return
    yield from _expression_with_unit(text)


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
    """The number times the word behind it that says thousands or millions, and what follows."""
    words = as_words(rest)
    for word, factor in SCALES.items():
        if words.lower().startswith(word) and not words[len(word) :][:1].isalpha():
            return value.scaled(factor), words[len(word) :]
        if not word.isascii() and words.startswith(word):
            return value.scaled(factor), words[len(word) :]
    return value, rest


def _labelled(text: str, depth: int) -> Iterator[Form]:
    if found := _OPTION.fullmatch(as_words(text)):
        yield Text(found[1].lower())
    elif found := _LABELLED.fullmatch(text):
        yield Labelled((found[1] or found[2] or found[3]).lower(), read(trimmed(found[4]), depth + 1))


def _intervals(text: str, depth: int) -> Iterator[Form]:
    return intervals(text, lambda end: read(trimmed(end), depth + 1))


def _matrix(text: str, depth: int) -> Iterator[Form]:
    if found := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", found[2].replace("\\hline", "")) if row.strip()]
        if sum(row.count("&") + 1 for row in rows) <= _MOST:
            yield Table(tuple(tuple(read(trimmed(cell), depth + 1) for cell in row.split("&")) for row in rows))


def _group(text: str, depth: int) -> Iterator[Form]:
    if exact_key(text) in ("\\emptyset", "\\{\\}", "{}"):
        yield Group("\\{", "\\}", ())
    elif (found := bracketed(text)) is not None:
        opening, inner, closing = found
        parts = split(inner, _LIST)
        if 1 < len(parts) <= _MOST or (opening == "\\{" and parts != [""]):
            yield Group(opening, closing, tuple(read(trimmed(part), depth + 1) for part in parts))


def _list(text: str, depth: int) -> Iterator[Form]:
    parts = [part for part in split(text, _LIST) if part]
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


def _equation(text: str, depth: int) -> Iterator[Form]:
    sides = split(text, re.compile(r"\s*(?<![<>=!\\])=(?!=)\s*"))
    if len(sides) < 2 or not all(sides) or not all(is_letters(side) or number(side) is not None for side in sides[1:-1]):
        return
    left, right = sides[0], sides[-1]
    is_value = _NAME.fullmatch(left) is not None or not re.search(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", "", as_words(left)))
    if is_value or (is_expression(left) and is_expression(right)):
        yield Equation(exact_key(left), read(trimmed(right), depth + 1), (left, right), is_value)
