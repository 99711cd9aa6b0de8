"""All the checks of a list, on many traces: each at its place, in this process or in those that are killed at a limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Any

from distill.checks import Found, Given, Verdict, language, math
from distill.checks.code import Runs, refuse_no_place
from distill.checks.degenerate import check_degenerate
from distill.checks.form import check_finish
from distill.checks.functions import check_python
from distill.checks.json_answer import check_json
from distill.checks.label import check_label
from distill.checks.language import check_language
from distill.checks.length import check_length
from distill.checks.number import check_number
from distill.checks.pool import Call, Pool, Question
from distill.checks.text import check_text
from distill.checks.thinking import check_thinking
from distill.checks.tool_calls import check_tool_calls
from distill.recipe.checks import Check
from distill.recipe.kinds import CheckSection, Code
from distill.run.schema import TOLD

_HERE: dict[str, Callable[[Given, Any], Found]] = {
    "finish": lambda given, _: check_finish(given.finish_reason, given.completion)[1:],
    "think": check_thinking,
    "label": check_label,
    "number": check_number,
    "length": check_length,
    "degenerate": check_degenerate,
}
"""Checks that take no longer for a text than its reading does."""

_APART: dict[str, Callable[[Given, Any], Found]] = {
    "text": check_text,
    "json": check_json,
    "tool_calls": check_tool_calls,
    "language": check_language,
    "python": check_python,
}
"""Checks that run what others have written, or compute for long; `math` is one, too, and `code`, which has processes of its own."""

_OF_FINAL_ANSWERS = frozenset({"math", "label", "number"})
"""Checks that look for one answer at the end of a text."""

_TOLD: dict[bool | None, Found] = {True: (True, "brought_right"), False: (False, "brought_wrong"), None: (None, "brought_unknown")}
"""What a column of verdicts comes to."""

_PREPARED = {"math": math.prepare, "language": language.prepare}


class Judges:
    """The checks of a list, but for `agreement`, which no trace passes by itself, and `judge`, which is asked when all others are done.

    Use as a context manager.

    Args:
        checks: In the recipe's order.
        timeout_s: Hard limit for one check of one trace, in seconds; code has its own.
        workers: Processes; null means one for each core this process may use.

    Raises:
        RecipeError: code is to be run, and there is no sandbox; when the first is.
    """

    def __init__(self, checks: Sequence[Check], timeout_s: float, workers: int | None = None) -> None:
        self._checks = [check for check in checks if check.agreement is None]
        self._asks_final = asks_final(checks)
        prepared = list(dict.fromkeys(_PREPARED[check.kind] for check in self._checks if check.kind in _PREPARED))
        self._runs: Runs | None = None  # of code
        # One alone goes there by its name: its process need not import what all the others do.
        self._pool = Pool(timeout_s, workers, prepared[0] if len(prepared) == 1 else partial(_prepare, prepared), "checks")

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, trace)
        if self._runs is not None:
            self._runs.__exit__(kind, error, trace)

    @property
    def slow(self) -> list[str]:
        """Names of the checks whose verdicts are worth keeping."""
        return [check.called for check in self._checks if _is_apart(check)]

    def stream(
        self, traces: Iterable[tuple[int, Given]], is_known: Callable[[int, str], bool] = lambda *_: False
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Each trace's number with the verdict of each check, as they come.

        Args:
            traces: Numbered; taken when there is room.
            is_known: Whether a check, by its name, has judged a trace, by its number, before.
        """
        with closing(self._pool.stream(self._questions(traces, is_known))) as answers:
            for (number, name), found in answers:
                yield number, Verdict(name, *found)

    def answers(self, traces: Iterable[tuple[int, Given]]) -> Generator[tuple[int, Found], None, None]:
        """Each trace's number with what all checks together come to, as soon as the last of them has judged it.

        Raises:
            ValueError: one of them is a model, which is asked elsewhere: without it nobody knows whether an answer is right.
        """
        asked = next((check.called for check in self._checks if check.judge is not None), None)
        if asked is not None or not self._checks:
            raise ValueError(f"checks: {asked} is a model that is not asked here. Leave it out." if asked else "checks: there are none.")
        waiting: dict[int, dict[str, Found]] = defaultdict(dict)
        with closing(self.stream(traces)) as verdicts:
            for number, verdict in verdicts:
                waiting[number][verdict.check] = verdict[1:]
                if len(waiting[number]) == len(self._checks):
                    yield number, combined(self._checks, waiting.pop(number))

    def _questions(
        self, traces: Iterable[tuple[int, Given]], is_known: Callable[[int, str], bool]
    ) -> Iterator[tuple[tuple[int, str], Question]]:
        for number, given in traces:
            for check in self._checks:
                key = (number, check.called)
                if is_known(*key):
                    continue
                if given.told is not None and check.settings.of_answers:
                    yield key, given.told
                elif check.code is not None:
                    yield from self._run(key, given, check.called, check.code)
                elif check.judge is None:
                    yield key, question(check, given, asks_final=self._asks_final and given.told is None)
        if self._runs is not None:
            for key, found in self._runs.rest():
                yield key, found[1:]

    def _run(self, key: tuple[int, str], given: Given, name: str, code: Code) -> Iterator[tuple[tuple[int, str], Question]]:
        """Begins to run an answer's code, and yields what others have come to meanwhile."""
        if self._runs is None:
            refuse_no_place(name, code)
            self._runs = Runs(self._pool.num_workers)
        for other, found in self._runs.add(key, given.completion, given.fields.get(code.tests), code):
            yield other, found[1:]


