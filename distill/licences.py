"""Whose outputs a student learns from, under which terms, and what these demand. Not legal advice: a record.

Read in the model cards and licence texts of the families in 2025 and 2026; a recipe's `licence` key overrides the name.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from distill.errors import LicenceError

UNKNOWN = "unknown"


class Terms(NamedTuple):
    """What a family's terms say of models trained on its outputs."""

    pattern: str
    """Regular expression on the model's name, case ignored; the first that matches counts."""
    licence: str
    name_prefix: str | None = None
    """How the name of a model trained on its outputs must begin."""
    note: str | None = None
    forbidden: bool = False
    """Whether training a model on its outputs is excluded."""


_FAMILIES = (
    Terms(r"^embedded:", "Apache-2.0"),
    Terms(r"deepseek-r1-distill-llama", "llama3", "Llama", "Built with Meta Llama 3: the Llama licence holds beside DeepSeek's MIT."),
    Terms(r"deepseek-(r1|v3)", "MIT", note="The licence names distillation as allowed."),
    Terms(r"\bllama-?3", "llama3", "Llama", "The Llama licence: show 'Built with Llama'."),
    Terms(r"qwen-?3|qwen2\.5-(0\.5b|1\.5b|7b|14b|32b)", "Apache-2.0"),
    Terms(r"gpt-oss", "Apache-2.0"),
    Terms(r"gemma-?4", "Apache-2.0"),
    Terms(r"gemma", "gemma", note="Gemma's terms pass on to models trained on its outputs, with their use restrictions."),
    Terms(r"glm-4\.[56]", "MIT"),
    Terms(r"kimi-k2|minimax-m2", "modified-MIT", note="Above a size of business the model's name must be shown to users."),
    Terms(r"^(openai/)?(gpt-[345](?!-oss)|o[134](-|$)|chatgpt)", "OpenAI-terms", forbidden=True),
)


def terms_of(model: str | None) -> Terms | None:
    """The terms of a model by its name, or null where it is not in the table."""
    return next((terms for terms in _FAMILIES if model and re.search(terms.pattern, model, re.IGNORECASE)), None)


def licence_of(model: str | None, stated: str | None) -> str:
    """The licence a recipe states, else the one known for the model, else `unknown`."""
    terms = terms_of(model)
    return stated or (terms.licence if terms else UNKNOWN)


def check_terms(author: str | None, student_name: str) -> list[str]:
    """What must be noted of a student trained on a model's outputs.

    Args:
        author: Model that wrote the traces, or null where that is not known.
        student_name: Name under which the student goes out.

    Raises:
        LicenceError: the terms exclude it, or ask for another name.
    """
    terms = terms_of(author)
    if terms is None:
        return [f"The terms of {author or 'the traces'} are not known to the kit: check them before you publish."]
    if terms.forbidden:
        raise LicenceError(f"{author}: its terms do not allow training other models on its outputs. Use another teacher.")
    if terms.name_prefix and not student_name.rpartition("/")[2].startswith(terms.name_prefix):
        raise LicenceError(
            f"{author}: its licence asks that a model trained on its outputs has a name beginning with {terms.name_prefix!r}, "
            f"got {student_name!r}. Set export.model_name."
        )
    return [terms.note] if terms.note else []
