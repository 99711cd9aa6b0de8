"""Fifty and more attacks on the sandbox: none gets through, and each would without it, or with other limits."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attacks
import psutil
import pytest
from attacks import Attack

from distill.checks import runs
from distill.checks.bubblewrap import interpreter_of, is_root
from distill.checks.runs import Place, run_program
from distill.checks.sandbox import place_for
from distill.recipe.code import CodeSettings

ROOT = Path(__file__).resolve().parent.parent
TIGHT = CodeSettings(timeout_s=30, memory_mib=256, processes=16, files_mib=1, output_mib=1)
NAME = f"distill{os.getpid()}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def protected() -> Place:
    place = place_for(CodeSettings())
    if isinstance(place, str):
        pytest.skip(f"no sandbox here: {place}")
    return place


@pytest.fixture
def words() -> Iterator[dict[str, str]]:
    """What the programs look for: files that everybody may read, and servers."""
    with (
        tempfile.TemporaryDirectory() as folder,  # pytest's own lie where nobody else may pass
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
    ):
        Path(folder).chmod(0o777)
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        abstract.bind(f"\0{NAME}")
        abstract.listen()
        named.bind(f"{folder}/s")
        named.listen()
        port = str(server.getsockname()[1])
        yield {"SECRET": str(secret), "FOLDER": folder, "ROOT": str(ROOT), "PORT": port, "NAME": NAME, "PID": str(os.getpid())}


def source_of(attack: Attack, words: dict[str, str]) -> str:
    source = attack.source
    for word, meant in words.items():
        source = source.replace(word, meant)
    return source


def came_through(source: str, settings: CodeSettings, place: Place) -> tuple[bool, runs.Outcome]:
    outcome = run_program(source, "", settings, place)
    return outcome.output.split()[-1:] == [b"through"], outcome


@pytest.mark.parametrize(
    "attack", [*attacks.FILES, *attacks.NETWORK, *attacks.PROCESSES, *attacks.RESOURCES], ids=lambda attack: attack.name
)
def test_nothing_gets_through(attack: Attack, words: dict[str, str], protected: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(attack, words)
    through, outcome = came_through(source, TIGHT, protected)
    assert not through
    assert outcome.limit == attack.limit
    if attack.limit is None:  # it was refused, and not kept from trying by an error in it
        assert outcome.output.startswith(b"held") and outcome.exit_code == 0, outcome

    if attack.control == "loose":
        loose = dict(attack.loose or {})
        monkeypatch.setattr(runs, "_INODES", loose.pop("inodes", 10_000))
        settings = TIGHT.model_copy(update={"files_mib": 64} | loose)
        through, outcome = came_through(source, settings, protected)
        assert through, outcome
    elif attack.control == "unprotected" or (attack.control == "root" and is_root()):
        through, outcome = came_through(source, TIGHT, Place(interpreter_of(None), protected=False))
        assert through, outcome


def left_over() -> list[psutil.Process]:
    """Processes that call themselves as the attacks do, after they had time to be gone."""
    found = [process for process in psutil.process_iter() if named(process) == NAME]
    return psutil.wait_procs(found, timeout=20)[1]


def named(process: psutil.Process) -> str | None:
    try:
        return process.name()
    except psutil.Error:
        return None


@pytest.mark.parametrize("attack", attacks.TIME, ids=lambda attack: attack.name)
def test_nothing_outlives_its_time(attack: Attack, protected: Place) -> None:
    source = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{NAME}', 0, 0, 0)\n{attack.source}"
    outcome = run_program(source, "", TIGHT.model_copy(update={"timeout_s": 2.0}), protected)
    assert outcome.limit == attack.limit and outcome.exit_code is None
    assert left_over() == []


def test_what_the_sandbox_ends_would_go_on_without_it() -> None:
    source = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{NAME}', 0, 0, 0)\n{attacks.CHILDREN}"
    run_program(source, "", TIGHT.model_copy(update={"timeout_s": 2.0}), Place(interpreter_of(None), protected=False))
    children = [process for process in psutil.process_iter() if named(process) == NAME]
    assert len(children) == 3
    for child in children:
        child.kill()
    assert left_over() == []


def test_one_run_leaves_nothing_to_the_next(protected: Place) -> None:
    source = "import os\nprint(os.path.exists('/tmp/left'))\nopen('/tmp/left', 'w').write('x')"
    for _ in range(2):
        assert run_program(source, "", TIGHT, protected).output == b"False\n"


def test_a_file_of_the_parent_does_not_come_along(protected: Place, tmp_path: Path) -> None:
    """Files that are open here, even those that other commands inherit, are not open there."""
    source = """
import os
for fd in range(3, 100):
    try:
        print(fd, os.fstat(fd))
    except OSError:
        pass
"""
    with (tmp_path / "x").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        assert run_program(source, "", TIGHT, protected).output == b""
