"""Texts in a normal form: what differs only in spelling is one text. Knows nothing of where texts come from."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from distill.data.identities import Ids
from distill.run.schema import Message

# Punctuation, operators and arrows of many scripts, for a class of a pattern; marks of letters, as Hindi and Thai have them, are none.
SIGNS = "!-/:-@\\[-`{-~\u00a1-\u00bf\u00d7\u00f7\u060c\u061b\u061f\u06d4\u0964\u0965\u2000-\u2bff\u3000-\u303f\uff00-\uff0f"
_BESIDE_SIGNS = re.compile(f"(?<=[{SIGNS}]) | (?=[{SIGNS}])")
_UNSEEN = re.compile(  # Unicode's Default_Ignorable_Code_Point: joiners, marks of direction, selectors, soft hyphens
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_DIGITS = re.compile(r"(?![0-9])\d")
_APART = "\x1f"  # between parts of a conversation; is white space, so it stands in no normal form


def normal_form(text: str) -> str:
    """A text without what is only spelling: Unicode forms (NFKC), case, white space, what nobody sees, the script of decimal digits.

    White space is one space between words and nothing elsewhere: `boxes ?` is `boxes?`, as the French write it or not. The normal form
    of one is itself. NFKC writes small raised digits as digits, so `2³` and `23` have one: what it calls equal need not mean the same.
    """
    if text.isascii():
        return _spaced(text.lower())
    # Folding undoes a composition here and there, and composing brings letters together that fold once more: twice is enough for all.
    for _ in range(2):
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
        text = _spaced(unicodedata.normalize("NFKC", text.casefold()))
    return _DIGITS.sub(lambda digit: str(unicodedata.decimal(digit.group())), text)


def _spaced(text: str) -> str:
    return _BESIDE_SIGNS.sub("", " ".join(text.split()))


def normal_numbers(conversations: Iterable[list[Message]]) -> Ids:
    """64 bits a conversation, equal for those whose turns have the same roles, contents in normal form, and further values."""
    return np.array([_number(messages) for messages in conversations], np.uint64)


def _data(text: str, ids: dict[str, str]) -> str:
    """A list of tools or calls, in whatever order their keys stand; the ids that each source draws anew are numbered in their order."""
    listed = [{name: value for name, value in entry.items() if name != "id"} for entry in json.loads(text)]
    for entry in json.loads(text):
        ids.setdefault(str(entry.get("id")), str(len(ids)))
    return json.dumps(listed, ensure_ascii=False, sort_keys=True)


def _number(messages: list[Message]) -> int:
    parts: list[str] = []
    ids: dict[str, str] = {}
    for turn in messages:
        more = {name: value for name, value in turn.items() if name not in ("role", "content") and value is not None}
        more |= {name: _data(more[name], ids) for name in ("tools", "tool_calls") if name in more}
        if "tool_call_id" in more:
            more["tool_call_id"] = ids.setdefault(more["tool_call_id"], str(len(ids)))
        parts += [turn["role"], normal_form(turn["content"]), *(part for pair in sorted(more.items()) for part in pair), ""]
    return int.from_bytes(hashlib.blake2b(_APART.join(parts).encode(), digest_size=8).digest(), "big")
