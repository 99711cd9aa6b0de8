"""Ending early on a signal: what is finished is on disk, there is more to do, exit code 75. Imports no torch.

| signal | a stage at work |
| --- | --- |
| SIGUSR1, SIGTERM | ends behind the unit of work it is in, or after `UNIT_S` at once; training behind a step |
| one more | is no other |
| SIGHUP, but not under nohup | ends at once, exit code 129 |
| SIGINT (Ctrl-C) | ends at once, exit code 130 |

Only an entry point installs handlers (`ends_on_signals`): where the kit is used from Python, signals are whoever's uses it, and all here
finds that nobody asked for an end. Processes that are forked from this one ignore SIGUSR1, which a scheduler may send to all of a job,
and die of SIGTERM as ever.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

UNIT_S = 10.0
"""How long a unit of work may take to its end; Slurm kills 30 s behind SIGTERM, and a server takes up to 10 s to end."""
_AGAIN_S = 0.5  # the alarm that meets held work comes again
_LOST_S = 60.0  # so does one whose exception was lost in a callback; by then what was started is ended
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class EndedEarly(BaseException):
    """The work was ended by a signal. No error: no `except Exception` takes it for one.

    Args:
        name: Of the signal.
        detail: How far the work came, behind a blank.
    """

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(f"ended early by {name}{detail}")


class _Asked:
    """What this process was told."""

    name: str | None = None
    """Of the first signal that asked for an end."""
    holds = 0
    """How deep the work is in what must not be cut."""


_asked = _Asked()


def asked() -> str | None:
    """The signal that asked this process to end; null where none did."""
    return _asked.name


def check() -> None:
    """Ends the work here if that was asked for; called where a unit is finished.

    Raises:
        EndedEarly: it was, and nothing holds it.
    """
    if _asked.name is not None and not _asked.holds and threading.current_thread() is threading.main_thread():
        end(_asked.name)


def end(name: str, detail: str = "") -> NoReturn:
    """Ends the work here, from whatever process the signal came; what was started has time to end, too.

    Raises:
        EndedEarly: always.
    """
    if _asked.name is not None:
        signal.setitimer(signal.ITIMER_REAL, _LOST_S, _AGAIN_S)
    raise EndedEarly(name, detail)


@contextmanager
def held() -> Iterator[None]:
    """Inside, nothing is cut: whoever works there looks at `asked` where it can end."""
    with _held_to(_asked.holds + 1):
        yield


@contextmanager
def released() -> Iterator[None]:
    """Inside, work that is part of something held may be cut, because whoever calls it is ready for that."""
    with _held_to(0):
        yield


@contextmanager
def _held_to(depth: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where nothing is ever cut
        yield
        return
    before, _asked.holds = _asked.holds, depth
    try:
        yield
    finally:
        _asked.holds = before


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """For an entry point: inside, signals end the work as the table above says."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {**dict.fromkeys(_SIGNALS, _told), signal.SIGALRM: _overdue}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        handlers[signal.SIGHUP] = _hung_up
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    _asked.name, _asked.holds = None, 0
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            if signal.getsignal(number) is handlers[number]:  # else the process is ending
                signal.signal(number, handler)


def ignore_signals() -> None:
    """From here on a signal to end does nothing: the process is ending."""
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _told(number: int, frame: FrameType | None) -> None:
    if _asked.name is None:
        _asked.name = signal.Signals(number).name
        signal.setitimer(signal.ITIMER_REAL, UNIT_S, _AGAIN_S)


def _overdue(number: int, frame: FrameType | None) -> None:
    if not _asked.holds and _asked.name is not None:
        end(_asked.name)


def _hung_up(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _in_child() -> None:
    for number, handler in ((signal.SIGUSR1, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _told:
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_in_child)
