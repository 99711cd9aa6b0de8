"""A check that is a function of the user's own, in a file that the recipe names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.checks import Found, Given
from distill.checks.form import answer_of
from distill.errors import RecipeError, visible
from distill.recipe.checks import Check
from distill.recipe.kinds import Python
from distill.run.files import digest_file, digest_json

_LONGEST_REASON = 60


def check_python(given: Given, settings: Python) -> Found:
    """What the function says of answer, reference and row. May do anything, or never return."""
    row = {"completion": given.completion, "prompt": given.prompt, "finish_reason": given.finish_reason, **given.fields}
    said = load_function(settings)(answer_of(given.completion), given.reference, row)
    passed, reason = said if isinstance(said, tuple) and len(said) == 2 else (said, None)
    if passed is not None and passed not in (True, False):
        return None, "no_verdict"
    verdict = None if passed is None else bool(passed)
    words = {True: "right", False: "wrong", None: "unjudged"}[verdict] if reason is None else " ".join(str(reason).split())
    return verdict, visible(words, _LONGEST_REASON)


@lru_cache(maxsize=8)
def load_function(settings: Python) -> Callable[[str | None, str | None, dict[str, Any]], Any]:
    """The function; its file is run for it.

    Raises:
        RecipeError: there is no such file or function, or the file can't be run.
    """
    path = Path(settings.file)
    where = f"checks: python.file {visible(settings.file, 200)}"
    spec = importlib.util.spec_from_file_location(f"distill_check_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise RecipeError(f"{where}: there is no such Python file. Correct the path.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it does when it is run
        raise RecipeError(f"{where}: can't be run: {type(error).__name__}: {visible(str(error), 200)}. Correct it.") from None
    function = getattr(module, settings.function, None)
    if not callable(function):
        raise RecipeError(f"{where}: has no function {settings.function!r}. Correct python.function.")
    return function  # type: ignore[no-any-return]


def digest_of(checks: list[Check]) -> str | None:
    """One digest of the files that some checks run; null where there are none.

    Raises:
        RecipeError: one is not there.
    """
    files = {check.called: Path(check.python.file) for check in checks if check.python is not None}
    missing = next((path for path in files.values() if not path.is_file()), None)
    if missing is not None:
        raise RecipeError(f"checks: python.file {visible(str(missing), 200)}: there is no such Python file. Correct the path.")
    return digest_json({name: digest_file(path) for name, path in files.items()}) if files else None
