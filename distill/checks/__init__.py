"""Checks of a trace. `passed` is true, false, or null: could not be judged, which is not the same as wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """What a check found."""

    check: str
    passed: bool | None
    reason: str


Found = tuple[bool | None, str]
"""What a check found, without its name: whether it passed, or null; and the reason."""


class Given(NamedTuple):
    """What a check is told of a trace."""

    completion: str
    """All that was written, reasoning included."""
    reference: str | None = None
    """The right answer; a list or an object is JSON."""
    fields: Mapping[str, Any] = {}
    """Further columns of its prompt, as `prompts.fields` names them."""
    prompt: str = ""
    """The user's last turn."""
    finish_reason: str | None = None
    num_tokens: int | None = None
    """Of the completion; null where they are not known."""
    told: Found | None = None
    """What the source says of the answer, which stands in place of every check of answers; null where it has no such column."""
