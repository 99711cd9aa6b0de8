"""Whether code can be run safely on this machine, found by trying: `python -m distill.checks.sandbox` prints what holds.

Each protection has a program that tries to break it and says what it got. Code is run only where those hold without which the others are
worth little: files, network, processes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from distill.checks.bubblewrap import Interpreter, Job, interpreter_of, is_root, missing, on_linux, start
from distill.checks.runs import Outcome, Place, end, run_program
from distill.errors import visible
from distill.recipe.code import CodeSettings


class Proof(NamedTuple):
    """What a program in the sandbox got when it tried."""

    name: str
    holds: bool
    found: str


def place_for(settings: CodeSettings) -> Place | str:
    """Where code is run as settings ask; where it can't be, why not."""
    try:
        interpreter = interpreter_of(settings.python)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"{settings.python} can't be used ({type(error).__name__})"
    why_not = missing() or _broken(interpreter)
    if why_not is None:
        return Place(interpreter, protected=True)
    return Place(interpreter, protected=False) if settings.unprotected and on_linux() else why_not


@cache
def _broken(interpreter: Interpreter) -> str | None:
    """The first protection that does not hold and without which nothing is run; null where all do."""
    place = Place(interpreter, protected=True)
    for proof in (_starts, _files, _network, _processes):
        tried = proof(place)
        if not tried.holds:
            return f"{tried.name}: {tried.found}"
    return None


def proofs(place: Place) -> Iterator[Proof]:
    """Each protection, as it was found by trying."""
    for proof in (_starts, _files, _network, _processes, _memory, _disk, _output, _time):
        yield proof(place)


_LIMITS = CodeSettings(timeout_s=30, memory_mib=256, processes=8, files_mib=1, output_mib=1)


def _try(place: Place, source: str, settings: CodeSettings = _LIMITS) -> tuple[str, Outcome]:
    outcome = run_program(source, "", settings, place)
    return outcome.output.decode(errors="replace").strip()[:200], outcome


def _starts(place: Place) -> Proof:
    job = Job("submission.program({job})", {"blocks": ["print('here')"]}, input=b"", output=subprocess.PIPE)
    process = start(job, _LIMITS, place.interpreter, protected=place.protected, errors=subprocess.PIPE)
    try:
        said, errors = process.communicate(timeout=_LIMITS.timeout_s)
    except subprocess.TimeoutExpired:
        end(process)
        return Proof("start", False, "nothing happens")
    why = errors.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    return Proof("start", said == b"here\n", "a program runs" if said == b"here\n" else f"no program runs: {visible(why[0], 200)}")


def _files(place: Place) -> Proof:
    """A file of this user, readable for everybody, in a folder that everybody can enter."""
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        Path(folder).chmod(0o755)
        asked = [str(secret), str(Path(__file__).resolve()), str(Path.home() / ".bashrc"), "/etc/passwd"]
        said, _ = _try(place, f"import os\nprint([name for name in {asked!r} if os.path.exists(name)])")
    return Proof("files", said == "[]", "none of the user's can be seen" if said == "[]" else f"seen: {said}")


def _network(place: Place) -> Proof:
    """A server here, which everybody on this machine can reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        source = f"""
import socket
try:
    socket.create_connection({address!r}, timeout=5)
    print("reached")
except OSError as error:
    print("refused")
"""
        said, _ = _try(place, source)
    return Proof("network", said == "refused", "a server on this machine is out of reach" if said == "refused" else f"got: {said}")


def _processes(place: Place) -> Proof:
    source = """
import os, time
started = 0
try:
    for _ in range(40):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
except OSError:
    pass
print(started, os.getuid(), flush=True)
os._exit(0)
"""
    said, outcome = _try(place, source)
    words = said.split()
    if len(words) != 2:
        return Proof("processes", False, f"the probe failed: {outcome.limit or said}")
    started, user = int(words[0]), int(words[1])
    who = f"by RLIMIT_NPROC of user {user}" + (", whom root became" if is_root() else ", in a namespace of users")
    return Proof("processes", 0 < started < 40, f"{started} of 40 forks went through a limit of {_LIMITS.processes} {who}")


def _memory(place: Place) -> Proof:
    said, outcome = _try(place, "x = bytearray(200 << 20)\nprint('much', flush=True)\ny = bytearray(200 << 20)\nprint('more')")
    return Proof("memory", said == "much", f"200 MiB and 200 MiB at a limit of {_LIMITS.memory_mib}: {said or outcome.limit!r}")


def _disk(place: Place) -> Proof:
    source = """
total = 0
try:
    for number in range(8):
        with open(f"/tmp/{number}", "wb", buffering=0) as file:
            total += file.write(bytes(1 << 19))
except OSError:
    pass
print(total)
"""
    said, _ = _try(place, source)
    return Proof("file size", said.isdigit() and 0 < int(said) <= 1 << 20, f"{said} bytes written at a limit of {1 << 20}")


def _output(place: Place) -> Proof:
    _, outcome = _try(place, "while True: print('x' * 10000)")
    return Proof("output", outcome.limit == "too_much_output", f"endless: {outcome.limit}, {len(outcome.output):,} bytes read")


def _time(place: Place) -> Proof:
    short = CodeSettings(timeout_s=1, memory_mib=256, processes=8, files_mib=1, output_mib=1)
    _, outcome = _try(place, "import time\nwhile True: time.sleep(60)", short)
    return Proof("time", outcome.limit == "timed_out", f"endless sleep at a limit of 1 s: {outcome.limit}")


def main(say: Callable[[str], None] = print) -> int:
    """Prints what holds; 0 where code can be run."""
    settings = CodeSettings()
    why_not = missing()
    if why_not:
        say(f"no sandbox: {why_not}. Code is not run, unless the recipe says unprotected: true.")
        return 1
    place = Place(interpreter_of(settings.python), protected=True)
    found = []
    for proof in proofs(place):
        found.append(proof)
        say(f"{'holds' if proof.holds else 'BROKEN':7} {proof.name:10} {proof.found}")
        if proof.name == "start" and not proof.holds:
            break
    return 0 if all(proof.holds for proof in found) else 1


if __name__ == "__main__":
    sys.exit(main())
