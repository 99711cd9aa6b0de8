"""How much of a step that is under way is on disk, how fast it comes, and what it has used of servers. Reads, and locks nothing.

A rate is that of the pieces at work, as they note it in `clock.json` (see `run/clock`): rows over the seconds since a piece began to
write them. Where no such note is, it is all rows over the time from `plan.json` to the last file written, pauses included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.errors import DistillError, IntegrityError, MissingStageError
from distill.recipe.experiment import Recipe
from distill.recipe.learning import DEFAULT_EPOCHS
from distill.run.counted import Files, clock_of, files_in, has_open_journal, is_held, rows_in_journals, rows_in_shards
from distill.run.manifest import JOURNAL, LOCK, MANIFEST, PARTS, PLAN, Manifest, read_manifest
from distill.run.owned import EARLIER
from distill.run.parts import summed
from distill.stages import Step, folder

Held = Collection[tuple[int, int, int]]
LATELY_S = 600.0
"""Whoever wrote a file so long ago may still be at work on the next."""
_TABLES = ("traces", "dropped")
_PART = re.compile(r"(?P<index>\d{5})-of-(?P<count>\d{5})")
_SCORED = re.compile(r"(?:targets|journal)-(?P<index>\d{5})-of-(?P<count>\d{5})\.(?P<kind>targets|targets\.part|jsonl)")
_SPENT = re.compile(r"server-spending-(teacher|student|base)\b.*\.json")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
UNITS = {"generate": "traces", "score": "traces", "train": "steps", "rollouts": "traces", "evaluate": "answers", "benchmark": "tasks"}


class Parts(NamedTuple):
    """Of a step that several processes write."""

    done: int
    at_work: int
    """Begun, and written to lately or held."""
    of: int


class UnderWay(NamedTuple):
    """What is known of a step that is under way."""

    rows: int | None = None
    total: int | None = None
    unit: str = "rows"
    exact: bool = True
    """Whether the rows were counted, and not reckoned from the length of the first."""
    parts: Parts | None = None
    held: bool = False
    """Whether a process of this machine is at work on it."""
    written_at: float | None = None
    """Unix time of the last file written; null for none."""
    seconds: float | None = None
    """Of work so far, of one process; null where they are not noted."""
    rate: float | None = None
    """Units a second; null where it can't be known yet."""
    reckoned: Literal["clock", "files"] | None = None
    """From what the rate is known (see the module)."""
    spent: dict[str, Any] | None = None
    """Requests, tokens and US dollars; null where no server has been used."""
    doing: str = ""
    """What a stage is at that is not counted in its rows, e.g. `encode: 12,000 of 40,000 rows`."""
    kept: int | None = None
    """Of a training, the step of its last checkpoint, from which another piece goes on; null elsewhere."""


class _Piece(NamedTuple):
    """A part of a step, or all of it where there are none."""

    files: Files
    total: int | None
    done: bool


def total_of(recipe: Recipe, step: Step) -> int | None:
    """How many rows a step writes in all; null where what it reads is not finished, or it counts no rows."""
    try:
        if step.stage == "generate" and recipe.generate is not None:
            if recipe.generate.unsolved is not None and (folder(recipe, "generate") / EARLIER).exists():
                return None  # more of some prompts, or of some more
            return _prompts(recipe, "train") * recipe.generate.samples_per_prompt
        if step.stage == "rollouts" and recipe.rollouts is not None:
            return _prompts(recipe, "train", recipe.rollouts.prompts_per_round) * recipe.rollouts.samples_per_prompt
        if step.stage == "evaluate" and recipe.evaluate is not None:
            asked = recipe.evaluate
            if asked.sets:  # how many prompts these have is known when they were read
                return None
            return _prompts(recipe, "heldout", asked.max_prompts) * asked.samples_per_prompt * len(asked.models)
        if step.stage == "benchmark" and recipe.benchmarks is not None:
            return len(recipe.benchmarks.models) * len(recipe.benchmarks.all_tasks)
        if step.stage == "score":
            source = ("rollouts", "traces") if step.number else ("curate", "curated")
            return read_manifest(folder(recipe, source[0], step.number)).rows(source[1])
        return read_manifest(folder(recipe, "generate")).rows("traces") if step.stage == "curate" else None
    except (DistillError, KeyError):
        return None


def _prompts(recipe: Recipe, table: str, most: int | None = None) -> int:
    there = read_manifest(folder(recipe, "prompts")).rows(table)
    return there if most is None else min(most, there)


def under_way(recipe: Recipe, step: Step, files: Files, held: Held, at: float) -> UnderWay:
    """What is known of a step that has a plan and no manifest.

    Args:
        recipe: Of the run.
        step: Which.
        files: Of its folder.
        held: What is locked on this machine.
        at: Unix time, now.
    """
    written = recipe.traces is None if step.stage == "generate" else step.stage in ("rollouts", "evaluate")
    if written:
        return _of_traces(recipe, step, files, held, at)
    if step.stage == "score":
        return _of_targets(recipe, step, files, held, at)
    if step.stage == "benchmark":
        return _of_benchmarks(recipe, step, files, held)
    return _of_training(recipe, step, files, held) if step.stage == "train" else _in_one_go(recipe, step, files, held)


