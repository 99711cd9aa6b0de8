"""The launcher of accelerate, on one node of `slurm/train.sbatch`: `python -m distill.cluster.launch [arguments of accelerate launch]`.

It knows of its place among the nodes from Slurm. What asks for an end, SIGUSR1 and SIGTERM, it leaves to the processes: they get it from
Slurm, too, and it would end them after 30 s. Where they ended early it ends with the same exit code; of any other it makes 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from distill.errors import EARLY

MARK = "DISTILL_EARLY"
"""Environment variable with a file that is made when the processes ended early: srun gives the highest exit code of all nodes."""


_ENDINGS = (signal.SIGUSR1, signal.SIGTERM)


def main(words: Sequence[str]) -> None:
    """Launches the processes of this node, and ends as they do."""
    for number in _ENDINGS:  # a function, and not SIG_IGN, which the processes would begin with
        signal.signal(number, _leave_to_processes)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args(["--machine_rank", os.environ.get("SLURM_NODEID", "0"), *words])
    arguments.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's, which accelerate hands on; its own has SIGTERM, too
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # of one process, which accelerate starts without torchrun
        if error.returncode not in (EARLY, *(-number for number in _ENDINGS)):
            raise
        _tell_early()
    except ChildFailedError as error:
        first = error.get_first_failure()[1].exitcode
        if first not in (EARLY, *(-number for number in _ENDINGS)):  # the latter: before it had begun
            raise
        _tell_early()


def _tell_early() -> None:
    if os.environ.get(MARK):
        Path(os.environ[MARK]).touch()
    sys.exit(EARLY)


def _leave_to_processes(number: int, frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1:])
