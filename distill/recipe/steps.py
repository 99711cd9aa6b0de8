"""How many rows an optimizer step takes, and how they come to so many processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from distill.errors import RecipeError

DEFAULT_ROWS = 16
"""Of an optimizer step over all processes, where the recipe says nothing of it."""
ON_CPU = 32
"""Most rows at once on a CPU, where the recipe says nothing of it: memory is no hardship there, padding is little at these lengths."""
AT_ONCE, PASSES = "per_device_train_batch_size", "gradient_accumulation_steps"


class StepSize(NamedTuple):
    """Of an optimizer step."""

    rows: int
    """Over all processes; with packing packs."""
    at_once: int
    """Most that one process takes at once."""
    passes: int
    """Forward and backward passes of every process."""


def step_size(rows: int | None, given: Mapping[str, Any], processes: int, on_cpu: bool, *, whole: bool = False) -> StepSize:
    """What a step takes, and in what pieces.

    Of traces any number of rows can be dealt out to any number of processes, since a process without one takes a stand-in that counts
    nothing. What TRL deals out itself must come out even.

    Args:
        rows: `train.global_batch_size`.
        given: `trainer_args`, which may have the rows at once; without `rows` also the passes, and both are of every process.
        processes: That share a step.
        on_cpu: Whether they compute on the CPU.
        whole: Whether every process must take as many in every pass.

    Raises:
        RecipeError: the rows don't come out even; the nearest numbers are named.
    """
    if rows is None and (AT_ONCE in given or PASSES in given):
        at_once, passes = given.get(AT_ONCE, DEFAULT_ROWS if on_cpu else 1), given.get(PASSES, 1 if on_cpu else DEFAULT_ROWS)
        return StepSize(at_once * passes * processes, at_once, passes)
    rows = DEFAULT_ROWS if rows is None else rows
    share = -(-rows // processes)
    unit = given.get(AT_ONCE, 1) * processes
    if whole and rows % unit:
        below, above = rows // unit * unit, -(-rows // unit) * unit
        raise RecipeError(
            f"train.global_batch_size: {rows:,} can't be dealt out evenly to {processes:,} processes"
            + (f" that take {given[AT_ONCE]:,} at once" if AT_ONCE in given else "")
            + f". The nearest that can: {f'{below:,} or ' if below else ''}{above:,}. Set that, or train.trainer_args.{AT_ONCE}."
        )
    limit = min(given.get(AT_ONCE, ON_CPU if on_cpu else 1), share)
    if AT_ONCE in given:
        at_once = limit
    elif whole:
        at_once = max(size for size in range(1, limit + 1) if share % size == 0)
    else:  # in as many passes as it takes, but alike
        at_once = -(-share // -(-share // limit))
    return StepSize(rows, at_once, -(-share // at_once))
