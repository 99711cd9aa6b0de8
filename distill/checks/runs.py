"""One run in the sandbox, and the eye on it: its time, memory, files and what it prints. At a limit everything in it is ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from distill.checks.bubblewrap import Interpreter, Job, start
from distill.recipe.code import CodeSettings

_LOOK_EVERY_S = 0.05
_INODES = 10_000  # files that may lie in /tmp: each takes memory, however empty


class Outcome(NamedTuple):
    """How a run went."""

    output: bytes
    exit_code: int | None
    """Null where it was ended."""
    limit: str | None
    """The one that it reached."""


class Place(NamedTuple):
    """Where code is run."""

    interpreter: Interpreter
    protected: bool
    """Whether that is a sandbox."""


def run_program(source: str, given: str, settings: CodeSettings, place: Place) -> Outcome:
    """Runs a program with an input, and returns what it printed."""
    job = Job("submission.program({job})", {"blocks": [source]}, input=given.encode(errors="replace"), output=subprocess.PIPE)
    return watch(start(job, settings, place.interpreter, protected=place.protected), [], settings)


def run_tests(blocks: list[str], tests: str, settings: CodeSettings, place: Place) -> Outcome:
    """Runs tests on code, each in a sandbox of its own, and returns what the tests found, as JSON.

    The two have a socket between them and nothing else.
    """
    ends = socket.socketpair()
    verdict, theirs = os.pipe()
    try:
        code = Job("submission.serve({job}, {0})", {"blocks": blocks}, (ends[0].fileno(),))
        asking = Job("testing.run_tests({job}, {0}, {1})", {"tests": tests}, (ends[1].fileno(), theirs))
        started = [start(code, settings, place.interpreter, protected=place.protected)]
        try:
            started.insert(0, start(asking, settings, place.interpreter, protected=place.protected))
        except BaseException:
            end(started[0])
            raise
    except BaseException:
        os.close(verdict)
        raise
    finally:
        os.close(theirs)
        for side in ends:
            side.close()
    return watch(started[0], started[1:], settings, verdict)


def watch(
    leader: subprocess.Popen[bytes], others: Sequence[subprocess.Popen[bytes]], settings: CodeSettings, source: int | None = None
) -> Outcome:
    """Reads what a process prints until it ends or something reaches a limit, and ends all of them.

    Args:
        leader: The process whose end is the end of all.
        others: Processes beside it.
        settings: Their limits; memory is that of all together.
        source: What is read, and closed afterwards; by default the leader's output.
    """
    deadline = time.monotonic() + settings.timeout_s
    look = time.monotonic() + _LOOK_EVERY_S
    output = bytearray()
    limit = None
    if source is None:
        assert leader.stdout is not None
        source = os.dup(leader.stdout.fileno())
        leader.stdout.close()
    try:
        while limit is None and not _over(leader, source, output, min(look, deadline)):
            now = time.monotonic()
            if len(output) > settings.output_mib << 20:
                limit = "too_much_output"
            elif now >= deadline:
                limit = "timed_out"
            elif now >= look:
                limit, look = _above([leader, *others], settings), now + _LOOK_EVERY_S
    finally:
        for process in (leader, *others):
            end(process)
        os.close(source)
    return Outcome(bytes(output), leader.returncode if limit is None else None, limit)


def _over(leader: subprocess.Popen[bytes], source: int, output: bytearray, until: float) -> bool:
    """Reads what is there, or waits for it; returns whether a process has ended and nothing is left to read.

    Args:
        leader: The process. Others may hold the pipe open after it: nobody waits for them.
        source: What is read.
        output: What is added to.
        until: When it returns at the latest, by `time.monotonic`.
    """
    has_ended = _has_ended(leader)  # asked first, so that nothing is written between the last look and the end
    readable = select.poll()  # `select` knows no file above 1,023
    readable.register(source, select.POLLIN)
    ready = readable.poll(0 if has_ended else max(0.0, until - time.monotonic()) * 1000)
    piece = os.read(source, 1 << 16) if ready else b""
    output += piece
    if ready and not piece and not has_ended:
        time.sleep(0.002)  # it has closed what is read, which as a rule is its end
    return has_ended and not piece


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process is over. It is left to be waited for: until then no other process gets its number, which is that of its group."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _above(processes: Sequence[subprocess.Popen[bytes]], settings: CodeSettings) -> str | None:
    """The limit that processes and what they have started are above, if any."""
    held = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(process.pid)
            family = [first, *first.children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.Error):
                    held += member.memory_info().rss
            for member in family[1:2]:
                with contextlib.suppress(OSError):
                    files = os.statvfs(f"/proc/{member.pid}/root/tmp")
                    if files.f_blocks * files.f_frsize == settings.files_mib << 20:  # the sandbox's own, and not the machine's
                        held += (files.f_blocks - files.f_bfree) * files.f_frsize
                        if files.f_files - files.f_ffree > _INODES:
                            return "too_many_files"
    return "too_much_memory" if held > settings.memory_mib << 20 else None


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process of the sandbox and all that it has started: the kernel ends a namespace with its first process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.returncode is None and os.getpgid(process.pid) == process.pid:  # without a sandbox: it leads a session of its own
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
