"""Every error a user can cause or meet, each naming where, what is wrong, and what to do.

One root exception, so that an entry point catches one class; each child is also the standard class it refines.
"""

import unicodedata

_CONTROLS = frozenset({"Cc", "Cf", "Zl", "Zp", "Cs"})
"""Categories of Unicode that can move a cursor, hide or turn around what follows."""
_JOINERS = "\u200c\u200d"  # of category Cf, but letters of Persian, Hindi and emoji hang on them


class DistillError(Exception):
    """Root of all errors that are reported to the user without a traceback."""


class RecipeError(DistillError, ValueError):
    """A recipe, or an override of it on the command line, can't be used."""


class DataError(DistillError, ValueError):
    """Rows brought by the user, or a whole input, can't be used as asked."""


class StageConflictError(DistillError, RuntimeError):
    """A stage folder was made with other settings or inputs, or another process is writing it."""


class MissingStageError(DistillError, FileNotFoundError):
    """A stage needs the output of an earlier one that is absent or unfinished."""


class IntegrityError(DistillError, ValueError):
    """A stored file is not what its manifest says: half-written, altered or gone."""


class ModelError(DistillError, RuntimeError):
    """A model, tokenizer or chat template can't be used for what the recipe asks of it."""


class LicenceError(DistillError, PermissionError):
    """The terms of a model or data set do not allow what the recipe asks for."""


def visible(text: str, limit: int | None = None) -> str:
    r"""Foreign text as it may be shown: control characters (ESC, C1, bidi marks, half surrogates) as escapes, line ends and tabs kept.

    Args:
        text: From a prompt, a trace, a key, a file's name.
        limit: Characters of it that are shown; what was cut is counted behind them.
    """
    shown = text if limit is None or len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _CONTROLS and character not in "\n\t" + _JOINERS
        else character
        for character in shown
    )
