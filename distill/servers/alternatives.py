"""Log-probabilities beside written tokens, from the forms in which servers tell them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distill.servers import Alternatives

_FLOOR = -9999.0
"""What servers of OpenAI's protocol write for a probability of nothing."""
_ID = "token_id:"


class Entry(NamedTuple):
    """One token with its log-probability in nats; id or bytes where they are told."""

    logprob: float
    token_id: int | None
    written: bytes | None


def chat_entries(items: Sequence[Mapping[str, Any]]) -> list[tuple[Entry, list[Entry]]]:
    """OpenAI's chat form, and llama-server's: an object a token, with `top_logprobs` of the same form."""
    return [(_object(item), [_object(other) for other in item.get("top_logprobs") or []]) for item in items]


def completion_entries(told: Mapping[str, Any]) -> list[tuple[Entry, list[Entry]]]:
    """OpenAI's older form: lists of tokens, of log-probabilities, and of objects from token to log-probability."""
    tokens, values = told.get("tokens") or [], told.get("token_logprobs") or []
    tops, ids = told.get("top_logprobs") or [None] * len(tokens), told.get("token_ids") or [None] * len(tokens)
    found = []
    for token, value, top, index in zip(tokens, values, tops, ids, strict=False):
        entry = _text(token, value)
        found.append((entry._replace(token_id=index) if index is not None else entry, [_text(*pair) for pair in (top or {}).items()]))
    return found


def triple_entries(written: Sequence[Sequence[Any]], tops: Sequence[Sequence[Sequence[Any]] | None]) -> list[tuple[Entry, list[Entry]]]:
    """SGLang's form: log-probability, id and text (or null) of each token."""
    pairs = zip(written, tops or [None] * len(written), strict=False)
    return [(_triple(item), [_triple(other) for other in top or []]) for item, top in pairs]


def alternatives_of(found: Sequence[tuple[Entry, list[Entry]]], most: int) -> Alternatives | None:
    """What came as lists: the best of each position, most probable first, none twice; null where a token has no log-probability.

    Servers give the written token beside the best ones asked for, in no order, and floors in place of a probability of nothing.

    Args:
        found: A written token and its alternatives, a position each.
        most: Alternatives that were asked for at each position.
    """
    if not found or any(not math.isfinite(entry.logprob) for entry, _ in found):
        return None
    rows = [_best(others, most) for _, others in found]
    everyone = [entry for entry, _ in found] + [entry for row in rows for entry in row]
    by_id = all(entry.token_id is not None for entry in everyone)
    by_bytes = all(entry.written is not None for entry in everyone)
    if not by_id and not by_bytes:
        return None
    return Alternatives(
        token_logprobs=[entry.logprob for entry, _ in found],
        logprobs=[[entry.logprob for entry in row] for row in rows],
        token_ids=[[entry.token_id for entry in row if entry.token_id is not None] for row in rows] if by_id else None,
        token_bytes=[[entry.written for entry in row if entry.written is not None] for row in rows] if by_bytes else None,
        written_bytes=[entry.written or b"" for entry, _ in found] if by_bytes else None,
    )


def checked(
    found: Sequence[tuple[Entry, list[Entry]]], asked: int | None, ids: Sequence[int] | None = None
) -> tuple[Alternatives | None, dict[str, Any]]:
    """Alternatives that were asked for, and a note where they are missing or belong to other tokens than came."""
    if asked is None:
        return None, {}
    read = alternatives_of(found, asked)
    if read is None:
        return None, {"logprobs": "asked for, and none came"}
    told = [entry.token_id for entry, _ in found]
    if ids is not None and (len(told) != len(ids) or any(a is not None and a != b for a, b in zip(told, ids, strict=True))):
        return None, {"logprobs": "they belong to other tokens than came"}
    return read, {}


def _best(others: Iterable[Entry], most: int) -> list[Entry]:
    best: dict[Any, Entry] = {}
    for entry in sorted((e for e in others if math.isfinite(e.logprob) and e.logprob > _FLOOR), key=lambda e: -e.logprob):
        best.setdefault(entry.written if entry.token_id is None else entry.token_id, entry)
    return list(best.values())[:most]


def _object(item: Mapping[str, Any]) -> Entry:
    index = item.get("id", item.get("token_id"))
    told, token = item.get("bytes"), item.get("token")
    if isinstance(token, str) and token.startswith(_ID):
        return _text(token, item.get("logprob"))
    written = bytes(told) if told is not None else token.encode() if isinstance(token, str) else None
    return Entry(_float(item.get("logprob")), index if isinstance(index, int) else None, written)


def _text(token: str, value: Any) -> Entry:
    if token.startswith(_ID):
        return Entry(_float(value), int(token.removeprefix(_ID)), None)
    return Entry(_float(value), None, token.encode())


def _triple(item: Sequence[Any]) -> Entry:
    text = item[2] if len(item) > 2 else None
    return Entry(_float(item[0]), int(item[1]), text.encode() if isinstance(text, str) else None)


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