def _of_traces(recipe: Recipe, step: Step, files: Files, held: Held, at: float) -> UnderWay:
    total = total_of(recipe, step)
    pieces, count = _parts(files, total, _a_prompt(recipe, step))
    parts = None
    if pieces:
        begun = [piece for piece in pieces if not piece.done and (is_held(piece.files, held) or _is_recent(piece.files, at))]
        parts = Parts(sum(piece.done for piece in pieces), len(begun), count)
    else:
        pieces = begun = [_Piece(files, total, False)]
    open_ones = [piece.files for piece in pieces if not piece.done]
    journalled = rows_in_journals([each.path / JOURNAL for each in open_ones if has_open_journal(each)])
    rows = sum(piece.total or 0 for piece in pieces if piece.done) + sum(rows_in_shards(each, _TABLES) for each in open_ones)
    rows += sum(each.rows for each in journalled)
    clocks = [clock_of(piece.files) for piece in begun]
    found = UnderWay(
        rows=rows if total is None else min(rows, total),
        total=total,
        unit=UNITS[step.stage],
        exact=all(each.exact for each in journalled),
        parts=parts,
        held=is_held(files, held) or any(is_held(piece.files, held) for piece in begun) or _part_held(files, held),
        written_at=_last([files.written_at, *(piece.files.written_at for piece in pieces)]),
        seconds=sum(clock.get("wall_s", 0.0) for clock in clocks) or None,
        spent=_spent(recipe, [files, *(piece.files for piece in pieces if parts)]),
    )
    return _with_rate(found, clocks, files)


def _of_targets(recipe: Recipe, step: Step, files: Files, held: Held, at: float) -> UnderWay:
    total = total_of(recipe, step)
    places = [match for name in files.changed if (match := _SCORED.fullmatch(name))]
    count = max((int(match["count"]) for match in places), default=1)
    done = {int(match["index"]) for match in places if match["kind"] == "targets"}
    open_ones = [match.string for match in places if match["kind"] == "jsonl" and int(match["index"]) not in done]
    journalled = rows_in_journals([files.path / name for name in open_ones])
    at_work = sum(at - files.changed[name] < LATELY_S for name in open_ones)
    rows = sum(len(range(index, total or 0, count)) for index in done) + sum(each.rows for each in journalled)
    clock = clock_of(files)
    found = UnderWay(
        rows=rows if total is None else min(rows, total),
        total=total,
        unit=UNITS[step.stage],
        exact=all(each.exact for each in journalled),
        parts=Parts(len(done), at_work, count) if count > 1 else None,
        held=is_held(files, held) or _part_held(files, held),
        written_at=files.written_at,
        seconds=clock.get("wall_s"),
        spent=_spent(recipe, [files]),
    )
    return _with_rate(found, [clock] if count == 1 else [], files)  # of several parts the clock knows only one


def _of_training(recipe: Recipe, step: Step, files: Files, held: Held) -> UnderWay:
    train = recipe.train_in_rounds if step.number else recipe.train
    clock = clock_of(files)
    doing = clock.get("doing") or {}
    last = _last_metrics(files.path / "metrics.jsonl")
    noted = doing.get("of") if doing.get("what") == "train" else None
    asked = train.trainer_args.get("max_steps", -1)
    epochs = train.trainer_args.get("num_train_epochs", DEFAULT_EPOCHS)
    reckoned = round(last["step"] * epochs / last["epoch"]) if last.get("epoch") else None
    reached = max(last.get("step", 0), doing.get("done", 0) if noted else 0)
    saved = _last_checkpoint(files.path / "checkpoints")
    newest = files_in(files.path / "checkpoints" / f"checkpoint-{saved}").written_at if saved else None
    found = UnderWay(
        rows=reached,
        total=noted or (asked if asked > 0 else reckoned),
        unit=UNITS["train"],
        held=is_held(files, held),
        written_at=_last([files.written_at, newest]),
        seconds=clock.get("wall_s"),
        spent=_spent(recipe, [files]),
        kept=saved,
        doing=_text(doing) if doing and not noted else "",
    )
    return _with_rate(found, [clock] if noted else [], files)


def _of_benchmarks(recipe: Recipe, step: Step, files: Files, held: Held) -> UnderWay:
    """Tasks of all models that are finished, and what is asked of the one at work; one task may take a hundred times as long as another."""
    clock = clock_of(files)
    doing = clock.get("doing") or {}
    done = sum(each.rows for each in rows_in_journals([files.path / JOURNAL] if has_open_journal(files) else []))
    return UnderWay(
        rows=done,
        total=total_of(recipe, step),
        unit=UNITS["benchmark"],
        held=is_held(files, held),
        written_at=files.written_at,
        seconds=clock.get("wall_s"),
        spent=_spent(recipe, [files]),
        doing=_text(doing) if doing else "",
    )


