"""Trainings of one run with other values of some keys: which there are, what they share, what is refused; and runs beside each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fabricated import change_manifest, make_run, recipe_for

from distill.cluster.chain import Wanted
from distill.cluster.compare import compare_folders
from distill.cluster.handed import Submission, dependency
from distill.cluster.site import Site
from distill.cluster.submit import prepare_sweep
from distill.cluster.sweep import Variant, links_of, variants_of
from distill.errors import EARLY, MissingStageError, RecipeError, StageConflictError
from distill.pipeline import verify_run
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe, recipe_text
from distill.run.folder import delete_stage
from distill.stages import Step, folder, stop_before

ROOT = Path(__file__).resolve().parent.parent
RATES = "train.trainer_args.learning_rate=1e-3,2e-3"
KD = {"score": {"target": {"kind": "top_k", "k": 4}}, "train.method": "kd"}


class Loader:
    """Reads the quickstart, into a folder, with overrides."""

    def __init__(self, run: Path, **overrides: object) -> None:
        self._overrides = {"run_dir": str(run), **overrides}

    def __call__(self, more: Sequence[str]) -> Recipe:
        words = [word for key, value in self._overrides.items() for word in (f"--{key}", str(value))]
        return load_recipe("quickstart", [*words, *more])


def variants(run: Path, *asked: str, **overrides: object) -> list[Variant]:
    load = Loader(run, **overrides)
    return variants_of(asked, load(()), load)


def prepared(run: Path, *asked: str, wanted: Wanted | None = None) -> Submission:
    load = Loader(run)
    return prepare_sweep(load(()), variants_of(asked, load(()), load), wanted or Wanted(), Site())


def test_every_combination_is_a_training_in_a_run_of_its_own(tmp_path: Path) -> None:
    found = variants(tmp_path, RATES, "student.adapter.r=8,16")
    assert [each.name for each in found] == [f"learning_rate={rate}_r={rank}" for rate in ("1e-3", "2e-3") for rank in (8, 16)]
    last = found[-1].recipe
    assert last.run_dir == str(tmp_path / "sweep" / "learning_rate=2e-3_r=16")
    assert last.train.trainer_args["learning_rate"] == 0.002 and last.student.adapter.model_dump()["r"] == 16
    assert len(variants(tmp_path, "train.trainer_args.optim_args='a=1,b=2','a=3'")) == 2
    (listed,) = variants(tmp_path, "student.adapter={type: lora, r: 8}")
    assert "/" not in listed.name and " " not in listed.name and listed.recipe.student.adapter.model_dump()["r"] == 8


@pytest.mark.parametrize(
    ("asked", "overrides", "expected"),
    [
        (["generate.temperature=0.5,1.0"], {}, "temperature=0.5 needs another generate than the recipe has"),
        (["train.max_length=128,256"], KD, "max_length=128 needs another score than the recipe has"),
        (["train.trainer_args.learning_rate"], {}, "expected KEY=VALUE,VALUE, got 'train.trainer_args.learning_rate'"),
        (["seed=1,1"], {}, "seed=1 needs another prompts"),
        (["train.trainer_args.learning_rate=1e-3,1e-3"], {}, "two trainings would be alike"),
        (["train.trainer_args.learning_rate=1e-3,0.001"], {}, "two trainings would be alike"),
        ([RATES, "train.trainer_args.learning_rate=3e-3"], {}, "a key is there twice"),
        (["train.learning_rat=1"], {}, "learning_rat"),
    ],
)
def test_what_is_no_sweep_is_refused(asked: list[str], overrides: dict[str, object], expected: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=expected):
        variants(tmp_path, *asked, **overrides)


def test_rounds_are_no_sweep(tmp_path: Path) -> None:
    recipe = load_recipe("qwen3-8b-to-0.6b-rounds", {"run_dir": str(tmp_path)})
    with pytest.raises(RecipeError, match="on-policy rounds write and score traces of their own"):
        variants_of([RATES], recipe, lambda _: recipe)


def test_trainings_are_an_array_behind_what_they_share(tmp_path: Path) -> None:
    asked = prepared(tmp_path, RATES, wanted=Wanted(nodes=2, gpus=8, shards=2, follow_ups=1))
    jobs = {job.name: job for job in asked.jobs}
    assert list(jobs) == ["prompts", "generate", "curate", "sweep-train", "sweep-evaluate", "sweep-compare"]
    train, evaluate, compare = list(jobs.values())[3:]
    assert (train.after, train.tasks, train.nodes, train.gpus) == (("curate",), (1, 2), 2, 8)
    assert (evaluate.tasks, evaluate.gpus, compare.behind) == ((1, 2), 1, ("sweep-evaluate",))
    assert dependency(evaluate, {"sweep-train": ["7", "8"]}) == "aftercorr:8"
    assert dependency(compare, {"sweep-evaluate": ["9"]}) == "afterany:9"
    listing = next(path for path in asked.files if path.suffix == ".txt")
    assert train.words[-1] == evaluate.words[-1] == f"@{listing}"
    lines = [Path(line) for line in asked.files[listing].splitlines()]
    assert [path.parents[1].name for path in lines] == ["learning_rate=1e-3", "learning_rate=2e-3"] and set(lines) <= set(asked.files)
    assert asked.links[tmp_path / "sweep" / "learning_rate=1e-3" / "curated"] == "../../curated"
    assert not (tmp_path / "sweep").exists()


def test_links_are_made_once_and_never_in_the_place_of_anything(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "run")
    place = tmp_path / "run" / "sweep" / "x"
    variant = Variant("x", recipe_for(place))
    place.mkdir(parents=True)
    for path, target in links_of(variant, recipe):
        path.symlink_to(target)
    assert (place / "traces").resolve() == tmp_path / "run" / "traces" and list(links_of(variant, recipe)) == []
    (place / "traces").unlink()
    (place / "traces").mkdir()
    with pytest.raises(StageConflictError, match="is in the place of a link"):
        list(links_of(variant, recipe))


def make_sweep(run: Path) -> Path:
    """A finished run with two trainings on its traces, the second of which was not measured yet."""
    make_run(run)
    (run / "recipe.yaml").write_text(recipe_text(recipe_for(run)))
    for number, rate in enumerate((1e-3, 2e-3)):
        place = run / "sweep" / f"learning_rate={rate:g}"
        make_run(place, evaluated=not number)
        change_manifest(place / "student", lambda made, number=number: made["facts"].update(train_loss=0.5 + number))  # type: ignore[misc]
        recipe = recipe_for(place, train={"trainer_args": {"learning_rate": rate}})
        (place / "recipe.yaml").write_text(recipe_text(recipe))
    return run / "sweep"


def test_runs_stand_beside_each_other_with_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path / "run")
    compare_folders([sweep])
    said = capsys.readouterr().out
    lines = said.splitlines()
    best = next(line for line in lines if "learning_rate=0.001" in line)
    assert "71.0 %" in best and "[66.0 %, 76.0 %]" in best and "0.5000" in best and "0.71" in best
    assert "not there yet" in next(line for line in lines if "learning_rate=0.002" in line)
    assert "train.trainer_args.learning_rate" in said and "generate.temperature" not in said and "run_dir" not in said
    page = (sweep / "comparison.md").read_text()
    assert "| learning_rate=0.001 | 0.001 |" in page and "](comparison.svg)" in page
    assert "learning_rate=0.001" in (sweep / "comparison.svg").read_text()
    compare_folders([tmp_path / "run", sweep / "learning_rate=0.001"])
    assert "| run |" not in capsys.readouterr().out and not (tmp_path / "run" / "comparison.md").exists()
    with pytest.raises(MissingStageError, match="holds no run"):
        compare_folders([tmp_path / "run" / "student"])


def test_a_shared_stage_is_verified_through_its_link_and_never_deleted_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, place = tmp_path / "run", tmp_path / "run" / "sweep" / "x"
    make_run(run)
    (run / "recipe.yaml").write_text(recipe_text(recipe_for(run)))
    place.mkdir(parents=True)
    for name in ("prompts", "traces", "curated"):
        (place / name).symlink_to(f"../../{name}")
    (run / "student").rename(place / "student")
    verify_run(place)
    said = capsys.readouterr().out
    assert "curated" not in said and "prompts" not in said, said
    with pytest.raises(StageConflictError, match=r"is a link to .*of another run"):
        delete_stage(place / "curated")
    assert (run / "curated" / "manifest.json").exists()


def test_rounds_that_were_ended_have_nothing_more_to_do(tmp_path: Path) -> None:
    recipe = load_recipe("qwen3-8b-to-0.6b-rounds", {"run_dir": str(tmp_path)})
    make_run(tmp_path / "other")
    for stage, number in (("rollouts", 1), ("train", 1)):
        folder(recipe, stage, number).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / {"rollouts": "traces", "train": "student"}[stage]).rename(folder(recipe, stage, number))
    assert stop_before(recipe, Step("score", 1)) is None and stop_before(recipe, Step("rollouts", 2)) is None
    change_manifest(folder(recipe, "train", 1), lambda made: made["facts"].update(stop="close enough"))
    assert stop_before(recipe, Step("train", 1)) is None and stop_before(recipe, Step("rollouts", 2)) == "close enough"
    change_manifest(folder(recipe, "rollouts", 1), lambda made: made["facts"].update(stop="too long"))
    assert stop_before(recipe, Step("rollouts", 1)) is None and stop_before(recipe, Step("score", 1)) == "too long"
    assert stop_before(recipe, Step("evaluate")) is None


_RANK = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
print("ready", os.getpid(), flush=True)
signal.pause()
"""


@pytest.mark.slow
def test_the_launcher_leaves_signals_to_its_processes_and_ends_as_they_do(tmp_path: Path) -> None:
    (tmp_path / "early_rank.py").write_text(_RANK)
    mark = tmp_path / "early"
    words = ["-m", "distill.cluster.launch", "--config_file", str(ROOT / "slurm" / "launch" / "ddp.yaml"), "--num_machines", "1"]
    words += ["--num_processes", "2", "--main_process_port", "0", "-m", "early_rank"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "ACCELERATE_USE_CPU": "true", "DISTILL_EARLY": str(mark)}
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    ranks = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    for rank in ranks:
        os.kill(rank, signal.SIGUSR1)
    process.communicate(timeout=300)
    assert process.returncode == EARLY and mark.exists()
