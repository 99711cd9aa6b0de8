"""The run that is tormented: all stages on the embedded pair, with two on-policy rounds, in seconds; and what counts as its result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import DistillError
from distill.run.files import digest_file
from distill.run.log import progress
from distill.run.manifest import Manifest, read_manifest
from torment_parts.children import Kill, Outcome, command

_RECIPE = """
name: torment
seed: {seed}
teacher: {{model: embedded:teacher, dtype: float32}}
student: {{model: embedded:student, dtype: float32, adapter: {{type: lora, r: 4}}}}
prompts: {{source: {problems}, heldout_size: 6}}
generate: {{samples_per_prompt: 3, max_new_tokens: 64, temperature: 1.0, top_p: 1.0, batch_size: 24}}
curate: {{checks: [think, math], max_per_prompt: 2, keep_unjudged: true, workers: 1}}
score: {{target: {{kind: top_k, k: 8}}, batch_size: 8, verify_rows: 2}}
train:
  method: kd
  max_length: 256
  trainer_args: {{max_steps: 6, save_steps: 2, logging_steps: 1, learning_rate: 1e-3, per_device_train_batch_size: 4}}
rounds: 2
rollouts: {{prompts_per_round: 8, max_new_tokens: 24, batch_size: 4, trainer_args: {{max_steps: 4}}}}
evaluate: {{models: [base, student], max_new_tokens: 24, batch_size: 4}}
export: {{parity_prompts: 2}}
"""


class Step(NamedTuple):
    """A stage of the run."""

    stage: str
    number: int
    folder: str
    """In the run."""

    def __str__(self) -> str:
        return f"round {self.number} {self.stage}" if self.number else self.stage

    @property
    def words(self) -> list[str]:
        """Of its command, without the recipe."""
        return ["--round", str(self.number)] if self.number else []


STEPS = [
    *(Step(stage, 0, folder) for stage, folder in {"prompts": "prompts", "generate": "traces", "curate": "curated"}.items()),
    *(Step(stage, 0, folder) for stage, folder in {"score": "targets", "train": "student"}.items()),
    *(
        Step(stage, number, f"rounds/{number:02d}/{folder}")
        for number in (1, 2)
        for stage, folder in {"rollouts": "rollouts", "score": "targets", "train": "student"}.items()
    ),
    *(Step(stage, 0, folder) for stage, folder in {"evaluate": "eval", "report": "report", "export": "export"}.items()),
]
"""All, in order."""


class Scene(NamedTuple):
    """A recipe, and the run that it makes undisturbed."""

    recipe: Path
    run: Path
    seconds: dict[str, float]
    """Of each step."""
    processes: int
    """That score and train."""
    steps: list[Step]
    """Of the run."""

    def do(self, step: Step, run: Path, *words: str, kill: Kill | None = None) -> Outcome:
        """The command of a step, in a run's folder."""
        processes = self.processes if step.stage in ("score", "train") else 1
        return command(step.stage, self.recipe, "--run_dir", run, *step.words, *words, kill=kill, processes=processes)


def write_recipe(place: Path, seed: int) -> Path:
    """The recipe and its problems."""
    from distill.embedded import resolve

    place.mkdir(parents=True, exist_ok=True)
    problems = Path(resolve("embedded:arithmetic")).read_text(encoding="utf-8").splitlines()[seed * 30 : (seed + 1) * 30]
    (place / "problems.jsonl").write_text("\n".join(problems) + "\n", encoding="utf-8")
    (place / "recipe.yaml").write_text(_RECIPE.format(seed=seed, problems=place / "problems.jsonl").lstrip(), encoding="utf-8")
    return place / "recipe.yaml"


def steps_until(stages: list[str]) -> list[Step]:
    """All steps to the last of some stages; of none all."""
    last = max((place for place, step in enumerate(STEPS) if step.stage in stages), default=len(STEPS) - 1)
    return STEPS[: last + 1]


def make_scene(place: Path, seed: int = 0, processes: int = 1, stages: list[str] | None = None) -> Scene:
    """Makes the undisturbed run as far as to the last of some stages, or finds it made."""
    steps = steps_until(stages or [])
    times = place / "seconds.json"
    if times.exists():
        return Scene(place / "recipe.yaml", place / "run", json.loads(times.read_text(encoding="utf-8")), processes, steps)
    scene = Scene(write_recipe(place, seed), place / "run", {}, processes, steps)
    with progress(len(steps), "steps", f"undisturbed run, seed {seed}, by {processes}") as bar:
        for step in steps:
            found = scene.do(step, scene.run)
            if found.code:
                raise RuntimeError(f"the undisturbed run failed in {step}:\n{found.said}")
            scene.seconds[str(step)] = found.seconds
            bar.update()
    times.write_text(json.dumps(scene.seconds), encoding="utf-8")
    return scene


def copy_until(scene: Scene, step: Step, target: Path) -> None:
    """A copy of the undisturbed run as it was before a step."""
    target.mkdir(parents=True)
    for earlier in STEPS[: STEPS.index(step)]:
        (target / earlier.folder).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(scene.run / earlier.folder, target / earlier.folder)


def content(folder: Path) -> Any:
    """All of a finished stage that must not depend on what happened on the way: digests of rows, targets and weights as they are now.

    Read without Arrow, whose threads would be copied into the next command.
    """
    manifest: Manifest = read_manifest(folder)
    pages = (".md", ".html", ".txt")  # with seconds in them
    names = [shard.file for shards in manifest.tables.values() for shard in shards]
    names += [name for name in manifest.files if not name.endswith(pages)]
    return {name: digest_file(folder / name) for name in names}, manifest.rows_in, manifest.rows_kept, manifest.drops


def same(scene: Scene, run: Path, step: Step) -> str:
    """Nothing if a step's folder holds what the undisturbed run has there, else what is wrong with it."""
    try:
        (found, *numbers), (expected, *others) = content(run / step.folder), content(scene.run / step.folder)
        other = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return f"another result: {', '.join(other) or f'{numbers}, not {others}'}" if other or numbers != others else ""
    except (DistillError, OSError) as error:
        return f"{type(error).__name__}: {error}"
