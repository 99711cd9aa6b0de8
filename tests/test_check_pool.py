"""Processes that do checks: a check that takes all memory, and one whose asker is gone, end without harm to the others."""

from __future__ import annotations

import itertools

from distill.checks import Found
from distill.checks.answers import compare
from distill.checks.pool import Call, Pool


def test_a_check_that_asks_for_too_much_memory_is_not_judged_and_the_others_are() -> None:
    right = Call(compare, ("\\boxed{5}", "5"))
    asks_for_much = Call(bytearray, (2**33,))  # type: ignore[arg-type]
    asked = [(0, right), (1, asks_for_much), (2, right), (3, Call(compare, ("\\boxed{6}", "5")))]
    with Pool(timeout_s=60, workers=1, memory_bytes=2**30) as pool:
        found = dict(pool.stream(iter(asked)))
    assert found == {0: (True, "right"), 1: (None, "checker_out_of_memory"), 2: (True, "right"), 3: (False, "wrong_answer")}


def test_what_grows_without_end_is_stopped_by_the_limit_of_memory_not_by_the_machine() -> None:
    with Pool(timeout_s=60, workers=1, memory_bytes=2**27) as pool:
        found = dict(pool.stream(iter([(0, Call(list, (itertools.repeat(0),)))])))  # type: ignore[arg-type]
    assert found == {0: (None, "checker_out_of_memory")}


_kept: list[bytearray] = []


def fills() -> Found:
    """Leaves all memory taken."""
    while True:
        _kept.append(bytearray(2**22))


def takes_some() -> Found:
    """What any check needs, and leaves behind as a cache would."""
    _kept.append(bytearray(2**26))
    return True, "right"


def test_what_one_check_leaves_behind_is_not_the_next_ones_fault() -> None:
    """Neither of one that fills the memory, nor of many that leave a little."""
    calls = [takes_some, fills, *[takes_some] * 4]
    with Pool(timeout_s=60, workers=1, memory_bytes=2**28) as pool:
        found = dict(pool.stream((number, Call(function, ())) for number, function in enumerate(calls)))
    short = {number for number, (passed, reason) in found.items() if (passed, reason) == (None, "checker_out_of_memory")}
    assert len(found) == len(calls) and short == {1}
