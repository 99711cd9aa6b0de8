"""Whether a trace goes round in circles: a loop at the end of reasoning or answer, a row of one character, phrases again and again.

The reason it exists: about one in a hundred long traces ends its reasoning well and then writes `!` without end, or says the same
paragraph over and over; both pass for whole by their form.
"""

from __future__ import annotations

import re

from distill.checks import Found, Given
from distill.data.texts import loops
from distill.recipe.kinds import Degenerate
from distill.run.schema import THINK_CLOSE

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")  # in Chinese and Japanese each character
_LEAST_PHRASES = 100  # in a text, below which a share of them says nothing


def check_degenerate(given: Given, settings: Degenerate) -> Found:
    """Whether nothing of the kind is found."""
    reasoning, _, answer = given.completion.rpartition(THINK_CLOSE)
    if loops(reasoning) or loops(answer):
        return False, "loops"
    if re.search(rf"(\S)\1{{{settings.max_run},}}", given.completion):
        return False, "one_character"
    if repeated(given.completion, settings.phrase_words) > settings.max_repeated:
        return False, "repeated_phrases"
    return True, "varied"


def repeated(text: str, phrase_words: int) -> float:
    """The share of a text's phrases, of so many words each, that stood in it before; 0 for a short text."""
    words = _WORD.findall(text)
    phrases = [hash(tuple(words[place : place + phrase_words])) for place in range(len(words) - phrase_words + 1)]
    return 1 - len(set(phrases)) / len(phrases) if len(phrases) >= _LEAST_PHRASES else 0.0
