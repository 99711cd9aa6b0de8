"""Whether answers can be compared with references at all: whether there are some."""

from __future__ import annotations

from collections.abc import Sequence


def unjudged_because(references: Sequence[str | None]) -> str | None:
    """Why answers can't be judged by these references; null where they can.

    Args:
        references: Of some prompts.
    """
    if not references or any(reference is not None for reference in references):
        return None
    return f"none of {len(references):,} prompts has a reference"
