"""Whether answers can be compared with references at all: there are some, and they are numbers or expressions, not words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distill.errors import visible

_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname)\b|\\([A-Za-z]+)")
_WORD = re.compile(r"[^\W\d_]{2,}")
_NAMES = frozenset({"pi", "sin", "cos", "tan", "cot", "sec", "log", "ln", "exp", "sqrt", "frac", "inf", "infty", "mod", "gcd", "lcm"})
"""What looks like a word in an expression, and is none."""


def is_words(reference: str) -> bool:
    """Whether a reference is words alone, which the comparison of expressions takes for a product of letters."""
    if any(character.isdigit() for character in reference):
        return False
    plain = _COMMAND.sub(" ", reference)  # what stands in \\text{...} stays
    return any(word.lower() not in _NAMES for word in _WORD.findall(plain))


def unjudged_because(references: Sequence[str | None]) -> str | None:
    """Why answers can't be judged by these references, most of which are missing or words; null where they can.

    Args:
        references: Of some prompts.
    """
    given = [reference for reference in references if reference is not None]
    if not given:
        return f"none of {len(references):,} prompts has a reference" if references else None
    words = [reference for reference in given if is_words(reference)]
    if 2 * len(words) <= len(given):
        return None
    return (
        f"{visible(words[0], 40)!r} is no number or expression, like {len(words) / len(given):.0%} of the references, and an answer in "
        "words can't be judged"
    )
