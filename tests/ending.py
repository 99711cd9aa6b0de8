"""Commands of the kit that send themselves signals at given places: the same at every run, whatever the machine does."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import commands

ROOT = Path(__file__).resolve().parent.parent

# Signals are words `rank:place:name`; a place is a step of training, a function's name, or a bar of progress that moves on.
_SCRIPT = """
import importlib, os, signal, sys
for number in (signal.SIGUSR1, signal.SIGTERM):  # as a process has them that is no fork of its launcher
    signal.signal(number, signal.SIG_DFL)
rank, words = os.environ.get("RANK", "0"), [word.split(":") for word in sys.argv.pop(1).split()]

def reach(place):
    for found in [word for word in words if word[:2] == [rank, place]]:
        words.remove(found)
        os.kill(os.getpid(), getattr(signal, found[2]))

def behind(module, name, place):
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    plain = getattr(owner, name)
    def called(*given, **more):
        found = plain(*given, **more)
        reach(place(given))
        return found
    setattr(owner, name, called)

behind("distill.run.log", "Progress.update", lambda given: given[0]._description.replace(" ", "_"))
if sys.argv[1] == "train":
    for module, name in (
        ("distill.trainers.encoded", "_batch"), ("distill.stages.train", "_student_to_train"), ("distill.stages.train", "_save"),
        ("distill.trainers.checkpoints", "_sums"), ("distill.trainers.callbacks", "MetricsFile.on_train_begin"),
    ):
        behind(module, name, lambda given, name=name: name)
    behind("distill.trainers.callbacks", "ProgressBar.on_step_end", lambda given: str(given[2].global_step))
    from distill.train import main
    main(sys.argv[2:])
else:
    behind("distill.pipeline", "run_stage", lambda given: "run_stage")
    from distill.cli import main
    main()
"""


def told(signals: str, words: Sequence[str | Path], place: Path, *, processes: int = 0) -> subprocess.CompletedProcess[str]:
    """What `distill WORDS` does when it is sent these signals; `train` stands for `distill.train`.

    Args:
        signals: Words `rank:place:name`, with blanks between.
        words: Of the command line.
        place: A folder for the script.
        processes: That are launched; 0 for one without a launcher.
    """
    script = place / "told.py"
    script.write_text(_SCRIPT)
    line = [script, signals or "none", *words]  # accelerate fails on an empty word
    if not processes:
        return commands.run(line)
    return commands.launch(line, processes, launcher="distill.cluster.launch")
