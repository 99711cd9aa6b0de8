"""Damaged inputs, and what the command makes of each: one clear error, a right acceptance, or a fault of the kit.

`python tests/damage.py [--seed 0] [--show] [recipes] [data]` prints the counts; with PYTHONPATH set to another checkout,
those of that code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

GIVEN_UP_S = int(os.environ.get("GIVEN_UP_S", "60"))  # when a case counts as a hang, however busy the machine is
SLOW_S = 2.0  # of its own time, that a command may need for an error; looked at in the table alone
LONGEST = 2500  # characters of a message
OUTCOMES = ("one clear error", "rightly accepted", "wrong", "traceback", "hang")


class Case(NamedTuple):
    """An input, and what is right to say of it."""

    kind: str
    files: dict[str, bytes]
    """By name, in the folder of the case."""
    words: list[str]
    """Of the command line."""
    valid: bool | None = False
    """Whether it is right to accept it; null where random damage may have spoilt nothing."""
    says: tuple[str, ...] = ()
    """What the error must name."""
    hides: tuple[str, ...] = ()
    """What it must not say."""
    gives: tuple[tuple[str, Any], ...] = ()
    """Keys of an accepted recipe, and their values."""
    prepare: Callable[[Path], object] = lambda folder: None
    """Makes in the folder what is no file of bytes."""


class Ending(NamedTuple):
    """How a command ended."""

    code: int | None
    message: str
    fault: str
    """`traceback` or `hang`, with what is known of it."""
    spent_s: float


class Hang(BaseException):
    """A command was given up."""


def give_up(number: int, frame: FrameType | None) -> None:
    raise Hang


def run(case: Case, folder: Path) -> Ending:
    """Runs the command on a case, in this process, inside the folder."""
    for name, content in case.files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    case.prepare(folder)
    from distill.cli import main

    out, err = io.StringIO(), io.StringIO()
    code, fault, before, argv = None, "", Path.cwd(), sys.argv
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(GIVEN_UP_S)
    start = time.process_time()
    try:
        os.chdir(folder)
        sys.argv = ["distill", *case.words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code if isinstance(ended.code, int) else 1
    except Hang:
        fault = "hang"
    except BaseException as error:  # what it is, is what is counted
        fault = f"traceback: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        spent = time.process_time() - start
        os.chdir(before)
        sys.argv = argv
    failed = "\n".join(line.strip() for line in out.getvalue().splitlines() if line.startswith("  FAIL"))
    message = "\n".join(line for line in err.getvalue().split("\n") if not re.match(r"\d\d:\d\d:\d\d ", line)).strip() or failed
    if not fault and ("Traceback" in message or "not foreseen" in message):
        fault = f"traceback: {message[:200]}"
    return Ending(code, message, fault, spent)


def judge(case: Case, ending: Ending, folder: Path) -> tuple[str, str]:
    """One of `OUTCOMES`, and why."""
    if ending.fault:
        return ending.fault.partition(":")[0], ending.fault
    if ending.code == 0:
        return _judge_acceptance(case, ending, folder)
    if case.valid:
        return "wrong", f"refused: {ending.message}"
    lacks = [word for word in case.says if word not in ending.message]
    said = [word for word in case.hides if word in ending.message]
    controls = {sign for sign in ending.message if unicodedata.category(sign) in ("Cc", "Cf", "Cs") and sign not in "\n\t"}
    rejected = re.search(r"(\S+): unknown key.*Did you mean (\S+)\?", ending.message[:LONGEST])
    faults = [
        f"exit code {ending.code}" * (ending.code != 1),
        "no message" * (not ending.message),
        f"{len(ending.message):,} characters" * (len(ending.message) > LONGEST),
        f"does not name {lacks}" * bool(lacks),
        f"says {said}" * bool(said),
        f"raw controls {controls}" * bool(controls),
        "suggests what it rejects" * bool(rejected and rejected[1] == rejected[2]),
    ]
    found = "; ".join(filter(None, faults))
    return ("wrong", f"{found}: {ending.message[:400]}") if found else ("one clear error", ending.message)


def _judge_acceptance(case: Case, ending: Ending, folder: Path) -> tuple[str, str]:
    if case.valid is False:
        return "wrong", "accepted"
    from distill.recipe.reading import load_recipe, recipe_text

    before = Path.cwd()
    os.chdir(folder)
    try:
        given = [word for word in case.words[case.words.index("recipe.yaml") + 1 :] if word not in ("--until", "generate")]
        recipe = load_recipe("recipe.yaml", given)
        Path("again.yaml").write_text(recipe_text(recipe), encoding="utf-8")
        if load_recipe("again.yaml") != recipe:
            return "wrong", "the resolved recipe is another"
        for key, value in case.gives:
            found: Any = recipe.model_dump()
            for name in key.split("."):
                found = found[name]
            if found != value:
                return "wrong", f"{key} is {found!r}, not {value!r}"
    except Exception as error:  # of code that reads back less than it writes
        return "wrong", f"{type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    return "rightly accepted", ""


def outcomes(cases: list[Case], root: Path) -> Iterator[tuple[Case, Ending, str, str]]:
    """Every case with how it ended, what that is, and why; each in a folder of its own."""
    before, tempfile.tempdir = tempfile.tempdir, str(root)
    try:
        for number, case in enumerate(cases):
            folder = root / str(number)
            folder.mkdir()
            ending = run(case, folder)
            yield case, ending, *judge(case, ending, folder)
    finally:
        tempfile.tempdir = before


def table(name: str, cases: list[Case], show: bool) -> None:
    """Prints the counts of some cases, and with `show` every fault."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        for case, ending, outcome, why in outcomes(cases, Path(root)):
            slow = ending.spent_s > SLOW_S and outcome not in ("traceback", "hang")
            counts["hang" if slow else outcome] += 1
            if show and (slow or outcome in OUTCOMES[2:]):
                print(f"  {outcome}{' (slow)' * slow}  {case.kind}  {case.words[1:][:4]!r:.120}: {why[:300]!r}")
    kinds = len({case.kind for case in cases})
    print(f"| {name} ({kinds} kinds) | {len(cases)} | " + " | ".join(str(counts[outcome]) for outcome in OUTCOMES) + " |", flush=True)


def main() -> None:
    """Prints the table."""
    from damaged_data import data_cases
    from damaged_recipes import recipe_cases

    import distill

    makers = {"recipes": (recipe_cases, 450), "data": (data_cases, 150)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=list(makers), choices=list(makers))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every case that is a fault of the kit")
    given = parser.parse_args()
    print(f"code: {Path(distill.__file__).parent.parent}, seed {given.seed}\n")
    print(f"| | cases | {' | '.join(OUTCOMES)} |\n|{' --- |' * 7}")
    for name in given.what:
        make, count = makers[name]
        table(name, make(random.Random(given.seed), count), given.show)


if __name__ == "__main__":
    main()
