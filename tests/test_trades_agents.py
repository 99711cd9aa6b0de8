"""Recipes for assistants that are tried and not compared: each as it is shipped, whole on its made rows, with tiny models.

The made teacher stands behind a server and answers as the rows say, so that what is measured of it is known beforehand.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import commands
import pytest
from answering import Answering
from conftest import ROOT

from distill.recipe.reading import load_recipe
from distill.run.tables import read_rows

MADE = ROOT / "recipes" / "made"


class Teacher(Answering):
    """Writes to each prompt what its row says."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def _written(self, body: dict[str, Any]) -> tuple[str, int, str]:
        asked = body["messages"][-1]["content"]
        return next(answer for prompt, answer in self.answers.items() if prompt in asked), 12, "stop"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (MADE / f"{name}.jsonl").read_text().splitlines()]
