"""Every error a user can cause or meet, each naming where, what is wrong, and what to do.

One root exception, so that an entry point catches one class; each child is also the standard class it refines.
"""


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
