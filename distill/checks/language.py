"""Whether a text is in a language, as far as a small classifier (py3langid, 139 languages) is sure of it: of short texts it seldom is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from distill.checks import Found, Given
from distill.checks.form import answer_of
from distill.recipe.kinds import Language

_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(?:\{[^{}]*\})*|</?[A-Za-z][^<>\n]*>|https?://\S+",
    re.DOTALL,
)
_ONE = {"arz": "ar", "ary": "ar", "wuu": "zh", "yue": "zh", "pcm": "en", "nb": "no", "nn": "no"}
"""What the classifier tells apart and a recipe does not: written Arabic, Chinese, English and Norwegian."""
_ALIKE = (
    {"da", "no"},
    {"id", "ms"},
    {"bs", "hr", "sr"},
    {"cs", "sk"},
    {"gl", "pt"},
    {"az", "tr"},
    {"be", "ru", "uk"},
    {"bg", "mk"},
    {"hi", "mr", "ne"},
)
"""Languages that are mistaken for each other: one in place of another is nothing to be sure of."""
_SURE, _LIKELY = 0.9, 0.5
"""Probabilities: of a language that is named without being expected, and of the one that is."""
_PIECE_LETTERS = 80  # that are judged together
_FEW_LETTERS, _FEW_SIGNS = 12, 4  # below it nothing is said, of a text in Latin letters and in others


def check_language(given: Given, settings: Language) -> Found:
    """Whether the text is in the language: `min_share` of what the classifier is sure of, which must be half of it; else null."""
    answer = answer_of(given.completion)
    text = given.completion if settings.reasoning else answer
    if text is None or not _words(text).strip():
        return None, "no_words"
    wanted = settings.language
    if wanted == "prompt":
        found = language_of(given.prompt)
        if found is None:
            return None, "prompt_unsure"
        wanted = found
    parts = [text] if not settings.reasoning or answer is None else [text[: len(text) - len(answer)], answer]
    results = [_share(part, _ONE.get(wanted, wanted), settings.min_share) for part in parts if _words(part).strip()]
    return next((found for passed in (False, None, True) for found in results if found[0] is passed), (None, "no_words"))


def language_of(text: str) -> str | None:
    """The language of most of a text; null where that is not sure."""
    letters: dict[str, int] = {}
    for piece in _pieces(text):
        ranked = _ranked(piece)
        best = max(ranked, key=lambda name: ranked[name])
        letters[best if ranked[best] >= _SURE else ""] = letters.get(best if ranked[best] >= _SURE else "", 0) + len(piece)
    if not letters:
        return None
    most = max(letters, key=lambda name: letters[name])
    return most if most and 2 * letters[most] > sum(letters.values()) else None


def supported() -> frozenset[str]:
    """Codes of the languages that the classifier knows."""
    return frozenset(_ONE.get(code, code) for code in _classifier().nb_classes) - {"zxx"}


def _share(text: str, wanted: str, min_share: float) -> Found:
    inside = outside = unsure = 0
    alike = next((group for group in _ALIKE if wanted in group), {wanted})
    for piece in _pieces(text):
        ranked = _ranked(piece)
        if ranked.get(wanted, 0.0) >= _LIKELY:
            inside += len(piece)
        elif sum(ranked.get(name, 0.0) for name in alike) <= 1 - _SURE and max(ranked.values()) >= _SURE:
            outside += len(piece)
        else:
            unsure += len(piece)
    if inside + outside <= unsure:
        return None, "unsure"
    return (True, "in_language") if inside >= min_share * (inside + outside) else (False, "other_language")


def _words(text: str) -> str:
    """The text without code, formulas, addresses, numbers and signs; its lines stay."""
    return re.sub(r"[^\w\s.,;:!?'’\-]|[\d_]", " ", _NO_WORDS.sub(" ", text))  # noqa: RUF001


def _pieces(text: str) -> Iterator[str]:
    """Lines of a text, put together until they are long enough to say something of."""
    piece = ""
    for line in [*_words(text).splitlines(), None]:
        piece = piece if line is None else f"{piece} {line.strip()}".strip()
        letters = sum(map(str.isalpha, piece))
        if letters >= _PIECE_LETTERS or (line is None and _says_something(piece, letters)):
            yield piece
            piece = ""


def _says_something(piece: str, letters: int) -> bool:
    latin = sum(sign.isalpha() and sign < "\u0250" for sign in piece)
    return letters >= (_FEW_LETTERS if 2 * latin > letters else _FEW_SIGNS)


def _ranked(piece: str) -> dict[str, float]:
    """The probability of each language; nothing where it is none at all."""
    ranked: dict[str, float] = {}
    for code, probability in _classifier().rank(piece):
        name = _ONE.get(str(code), str(code))
        ranked[name] = ranked.get(name, 0.0) + float(probability)
    return ranked


@lru_cache(maxsize=1)
def _classifier() -> Any:
    """Takes two seconds the first time."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def prepare() -> None:
    """Loads what takes long the first time."""
    _classifier()
