"""A server's process: started in a session of its own, awaited, and ended with all its children; also one that a killed run left behind.

Its log and a record of it lie in the stage's folder. The record tells the next run what it would have to end if this one is killed.
A process is known again by its time of creation and by a mark in its environment, never by its number alone, which others get later.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from distill.errors import IntegrityError, ServerError, visible
from distill.run import early
from distill.run.files import read_json, write_json
from distill.run.log import duration_text, say

GRACE_S = 10.0
"""How long a server may take to end by itself before it is killed."""
_MARK = "DISTILL_SERVER"
_SAME_S = 1.0  # the system's clock may have been set meanwhile, and times of creation follow it
_FIRST_NOTE_S, _NOTE_EVERY_S = 5.0, 60.0
_TAIL_BYTES, _LINES, _LONGEST = 2**16, 12, 240  # of a log: looked at, shown, and characters of a line
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CAUSE = re.compile(r"\b(?:[A-Z]\w*)?(?:Error|Exception)\b: \S")


class ServerProcess:
    """A server that this process starts and ends; a context manager.

    Args:
        words: The command.
        log: What it writes is added to this file.
        record: File that says which process it is, for as long as it may live.
        name: For messages, e.g. `teacher.server (vllm)`.
        environment: Of the process, besides the mark.
    """

    def __init__(self, words: Sequence[str], log: Path, record: Path, name: str, environment: Mapping[str, str] | None = None) -> None:
        self.words, self.log, self.record, self.name = list(words), log, record, name
        self._environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begins = 0

    def __enter__(self) -> ServerProcess:
        end_leftover(self.record)
        mark = uuid.uuid4().hex
        # Written before it starts, too: a kill may come in between.
        self._write(mark, None)
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            try:
                self._process = subprocess.Popen(
                    self.words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env=self._environment | {_MARK: mark, "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
            except OSError as error:
                self.record.unlink(missing_ok=True)
                raise ServerError(
                    f"{self.name}: {visible(self.words[0], _LONGEST)} can't be run: {error.strerror}. Correct server.python or "
                    "server.command."
                ) from None
        with suppress(psutil.Error):  # it has died already, which is said by whoever waits for it
            self._write(mark, psutil.Process(self._process.pid))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def _write(self, mark: str, process: psutil.Process | None) -> None:
        us = psutil.Process()
        identity = {"pid": process.pid, "created_s": process.create_time()} if process else {"pid": None, "created_s": us.create_time()}
        starter = {"pid": us.pid, "created_s": us.create_time()}
        write_json(self.record, {"host": socket.gethostname(), "mark": mark, **identity, "starter": starter})

    @property
    def exit_code(self) -> int | None:
        """Null while it lives; negative is the number of a signal."""
        return None if self._process is None else self._process.poll()

    def wait_until(self, answers: Callable[[], bool], timeout_s: float) -> None:
        """Returns when it answers; says now and then that it is waited for, with the log's last line.

        Raises:
            ServerError: it died, with its last lines, or the time is over.
        """
        start_s, pause_s, note_s = time.monotonic(), 0.05, _FIRST_NOTE_S
        while not answers():
            early.check()
            self.raise_if_dead()
            waited_s = time.monotonic() - start_s
            if waited_s > timeout_s:
                raise ServerError(
                    f"{self.name}: has not answered after {duration_text(waited_s)} (server.start_timeout_s). {self.last_words()}"
                )
            if waited_s >= note_s:
                say(f"waiting for {self.name} ({duration_text(waited_s)}): {next(reversed(self._tail()), 'it has said nothing')}")
                note_s += min(note_s, _NOTE_EVERY_S)
            time.sleep(pause_s)
            pause_s = min(1.3 * pause_s, 2.0)
        self.raise_if_dead()  # another program may answer at that port

    def raise_if_dead(self, wait_s: float = 0.0) -> None:
        """Looks whether it lives, also after a moment in which it may be dying.

        Raises:
            ServerError: it doesn't; with its last lines.
        """
        if self._process is not None and wait_s:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
        code = self.exit_code
        if code is not None:
            how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            memory = " (the machine's memory may have been used up)" if code == -signal.SIGKILL else ""
            raise ServerError(f"{self.name}: {how}{memory}. {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log for an error: what looks like the cause, if that stands further up, and the last lines."""
        return last_words(self.log, self._log_begins)

    def _tail(self) -> list[str]:
        return tail(self.log, self._log_begins)

    def end(self) -> None:
        """Ends it with all its children: asks first, and kills what lives on."""
        if self._process is None:
            return
        try:
            end_recorded(self.record)
        finally:
            if self._process.poll() is None:  # its record was taken away
                self._process.kill()
            self._process.wait()
        self.record.unlink(missing_ok=True)


