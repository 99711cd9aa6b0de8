"""How alike two texts are."""

from __future__ import annotations

from functools import cache
from typing import Any


def chrf(text: str, reference: str) -> float:
    """The chrF of a text against one reference, 0 to 100: F2 of its character n-grams up to 6, by sacrebleu (Popović 2015).

    Needs no words, so it means the same in every script. Of two empty texts it is 100.
    """
    return 100.0 if text == reference else float(_chrf().sentence_score(text, [reference]).score)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
