"""The processes of a launch: work that is dealt out rather than done in step, and the end of them all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from distill.errors import DistillError, ModelError, RecipeError, ServerError
from distill.run import early

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
        self.group: Any = None
        """In which they wait for each other; null for one process."""
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
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))

    def wait(self) -> None:
        """Returns when all have come here."""
        if self.group is not None:
            import torch

            torch.distributed.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order; all have come here then."""
        if self.group is None:
            return [value]
        import torch

        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def agree(self) -> None:
        """Returns when all have come here.

        Raises:
            EndedEarly: on all of them, where a signal asked any one to end.
        """
        name = next(filter(None, self.gather(early.asked())), None)
        if name is not None:
            early.end(name)

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Inside, the process that first meets an error tells it and ends, upon which the launcher ends the others: they say nothing."""
        try:
            yield
        except Exception as error:
            foreseen = isinstance(error, DistillError) and not isinstance(error, ServerError)
            if early.asked() and not foreseen:  # others have gone, it seems, and this process ends like them
                raise
            if self.group is None or self._is_first("failed"):
                if isinstance(error, DistillError):
                    error.tells_for_all = True
                raise
            if not early.asked():  # as the launcher does when the first has ended, and so has spoken
                time.sleep(_ENDED_WITHIN_S)
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
        """Lets the first do what is inside, then the others: they find what it has made.

        Raises:
            EndedEarly: on all of them, where a signal asked any one to end; it cuts what the first does.
        """
        if self.rank:
            self.agree()
            yield
            return
        with suppress(early.EndedEarly), early.released():
            yield
        self.agree()


class Poll:
    """Questions to all processes of which the answer comes a round later, so that nobody waits for it."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._asked: Any = None

    def ask(self, *flags: bool) -> list[bool]:
        """Of the flags of the call before, those that any process had raised; the same on all. All false at the first call.

        One process alone is answered at once.
        """
        if self._processes.group is None:
            return list(flags)
        import torch

        found = self.last(len(flags))
        values = torch.tensor(flags, dtype=torch.int32)
        work = torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._processes.group, async_op=True)
        self._asked = (work, values)
        return found

    def last(self, count: int) -> list[bool]:
        """The answer to the call before, and no new question."""
        if self._asked is None:
            return [False] * count
        (work, values), self._asked = self._asked, None
        work.wait()
        return [bool(value) for value in values.tolist()]


def leave() -> None:
    """Ends the group of a launch whose work is done; at exit NCCL would warn of it, and the threads of gloo may abort the process."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
