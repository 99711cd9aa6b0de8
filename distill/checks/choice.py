"""Which traces are kept: what was found of each, as numbers in arrays, and the choice among all of them at once.

A trace takes 24 bytes and 2 for each check, however long its text is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.checks import Verdict
from distill.checks.agreement import agreements, answer_number
from distill.recipe.traces import Curate

Codes = NDArray[np.uint16]
_MOST_VERDICTS = 1000  # different ones, that are told apart
NOT_ASKED = (None, "not_asked")
"""What a check found that was asked only of what passes all others."""
_KEPT, _DUPLICATE, _OVER, _STRAY, _HARD, _EASY = range(6)


class Evidence:
    """What was found of every trace.

    Args:
        num_rows: Traces.
        checks: Names, in the order in which a failing one gives the reason.
        compares_answers: Whether the answers of a prompt's traces are compared with each other; it takes 8 bytes more.
    """

    def __init__(self, num_rows: int, checks: Sequence[str], *, compares_answers: bool = False) -> None:
        self.checks = list(checks)
        self.verdicts: list[Verdict] = []
        """The different ones; code c stands for number c - 1, and 0 for none yet."""
        self.codes_CR: Codes = np.zeros((len(self.checks), num_rows), np.uint16)
        self.prompts_R = np.zeros(num_rows, np.uint64)
        self.completions_R = np.zeros(num_rows, np.uint64)
        self.answers_R = np.zeros(num_rows, np.uint64) if compares_answers else None
        self.lengths_R = np.zeros(num_rows, np.uint32)
        self.samples_R = np.zeros(num_rows, np.int32)
        self.stray_R = np.zeros(num_rows, np.bool_)
        """Where a token was drawn inside that steers a conversation: what follows is no answer any more, and its text does not show it."""
        self._code: dict[Verdict, int] = {}

    def describe(self, row: int, trace: dict[str, Any]) -> None:
        """Notes what tells a trace from others: prompt and completion by 64 bits each, so no two are alike by chance."""
        self.prompts_R[row], self.completions_R[row] = number_of(trace["prompt_id"]), number_of(trace["completion"])
        if self.answers_R is not None:
            self.answers_R[row] = answer_number(trace["completion"])
        self.lengths_R[row], self.samples_R[row] = len(trace["completion"]), trace["sample_index"]

    def note(self, row: int, verdict: Verdict) -> None:
        """Notes what a check found; of a function that gives every trace a reason of its own, the later ones as `other`."""
        if len(self.verdicts) >= _MOST_VERDICTS and verdict not in self._code:
            verdict = verdict._replace(reason="other")
        code = self._code.get(verdict)
        if code is None:
            self.verdicts.append(verdict)
            code = self._code[verdict] = len(self.verdicts)
        self.codes_CR[self.checks.index(verdict.check), row] = code

    def has(self, check: str) -> NDArray[np.bool_]:
        """Of which traces a check has found something, `(R,)`."""
        found_R: NDArray[np.bool_] = self.codes_CR[self.checks.index(check)] != 0
        return found_R

    def summary(self) -> dict[str, dict[str, int]]:
        """How many traces passed, failed and could not be judged, for each check."""
        summary = {check: {"passed": 0, "failed": 0, "unjudged": 0} for check in self.checks}
        counts_CV = [np.bincount(codes_R, minlength=len(self.verdicts) + 1)[1:].tolist() for codes_R in self.codes_CR]
        for check, counts_V in zip(self.checks, counts_CV, strict=True):
            for verdict, count in zip(self.verdicts, counts_V, strict=True):
                summary[check][{True: "passed", False: "failed", None: "unjudged"}[verdict.passed]] += count
        return summary


def evidence_for(curate: Curate, num_rows: int) -> Evidence:
    """Room for what the checks of a recipe find of so many traces."""
    compares = any(check.agreement is not None for check in curate.checks)
    return Evidence(num_rows, [check.called for check in curate.checks], compares_answers=compares)


def agree(curate: Curate, evidence: Evidence) -> None:
    """Notes what most samples of a prompt agree on, where that is asked; when all traces were described."""
    for check in curate.checks:
        if check.agreement is not None:
            assert evidence.answers_R is not None
            for row, found in enumerate(agreements(evidence.prompts_R, evidence.answers_R, check.agreement.min_share)):
                evidence.note(row, Verdict(check.called, *found))


def unfailed(evidence: Evidence, curate: Curate) -> NDArray[np.bool_]:
    """Which traces no check has failed so far, `(R,)`."""
    fails_V = np.array([False, *(_fails(verdict, curate) for verdict in evidence.verdicts)])
    unfailed_R = np.ones(len(evidence.prompts_R), np.bool_)
    for found_R in evidence.codes_CR:
        unfailed_R &= ~fails_V[found_R]
    return unfailed_R


def _fails(verdict: Verdict, curate: Curate) -> bool:
    """Whether a verdict drops a trace; one that was not asked for leaves that to the check for which it was not."""
    unjudged = verdict.passed is None and not curate.keep_unjudged and verdict[1:] != NOT_ASKED
    return verdict.passed is False or unjudged


class Choice(NamedTuple):
    """Which traces are kept, and why the others are not."""

    codes_R: Codes
    """0 where a trace is kept, else the place of its reason."""
    reasons: list[str | None]

    @property
    def num_kept(self) -> int:
        """Of the traces that are kept."""
        return int((self.codes_R == _KEPT).sum())

    @property
    def drops(self) -> dict[str, int]:
        """Reason and number of the others."""
        counts = np.bincount(self.codes_R, minlength=len(self.reasons)).tolist()
        return {reason: count for reason, count in zip(self.reasons, counts, strict=True) if reason is not None and count}


class PassRates(NamedTuple):
    """Of each prompt with a judged trace, how many there are and how many of them pass every check.

    A trace is judged where a check has failed it, or all have passed it. What was drawn with a control token inside is no answer, whatever
    was found of its text, and fails.
    """

    prompts_P: NDArray[np.uint64]
    judged_P: NDArray[np.int64]
    passed_P: NDArray[np.int64]

    @property
    def rates_P(self) -> NDArray[np.float64]:
        """Share of the judged traces that pass: 1 of a prompt that is easy for whoever wrote them, 0 of one that is too hard."""
        rates_P: NDArray[np.float64] = self.passed_P / self.judged_P
        return rates_P

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers of prompts: with a rate, with one that is 0 or 1, with one judged trace alone; and the mean rate."""
        rates_P = self.rates_P
        return {
            "prompts": len(rates_P),
            "never": int((rates_P == 0).sum()),
            "always": int((rates_P == 1).sum()),
            "one_sample": int((self.judged_P == 1).sum()),
            "mean": float(rates_P.mean()) if len(rates_P) else None,
        }


