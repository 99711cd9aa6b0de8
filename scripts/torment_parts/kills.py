"""Kills a command at random moments and around every renaming, goes on, and compares the end with the undisturbed run's."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distill.run.log import Progress, progress
from torment_parts.children import Kill
from torment_parts.runs import STEPS, Scene, Step, copy_until, make_scene, same

_WHOLE = (".parquet", ".targets", "manifest.json", "adapter_config.json", "report.html", "README.md")
"""Files that appear by a renaming."""
EQUAL = "equal to the last bit"
_TRIES = 60  # of one step, before it is said not to come to its end


class Tally(NamedTuple):
    """What became of a step."""

    kills: int
    fault: str


def torment(place: Path, count: int, seed: int, stages: list[str], until_s: float) -> list[tuple[str, ...]]:
    """At least so many kills, spread over all steps, in one process and in two; a row of the table for each step.

    Args:
        place: Folder for the runs.
        count: Kills.
        seed: Of the moments.
        stages: Only these; empty takes all.
        until_s: Of `time.monotonic`; then no other step is begun.
    """
    rng = random.Random(seed)
    rows: list[tuple[str, ...]] = []
    with progress(count, "kills", "kills") as bar:
        for processes in (1, 2):
            wanted = [step for step in STEPS if not stages or step.stage in stages]
            steps = [step for step in wanted if processes == 1 or step.stage in ("score", "train")]
            if not steps:
                continue
            scene = make_scene(place / f"by-{processes}", processes=processes, stages=stages)
            share = count * (0.75 if processes == 1 else 0.25) / len(steps)
            for step in steps:
                if time.monotonic() > until_s:
                    break
                kills, fault = _step(scene, step, place / "tormented", round(share + 0.5), rng, bar)
                rows.append((f"{step}, {processes} process{'es' * (processes > 1)}", f"{kills}", fault or EQUAL))
    return rows


def _step(scene: Scene, step: Step, target: Path, count: int, rng: random.Random, bar: Progress) -> Tally:
    """Kills one step so often, begun anew whenever it comes to its end before that."""
    kills = 0
    moments = _moments(scene, step, rng)
    while kills < count:
        shutil.rmtree(target, ignore_errors=True)
        copy_until(scene, step, target)
        for _ in range(_TRIES):
            kill = next(moments) if kills < count else None
            ended = scene.do(step, target, kill=kill)
            if ended.killed:
                kills += 1
                bar.update()
            elif ended.code or ended.broke:
                return Tally(kills, f"went on with exit code {ended.code}: {ended.said.strip()[-300:]}")
            else:
                break
        else:
            return Tally(kills, "did not come to its end")
        if wrong := same(scene, target, step):
            return Tally(kills, wrong)
    shutil.rmtree(target, ignore_errors=True)
    return Tally(kills, "")


def _moments(scene: Scene, step: Step, rng: random.Random) -> Iterator[Kill]:
    """Before and after each renaming that the step does, and between them at random moments."""
    names = _renamed(scene, step)
    while True:
        for name in names:
            for done in (False, True):
                yield Kill(event="os.rename", path=name, done=done)
                yield Kill(after_s=rng.uniform(0.05, 1.0) * scene.seconds[str(step)])


_NAMES: dict[str, list[str]] = defaultdict(list)


def _renamed(scene: Scene, step: Step) -> list[str]:
    """Patterns of what a step renames into its place: its tables, plan and manifest, and the run's recipe and cache."""
    if not _NAMES[str(step)]:
        folder = scene.run / step.folder
        there = [f"{step.folder}/{file.relative_to(folder)}" for file in sorted(folder.rglob("*")) if file.name.endswith(_WHOLE)]
        there = [re.escape(name) + "$" for name in there]
        _NAMES[str(step)] = [r"recipe\.yaml$", r"plan\.json$", *there, r"cache/rows-.*\.arrow$", r"cache/rows-.*\.parquet$"]
    return _NAMES[str(step)]
