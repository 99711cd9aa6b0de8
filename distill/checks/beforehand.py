"""Whether checks can judge a recipe's prompts at all, found out before anything is spent: each reference must pass its own check.

What a reference means is put to the check as if a model had answered it. Where that does not pass, no answer to the prompt will: the
label is none of the choices, the JSON is against its own schema, the call names no tool there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.checks import Found, Given
from distill.checks.code import judge_code, read_tests, refuse_no_place
from distill.checks.fields import as_fields
from distill.checks.functions import load_function
from distill.checks.judging import Judges
from distill.checks.language import supported
from distill.checks.pool import Call, Pool
from distill.checks.references import unjudged_because
from distill.checks.text import references_of
from distill.errors import DataError, RecipeError, visible
from distill.recipe.checks import Check
from distill.recipe.kinds import Code, Python

_EXAMPLE = {"input": "3", "output": "6"}


def refuse_settings(checks: Sequence[Check], timeout_s: float) -> str:
    """What can be said of checks without any prompt; names those that were looked at.

    Raises:
        RecipeError: a function can't be loaded, a schema is none, a language is not known, code can't be run.
    """
    looked_at = []
    with Pool(timeout_s, workers=1) as pool:
        for check in checks:
            if check.python is not None:
                [(_, (passed, reason))] = pool.stream([(0, Call(can_load, (check.python,)))])
                if not passed:
                    raise RecipeError(reason if passed is False else f"checks: {check.called}: its file was not loaded ({reason}).")
            elif check.json is not None and check.json.json_schema is not None:
                _refuse_schema(check.called, check.json.json_schema)
            elif check.code is not None:
                prove_code(check.called, check.code)
            elif check.language is not None and check.language.language not in {"prompt", *supported()}:
                raise RecipeError(
                    f"checks: {check.called}: the language {check.language.language!r} is not known. "
                    f"There are {', '.join(sorted(supported()))}."
                )
            else:
                continue
            looked_at.append(check.called)
    return ", ".join(looked_at)


def can_load(settings: Python) -> Found:
    """Whether a function of the user's own is there; the reason says what is wrong. May never return: its file is run."""
    try:
        load_function(settings)
    except RecipeError as error:
        return False, str(error)
    return True, "loaded"


def prove_code(name: str, settings: Code) -> None:
    """Runs a function with a test, and a program.

    Raises:
        RecipeError: there is no sandbox, or they don't pass in it.
    """
    refuse_no_place(name, settings)
    for answer, tests in (("def twice(x):\n    return 2 * x", "assert twice(3) == 6"), ("print(2 * int(input()))", [_EXAMPLE])):
        found = judge_code(answer, tests, settings)
        if not found.passed:
            raise RecipeError(f"checks: {name}: a trivial program does not pass its test ({found.reason}). Raise the limits of {name}.")


def _refuse_schema(name: str, schema: dict[str, Any]) -> None:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"checks: {name}: json_schema is no JSON schema: {visible(error.message, 200)}. Correct it.") from None


def unfit(checks: Sequence[Check], rows: Sequence[dict[str, Any]], timeout_s: float) -> list[str]:
    """What some checks cannot judge of prompts that they could judge otherwise, a sentence a check.

    Args:
        checks: Of traces or of answers.
        rows: Of prompts, with `reference` and, where there are any, `fields`.
        timeout_s: Hard limit for one of them.

    Raises:
        DataError: one can judge less than half of them.
    """
    found = [_unfit(check, rows, timeout_s) for check in checks if check.settings.asks_reference or check.settings.columns]
    return [sentence for sentence in found if sentence is not None]


def _unfit(check: Check, rows: Sequence[dict[str, Any]], timeout_s: float) -> str | None:
    if check.math is not None:
        if problem := unjudged_because([row["reference"] for row in rows]):
            raise DataError(problem)
        return None
    reasons: dict[int, str] = {}
    if check.code is not None:
        reasons = {place: "tests_unreadable" for place, row in enumerate(rows) if not _has_tests(row, check.code.tests)}
        return _summed(check, rows, reasons)
    strict = check.settings.asks_reference and (check.text is None or check.text.pattern is None)
    with Judges([_of_any_form(check)], timeout_s) as judges:
        for number, verdict in judges.stream(enumerate(_as_answered(check, row) for row in rows)):
            if verdict.passed is None or (strict and not verdict.passed and rows[number]["reference"] is not None):
                reasons[number] = verdict.reason
    return _summed(check, rows, reasons)


def _has_tests(row: dict[str, Any], column: str) -> bool:
    return read_tests(as_fields(row.get("fields")).get(column)) is not None


def _summed(check: Check, rows: Sequence[dict[str, Any]], reasons: dict[int, str]) -> str | None:
    """What is said of the rows that can't be judged, each with its reason.

    Raises:
        DataError: they are more than half.
    """
    if not reasons:
        return None
    first = min(reasons)
    reference = rows[first]["reference"]
    shown = f"{visible(reference, 60)!r}" if reference is not None else "none"
    share = f"{len(reasons):,} of {len(rows):,} prompts looked at"
    sentence = f"{check.called} can't judge {share} (the first: {reasons[first]}, reference {shown})"
    if 2 * len(reasons) > len(rows):
        raise DataError(sentence)
    return sentence


def _of_any_form(check: Check) -> Check:
    """The check, where a reference is written otherwise than an answer must be: calls as data."""
    if check.tool_calls is None:
        return check
    return check.model_copy(update={"tool_calls": check.tool_calls.model_copy(update={"form": "any", "required": False})})


def _as_answered(check: Check, row: dict[str, Any]) -> Given:
    """The reference of a prompt as if a model had answered it: of several texts the first."""
    reference: str | None = row["reference"]
    answer = next(iter(references_of(reference)), None) if check.text is not None else reference
    return Given(answer or "", reference, as_fields(row.get("fields")))
