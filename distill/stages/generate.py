"""Stage `generate`: the teacher writes traces for the training prompts, here or behind a server. Reads prompts/, writes traces/."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Generate
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.manifest import Manifest, read_manifest
from distill.run.parts import (
    WHOLE,
    Part,
    begun,
    gathered_facts,
    missing,
    num_tokens,
    part_facts,
    part_folders,
    run_part,
    write_part,
)
from distill.run.plan import Growth, StagePlan
from distill.run.schema import ALTERNATIVES, DROPPED_TRACE, TRACE
from distill.run.tables import iter_rows, rows_at
from distill.stages import Step, folder, open_stage, plan_of, run_dir

if TYPE_CHECKING:
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces

_COLUMNS = ["prompt_id", "messages", "reference"]


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make."""
    assert recipe.teacher is not None and recipe.generate is not None  # the recipe was validated
    settings = {"teacher": recipe.teacher.identity(), "generate": recipe.generate.identity(), "seed": recipe.seed}
    return plan_of(recipe, Step("generate"), settings, [folder(recipe, "prompts")], Growth({"generate.samples_per_prompt": 0}))


def run(recipe: Recipe) -> Manifest:
    """Writes the table `traces`, a row a prompt and sample, and `dropped`; resumes after the last answer, and finishes parts."""
    asked = plan(recipe)
    with open_stage(recipe, asked) as out:
        if out.manifest:
            return out.manifest
        count = begun(out.path)
        if count is None:
            return _write(recipe, out, out.earlier)
        for part in missing(out.path, count):
            write_part(asked, part, partial(_write, recipe, earlier=out.earlier, part=part))
        return _complete(recipe, out)


def run_shard(recipe: Recipe, part: Part, *, completes: bool = True) -> Manifest | None:
    """Writes one part, and completes the stage if it was the last; else null.

    Args:
        recipe: The recipe.
        part: Which.
        completes: Put all parts together, if it was the last; else another process does.

    Raises:
        StageConflictError: the stage was begun in another number of parts, or another process works on this one.
    """
    asked = plan(recipe)
    with open_stage(recipe, asked, str(part)) as out:
        if out.manifest:
            return out.manifest
        write = partial(_write, recipe, earlier=out.earlier, part=part)
        return run_part(out, asked, part, write, partial(_complete, recipe, out) if completes else None)


def _write(recipe: Recipe, out: StageFolder, earlier: Path | None, part: Part = WHOLE) -> Manifest:
    """The traces of a part of the prompts, into the folder of the stage or of its part."""
    # Imported here, so that a finished stage answers without loading torch.
    from distill.data.licences import licence_of
    from distill.engines.earlier import EarlierTraces, refuse_another
    from distill.servers.opening import open_writer

    teacher, sampling = recipe.teacher, recipe.generate
    assert teacher is not None and sampling is not None  # the recipe was validated
    clock, source = Clock(out.path), folder(recipe, "prompts")
    wanted = range(read_manifest(source).rows("train"))[part.slice]
    with open_writer(recipe, "teacher", sampling, out.path, run_dir(recipe), logprobs=sampling.logprobs, parts=part.count) as writer:
        known = None
        if earlier:
            before = read_manifest(earlier).facts
            refuse_another("teacher", writer.record | writer.rendering, before | before.get("author", {}))  # both have a `server`
            known = EarlierTraces(earlier, {"teacher"})
        traces = _table(out, recipe, sampling, known)
        rows = rows_at(source, "train", wanted, _COLUMNS)
        traces.write(writer.engine, rows, len(wanted), "teacher", "generate", writer.max_failed)
    facts = {
        "device": writer.device,
        "author": writer.record,
        "licence": licence_of(teacher.model, teacher.licence),
        **writer.rendering,
        "control_ids": sorted(writer.chat.control_ids) if writer.chat is not None else [],
        **writer.spent(),
    }
    return _finish(out, traces, len(wanted), clock.facts(**facts))


def _complete(recipe: Recipe, out: StageFolder) -> Manifest:
    """Puts all parts together: the same tables as if one process had written them."""
    from distill.engines.earlier import EarlierTraces

    assert recipe.generate is not None  # the recipe was validated
    clock, source = Clock(out.path), folder(recipe, "prompts")
    num_prompts = read_manifest(source).rows("train")
    traces = _table(out, recipe, recipe.generate, EarlierTraces(part_folders(out.path), {"teacher"}, failed=True))
    traces.write(None, iter_rows(source, "train", columns=_COLUMNS), num_prompts, "teacher", "generate", silent=True)
    return _finish(out, traces, num_prompts, gathered_facts(part_facts(out.path), clock))


def _table(out: StageFolder, recipe: Recipe, sampling: Generate, known: EarlierTraces | None) -> TraceTable:
    from distill.engines import TraceTable

    dropped = out.table("dropped", DROPPED_TRACE, resume=True, optional=True)
    alternatives = None if sampling.logprobs is None else out.table("alternatives", ALTERNATIVES, resume=True)
    table = out.table("traces", TRACE, resume=True)
    return TraceTable(table, out.journal(), sampling, recipe.seed, known, dropped=dropped, alternatives=alternatives)


def _finish(out: StageFolder, traces: TraceTable, num_prompts: int, facts: dict[str, Any]) -> Manifest:
    if num_prompts and not traces.num_rows:
        raise DataError(f"{out.path}: not one of {num_prompts:,} prompts was answered ({dict(traces.drops)}). See server.max_failed.")
    written = {"tokens": num_tokens(traces, facts), "finish_reasons": dict(traces.finish_reasons)}
    return out.finish(rows_in=num_prompts, rows_kept=traces.num_rows, drops=dict(traces.drops), facts=facts | written)
