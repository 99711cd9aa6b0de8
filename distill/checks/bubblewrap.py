"""Starts a process of `distill.checks.inside` in bubblewrap, or without it where the settings allow that.

Nothing of the machine is in there but programs and libraries, read only, the interpreter, and an empty /tmp. There is no /proc: nothing
needs it, much has been done with it, and a container may forbid to mount one. Namespaces keep away the network and other processes. Two
things they don't do: as root the code becomes a user that owns nothing, because limits of processes do not hold for root, whatever it is
called inside; and a filter of system calls refuses memory that no limit counts.
"""

from __future__ import annotations

import compileall
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from distill.checks.seccomp import seccomp_filter
from distill.recipe.code import CodeSettings

_INSIDE = Path(__file__).resolve().parent / "inside"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "2",  # each reserves 64 MiB, which count as memory
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_USERS = itertools.count(os.getpid() % 5000)


class Interpreter(NamedTuple):
    """What runs the code."""

    executable: str
    folders: tuple[str, ...]
    """What it is made of, as far as that is not in /usr."""
    isolated: tuple[str, ...]
    """Options that keep away what is not its own."""


class Job(NamedTuple):
    """One process, and what it is to do."""

    call: str
    """A function of `distill.checks.inside` with its arguments, where `{job}` is the number of the file that says what to do, and
    `{0}`, `{1}` those of `fds`."""
    content: dict[str, Any]
    fds: tuple[int, ...] = ()
    input: bytes | None = None
    output: int = subprocess.DEVNULL


