"""Damages one file of a finished or a half-finished run, and asks whether anybody notices.

Of a finished run `distill verify` must name the file, and `distill run` may only refuse, mend, or have nothing to do. A half-finished
step must end with the undisturbed run's result, or name the damage; and where its error advises something, that must lead to
that result.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from distill.run.log import progress
from torment_parts.children import Kill, command
from torment_parts.runs import STEPS, Scene, Step, copy_until, make_scene, same

HALVES: dict[str, list[Kill]] = {
    "prompts": [Kill(event="os.rename", path=r"manifest\.json$")],
    "generate": [Kill(event="os.rename", path=r"traces-00000\.parquet$"), Kill(event="os.rename", path=r"manifest\.json$")],
    "curate": [Kill(event="os.rename", path=r"curated-00000\.parquet$")],
    "score": [Kill(event="os.rename", path=r"\.targets$"), Kill(event="os.rename", path=r"targets/manifest\.json$")],
    "train": [Kill(event="os.mkdir", path=r"checkpoint-6|checkpoint-4$"), Kill(event="os.rename", path=r"student/manifest\.json$")],
    "rollouts": [Kill(event="os.rename", path=r"traces-00000\.parquet$")],
    "evaluate": [Kill(event="os.rename", path=r"answers-00000\.parquet$")],
    "report": [Kill(event="os.rename", path=r"summary\.txt$")],
    "export": [Kill(event="os.rename", path=r"README\.md$")],
}
"""Where each stage is stopped to be damaged half-way."""

_NOTES = "notes.txt"  # what is laid beside a file
_ADVICES = 4  # followed one after the other
Rng = random.Random


def _flip(file: Path, other: Path, rng: Rng) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _cut(file: Path, other: Path, rng: Rng) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(1, len(data)) if len(data) > 1 else 0])


def _empty(file: Path, other: Path, rng: Rng) -> None:
    file.write_bytes(b"")


def _delete(file: Path, other: Path, rng: Rng) -> None:
    file.unlink()


def _swap(file: Path, other: Path, rng: Rng) -> None:
    shutil.copyfile(other, file)


def _extra(file: Path, other: Path, rng: Rng) -> None:
    file.with_name(_NOTES).write_text("mine\n")


def _line(file: Path, other: Path, rng: Rng) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines.pop(rng.randrange(len(lines)))
    file.write_bytes(b"".join(lines))


KINDS: dict[str, Callable[[Path, Path, Rng], None]] = {
    "bit flipped": _flip,
    "truncated": _cut,
    "emptied": _empty,
    "deleted": _delete,
    "of another run": _swap,
    "extra file beside": _extra,
    "line deleted": _line,
}


class Case(NamedTuple):
    """One file, damaged in one way."""

    state: str
    """The step that is under way; empty for a finished run."""
    place: int
    """Of the kill among those of its stage."""
    file: str
    """In the run."""
    kind: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.file}, {self.kind}, {self.state + ' under way' if self.state else 'finished run'}"


class Finding(NamedTuple):
    """What came of a case."""

    verdict: str
    """`noticed`, `redone`, `harmless`, `SILENT` or `TRACEBACK`."""
    detail: str = ""


class Damage:
    """The undisturbed run, one from elsewhere, and their copies half-way.

    Args:
        place: For the runs.
        verifies: Whether there is `distill verify`.
        stages: To be damaged half-way; empty takes all.
    """

    def __init__(self, place: Path, *, verifies: bool, stages: list[str]) -> None:
        self.place, self._verifies = place, verifies
        self.scene, self.stranger = make_scene(place / "own", stages=stages), make_scene(place / "stranger", seed=1, stages=stages)
        self.steps = [step for step in STEPS if step.number < 2 and (not stages or step.stage in stages)]
        for step in self.steps:
            for number, kill in enumerate(HALVES[step.stage]):
                for scene in (self.scene, self.stranger):
                    target = self._half(scene, step, number)
                    if (target / ".made").exists():
                        continue
                    shutil.rmtree(target, ignore_errors=True)
                    copy_until(scene, step, target)
                    ended = scene.do(step, target, kill=kill)
                    if not ended.killed:
                        raise RuntimeError(f"{step} was not stopped at {kill.path}: {ended.said[-500:]}")
                    (target / ".made").touch()

    def _half(self, scene: Scene, step: Step, number: int) -> Path:
        return scene.run.parent / f"half-{step.folder.replace('/', '-')}-{number}"

    def cases(self, rng: Rng) -> list[Case]:
        """All of them, the finished run first."""
        finished = [Case("", 0, file, kind) for file, kind in self._damages(self.scene.run, self.stranger.run, "")]
        for step in self.steps:
            for number in range(len(HALVES[step.stage])):
                halves = [self._half(scene, step, number) for scene in (self.scene, self.stranger)]
                found = [
                    *self._damages(halves[0], halves[1], step.folder),
                    *((file, kind) for file, kind in self._damages(halves[0], halves[1], "cache") if step.stage == "train"),
                ]
                finished += [Case(str(step), number, file, kind) for file, kind in found]
        rng.shuffle(finished)
        return finished

    def _damages(self, run: Path, stranger: Path, folder: str) -> Iterator[tuple[str, str]]:
        for file in sorted((run / folder).rglob("*")):
            name = str(file.relative_to(run))
            if not file.is_file() or file.name.startswith(".lock") or not file.stat().st_size:
                continue
            for kind in KINDS:
                if kind == "line deleted" and file.suffix != ".jsonl":
                    continue
                if kind == "of another run" and not self._is_another(file, stranger / name):
                    continue
                yield name, kind

    def _is_another(self, file: Path, other: Path) -> bool:
        return other.is_file() and other.read_bytes() != file.read_bytes()

    def judge(self, case: Case, rng: Rng) -> Finding:
        """Damages a copy, and looks what the kit says and does."""
        step = next((each for each in STEPS if str(each) == case.state), None)
        origins = [self._half(scene, step, case.place) if step else scene.run for scene in (self.scene, self.stranger)]
        target = self.place / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(origins[0], target, ignore=shutil.ignore_patterns(".made"))
        before = (target / case.file).read_bytes()
        KINDS[case.kind](target / case.file, origins[1] / case.file, rng)
        return self._half_finished(step, target) if step else self._finished(target, case, before)

    def _half_finished(self, step: Step, target: Path) -> Finding:
        ended = self.scene.do(step, target)
        if ended.broke:
            return Finding("TRACEBACK", ended.broke)
        if not ended.code:
            wrong = same(self.scene, target, step)
            return Finding("SILENT", wrong) if wrong else Finding("redone")
        return self._follow(step, target, ended.error) if str(target) in ended.error else Finding("UNNAMED", ended.error[:200])

    def _follow(self, step: Step, target: Path, said: str) -> Finding:
        """Does what the error advises, the gentlest first, until it says nothing more; that must end well."""
        for _ in range(_ADVICES):
            redo: list[str] = []
            if line := re.search(r"(\S+\.jsonl):(\d+):.*[Dd]elete the line", said):
                lines = Path(line[1]).read_bytes().splitlines(keepends=True)
                Path(line[1]).write_bytes(b"".join(lines[: int(line[2]) - 1] + lines[int(line[2]) :]))
            elif file := re.search(r"error: (/\S+?):\s.*\b[Dd]elete (?:it|the file)\b", said):
                Path(file[1]).unlink(missing_ok=True)
            elif folder := re.search(r"error: (/\S+?):\s.*\bMove the folder away", said):
                shutil.rmtree(folder[1])
            elif "--redo" in said:
                redo = ["--redo"]
            else:
                return Finding("UNADVISED", said[:200])
            ended = self.scene.do(step, target, *redo)
            if ended.broke:
                return Finding("TRACEBACK", f"after its advice: {ended.broke}")
            if not ended.code:
                wrong = same(self.scene, target, step)
                return Finding("BAD ADVICE", f"{wrong}: {said[:200]}") if wrong else Finding("noticed")
            said = ended.error
        return Finding("BAD ADVICE", said[:200])

    def _finished(self, target: Path, case: Case, before: bytes) -> Finding:
        named = False
        if self._verifies:
            verified = command("verify", target)
            if verified.broke:
                return Finding("TRACEBACK", f"verify: {verified.broke}")
            file = target / case.file
            file = file.with_name(_NOTES) if case.kind == "extra file beside" else file
            stage = next((step.folder for step in STEPS if case.file.startswith(f"{step.folder}/")), case.file)
            named = bool(verified.code) and (str(target / stage) in verified.said or str(file) in verified.said)
        ended = command("run", self.scene.recipe, "--run_dir", target, "--until", self.scene.steps[-1].stage)
        if ended.broke:
            return Finding("TRACEBACK", ended.broke)
        if ended.code and str(target) not in ended.error:
            return Finding("UNNAMED", ended.error[:200])
        if named or ended.code:
            return Finding("noticed")
        wrong = [f"{step}: {found}" for step in self.scene.steps if (found := same(self.scene, target, step))]
        if case.file.startswith("cache/") and not wrong:
            return Finding("harmless")  # whoever trains on it next looks at it
        there = (target / case.file).read_bytes() if (target / case.file).exists() else b""
        if not wrong and _without_place(there) == _without_place(before) and case.kind != "extra file beside":
            return Finding("redone")
        return Finding("SILENT", "; ".join(wrong)[:200])


def _without_place(content: bytes) -> bytes:
    """Of a run's recipe what must come back: not where the run is, which is another place for every copy, nor the digest over that."""
    return re.sub(rb"(?m)^(run_dir:|# SHA-256 of the lines above:).*$", b"", content)


