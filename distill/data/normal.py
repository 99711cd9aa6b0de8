"""Texts in a normal form: what differs only in spelling is one text. Knows nothing of where texts come from."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from distill.data.identities import Ids
from distill.run.schema import Message

_BESIDE_SIGNS = re.compile(r"(?<!\w) | (?!\w)")
_DIGITS = re.compile(r"(?![0-9])\d")
_APART = "\x1f"  # between parts of a conversation; is white space, so it stands in no normal form


def normal_form(text: str) -> str:
    """A text without what is only spelling: Unicode forms (NFKC), case, white space, and the script of decimal digits.

    White space is one space between words and nothing elsewhere: `boxes ?` is `boxes?`, as the French write it or not. The normal form
    of one is itself. NFKC writes small raised digits as digits, so `2³` and `23` have one: what it calls equal need not mean the same.
    """
    if text.isascii():
        return _spaced(text.lower())
    # Folding undoes a composition here and there, and composing brings letters together that fold once more: twice is enough for all.
    for _ in range(2):
        text = _spaced(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))
    return _DIGITS.sub(lambda digit: str(unicodedata.decimal(digit.group())), text)


def _spaced(text: str) -> str:
    return _BESIDE_SIGNS.sub("", " ".join(text.split()))


def normal_numbers(conversations: Iterable[list[Message]]) -> Ids:
    """64 bits a conversation, equal for those whose turns have the same roles, contents in normal form, and further values."""
    return np.array([_number(messages) for messages in conversations], np.uint64)


def _number(messages: list[Message]) -> int:
    parts: list[str] = []
    for turn in messages:
        more = sorted((name, value) for name, value in turn.items() if name not in ("role", "content") and value is not None)
        parts += [turn["role"], normal_form(turn["content"]), *(part for pair in more for part in pair), ""]
    return int.from_bytes(hashlib.blake2b(_APART.join(parts).encode(), digest_size=8).digest(), "big")
