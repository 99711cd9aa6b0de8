"""Damaged recipes, overrides and files of rows: each gives one clear error or is rightly accepted; by the command, in this process."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from damage import OUTCOMES, Case, outcomes
from damaged_data import data_cases
from damaged_recipes import recipe_cases


def faults(cases: list[Case], root: Path) -> list[str]:
    """What the kit does wrong about some cases."""
    found = outcomes(cases, root)
    return [f"{case.kind} {case.words[1:]!r:.200}: {outcome}, {why}" for case, _, outcome, why in found if outcome in OUTCOMES[2:]]


def test_every_seventh_kind_of_damage_is_one_clear_error(tmp_path: Path) -> None:
    cases = [*recipe_cases(random.Random(1), 110)[::7], *data_cases(random.Random(1), 70)[::7]]
    assert len({case.kind for case in cases}) >= 20
    assert faults(cases, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("make", "count", "kinds"), [(recipe_cases, 450, 100), (data_cases, 150, 60)])
def test_every_kind_of_damage_is_one_clear_error(make, count: int, kinds: int, tmp_path: Path) -> None:
    cases = make(random.Random(0), count)
    assert len(Counter(case.kind for case in cases)) >= kinds
    assert faults(cases, tmp_path) == []