def _in_one_go(recipe: Recipe, step: Step, files: Files, held: Held) -> UnderWay:
    """A stage whose tables are made all or none: of what it is at only its clock tells."""
    clock = clock_of(files)
    doing = clock.get("doing") or {}
    seconds, total = clock.get("wall_s"), total_of(recipe, step)
    rows = {"rows": doing["done"], "total": doing["of"], "unit": doing["unit"]} if doing else {"total": total}
    found = UnderWay(**rows, held=is_held(files, held), written_at=files.written_at, seconds=seconds, doing=doing.get("what", ""))
    return _with_rate(found, [clock], files) if doing else found


def _parts(files: Files, total: int | None, a_prompt: int) -> tuple[list[_Piece], int]:
    """The parts of a stage that were begun, and how many there are in all."""
    pieces, count = [], 0
    for place in sorted((files.path / PARTS).glob("*-of-*")):
        match = _PART.fullmatch(place.name)
        if match:
            count = int(match["count"])
            there = files_in(place)
            rows = None if total is None else len(range(int(match["index"]) - 1, total // a_prompt, count)) * a_prompt
            pieces.append(_Piece(there, rows, there.is_done))
    return pieces, count


def _a_prompt(recipe: Recipe, step: Step) -> int:
    """Rows that a prompt gives."""
    if step.stage == "evaluate" and recipe.evaluate is not None:
        return recipe.evaluate.samples_per_prompt * len(recipe.evaluate.models)
    sampling = recipe.rollouts if step.stage == "rollouts" else recipe.generate
    return sampling.samples_per_prompt if sampling is not None else 1


def _with_rate(found: UnderWay, clocks: Sequence[dict[str, Any]], files: Files) -> UnderWay:
    noted = [clock["doing"] for clock in clocks if clock.get("doing")]
    rates = [(each["done"] - each["begun_at"]) / each["seconds"] for each in noted if each["seconds"] > 0]
    if sum(rates) > 0:
        return found._replace(rate=sum(rates), reckoned="clock")
    begun_at = files.changed.get(PLAN)
    before = 0
    if (files.path / EARLIER / MANIFEST).exists():  # which was taken over in no time
        before = read_manifest(files.path / EARLIER).rows_kept or 0
    written = (found.rows or 0) - before
    if begun_at is None or found.written_at is None or written <= 0 or found.written_at - begun_at < 1:
        return found
    return found._replace(rate=written / (found.written_at - begun_at), reckoned="files")


def _spent(recipe: Recipe, places: Sequence[Files]) -> dict[str, Any] | None:
    """What all pieces have used of servers; finished ones say it in their manifests."""
    specs = {"teacher": recipe.teacher, "student": recipe.student, "base": recipe.student}
    if not any(spec is not None and spec.server is not None for spec in specs.values()):
        return None
    from distill.servers.spending import spent_in  # which few runs need

    found: list[dict[str, Any] | None] = []
    for files in places:
        if files.is_done:
            found.append(_facts(files.path).get("server"))
        for role in sorted({match[1] for name in files.changed if (match := _SPENT.fullmatch(name))}):
            spec = specs[role]
            if spec is not None and spec.server is not None:
                found.append(spent_in(files.path, role, spec.server))
    return summed(found)


def _facts(place: Path) -> dict[str, Any]:
    try:
        return read_manifest(place).facts
    except (IntegrityError, MissingStageError):
        return {}


def _part_held(files: Files, held: Held) -> bool:
    return any(is_held(files, held, name) for name in files.changed if name.startswith(f"{LOCK}-"))


def _is_recent(files: Files, at: float) -> bool:
    return files.written_at is not None and at - files.written_at < LATELY_S


def _last(times: Sequence[float | None]) -> float | None:
    return max((each for each in times if each is not None), default=None)


def _last_metrics(file: Path) -> dict[str, Any]:
    """The last line of a training's metrics that is of a step under way."""
    for line in reversed(tail(file)):
        try:
            found = json.loads(line)
        except ValueError:  # torn by a kill, or by where the end was cut off
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
    return {}


def _last_checkpoint(place: Path) -> int:
    """The step of the last whole checkpoint; 0 for none."""
    steps = [int(match[1]) for path in place.glob("checkpoint-*/whole") if (match := _CHECKPOINT.fullmatch(path.parent.name))]
    return max(steps, default=0)


def _text(doing: dict[str, Any]) -> str:
    return f"{doing['what']}: {doing['done']:,} of {doing['of']:,} {doing['unit']}"


def tail(file: Path, most: int = 2**14) -> list[str]:
    """The last lines of a text file, as far as they lie in so many bytes; empty where it can't be read."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(opened.seek(0, 2) - most, 0))
            return opened.read().decode(errors="replace").split("\n")
    except OSError:
        return []


def finished(manifest: Manifest) -> UnderWay:
    """The same of a step that is done."""
    facts, stage = manifest.facts, manifest.stage
    rows = facts.get("steps") if stage == "train" else manifest.rows_kept
    return UnderWay(rows=rows, total=rows, unit=UNITS.get(stage, "rows"), seconds=facts.get("wall_s"), spent=facts.get("server"))