def pass_rates(evidence: Evidence) -> PassRates:
    """How hard each prompt is, by what the checks have found; when they all have."""
    worst_V = np.array([0, *({True: 0, None: 1, False: 2}[verdict.passed] for verdict in evidence.verdicts)], np.uint8)
    worst_R = np.zeros(len(evidence.prompts_R), np.uint8)
    for found_R in evidence.codes_CR:
        np.maximum(worst_R, worst_V[found_R], out=worst_R)
    worst_R[evidence.stray_R] = 2
    judged_R = worst_R != 1
    prompts_P, place_J, judged_P = np.unique(evidence.prompts_R[judged_R], return_inverse=True, return_counts=True)
    passed_P = np.bincount(place_J[worst_R[judged_R] == 0], minlength=len(prompts_P))
    return PassRates(prompts_P, judged_P, passed_P)


def samples_of_unsolved(evidence: Evidence, samples_per_prompt: int) -> dict[int, int]:
    """Of prompts of whose judged traces none passes, by the hash of their names: how many samples were asked for.

    They come `samples_per_prompt` at a time, so that those of which no answer came are counted too.
    """
    found = pass_rates(evidence)
    unsolved_P = found.prompts_P[found.passed_P == 0]
    rows = np.flatnonzero(np.isin(evidence.prompts_R, unsolved_P))
    most: dict[int, int] = {}
    for prompt, sample in zip(evidence.prompts_R[rows].tolist(), evidence.samples_R[rows].tolist(), strict=True):
        most[prompt] = max(most.get(prompt, 0), sample + 1)
    return {prompt: -(-samples // samples_per_prompt) * samples_per_prompt for prompt, samples in most.items()}


Values = Callable[[NDArray[np.bool_]], NDArray[np.float64]]
"""Of the traces that compete for their prompt's places a number each, `(R,)`: the lowest are kept, and NaN last."""


def choose(evidence: Evidence, curate: Curate, values: Values | None = None) -> Choice:
    """The first failing check is the reason; then a control token inside, a prompt that is too hard or too easy, a text that its prompt
    has before, and what is over the number for a prompt.

    Args:
        evidence: Of all traces.
        curate: How many of a prompt are kept, which first, and whether those that could not be judged.
        values: By which they are preferred; null takes their lengths, where those are asked for, and else their numbers alone.
    """
    reasons: list[str | None] = [None, "duplicate", "over_max_per_prompt", "control_token_inside", "too_hard", "too_easy"]
    reason_V = np.zeros(len(evidence.verdicts) + 1, np.uint16)
    for code, verdict in enumerate(evidence.verdicts, start=1):
        if _fails(verdict, curate):
            reason_V[code] = len(reasons)
            reasons.append(f"{verdict.check}:{verdict.reason}")
    codes_R: Codes = np.zeros(len(evidence.prompts_R), np.uint16)
    for found_R in evidence.codes_CR[::-1]:  # the first check last, so that its reason is the one that stays
        failed_R = reason_V[found_R]
        np.copyto(codes_R, failed_R, where=failed_R != 0)
    np.copyto(codes_R, _STRAY, where=(codes_R == _KEPT) & evidence.stray_R)
    _drop_by_difficulty(codes_R, evidence, curate)
    _drop_duplicates(codes_R, evidence)
    _drop_surplus(codes_R, evidence, curate, values)
    return Choice(codes_R, reasons)


def _drop_by_difficulty(codes_R: Codes, evidence: Evidence, curate: Curate) -> None:
    if not curate.bounds_difficulty:
        return
    found = pass_rates(evidence)
    for bound, outside_P, reason in (
        (curate.min_pass_rate, found.rates_P < (curate.min_pass_rate or 0), _HARD),
        (curate.max_pass_rate, found.rates_P > (curate.max_pass_rate or 1), _EASY),
    ):
        if bound is not None:
            np.copyto(codes_R, reason, where=(codes_R == _KEPT) & np.isin(evidence.prompts_R, found.prompts_P[outside_P]))


def _drop_duplicates(codes_R: Codes, evidence: Evidence) -> None:
    passing = np.flatnonzero(codes_R == _KEPT)
    passing = passing[np.lexsort((evidence.completions_R[passing], evidence.prompts_R[passing]))]  # equal ones stay in their order
    repeats = _equals_before(evidence.prompts_R[passing]) & _equals_before(evidence.completions_R[passing])
    codes_R[passing[repeats]] = _DUPLICATE


def _drop_surplus(codes_R: Codes, evidence: Evidence, curate: Curate, values: Values | None) -> None:
    passing = np.flatnonzero(codes_R == _KEPT)
    _, place, counts_P = np.unique(evidence.prompts_R[passing], return_inverse=True, return_counts=True)
    competing = passing[counts_P[place] > curate.max_per_prompt]
    if not len(competing):
        return
    competing_R = np.zeros(len(codes_R), np.bool_)
    competing_R[competing] = True
    sign = {"shortest": 1, "longest": -1}.get(curate.prefer, 0)
    values_c = sign * evidence.lengths_R[competing].astype(np.float64) if values is None else values(competing_R)[competing]
    order = np.lexsort((evidence.samples_R[competing], values_c, evidence.prompts_R[competing]))  # the last key counts first, NaN last
    competing = competing[order]
    firsts = np.flatnonzero(~_equals_before(evidence.prompts_R[competing]))
    rank = np.arange(len(competing)) - np.repeat(firsts, np.diff(firsts, append=len(competing)))
    codes_R[competing[rank >= curate.max_per_prompt]] = _OVER


def _equals_before(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each equals the one before it; the first equals none."""
    equal = np.zeros(len(values), np.bool_)
    np.equal(values[1:], values[:-1], out=equal[1:])
    return equal


def number_of(text: str) -> int:
    """64 bits that are equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
