"""Stage `rollouts` of an on-policy round: the current student writes traces. Reads prompts/ and the last student/.

A rollout that is cut off at the horizon is as good as any other: the teacher judges every token of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import DataError, RecipeError
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Rollouts
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.manifest import Manifest, check_files, read_manifest
from distill.run.parts import WHOLE, Part, begun, gathered_facts, missing, part_facts, part_folders, run_part, write_part
from distill.run.plan import Growth, StagePlan
from distill.run.schema import DROPPED_TRACE, TRACE
from distill.run.tables import rows_at
from distill.stages import Step, folder, open_stage, plan_of, previous_student, run_dir

if TYPE_CHECKING:
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces

_COLUMNS = ["prompt_id", "messages", "reference"]


def plan(recipe: Recipe, number: int) -> StagePlan:
    """What the stage is asked to make in a round.

    Raises:
        RecipeError: the recipe has no such round.
    """
    rollouts = _rollouts_of(recipe, number)
    settings = {
        "student": recipe.student.identity(),
        "rollouts": {
            **_sampling(recipe, number).identity(),
            **{name: getattr(rollouts, name) for name in ("prompts_per_round", "stop_truncation_rate", "stop_mean_tokens")},
        },
        "seed": recipe.seed,
        "round": number,
    }
    writer = previous_student(recipe, number)
    inputs = [folder(recipe, "prompts"), *([] if writer is None else [writer])]
    return plan_of(recipe, Step("rollouts", number), settings, inputs, Growth(inputs="ignore"))  # a round that is over stays as it is


def run(recipe: Recipe, number: int) -> Manifest:
    """Writes the table `traces`, a row a prompt and sample, and `dropped`; resumes after the last answer, and finishes parts.

    Args:
        recipe: The recipe.
        number: Of the round, from 1.

    Raises:
        RecipeError: the recipe has no such round.
    """
    asked = plan(recipe, number)
    with open_stage(recipe, asked) as out:
        if out.manifest:
            return out.manifest
        count = begun(out.path)
        if count is None:
            return _write(recipe, number, out)
        for part in missing(out.path, count):
            write_part(asked, part, partial(_write, recipe, number, part=part))
        return _complete(recipe, number, out)


def run_shard(recipe: Recipe, part: Part, number: int, *, completes: bool = True) -> Manifest | None:
    """Writes one part, and completes the stage if it was the last; else null.

    Args:
        recipe: The recipe.
        part: Which.
        number: Of the round, from 1.
        completes: Put all parts together, if it was the last; else another process does.

    Raises:
        RecipeError: the recipe has no such round.
        StageConflictError: the stage was begun in another number of parts, or another process works on this one.
    """
    asked = plan(recipe, number)
    with open_stage(recipe, asked, str(part)) as out:
        if out.manifest:
            return out.manifest
        return run_part(
            out, asked, part, partial(_write, recipe, number, part=part), partial(_complete, recipe, number, out) if completes else None
        )


def _rollouts_of(recipe: Recipe, number: int) -> Rollouts:
    if recipe.rollouts is None or not 1 <= number <= recipe.rounds:
        raise RecipeError(f"round {number}: the recipe has {recipe.rounds} rounds. Raise rounds, or give --round from 1 up to that.")
    return recipe.rollouts


def _sampling(recipe: Recipe, number: int) -> Sampling:
    rollouts = _rollouts_of(recipe, number)
    return rollouts.plain(max_new_tokens=rollouts.horizon(number, recipe.rounds))


def _write(recipe: Recipe, number: int, out: StageFolder, part: Part = WHOLE) -> Manifest:
    """The rollouts of a part of the prompts, into the folder of the stage or of its part."""
    # Imported here, so that a finished stage answers without loading torch.
    from distill.servers.opening import open_writer

    clock, wanted = Clock(out.path), _prompts_of(recipe, number)[part.slice]
    writer_folder, place, run = previous_student(recipe, number), out.path, run_dir(recipe)
    if writer_folder is not None:
        check_files(writer_folder)
    sampling, traces = _sampling(recipe, number), _table(recipe, number, out)
    how: dict[str, Any] = {"section": "rollouts", "trained": writer_folder, "needs_ids": True, "parts": part.count}
    with open_writer(recipe, "student", sampling, place, run, **how) as writer:
        rows = rows_at(folder(recipe, "prompts"), "train", wanted, _COLUMNS)
        traces.write(writer.engine, rows, len(wanted), "student", f"round {number} rollouts", writer.max_failed)
    facts = {"device": writer.device, "author": writer.record, **writer.rendering, **writer.spent()}
    return _finish(recipe, number, out, traces, len(wanted), clock.facts(**facts))


def _complete(recipe: Recipe, number: int, out: StageFolder) -> Manifest:
    """Puts all parts together: the same tables as if one process had written them."""
    from distill.engines.earlier import EarlierTraces

    clock, wanted = Clock(out.path), _prompts_of(recipe, number)
    traces = _table(recipe, number, out, EarlierTraces(part_folders(out.path), {"student"}, failed=True))
    rows = rows_at(folder(recipe, "prompts"), "train", wanted, _COLUMNS)
    traces.write(None, rows, len(wanted), "student", f"round {number} rollouts", silent=True)
    return _finish(recipe, number, out, traces, len(wanted), gathered_facts(part_facts(out.path), clock))


def _table(recipe: Recipe, number: int, out: StageFolder, known: EarlierTraces | None = None) -> TraceTable:
    from distill.engines import TraceTable, request_seed

    # A seed of its own for each round: the same prompt should not meet the same random numbers again.
    seed = request_seed(recipe.seed, "round", number)
    dropped, table = out.table("dropped", DROPPED_TRACE, resume=True, optional=True), out.table("traces", TRACE, resume=True)
    return TraceTable(table, out.journal(), _sampling(recipe, number), seed, known, dropped=dropped)


def _finish(recipe: Recipe, number: int, out: StageFolder, traces: TraceTable, num_prompts: int, facts: dict[str, Any]) -> Manifest:
    if num_prompts and not traces.num_rows:
        raise DataError(f"{out.path}: not one of {num_prompts:,} prompts was answered ({dict(traces.drops)}). See server.max_failed.")
    horizon = _sampling(recipe, number).max_new_tokens
    rows = max(traces.num_rows, 1)  # a part may have no prompt
    mean_tokens, cut_off = traces.tokens / rows, traces.finish_reasons["length"] / rows
    written = {
        "horizon": horizon,
        "tokens": traces.tokens,
        "finish_reasons": dict(traces.finish_reasons),
        **_stop(_rollouts_of(recipe, number), horizon, mean_tokens, cut_off),
    }
    return out.finish(rows_in=num_prompts, rows_kept=traces.num_rows, drops=dict(traces.drops), facts=facts | written)


def _prompts_of(recipe: Recipe, number: int) -> Sequence[int]:
    """The numbers of the prompts of a round, rising."""
    prompts = folder(recipe, "prompts")
    return _drawn(read_manifest(prompts).rows("train"), _rollouts_of(recipe, number).prompts_per_round, f"{recipe.seed}/{number}")


def _drawn(num_prompts: int, count: int | None, salt: str) -> Sequence[int]:
    """The numbers of so many prompts, rising; other ones in each round."""
    if count is None or count >= num_prompts:
        return range(num_prompts)
    seed = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big")
    drawn: list[int] = np.sort(np.random.default_rng(seed).choice(num_prompts, count, replace=False)).tolist()
    return drawn


def _stop(rollouts: Rollouts, horizon: int, mean_tokens: float, truncation_rate: float) -> dict[str, str]:
    """The fact `stop` where the student has begun to write without end."""
    limit, longest = rollouts.stop_truncation_rate, rollouts.stop_mean_tokens
    advice = "Lower the learning rate (rollouts.trainer_args), raise rollouts.teacher_share, or raise the horizon"
    if limit is not None and horizon == rollouts.max_new_tokens and truncation_rate > limit:
        return {"stop": f"{truncation_rate:.0%} of the rollouts were cut off, over rollouts.stop_truncation_rate ({limit:.0%}). {advice}."}
    if longest is not None and mean_tokens > longest:
        return {"stop": f"rollouts have {mean_tokens:,.0f} tokens on average, over rollouts.stop_mean_tokens ({longest:,}). {advice}."}
    return {}
