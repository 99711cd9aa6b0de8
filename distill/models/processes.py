"""The processes of a launch: work that is dealt out rather than done in step, and the end of them all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from distill.errors import DistillError, ModelError, RecipeError

WRITTEN = ("generate", "rollouts", "evaluate")
"""Stages whose traces several processes write, each a part."""
SEVERAL = (*WRITTEN, "score", "train")
"""Stages, and their commands, that several processes share."""

_ENDED_WITHIN_S = 60.0


def world_size() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(what: str) -> None:
    """Refuses what one process does alone, where several were launched: each would do all of it.

    Args:
        what: A stage or command.

    Raises:
        RecipeError: they were.
    """
    if world_size() > 1 and what not in SEVERAL:
        raise RecipeError(
            f"{what}: one process does it, and {world_size()} were launched. Run `distill {what}` without accelerate; what several "
            f"share is {', '.join(SEVERAL)}."
        )


class Processes:
    """The processes of a launch. They wait for each other on the CPU, for as long as it takes."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), world_size()
        self._group: Any = None
        if self.count > 1:
            import torch
            from accelerate import PartialState

            from distill.models.loading import pick_device

            found = PartialState(cpu=pick_device().type == "cpu").num_processes
            if found != self.count:
                raise ModelError(
                    f"{self.count} processes were launched, but this one sees {found}, so each would do all the work. "
                    "On CPUs set ACCELERATE_USE_CPU=true; on GPUs check `accelerate env`."
                )
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait(self) -> None:
        """Returns when all have come here."""
        if self._group is not None:
            import torch

            torch.distributed.barrier(group=self._group)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order; all have come here then."""
        if self._group is None:
            return [value]
        import torch

        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Inside, the process that first meets an error tells it and ends, upon which the launcher ends the others: they say nothing."""
        try:
            yield
        except Exception as error:
            if self._group is None or self._is_first("failed"):
                if isinstance(error, DistillError):
                    error.tells_for_all = True
                raise
            time.sleep(_ENDED_WITHIN_S)  # would it end at once, so might the first, before it has spoken
            sys.exit(1)

    def _is_first(self, event: str) -> bool:
        """Whether no process of the launch has asked this before."""
        import torch

        try:
            store: Any = torch.distributed.distributed_c10d._get_default_store()
            return bool(store.add(f"distill/{event}", 1) == 1)
        except RuntimeError:  # whoever keeps it has ended
            return False

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets the first do what is inside, then the others: they find what it has made."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()


def leave() -> None:
    """Ends the group of a launch whose work is done; at exit NCCL would warn of it, and the threads of gloo may abort the process."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
