"""Requests that fail for good: counted, dropped in their places, the same through a kill between any two files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.engines import Alternatives, Completion, Failure, Request, TraceTable
from distill.errors import ServerError
from distill.recipe.base import Sampling
from distill.run.folder import StageFolder
from distill.run.manifest import Manifest
from distill.run.schema import ALTERNATIVES, DROPPED_TRACE, TRACE
from distill.run.tables import read_rows


class Killed(BaseException):
    """A kill, as far as one can be raised."""


class Failing:
    """Answers all but some prompts, which fail each time."""

    def __init__(self) -> None:
        self.answered: list[tuple[str, int]] = []

    def write(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion | Failure]]]:
        for place in reversed(range(len(requests))):
            request = requests[place]
            if request.prompt_id in ("p1", "p2", "p7", "p8"):
                yield [(place, Failure("content_filter", "not this one"))]
                continue
            self.answered.append((request.prompt_id, request.sample_index))
            others = Alternatives([-0.5], [[-0.5, -1.5]], token_bytes=[[b"\xff", b"b"]])
            yield [(place, Completion(str(request.seed), [1], [2], "stop", others))]


def fill(folder: Path, engine: Failing, max_failed: float = 0.7) -> Manifest:
    prompts = [{"prompt_id": f"p{number}", "messages": [{"role": "user", "content": "x"}], "reference": None} for number in range(10)]
    with StageFolder(folder, "generate", {}) as out:
        dropped = out.table("dropped", DROPPED_TRACE, resume=True, optional=True)
        others = out.table("alternatives", ALTERNATIVES, resume=True)
        table = out.table("traces", TRACE, resume=True)
        sampling = Sampling(max_new_tokens=4, samples_per_prompt=2)
        traces = TraceTable(table, out.journal(), sampling, 1, dropped=dropped, alternatives=others)
        traces.write(engine, prompts, 10, "teacher", "test", max_failed)
        return out.finish(rows_kept=traces.num_rows, drops=dict(traces.drops))


@pytest.mark.parametrize("at", range(9))
def test_a_kill_between_any_two_files_loses_and_doubles_nothing(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of three prompts; one of them is dropped nearly whole."""
    monkeypatch.setattr("distill.engines.traces.ROWS_PER_SHARD", 6)
    whole = fill(tmp_path / "whole", Failing())
    end, ended = TraceTable._end, [0]

    def dies(table: Any, rows: Any) -> None:
        if ended[0] == at:
            raise Killed
        ended[0] += 1
        end(table, rows)

    first, second = Failing(), Failing()
    with monkeypatch.context() as patch:
        patch.setattr(TraceTable, "_end", staticmethod(dies))
        with pytest.raises(Killed):
            fill(tmp_path / "cut", first)
    found = fill(tmp_path / "cut", second)
    assert found.digest == whole.digest and found.drops == whole.drops == {"content_filter": 8}
    assert len(first.answered) + len(second.answered) == len({*first.answered, *second.answered}) == 12
    keys = [(row["prompt_id"], row["sample_index"]) for row in read_rows(tmp_path / "cut", "traces")]
    others = read_rows(tmp_path / "cut", "alternatives")
    assert [(row["prompt_id"], row["sample_index"]) for row in others] == keys and others[0]["token_bytes"] == [[b"\xff", b"b"]]


def test_too_many_failures_end_the_stage_and_only_they_are_asked_again(tmp_path: Path) -> None:
    engine = Failing()
    with pytest.raises(ServerError, match=r"8 of 20 requests failed for good(.|\n)*content_filter +not this one"):
        fill(tmp_path / "stage", engine, max_failed=0.1)
    again = Failing()
    made = fill(tmp_path / "stage", again)
    assert len(engine.answered) == 12 and again.answered == [] and made.rows_kept == 12


def test_what_another_author_wrote_before_allows_no_more_failures(tmp_path: Path) -> None:
    """8 of 20 requests are 40%, though 30 others of the same table went well."""
    fine = [{"prompt_id": f"f{number}", "messages": [{"role": "user", "content": "x"}], "reference": None} for number in range(15)]
    prompts = [row | {"prompt_id": f"p{number}"} for number, row in enumerate(fine[:10])]
    with StageFolder(tmp_path / "run", "evaluate", {}) as out:
        table = out.table("traces", TRACE, resume=True)
        traces = TraceTable(table, out.journal(), Sampling(max_new_tokens=4, samples_per_prompt=2), 1)
        traces.write(Failing(), fine, 15, "base", "test", 0.2)
        with pytest.raises(ServerError, match="8 of 20"):
            traces.write(Failing(), prompts, 10, "teacher", "test", 0.2)
