"""Checks of a trace. `passed` is true, false, or null: could not be judged, which is not the same as wrong."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """What a check found."""

    check: str
    passed: bool | None
    reason: str
