"""What tests of the recipes for trades share: a recipe on its made data, judged without models, or run whole with the embedded pair.

A row of `recipes/made/TRADE.jsonl` has the columns of the real source, and three more: `made_completion`, an answer as a teacher
might have written it; `made_end`, how that ended; and `made_verdict`, what curate must say of it: `kept`, or its reason to drop it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commands
from answering import Answering

from distill.pipeline import run_stage
from distill.recipe.reading import load_recipe
from distill.run.tables import read_rows

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MADE = RECIPES / "made"
KEPT = "kept"


def recipe_of(trade: str) -> Path:
    return RECIPES / f"{trade}.yaml"


def made_rows(trade: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (MADE / f"{trade}.jsonl").read_text(encoding="utf-8").splitlines()]


def made_words(trade: str) -> list[str]:
    """The overrides that put made data and the embedded pair in the place of the real: what `$(cat tiny.args TRADE.args)` is to a shell."""
    return [word for name in ("tiny", trade) for word in (MADE / f"{name}.args").read_text(encoding="utf-8").split()]


def judged(trade: str, folder: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """What the recipe's checks say of each made answer, by its text, and what they must say. No model is loaded."""
    none_held_out = ["--prompts.heldout_size", "0", "--evaluate", "null", "--run_dir", str(folder)]
    recipe = load_recipe(recipe_of(trade), [*made_words(trade), *none_held_out, *overrides])
    for stage in ("prompts", "generate", "curate"):
        run_stage(stage, recipe)
    found = {row["completion"]: KEPT for row in read_rows(folder / "curated", "curated")}
    found |= {row["completion"]: row["reason"] for row in read_rows(folder / "curated", "dropped")}
    wanted = {row["made_completion"]: row["made_verdict"] for row in made_rows(trade)}
    assert len(wanted) == len(made_rows(trade)), "two made answers are the same text"
    return found, {completion: wanted[completion] for completion in found}


class MadeTeacher(Answering):
    """A teacher behind a server that answers as the made rows say, so that what a report must say of it is known."""

    def __init__(self, trade: str, column: str) -> None:
        """Takes for each row the text of a column that its prompt has inside, and no other."""
        super().__init__()
        self._answers = {row[column]: (row["made_completion"], row["made_end"]) for row in made_rows(trade)}

    def _written(self, body: dict[str, Any]) -> tuple[str, int, str]:
        asked = body["messages"][-1]["content"]
        completion, end = next(answer for text, answer in self._answers.items() if text in asked)
        return completion, 12, end

    @property
    def words(self) -> list[str]:
        """The overrides that put it in the place of the tiny teacher; it asks for a key in OPENAI_API_KEY, whatever that is."""
        return ["--teacher.server", json.dumps({"kind": "openai", "url": f"{self.url}/v1", "model": self.model})]


def run_made(trade: str, folder: Path, *overrides: str) -> str:
    """Runs the recipe whole on its made data with the embedded pair, as its readme has it, and returns what it printed."""
    words = ["run", recipe_of(trade), *made_words(trade), "--run_dir", str(folder), "--no-check", *overrides]
    result = commands.run(["-m", "distill", *words])
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def scores(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of a run's table `scores` of its own held-out prompts, by model and metric; those of tags by `metric/tag`."""
    rows = [row for row in read_rows(folder / "eval", "scores") if row["set"] == "heldout"]
    return {(row["model_role"], "/".join(filter(None, (row["metric"], row.get("tag"))))): row for row in rows}
