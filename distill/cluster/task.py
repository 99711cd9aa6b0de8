"""Runs the command of a task, in the place of its batch script: `python -m distill.cluster.task RECORD [options] -- COMMAND`.

Signals that a scheduler sends to the script are passed on, how the command began and ended is written into the record that `tasks` reads,
and the script ends as the command ended. A shell can't do this: where a signal comes while its command ends, bash loses the exit code.

  --as SIGNAL        what the command gets, whichever signal came
  --received SIGNAL  came before: there is no time to begin
  --requeue          have the task queued again where it ended early, unless Slurm ends its job: a cancelled one stays so, and one that
                     was preempted it queues again itself
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from distill.cluster.launch import MARK
from distill.errors import EARLY

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_ANSWER_S = 60  # that a busy scheduler may take, before the job's own limit
_KILLED = 128  # and the signal's number: the exit code of what a signal has killed, as shells have it


class Task:
    """A command under way, and what was written of it.

    Args:
        record: The file for how it began and ended.
        sent_as: The signal that it gets in place of any; null: the same.
        received: A signal that came before.
    """

    def __init__(self, record: Path, sent_as: signal.Signals | None, received: signal.Signals | None) -> None:
        self._record = record
        self._as = sent_as
        self._received = [received] if received is not None else []
        self._process: subprocess.Popen[bytes] | None = None
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number))
        if self._process is not None:
            self._process.send_signal(self._as or number)

    def run(self, command: Sequence[str]) -> int:
        """Runs the command, and returns its exit code: `EARLY` where a signal ended it before it had begun to listen.

        Args:
            command: Its words.
        """
        mark = Path(os.environ[MARK]) if os.environ.get(MARK) else None
        if mark is not None:
            mark.unlink(missing_ok=True)
        self._note("started")
        code = EARLY
        if not self._received:
            self._process = subprocess.Popen(command)
            for came in self._received[:1]:  # while it was made
                self._process.send_signal(self._as or came)
            code = self._process.wait()
        first = next(iter(self._received), None)
        was_deaf = first is not None and code == -(self._as or first)
        if was_deaf or (mark is not None and mark.exists()):
            code = EARLY
        elif code < 0:
            code = _KILLED - code
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._note("ended", code=code, signal=first and first.name.removeprefix("SIG"))
        print(f"\n--- {_now()}  ended with exit code {code}{f' after {first.name}' if first else ''}", flush=True)
        if mark is not None:
            mark.unlink(missing_ok=True)
        return code

    def _note(self, event: str, **more: object) -> None:
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        line = {"event": event, "at": _now(), "attempt": int(os.environ.get("SLURM_RESTART_COUNT") or 0), "host": host, **more}
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def number_of(environment: Mapping[str, str]) -> str:
    """A task's number, for scontrol: of an array's by both its numbers.

    Of the task whose job has the array's number `SLURM_JOB_ID` would mean all tasks.

    Args:
        environment: As Slurm sets it.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def _still_runs(number: str) -> bool:
    """Whether Slurm has not been told to end a job: then it is COMPLETING while its script still runs."""
    words = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={number}"]
    try:
        asked = subprocess.run(words, capture_output=True, text=True, timeout=_ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return True  # nothing says that it was ended, and a run that stops for that would be worse than one that comes back
    return not asked.stdout.strip() or asked.stdout.split() == ["RUNNING"]


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _signal(name: str) -> signal.Signals | None:
    return signal.Signals[f"SIG{name}"] if name else None


def main(words: Sequence[str]) -> None:
    """Runs the command behind `--`, and ends as it ended."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("record", type=Path)
    parser.add_argument("--as", dest="sent_as", default="")
    parser.add_argument("--received", default="")
    parser.add_argument("--requeue", action="store_true")
    place = words.index("--")
    asked = parser.parse_args(words[:place])
    code = Task(asked.record, _signal(asked.sent_as), _signal(asked.received)).run(words[place + 1 :])
    if code == EARLY and asked.requeue and _still_runs(number := number_of(os.environ)):
        subprocess.run(["scontrol", "requeue", number])
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