def start(
    job: Job, settings: CodeSettings, interpreter: Interpreter, *, protected: bool, errors: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Starts a process of the sandbox; ending it ends all that it has started, and so does the end of this one."""
    handed = _file(json.dumps({**job.content, **_limits(settings, protected)}).encode())
    given = _file(job.input) if job.input is not None else subprocess.DEVNULL
    extra = [handed, *job.fds]
    place = "/kit" if protected else str(_INSIDE.parent)
    call = job.call.format(*job.fds, job=handed)
    # Appended: beside the folder lie modules that are called like some of Python's.
    program = f"import sys; sys.path[:] = [*filter(None, sys.path), {place!r}]; from inside import {call.split('.')[0]}; {call}"
    words = [interpreter.executable, *interpreter.isolated, "-c", program]
    opened = [handed]
    try:
        if protected:
            rules = _file(seccomp_filter() or b"")
            opened.append(rules)
            extra.append(rules)
            options = [*_options(settings, interpreter), "--seccomp", str(rules)]
            if b"/dev/stdin" in json.dumps(job.content).encode() and job.input is not None:
                again = _file(job.input)
                opened.append(again)
                extra.append(again)
                options += ["--perms", "0444", "--ro-bind-data", str(again), "/dev/stdin"]
            words = [_bwrap() or "bwrap", *options, "--remount-ro", "/dev", "--", *words]
        with _deaf():
            return subprocess.Popen(
                words,
                stdin=given,
                stdout=job.output,
                stderr=errors,
                pass_fds=extra,
                env=_ENVIRONMENT if not protected else {},
                cwd="/",
                start_new_session=not protected,
            )
    finally:
        for fd in [*opened, *([given] if given != subprocess.DEVNULL else [])]:
            os.close(fd)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """What is started inside hears none of the signals that a terminal or a scheduler sends to all of a job: they are not for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _file(content: bytes) -> int:
    """A file without a name, open for reading alone, with this content."""
    fd = os.memfd_create("distill", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _limits(settings: CodeSettings, protected: bool) -> dict[str, Any]:
    """What `distill.checks.inside.confine` sets."""
    return {
        "memory_mib": settings.memory_mib,
        "files_mib": settings.files_mib,
        "output_mib": settings.output_mib,
        "processor_s": math.ceil(settings.timeout_s) + 1,
        # Without a sandbox all processes of the user are counted; in one without root, its first process too.
        "processes": settings.processes + (0 if is_root() else 1) if protected else None,
        "user": _user() if protected else None,
    }


def is_root() -> bool:
    """Whether this process may become other users, and bubblewrap needs no namespace of users."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _user() -> int | None:
    """A user that owns nothing here, another one for each process, because limits of processes count those of a user.

    Null where there is none, because this is not root, or root of a container that has no other users.
    """
    if not is_root():
        return None
    first, _, count = (int(word) for word in Path("/proc/self/uid_map").read_text().split("\n")[0].split())
    return min(first + count, 1 << 30) - 2 - next(_USERS) % 5000 if count > 10_000 else None


def _options(settings: CodeSettings, interpreter: Interpreter) -> list[str]:
    """What bubblewrap makes, in its order."""
    size = str(settings.files_mib << 20)
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    options += ["--die-with-parent", "--new-session", "--clearenv"]
    if is_root():
        options += ["--cap-drop", "ALL"]
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if _user() is not None else []
    else:
        options += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    options += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp"]  # first, for an interpreter may lie in there
    # Made here, where anyone may pass: bubblewrap makes them for itself alone, and root becomes somebody else.
    parents = [str(parent) for folder in interpreter.folders for parent in reversed(Path(folder).parents[:-1])]
    for name in dict.fromkeys(["/usr", "/usr/share", "/etc", "/kit", *parents]):
        options += ["--perms", "0755", "--dir", name]
    for name in ("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo"):
        options += ["--ro-bind-try", name, name]
    for name in ("/bin", "/lib", "/lib32", "/lib64"):
        path = Path(name)
        options += ["--symlink", str(path.readlink()), name] if path.is_symlink() else ["--ro-bind-try", name, name]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in interpreter.folders:
        options += ["--ro-bind", folder, folder]
    options += ["--ro-bind", str(_INSIDE), "/kit/inside"]
    options += ["--perms", "0755", "--size", str(1 << 20), "--tmpfs", "/dev", "--symlink", "/tmp", "/dev/shm"]
    for name in _DEVICES:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, value in _ENVIRONMENT.items():
        options += ["--setenv", name, value]
    return [*options, "--chdir", "/tmp", "--remount-ro", "/"]


@cache
def _bwrap() -> str | None:
    return shutil.which("bwrap")


def on_linux() -> bool:
    """Whether this is Linux, whose files without names and limits everything here uses."""
    return sys.platform.startswith("linux")


def missing() -> str | None:
    """What the sandbox needs and this machine has not, before anything is tried; null where all is there."""
    if not on_linux():
        return "it needs Linux"
    if _bwrap() is None:
        return "bubblewrap (bwrap) is not installed"
    return None if seccomp_filter() else "its filter of system calls knows x86-64 and ARM64 alone"


@cache
def interpreter_of(python: str | None) -> Interpreter:
    """The interpreter of the settings.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: it is none, or it lies in a folder that holds more than that.
    """
    if python is None:
        compileall.compile_dir(str(_INSIDE), quiet=2)  # once, and not in each run
        executable = os.path.realpath(sys.executable)
        return Interpreter(executable, _outside([sys.base_prefix]), ("-s", "-S", "-B"))
    ask = "import json, os, sys; print(json.dumps([sys.executable, os.path.realpath(sys.executable), sys.prefix, sys.base_prefix]))"
    said = subprocess.run([python, "-I", "-c", ask], capture_output=True, check=True, timeout=60, stdin=subprocess.DEVNULL)
    executable, _, prefix, base = json.loads(said.stdout)
    return Interpreter(executable, _outside([base, prefix]), ("-s", "-B"))


def _outside(folders: Sequence[str]) -> tuple[str, ...]:
    """Folders that the sandbox does not have already."""
    home = Path.home()
    for folder in folders:
        if Path(folder) == home or Path(folder) in home.parents:
            raise ValueError(f"{folder} holds more than an interpreter")
    return tuple(dict.fromkeys(folder for folder in folders if folder != "/usr"))
