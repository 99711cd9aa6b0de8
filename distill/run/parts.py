"""A stage that several processes write, each a part: the parts lie in its folder, each a small stage, until one process puts them together.

<stage>/parts/00002-of-00004/    plan, journal, tables, manifest of the second of four parts
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distill.errors import RecipeError, StageConflictError
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.log import say
from distill.run.manifest import JOURNAL, MANIFEST, PARTS, Manifest, read_manifest
from distill.run.plan import StagePlan

_NAME = re.compile(r"(\d{5})-of-(\d{5})")
_MOST = 9999
_OF_ONE = frozenset({"tokens", "finish_reasons", "server", "stop"})
_SUMMED = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "requests", "retries", "cost_usd", "seconds")


@dataclass(frozen=True)
class Part:
    """One of several parts of a stage: every `count`-th prompt from the `index`-th."""

    index: int = 0
    """From 0."""
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1:05d}-of-{self.count:05d}"

    @property
    def slice(self) -> slice:
        """Of the prompts, those of this part."""
        return slice(self.index, None, self.count)

    def folder(self, stage: Path) -> Path:
        """Where it lies in the folder of its stage."""
        return stage / PARTS / str(self)


WHOLE = Part()
"""All prompts."""


def part_of(shard: str) -> Part:
    """A part as the command line names it: `i/n`, counted from 1.

    Raises:
        RecipeError: there is no such part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= _MOST:
        raise RecipeError(f"--shard: expected I/N with 1 <= I <= N <= {_MOST}, got {shard!r}. The third of eight parts is 3/8.")
    return Part(int(match[1]) - 1, int(match[2]))


def begun(stage: Path) -> int | None:
    """The number of parts that a stage was begun in; null where it was begun in none.

    Raises:
        StageConflictError: there are parts of several numbers.
    """
    found = {int(match[2]) for place in (stage / PARTS).glob("*") if (match := _NAME.fullmatch(place.name))}
    if len(found) > 1:
        raise StageConflictError(f"{stage / PARTS}: holds parts of {sorted(found)} at once. Delete those of one number, or add --redo.")
    return min(found, default=None)


def refuse_other_number(stage: Path, part: Part) -> None:
    """Refuses a part where a stage was begun in another number of them, or as a whole.

    Raises:
        StageConflictError: it was.
    """
    there = begun(stage)
    if there is None and (any(stage.glob("*-00000.parquet")) or any(stage.glob("batches*.json")) or _has_rows(stage / JOURNAL)):
        raise StageConflictError(f"{stage}: was begun as a whole. Finish it in one process and without --shard, or add --redo.")
    if there not in (None, part.count):
        raise StageConflictError(f"{stage}: was begun in {there} parts, asked for {part.count}. Keep to {there}, or finish it alone.")


def _has_rows(journal: Path) -> bool:
    return journal.exists() and journal.stat().st_size > 0


def write_part(plan: StagePlan, part: Part, write: Callable[[StageFolder], Manifest]) -> Manifest:
    """Writes a part, or finds it finished.

    Args:
        plan: Of the whole stage.
        part: Which.
        write: Fills the part's folder and finishes it.

    Raises:
        StageConflictError: another process works on it.
    """
    settings = {**plan.settings, "part": str(part)}
    with StageFolder(part.folder(plan.path), plan.stage, settings, plan.inputs, made_with=plan.made_with, writes=plan.writes) as out:
        return out.manifest or write(out)


def missing(stage: Path, count: int) -> list[Part]:
    """Parts that are not finished."""
    return [part for index in range(count) if not ((part := Part(index, count)).folder(stage) / MANIFEST).exists()]


def run_part(
    out: StageFolder, plan: StagePlan, part: Part, write: Callable[[StageFolder], Manifest], complete: Callable[[], Manifest] | None
) -> Manifest | None:
    """Writes a part of a stage that is open for it, and completes the stage if no other part is missing; null if one is.

    Args:
        out: The stage, opened for this part.
        plan: Of the whole stage.
        part: Which.
        write: Fills the part's folder.
        complete: Puts all parts together; null leaves that to another process.
    """
    refuse_other_number(out.path, part)
    write_part(plan, part, write)
    if complete is None:
        return None
    with out.whole():
        if out.manifest is not None:
            return out.manifest
        left = missing(out.path, part.count)
        if left:
            say(f"{plan.stage:<9} part {part.index + 1}/{part.count} is done, {len(left)} of {part.count} parts are not yet", result=True)
            return None
        return complete()


def part_folders(stage: Path) -> list[Path]:
    """The folders of all parts of a stage that was begun in some, in order."""
    count = begun(stage) or 0
    return [Part(index, count).folder(stage) for index in range(count)]


def part_facts(stage: Path) -> list[dict[str, Any]]:
    """What each finished part measured."""
    return [read_manifest(place).facts for place in part_folders(stage)]


def gathered_facts(parts: list[dict[str, Any]], clock: Clock) -> dict[str, Any]:
    """The facts of a stage that was written in parts: those that all share, and what they cost together.

    Args:
        parts: Of each part.
        clock: Of the process that puts them together.
    """
    first = {name: value for name, value in parts[0].items() if name not in _OF_ONE}
    facts = first | clock.facts()
    facts["wall_s"] = round(facts["wall_s"] + sum(part["wall_s"] for part in parts), 2)
    spent = summed([part.get("server") for part in parts])
    return facts | ({"server": spent} if spent else {})


def num_tokens(traces: _Counted, facts: dict[str, Any]) -> int:
    """Tokens of a table of traces; of those whose ids are not known as many as the server has counted."""
    served = (facts.get("server") or {}).get("output_tokens")
    return int(served) if traces.num_unknown and served is not None else traces.tokens


class _Counted(Protocol):
    tokens: int
    num_unknown: int


def summed(spent: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What all parts had of servers together; null where they had none."""
    there = [facts for facts in spent if facts]
    if not there:
        return None
    total = dict(there[0])
    for name in _SUMMED:
        values = [facts[name] for facts in there if facts.get(name) is not None]
        if values:
            total[name] = round(sum(values), 6)
    if total.get("seconds"):
        total["tokens_per_s"] = round(total["output_tokens"] / total["seconds"], 1)
    return total
