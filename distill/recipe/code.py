"""How the code of an answer is run against a row's tests: where, and within which limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill.recipe.base import PathOrName, PositiveInt, Section


class CodeSettings(Section):
    """Code is run in bubblewrap: no network, none of the user's files, every run in a place of its own."""

    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit of a run, in seconds: of all asserts of a row together, or of a program for one input."""
    memory_mib: Annotated[int, Field(ge=64)] = 1024
    """What the processes of a run may hold together, in MiB; none of them may reserve more."""
    processes: Annotated[int, Field(ge=1, le=1000)] = 16
    """Processes and threads of a run at once."""
    files_mib: PositiveInt = 16
    """What a run may write in its empty /tmp, in MiB, which is gone with it."""
    output_mib: PositiveInt = 4
    """What a program may print, and what a function may return, in MiB."""
    python: PathOrName | None = None
    """Interpreter that runs the code, whose environment it can read and import; null means this one with the standard library alone."""
    unprotected: bool = False
    """Run the code where no sandbox is to be had too, as the user who runs the kit, with all that user's files and the network."""
