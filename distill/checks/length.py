"""Whether a trace has as many tokens as it may have."""

from __future__ import annotations

from distill.checks import Found, Given
from distill.recipe.kinds import Length


def check_length(given: Given, settings: Length) -> Found:
    """Whether its tokens are within the bounds; null where they are not known."""
    if given.num_tokens is None:
        return None, "tokens_not_known"
    if given.num_tokens < settings.min_tokens:
        return False, "too_short"
    if settings.max_tokens is not None and given.num_tokens > settings.max_tokens:
        return False, "too_long"
    return True, "within_bounds"
