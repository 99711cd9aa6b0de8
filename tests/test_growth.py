"""A run that grows: what was there stays what it is, what is asked for more is added, and what would mix is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.errors import StageConflictError
from distill.recipe.experiment import Recipe
from distill.run.manifest import PLAN, read_manifest
from distill.run.owned import EARLIER
from distill.run.plan import relation
from distill.run.tables import read_rows
from distill.stages import import_traces, prompts

Rows = list[dict[str, Any]]


def problems(count: int, first: int = 0) -> Rows:
    return [
        {"question": f"{number}+1?", "answer": number + 1, "completion": f"<think>\nx\n</think>\n\n{number + 1}"}
        for number in range(first, count)
    ]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(tmp_path: Path, **more: Any) -> Recipe:
    source = str(tmp_path / "p.jsonl")
    return Recipe.model_validate(
        {
            "name": "test",
            "run_dir": str(tmp_path / "run"),
            "student": {"model": "none"},
            "prompts": {"source": source, "heldout_size": 5} | more.pop("prompts", {}),
            "traces": {"source": source},
            "evaluate": None,
        }
        | more
    )


def ids(tmp_path: Path, table: str, stage: str = "prompts") -> set[str]:
    return {row["prompt_id"] for row in read_rows(tmp_path / "run" / stage, table)}


def test_more_prompts_keep_what_is_held_out_and_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", problems(40))
    few = recipe(tmp_path, prompts={"max_prompts": 10})
    prompts.run(few)
    train, heldout = ids(tmp_path, "train"), ids(tmp_path, "heldout")
    write(tmp_path / "p.jsonl", problems(90, first=-30))  # in front and behind
    manifest = prompts.run(few)
    assert (ids(tmp_path, "train"), ids(tmp_path, "heldout")) == (train, heldout) and manifest.grew_from
    prompts.run(recipe(tmp_path, prompts={"max_prompts": 60}))
    assert ids(tmp_path, "heldout") == heldout and train < ids(tmp_path, "train") and len(ids(tmp_path, "train")) == 60
    prompts.run(recipe(tmp_path))
    assert ids(tmp_path, "heldout") == heldout and len(ids(tmp_path, "train")) == 115
    assert len(read_manifest(tmp_path / "run" / "prompts").grew_from) == 3 and not (tmp_path / "run" / "prompts" / EARLIER).exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda rows: rows[:-8], "of the run's .* prompts are not in it any more"),
        (lambda rows: [row | {"answer": 0} for row in rows], "have another reference now"),
    ],
)
def test_prompts_that_are_gone_or_others_are_refused_and_nothing_moves(tmp_path: Path, changed: Any, message: str) -> None:
    rows = problems(40)
    write(tmp_path / "p.jsonl", rows)
    manifest = prompts.run(recipe(tmp_path))
    write(tmp_path / "p.jsonl", changed(rows))
    with pytest.raises(StageConflictError, match=message):
        prompts.run(recipe(tmp_path))
    folder = tmp_path / "run" / "prompts"
    assert read_manifest(folder) == manifest and not (folder / PLAN).exists() and not (folder / EARLIER).exists()
    write(tmp_path / "p.jsonl", rows)
    assert prompts.run(recipe(tmp_path)) == manifest


def test_more_held_out_prompts_are_refused_by_their_key(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", problems(40))
    prompts.run(recipe(tmp_path))
    more = recipe(tmp_path, prompts={"heldout_size": 8})
    assert relation(prompts.plan(more)) == ("refused", ["prompts.heldout_size is 5 there and 8 here"])


def test_brought_traces_grow_at_their_end(tmp_path: Path) -> None:
    rows = problems(40)
    write(tmp_path / "p.jsonl", rows)
    prompts.run(recipe(tmp_path))
    first = import_traces.run(recipe(tmp_path))
    before = read_rows(tmp_path / "run" / "traces", "traces")
    again = [row | {"completion": row["completion"] + "!"} for row in rows]
    write(tmp_path / "p.jsonl", rows + again)  # the prompts are there twice, so they stay the same
    prompts.run(recipe(tmp_path))
    grown = import_traces.run(recipe(tmp_path))
    after = read_rows(tmp_path / "run" / "traces", "traces")
    assert after[: len(before)] == before and len(after) == 2 * len(before) and grown.grew_from == [first.digest]
    write(tmp_path / "p.jsonl", again + rows)
    prompts.run(recipe(tmp_path))
    with pytest.raises(StageConflictError, match=r"70 of the run's 70 traces are not in it any more, are others now, or stand"):
        import_traces.run(recipe(tmp_path))
    assert read_manifest(tmp_path / "run" / "traces") == grown and read_rows(tmp_path / "run" / "traces", "traces") == after