def last_words(log: Path, begins: int = 0) -> str:
    """The end of a log for an error: what looks like the cause, if that stands further up, and the last lines.

    Args:
        log: The file.
        begins: Bytes before what counts.
    """
    lines = tail(log, begins)
    last = lines[-_LINES:]
    cause = next((line for line in lines[:-_LINES] if _CAUSE.search(line)), None)
    shown = [*([cause, "..."] if cause else []), *last]
    return f"Its last lines ({log}):\n" + "\n".join(f"    {line}" for line in shown) if shown else f"It said nothing ({log})."


def tail(path: Path, begins: int = 0) -> list[str]:
    """The last lines of a log, harmless to show."""
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(begins, size - _TAIL_BYTES))
        text = log.read().decode("utf-8", "replace")
    lines = (line.rsplit("\r", 1)[-1].rstrip() for line in _COLOURS.sub("", text).replace("\r\n", "\n").split("\n"))
    return [visible(line, _LONGEST) for line in lines if line]


def end_leftover(record: Path) -> None:
    """Ends the server that a killed run left behind, if there is one on this machine, and removes its record."""
    found = _read(record)
    if found is None:
        return
    if found.get("host") != socket.gethostname():
        say(f"{record}: was left by a run on {visible(str(found.get('host')), 100)}; if that was killed, its server may live on there")
    elif ended := end_recorded(record):
        say(f"a server that a killed run had left behind was ended ({ended} process{'es' * (ended > 1)})")
    record.unlink(missing_ok=True)


def is_orphan(record: Path) -> bool:
    """Whether whoever started the server of a record on this machine does not live any more."""
    found = _read(record)
    if found is None or found.get("host") != socket.gethostname():
        return False
    return _known(found["starter"]["pid"], found["starter"]["created_s"]) is None


def end_recorded(record: Path) -> int:
    """Ends the processes of a server that is recorded on this machine, and returns how many lived."""
    found = _read(record)
    if found is None:
        return 0
    living = _processes_of(found)
    try:
        for process in living:
            with suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(living, timeout=GRACE_S)
    finally:  # also when it is interrupted
        last = _processes_of(found, living)
        for process in last:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(last, timeout=GRACE_S)
    return len(living)


def _read(record: Path) -> dict[str, Any] | None:
    try:
        return read_json(record)
    except (FileNotFoundError, IntegrityError):
        return None


def _known(pid: int | None, created_s: float) -> psutil.Process | None:
    """The living process of that number, if it is the same one."""
    if pid is None:
        return None
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - created_s) < _SAME_S and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _processes_of(found: dict[str, Any], before: Sequence[psutil.Process] = ()) -> list[psutil.Process]:
    """The living processes of a server: the one that was started, its descendants, its session's, and all that carry its mark."""
    leader = _known(found["pid"], found["created_s"])
    family = {process.pid: process for process in before if process.is_running()}
    if leader is not None:
        with suppress(psutil.Error):
            family |= {process.pid: process for process in (leader, *leader.children(recursive=True))}
    # A number stays reserved while a session of that name lives, so without its first process it is still the server's.
    has_session = found["pid"] is not None and (leader is not None or not psutil.pid_exists(found["pid"]))
    for process in psutil.process_iter():
        if process.pid not in family and process.pid != os.getpid() and _belongs(process, found, has_session):
            family[process.pid] = process
    return [process for process in family.values() if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _belongs(process: psutil.Process, found: dict[str, Any], has_session: bool) -> bool:
    with suppress(psutil.Error, OSError):
        if process.create_time() < found["created_s"] - _SAME_S:
            return False
        return bool((has_session and os.getsid(process.pid) == found["pid"]) or process.environ().get(_MARK) == found["mark"])
    return False  # another user's, or gone


def free_port(host: str = "127.0.0.1") -> int:
    """A port of an address that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])