class Rows(NamedTuple):
    """What is printed."""

    table: list[tuple[str, ...]]
    faults: list[tuple[str, ...]]


def torment(place: Path, count: int, seed: int, stages: list[str], until_s: float) -> Rows:
    """So many cases, of every kind of file and damage first; a table by kind of damage, and the faults one by one.

    Args:
        place: Folder for the runs.
        count: Cases.
        seed: Of cases and damage.
        stages: Only these half-way; empty takes all.
        until_s: Of `time.monotonic`; then no other case is begun.
    """
    rng = random.Random(seed)
    damage = Damage(place, verifies="verify" in command("--help").said, stages=stages)
    chosen = _spread(damage.cases(rng), count)
    found: list[tuple[Case, Finding]] = []
    with progress(len(chosen), "cases", "damage") as bar:
        for case in chosen:
            if time.monotonic() > until_s:
                break
            found.append((case, damage.judge(case, rng)))
            if found[-1][1].verdict.isupper():
                print("FAULT", found[-1][1].verdict, case.name, found[-1][1].detail, sep="  ", file=sys.stderr, flush=True)
            bar.update()
    return Rows(_table(found), [(finding.verdict, case.name, finding.detail) for case, finding in found if finding.verdict.isupper()])


def _table(found: list[tuple[Case, Finding]]) -> list[tuple[str, ...]]:
    verdicts = ["noticed", "redone", "harmless", *sorted({finding.verdict for _, finding in found if finding.verdict.isupper()})]
    rows: list[tuple[str, ...]] = [("damage", "state", *verdicts)]
    for kind in KINDS:
        for state in ("finished", "half-finished"):
            here = [finding.verdict for case, finding in found if case.kind == kind and bool(case.state) == (state != "finished")]
            if here:
                rows.append((kind, state, *(str(here.count(verdict)) for verdict in verdicts)))
    totals = [sum(finding.verdict == verdict for _, finding in found) for verdict in verdicts]
    return [*rows, ("all", str(len(found)), *map(str, totals))]


def _spread(cases: list[Case], count: int) -> list[Case]:
    """So many cases that every kind of file meets every kind of damage, as far as the count goes, before one is met twice."""
    seen: dict[tuple[str, ...], int] = {}
    turns: list[tuple[int, int, Case]] = []
    for case in cases:
        sort = (case.state and case.state.split()[-1], re.sub(r"\d+", "#", case.file.rpartition("/")[2]), case.kind)
        turns.append((seen.get(sort, 0), len(turns), case))
        seen[sort] = seen.get(sort, 0) + 1
    return [case for *_, case in sorted(turns)[:count]]
