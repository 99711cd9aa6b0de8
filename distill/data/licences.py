"""Whose outputs a student learns from, under which terms, and what these demand. Not legal advice: a record.

A recipe's `licence` key says what is recorded; it adds demands where it names terms of the table, and removes none.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from distill.errors import LicenceError

UNKNOWN = "unknown"
_ANY, _NONE = "", r"(?!)"  # regular expressions that find something in every text, and in none
_BUILT_WITH_LLAMA = "Give a copy of the Llama licence along, and show 'Built with Llama'."


class Terms(NamedTuple):
    """What a family's terms say of models trained on its outputs, or from its weights."""

    pattern: str
    """Regular expression on the name of a model or a licence, case ignored; the first that matches counts."""
    licence: str
    r"""Its name; `\1` is what the pattern's group found."""
    name_prefix: str | None = None
    """How the name of a model that is made with it must begin; spaces, `-`, `_` and `.` in it don't count."""
    note: str | None = None
    """What else it asks for."""
    students: str = _ANY
    """Regular expression on the models that may be trained on its outputs."""


_FAMILIES = (
    Terms(r"^embedded:", "Apache-2.0"),
    # Model cards of DeepSeek-R1-Distill-*: MIT for what DeepSeek added, and the Llama licence of the weights below.
    Terms(r"deepseek-r1-distill-llama-8b", "llama3.1", "Llama", _BUILT_WITH_LLAMA),
    Terms(r"deepseek-r1-distill-llama", "llama3.3", "Llama", _BUILT_WITH_LLAMA),
    # Model card of DeepSeek-R1 ("distillation for training other LLMs" is allowed in words), V3-0324, V3.1, V3.2: MIT.
    Terms(r"deepseek-(r1|v3\.\d|v3-0324)", "MIT"),
    # Llama 3.1, 3.2, 3.3 and 4 Community License Agreement, 1.b.i: weights or outputs used for training.
    Terms(r"\bllama[- ]?(3\.[1-9]|4)", r"llama\1", "Llama", _BUILT_WITH_LLAMA),
    # Meta Llama 3 Community License Agreement, 1.b.i and 1.b.v: outputs improve no other language model.
    Terms(r"\bllama[- ]?3", "llama3", "Llama 3", "Show 'Built with Meta Llama 3'.", students=r"llama[- ]?3(?!\.)"),
    # Model cards of Qwen2.5: Qwen Research License (3B), Qwen License (72B), Apache-2.0 (the rest). Qwen3: Apache-2.0.
    Terms(r"qwen2\.5-(\w+-)?3b|qwen-research", "qwen-research", note="Not for commercial use."),
    Terms(r"qwen2\.5-(\w+-)?72b", "qwen", note="Show 'Built with Qwen' or 'Improved using Qwen'."),
    Terms(r"qwen-?3|qwen2\.5-(\w+-)?(0\.5|1\.5|7|14|32)b", "Apache-2.0"),
    Terms(r"gpt-oss", "Apache-2.0"),
    Terms(r"gemma-?4", "Apache-2.0"),
    # Gemma Terms of Use, 1.1 (e) and 3.1: a model distilled from its outputs is a derivative.
    Terms(r"gemma", "gemma", note="Pass the Gemma Terms of Use and their restrictions on; they hold for models trained on its outputs."),
    Terms(r"glm-4\.[56]", "MIT"),
    # Modified MIT License of Kimi K2 and of MiniMax-M2: a clause on display.
    Terms(r"kimi-k2|minimax-m2|modified-mit", "modified-MIT", note="Above a size of business, show the name of the traces' author."),
    # OpenAI Terms of Use: "Use Output to develop models that compete with OpenAI" is among the forbidden uses.
    Terms(r"^(openai/)?(gpt-?[345]|o[134](-|$)|chatgpt)|openai-terms", "OpenAI-terms", students=_NONE),
)

# Licences that the Hub knows by name, of those that this kit meets; others are `license: other` with a name there.
_HUB = {"apache-2.0", "mit", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", UNKNOWN}
_ASKS_NOTHING_OF_STUDENTS = {"apache-2.0", "mit"}


def licence_of(model: str | None, stated: str | None) -> str:
    """The licence a recipe states, else the one known for the model, else `unknown`."""
    return stated or (_terms_of(model) or Terms("", UNKNOWN)).licence


def check_terms(author: str | None, student_name: str, *, licence: str | None = None, student: str | None = None) -> list[str]:
    """What must be noted of a student trained on a model's outputs.

    Args:
        author: Model that wrote the traces, or null where that is not known.
        student_name: Name under which the student goes out.
        licence: Terms of the traces, as recorded.
        student: Model that the student started from.

    Raises:
        LicenceError: the terms exclude it, or ask for another name.
    """
    of_traces = [terms for terms in (_terms_of(author), _terms_of(licence)) if terms]
    for terms in of_traces:
        if not re.search(terms.students, student or "", re.IGNORECASE):
            raise LicenceError(
                f"{author or licence}: its terms ({terms.licence}) do not allow training {student or 'other models'} on its outputs. "
                "Use another teacher, or other traces."
            )
    of_student = _terms_of(student)
    notes = []
    for name, terms in [(author or licence, terms) for terms in of_traces] + ([(student, of_student)] if of_student else []):
        _check_name(str(name), terms, student_name)
        if terms.note and terms.note not in notes:
            notes.append(terms.note)
    if not of_traces and licence in (None, UNKNOWN):
        notes.append(f"The terms of {author or 'the traces'} are not known to the kit: check them before you publish.")
    return notes


def hub_licence(student: str, traces: str) -> dict[str, str]:
    """A model card's `license` keys, as the Hub wants them, from the licences of the student before training and of the traces."""
    names = [student] if traces.lower() in {*_ASKS_NOTHING_OF_STUDENTS, student.lower()} else [student, traces]
    if len(names) == 1 and student.lower() in _HUB:
        return {"license": student.lower()}
    return {"license": "other", "license_name": "-and-".join(re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in names)}


def _terms_of(name: str | None) -> Terms | None:
    """The terms of a model, or of a licence, by its name; null where it is not in the table."""
    for terms in _FAMILIES:
        found = re.search(terms.pattern, name or "", re.IGNORECASE)
        if found:
            return terms._replace(licence=found.expand(terms.licence))
    return None


def _check_name(source: str, terms: Terms, student_name: str) -> None:
    prefix = terms.name_prefix
    if prefix and not _plain(student_name.rpartition("/")[2]).startswith(_plain(prefix)):
        raise LicenceError(
            f"{source}: its licence ({terms.licence}) asks that the name of a model made with it begins with {prefix!r}, "
            f"got {student_name!r}. Set export.model_name."
        )


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name)
