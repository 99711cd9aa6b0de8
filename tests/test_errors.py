"""What a user sees when something is wrong: one message, which controls nothing."""

from __future__ import annotations

import pytest

from distill.errors import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202etxt", r"abc\u202etxt"),
        ("a\rb", r"a\rb"),
        ("\ud800", r"\ud800"),
        ("Zeile\n\tzwei", "Zeile\n\tzwei"),
        ("नी\u200dक", "नी\u200dक"),
    ],
)
def test_foreign_text_controls_no_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_what_is_cut_is_counted() -> None:
    assert visible("x" * 1000, limit=3) == "xxx... (1,000 characters)"
