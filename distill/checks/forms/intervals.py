r"""Intervals and inequalities: `(-\infty,4)` and `x<4` are one, `x<1 or x>2` and a union too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from distill.checks.forms.plain import as_words
from distill.checks.forms.shapes import Intervals, Piece, Readings, Text
from distill.checks.forms.splitting import bracketed, split

_UNION = re.compile(r"\s*(?:\\cup(?![a-z])|(?<=[)\]])\s*U(?=\s*[(\[]))\s*")
_OR = re.compile(r"\s*(?:\bor\b|\\cup(?![a-z]))\s*")
_BUILT = re.compile(
    r"\\\{ ?([A-Za-z])(?: ?\\in ?\\mathbb ?\{?R\}?)? ?(?:\||:|\\mid(?![a-z])|\\vert(?![a-z])|such that) ?(.+?) ?\\\}", re.IGNORECASE
)
_ALL = re.compile(r"\\mathbb ?\{?R\}?|all (?:the )?real(?: number)?s?", re.IGNORECASE)
_ALL_BUT = re.compile(r"\\mathbb ?\{?R\}? ?(?:\\setminus|-) ?\\\{ ?([^{},]+?) ?\\\}")
_SIZE = re.compile(r"\|([A-Za-z])\| ?(<=|>=|<|>|\\le(?![a-z])|\\ge(?![a-z])) ?([^<>=|-]+)")
_AND = re.compile(r"\s*\band\b\s*")
_COMMA = re.compile(r"\s*[,;]\s*")
_RELATION = re.compile(r"\s*(<=|>=|<|>|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|!=)\s*")
_LETTER = re.compile(r"(?:[A-Za-z]|\\(?!infty|pi)[a-z]+)(?:_\{?\w\}?)?")
_MEMBER = re.compile(rf"({_LETTER.pattern})\s*\\in(?![a-z])\s*(.+)")
_INFINITE = re.compile(r"[+-]?(?:\\infty|infinity|inf|oo)", re.IGNORECASE)
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_SPELLED = {"<=": "\\le", ">=": "\\ge", "!=": "\\ne"}
Read = Callable[[str], Readings]
"""Reads an end of an interval."""


def intervals(text: str, read: Read) -> Iterator[Intervals]:
    """The union that a plain text is; nothing where it is something else, or brackets that may be a pair of numbers too."""
    text = as_words(text)
    if found := _BUILT.fullmatch(text):
        yield from (piece for piece in _inequalities(found[2], read) if piece.letter in (None, found[1]))
        return
    text = _SIZE.sub(_without_bars, text)
    letter = None
    if found := _MEMBER.fullmatch(text):
        letter, text = found[1], found[2].strip()
    if _ALL.fullmatch(text):
        yield Intervals(letter, (Piece(None, None, False, False),))
        return
    if found := _ALL_BUT.fullmatch(text):
        yield Intervals(letter, _around(read(found[1])))
        return
    parts = split(text, _UNION)
    pieces = [piece_of(bracketed(part), read) for part in parts]
    if (len(parts) > 1 or letter is not None) and all(pieces):
        yield Intervals(letter, tuple(piece for piece in pieces if piece is not None))
        return
    if len(parts) == 1 and pieces[0] is not None and _has_mixed_or_infinite(parts[0]):
        yield Intervals(letter, (pieces[0],))
    elif letter is None:
        yield from _inequalities(text, read)


def piece_of(found: tuple[str, str, str] | None, read: Read) -> Piece | None:
    """The interval between two brackets, or null."""
    if found is None or found[0] == "\\{":
        return None
    ends = split(found[1], _COMMA)
    if len(ends) != 2 or not all(ends):
        return None
    if _infinite(ends[0]) > 0 or _infinite(ends[1]) < 0:
        return None
    lower, upper = (_end(end, read) for end in ends)
    return Piece(lower, upper, found[0] == "[" and lower is not None, found[2] == "]" and upper is not None)


def _around(end: Readings) -> tuple[Piece, Piece]:
    """All but one number."""
    return Piece(None, end, False, False), Piece(end, None, False, False)


def _without_bars(found: re.Match[str]) -> str:
    """`|x|<2` as `-2<x<2`, `|x|>2` as what lies outside."""
    letter, sign, end = found[1], found[2], found[3].strip()
    if sign in ("<", "<=", "\\le"):
        return f"-{end} {sign} {letter} {sign} {end}"
    return f"{letter} {_FLIPPED[_SPELLED.get(sign, sign)]} -{end} or {letter} {sign} {end}"


def _has_mixed_or_infinite(text: str) -> bool:
    return text[0] + text[-1] in ("(]", "[)", "][", "]]", "[[") or "\\infty" in text or re.search(r"\binf", text) is not None


def _infinite(text: str) -> int:
    """-1 and 1 for the two infinities, else 0."""
    found = text.strip()
    return 0 if _INFINITE.fullmatch(found) is None else -1 if found.startswith("-") else 1


def _end(text: str, read: Read) -> Readings | None:
    """An end of an interval; null for one that goes on for ever."""
    return None if _infinite(text) else read(text)


def _inequalities(text: str, read: Read) -> Iterator[Intervals]:
    letters: set[str] = set()
    pieces: list[Piece] = []
    for part in split(text, _OR):
        chains = [_chain(chain, read) for chain in split(part, _AND)]
        if not all(chains) or len(chains) > 2:
            return
        found = [chain for chain in chains if chain is not None]
        letters |= {letter for letter, _ in found}
        joined = _joined([piece for _, these in found for piece in these]) if len(found) == 2 else found[0][1]
        if joined is None:
            return
        pieces += joined
    if len(letters) == 1 and pieces:
        yield Intervals(letters.pop(), tuple(pieces))


def _joined(pieces: list[Piece]) -> list[Piece] | None:
    """What is in two half-lines at once, one to each side; null for others."""
    lower = next((piece for piece in pieces if piece.upper is None and piece.lower is not None), None)
    upper = next((piece for piece in pieces if piece.lower is None and piece.upper is not None), None)
    if len(pieces) != 2 or lower is None or upper is None:
        return None
    return [Piece(lower.lower, upper.upper, lower.has_lower, upper.has_upper)]


def _chain(text: str, read: Read) -> tuple[str, list[Piece]] | None:
    """The letter and the intervals of `x<4`, `4>x`, `0<x<7.5`, `x != 3`; null for other text."""
    parts = _RELATION.split(text.strip())
    sides, signs = [part.strip() for part in parts[::2]], [_SPELLED.get(sign, sign) for sign in parts[1::2]]
    places = [place for place, side in enumerate(sides) if _LETTER.fullmatch(side)]
    if len(sides) not in (2, 3) or len(places) != 1 or not all(sides):
        return None
    place = places[0]
    if len(sides) == 3:
        directions = {sign in ("<", "\\le") for sign in signs}
        if place != 1 or len(directions) > 1 or "\\ne" in signs:
            return None
        ends = [(sides[0], signs[0]), (sides[2], signs[1])]
        (low, low_sign), (high, high_sign) = ends if directions.pop() else ends[::-1]
        return sides[1], [Piece(_end(low, read), _end(high, read), "e" in low_sign, "e" in high_sign)]
    sign = signs[0] if place == 0 else _FLIPPED[signs[0]]
    end = _end(sides[1 - place], read)
    if end is None or any(isinstance(form, Text) for form in end):
        return None
    if sign == "\\ne":
        return sides[place], list(_around(end))
    closed = "e" in sign
    return sides[place], [Piece(None, end, False, closed) if sign in ("<", "\\le") else Piece(end, None, closed, False)]
