"""What a refused request means: send it again, give up its row, or end the stage with the server's words and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill.errors import visible

Verdict = Literal["retry", "row", "stage"]

_MAY_PASS = frozenset({408, 409, 425, 429})
_OF_A_PROMPT = frozenset({400, 403, 413, 422, 451})
_SPENT = re.compile(
    r"insufficient[ _]quota|insufficient[ _]balance|exceeded your current quota|out of credits|billing[ _]hard[ _]limit|arrearage", re.I
)
"""Words in which hosts say with 429 or 403 that nothing is left to pay with."""
_TOO_LONG = re.compile(
    r"context[ _-]?(?:length|window|size)|maximum (?:context|input|sequence|prompt)|max_model_len|max[ _]seq|too (?:long|many tokens)"
    r"|reduce the length|exceeds? (?:the )?(?:available|maximum|model|max|token|limit)|longer than|input (?:token )?length"
    r"|string_above_max_length|range of input",
    re.I,
)
_FILTERED = re.compile(
    r"content[ _-]?(?:filter|policy|management|moderation|exists risk)|content exists risk|moderation|flagged|safety|inappropriate"
    r"|data[ _]?inspection|sensitive|policy violation|usage policies|prohibited",
    re.I,
)
_ADVICE = {
    400: "Compare the recipe's keys of this server (body, chat_template_kwargs) with what it takes",
    401: "The key is missing or wrong: set the environment variable {key}",
    402: "Nothing is left to pay with: add credit at the host, and run this again; it goes on",
    403: "The key may not use this model: look at what the host allows it",
    404: "It knows no such model, or no such path: compare server.model and server.url with what it serves (`distill check`)",
    405: "Another program answers at this address: look at server.url and server.kind",
    422: "It does not take a field that was sent: look at server.kind and server.body",
}


@dataclass(frozen=True)
class Fault:
    """What an HTTP status that is no success means."""

    verdict: Verdict
    """`retry`: it may pass. `row`: this request has failed for good, others need not. `stage`: no row could make it right."""
    reason: str
    """In one word, for counting: `too_long`, `content_filter`, `http_429`, ..."""
    detail: str
    """The server's own words, cut."""
    advice: str = ""
    """What to do, where the stage ends."""


def fault_of(status: int, body: Any, key_variable: str | None = None) -> Fault:
    """What a status and its body mean.

    Args:
        status: Of HTTP, 400 or more; or the code of an error inside an answer.
        body: Parsed JSON, or text, or bytes.
        key_variable: Name of the environment variable with the key, for the advice.
    """
    words = words_of(body)
    if _SPENT.search(words) and status in (402, 403, 429):
        return Fault("stage", f"http_{status}", words, _ADVICE[402])
    if status in _MAY_PASS or status >= 500:
        return Fault("retry", f"http_{status}", words)
    if status in _OF_A_PROMPT:
        if status == 413 or _TOO_LONG.search(words):
            return Fault("row", "too_long", words)
        if status == 451 or _FILTERED.search(words):
            return Fault("row", "content_filter", words)
    named = f"{key_variable}" if key_variable else "that server.api_key_env names"
    return Fault("stage", f"http_{status}", words, _ADVICE.get(status, "Look at server.url and server.kind").format(key=named))


def words_of(body: Any, limit: int = 300) -> str:
    """A server's own words in an error's body: the message where there is one, else the body; without controls, cut."""
    if isinstance(body, bytes):
        body = body.decode("utf-8", "replace")
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return visible(re.sub(r"<[^>]*>", " ", body).strip(), limit)  # a gateway's page
    return visible(_message(body), limit)


def _message(body: Any) -> str:
    if isinstance(body, Mapping):
        parts = [_message(body[name]) for name in ("error", "message", "msg", "detail") if body.get(name)]
        coded = [str(body[name]) for name in ("code", "type") if isinstance(body.get(name), str)]
        # What a host passes on from behind it says more than its own words.
        raw = body.get("metadata")
        behind = [_message(raw["raw"])] if isinstance(raw, Mapping) and raw.get("raw") else []
        return " ".join([*parts, *behind, *(f"({code})" for code in coded)]) or json.dumps(body, ensure_ascii=False)
    if isinstance(body, list):
        return "; ".join(_message(entry) for entry in body)
    return str(body)
