"""Nothing that code does to its tests makes them pass, and each thing would where both share a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cheats
import pytest
from cheats import Cheat

from distill.checks.code import judge_code
from distill.checks.sandbox import place_for
from distill.recipe.code import CodeSettings

SETTINGS = CodeSettings(timeout_s=20, memory_mib=256)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _sandbox() -> None:
    place = place_for(SETTINGS)
    if isinstance(place, str):
        pytest.skip(f"no sandbox here: {place}")


@pytest.mark.parametrize("cheat", cheats.ALL, ids=lambda cheat: cheat.name)
def test_no_cheat_passes(cheat: Cheat) -> None:
    verdict = judge_code(f"```python\n{cheat.code}\n```", cheat.tests, SETTINGS)
    assert verdict.passed is False, verdict


@pytest.mark.parametrize("cheat", [cheat for cheat in cheats.ALL if cheat.fools_naive], ids=lambda cheat: cheat.name)
def test_each_passes_in_the_process_of_its_tests(cheat: Cheat, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-S", "-c", cheats.NAIVE],
        input=json.dumps([cheat.code, cheat.tests]),
        text=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0 or cheats.MARKER in result.stdout.splitlines(), result
