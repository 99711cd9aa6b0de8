"""A sample of what `scripts/torment.py` does to a run: kills that change nothing, damage that is never silent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def torment(*words: str) -> list[str]:
    """The lines of its table."""
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "torment.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    return result.stdout.splitlines()


@pytest.mark.slow
def test_killed_stages_end_as_undisturbed_ones() -> None:
    *steps, total = torment("kills", "--count", "16", "--stages", "prompts", "generate", "curate")[1:]
    assert len(steps) == 3 and all(line.endswith("equal to the last bit") for line in steps) and total.endswith("0 faults")


@pytest.mark.slow
def test_damage_is_noticed_or_mended() -> None:
    assert torment("damage", "--count", "30", "--stages", "prompts", "generate", "curate")[-1].split()[:2] == ["all", "30"]


@pytest.mark.nightly
def test_two_hundred_kills_and_damaged_files_of_all_stages() -> None:
    assert torment("kills")[-1].endswith("0 faults")
    assert torment("damage")[-1].split()[:2] == ["all", "260"]