def columns_read(checks: Sequence[Check]) -> list[str]:
    """Columns of the traces that these checks need beside what all of them are told."""
    asks_prompt = any(check.python is not None or (check.language is not None and check.language.language == "prompt") for check in checks)
    return ["messages"] if asks_prompt else []


def given_of(trace: Mapping[str, Any], fields: Mapping[str, Any] | None = None) -> Given:
    """What a check is told of a row of traces, and of the fields of its prompt."""
    turns = [turn["content"] for turn in trace.get("messages") or () if turn["role"] == "user"]
    prompt = turns[-1] if turns else ""
    told = _TOLD[trace[TOLD.name]] if TOLD.name in trace else None
    known = (trace.get("finish_reason"), trace.get("num_tokens"), told)
    return Given(trace["completion"], trace.get("reference"), fields or {}, prompt, *known)


def asks_final(checks: Sequence[Check]) -> bool:
    """Whether some of these checks look for a final answer, so that a trace of which nobody says how it ended must have one."""
    return any(check.kind in _OF_FINAL_ANSWERS for check in checks)


def question(check: Check, given: Given, *, asks_final: bool = False) -> Question:
    """What a check is to find out of a trace, or what it has found already; `asks_final` is for `finish`."""
    if check.finish is not None:
        return check_finish(given.finish_reason, given.completion, asks_final=asks_final)[1:]
    if check.math is not None:
        return math.question(given.completion, given.reference)
    if not _is_apart(check):
        return {**_HERE, **_APART}[check.kind](given, check.settings)
    if check.python is None:  # of a row no more goes to another process than is looked at there
        fields = {name: given.fields[name] for name in check.settings.columns if name in given.fields}
        given = given._replace(fields=fields, prompt=given.prompt if check.language is not None else "")
    return Call(judge, (check.kind, given, check.settings))


def judge(kind: str, given: Given, settings: CheckSection) -> Found:
    """What a check that runs apart finds. May never return."""
    return _APART[kind](given, settings)


def combined(checks: Sequence[Check], found: dict[str, Found]) -> Found:
    """What all checks of an answer come to: wrong if one fails, else null if one could not judge it.

    The reason is that of the check which decided, with its name where there are several.
    """
    for passed in (False, None):
        for check in checks:
            if found[check.called][0] is passed:
                reason = found[check.called][1]
                return passed, reason if len(checks) == 1 else f"{check.called}:{reason}"
    return True, found[checks[0].called][1] if len(checks) == 1 else "right"


def _is_apart(check: Check) -> bool:
    """Whether a check runs in a process of its own; of texts only one with a pattern of the user's."""
    if check.math is not None or check.code is not None:
        return True
    return check.kind in _APART and (check.text is None or check.text.pattern is not None)


def _prepare(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()
