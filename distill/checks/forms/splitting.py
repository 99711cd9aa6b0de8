"""Splits a plain text where it is not inside brackets."""

from __future__ import annotations

import re

_OPENING, _CLOSING = "([{", ")]}"


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between separators that stand in no brackets; the text alone where its brackets do not match."""
    parts, start, place, depth = [], 0, 0, 0
    while place < len(text):
        letter = text[place]
        if depth == 0 and (found := separator.match(text, place)) and found.end() > place and not _splits_thousands(found, text):
            parts.append(text[start:place].strip())
            place = start = found.end()
            continue
        if letter == "\\" and text[place + 1 : place + 2] not in ("{", "}"):
            place += 1
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        place += 1
    return [*parts, text[start:].strip()] if depth == 0 else [text]


def bracketed(text: str) -> tuple[str, str, str] | None:
    r"""The brackets around a whole text and what is between them; null where the first one closes before the end."""
    opening = "\\{" if text.startswith("\\{") else text[:1]
    closing = "\\}" if text.endswith("\\}") else text[-1:]
    if opening not in ("(", "[", "\\{", "]") or closing not in (")", "]", "\\}", "[") or len(text) <= len(opening) + len(closing):
        return None
    inner = text[len(opening) : -len(closing)]
    if "]" in (opening,) or "[" in (closing,):  # ]2,5[ is how some write an open interval
        return None if re.search(r"[\[\]]", inner) else (opening, inner.strip(), closing)
    depth = 0
    for letter in inner:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth < 0:
            return None
    return (opening, inner.strip(), closing) if depth == 0 else None


def _splits_thousands(found: re.Match[str], text: str) -> bool:
    """Whether a comma stands inside a number: in `x = 1,500` and `1,500 and 2,000`, not in `125,216,343` alone."""
    before, after = text[: found.start()], text[found.end() :]
    if found.group() != "," or not re.match(r"\d{3}(?!\d)", after) or not re.search(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})*$", before):
        return False
    return re.search(r", | and | or |;|=", text) is not None
