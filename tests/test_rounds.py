"""On-policy rounds through the command line: what is made, again without work, killed on the way, stopped, and mixed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import commands
import pytest
import torch
from conftest import build_tiny_model
from safetensors.torch import load_file

from distill.recipe.learning import Rollouts
from distill.recipe.reading import load_recipe
from distill.run.manifest import MANIFEST, read_manifest
from distill.run.tables import read_rows
from distill.stages import folder, last_round, previous_student, stages_of, student_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("teacher"), seed=5, hidden_size=48)


def write_recipe(place: Path, student: Path, teacher: Path, *, rollouts: str = "", start: str = "student") -> Path:
    problems = [json.dumps({"question": f"What is {n} plus {2 * n}?", "answer": 3 * n}) for n in range(28)]
    (place / "problems.jsonl").write_text("\n".join(problems))
    path = place / "recipe.yaml"
    learns = "generate: {max_new_tokens: 16, temperature: 1.0, top_p: 1.0}\ncurate: {checks: []}\n"
    path.write_text(
        f"name: rounds\nrun_dir: {place / 'run'}\nseed: 3\nteacher: {{model: {teacher}}}\n"
        f"student: {{model: {student}, adapter: {{type: lora, r: 4}}}}\n"
        f"prompts: {{source: {place / 'problems.jsonl'}, heldout_size: 4}}\n"
        f"{learns if start == 'student' or 'teacher_share' in rollouts else ''}"
        "score: {target: {kind: top_k, k: 16}, verify_rows: 1}\n"
        "train: {max_length: 256, kd: {divergence: reverse_kl}, trainer_args: {max_steps: 3, learning_rate: 5e-3, "
        "per_device_train_batch_size: 8}}\n"
        f"rounds: 2\nrollouts: {{start: {start}, prompts_per_round: 12, max_new_tokens: 20, batch_size: 6{rollouts}}}\n"
        "evaluate: {models: [base, student], max_new_tokens: 8}\nexport: {parity_prompts: 2}\n"
    )
    return path


def distill(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return commands.run(["-m", "distill", *arguments])


def adapter(student: Path) -> dict[str, torch.Tensor]:
    return load_file(student / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, teacher: Path) -> Path:
    place = tmp_path_factory.mktemp("rounds")
    result = distill("run", write_recipe(place, tiny_model_dir, teacher, rollouts=", first_max_new_tokens: 5"), "--no-check")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "round 1 of 2" in result.stdout and "round 2 of 2" in result.stdout
    return place / "recipe.yaml"


@pytest.mark.slow
def test_each_round_writes_scores_and_trains_on_from_the_one_before(finished: Path) -> None:
    recipe = load_recipe(finished)
    students = [folder(recipe, "train", number) for number in range(3)]
    for number in (1, 2):
        rows = read_rows(folder(recipe, "rollouts", number), "traces")
        assert len(rows) == 12 and {row["author"] for row in rows} == {"student"}
        assert max(len(row["completion_ids"]) for row in rows) <= (5, 20)[number - 1]
        scored = read_manifest(folder(recipe, "score", number))
        assert scored.facts["positions"] == sum(len(row["completion_ids"]) for row in rows)  # cut-off rollouts get no end of turn
        trained = read_manifest(students[number])
        assert trained.rows_kept == 12 and trained.facts["method"] == "kd" and trained.facts["steps"] == 3
        name = "student" if number == 1 else "rounds/01/student"
        assert read_manifest(folder(recipe, "rollouts", number)).inputs[name] == read_manifest(students[number - 1]).digest
    weights = [adapter(student) for student in students]
    assert all(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "lora_B" in name)
    assert all(not torch.equal(weights[1][name], weights[2][name]) for name in weights[1] if "lora_B" in name)
    first, second = (
        {row["prompt_id"]: row["completion_ids"] for row in read_rows(folder(recipe, "rollouts", number), "traces")} for number in (1, 2)
    )
    assert set(first) != set(second) or first != second  # other prompts, other random numbers


@pytest.mark.slow
def test_the_last_student_is_measured_and_exported(finished: Path) -> None:
    recipe = load_recipe(finished)
    assert student_folder(recipe) == folder(recipe, "train", 2)
    assert read_manifest(folder(recipe, "evaluate")).inputs["rounds/02/student"] == read_manifest(student_folder(recipe)).digest
    exported = load_file(folder(recipe, "export") / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, adapter(student_folder(recipe))[name]) for name, value in exported.items())


@pytest.mark.slow
def test_a_finished_run_does_no_work(finished: Path) -> None:
    again = distill("run", finished)
    assert again.returncode == 0 and again.stdout.count("nothing to do") == len(stages_of(load_recipe(finished))) + 6


@pytest.mark.slow
def test_killed_rounds_end_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    """Killed as soon as each of the second round's stages has begun, and run again."""
    run = tmp_path / "run"
    words = ["run", finished, "--no-check", "--run_dir", run]
    for stage in ("rollouts", "targets", "student"):
        with commands.Command(["-m", "distill", *words]) as command:
            command.until((run / "rounds" / "02" / stage / "plan.json").exists)
    assert distill(*words).returncode == 0
    undisturbed = adapter(student_folder(load_recipe(finished)))
    for name, value in adapter(run / "rounds" / "02" / "student").items():
        assert torch.equal(value, undisturbed[name]), name


@pytest.mark.slow
def test_rounds_from_the_base_with_a_share_of_the_teachers_traces(tmp_path: Path, tiny_model_dir: Path, teacher: Path) -> None:
    path = write_recipe(tmp_path, tiny_model_dir, teacher, start="base", rollouts=", teacher_share: 0.25")
    recipe = load_recipe(path)
    assert stages_of(recipe) == ["prompts", "generate", "curate", "score", "evaluate", "report", "export"]  # none of it trains before them
    assert distill("run", path, "--no-check").returncode == 0
    trained = read_manifest(folder(recipe, "train", 1))
    theirs = read_manifest(folder(recipe, "curate")).rows("curated")  # a token of control inside drops some of a random model's 24
    assert trained.rows_in == 12 + theirs and trained.rows_kept == 12 + 4 and trained.drops == {"not_drawn": theirs - 4}
    assert "student" not in read_manifest(folder(recipe, "rollouts", 1)).inputs  # the base wrote


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (", stop_truncation_rate: 0.0", "were cut off, over rollouts.stop_truncation_rate"),
        (", stop_mean_tokens: 1", "tokens on average, over rollouts.stop_mean_tokens"),
        (", stop_kl: 1000.0", "under rollouts.stop_kl"),
    ],
)
def test_rounds_stop_with_a_reason(limit: str, says: str, tmp_path: Path, tiny_model_dir: Path, teacher: Path) -> None:
    path = write_recipe(tmp_path, tiny_model_dir, teacher, rollouts=limit)
    result = distill("run", path, "--no-check")
    assert result.returncode == 0 and says in result.stdout, result.stdout + result.stderr[-1500:]
    recipe = load_recipe(path)
    stopped_after = 1 if "kl" in limit else 0
    assert last_round(recipe) == stopped_after and not (folder(recipe, "train", stopped_after + 1) / MANIFEST).exists()
    assert read_manifest(folder(recipe, "evaluate")).rows_kept == 8
    assert says in (folder(recipe, "report") / "report.md").read_text().replace("\\", "")


def test_a_run_that_never_trained_has_no_student(tmp_path: Path, tiny_model_dir: Path, teacher: Path) -> None:
    path = write_recipe(tmp_path, tiny_model_dir, teacher, start="base")
    recipe = load_recipe(path)
    assert "train" not in stages_of(recipe) and previous_student(recipe, 1) is None
    assert previous_student(recipe, 2) == folder(recipe, "train", 1)
    result = distill("evaluate", path)
    assert result.returncode == 1 and "is not there" in result.stderr and "Traceback" not in result.stderr
    beyond = distill("rollouts", path, "--round", "3")
    assert beyond.returncode == 1 and "the recipe has 2 rounds" in beyond.stderr


def test_greedy_rollouts_keep_their_settings() -> None:
    rollouts = Rollouts(temperature=0.0, max_new_tokens=64)
    assert rollouts.plain(max_new_tokens=8).identity() == {
        "samples_per_prompt": 1, "max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0
    }  # fmt: skip


def test_the_horizon_grows_by_a_constant_factor() -> None:
    rollouts = Rollouts(first_max_new_tokens=100, max_new_tokens=1600)
    assert [rollouts.horizon(number, 5) for number in (1, 2, 3, 4, 5)] == [100, 200, 400, 800, 1600]
    assert Rollouts(max_new_tokens=64).horizon(1, 3) == 64


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rounds: 2\n", "", "go together"),
        ("score: {target: {kind: top_k, k: 16}, verify_rows: 1}\n", "", "section score"),
        ("kind: top_k, k: 16", "kind: sampled", "can't be computed from sampled"),
        ("generate: {max_new_tokens: 16, temperature: 1.0, top_p: 1.0}\n", "", "exactly one of the sections"),
        ("teacher: {model: ", "#", "needs a teacher"),
        ("batch_size: 6", "batch_size: 6, teacher_share: 1.0", "less than 1"),
        ("batch_size: 6", "batch_size: 6, trainer_args: {loss_type: dft}", "loss_type belongs to the loss of method sft"),
        ("batch_size: 6", "batch_size: 6, first_max_new_tokens: 21", "first_max_new_tokens .21. is above max_new_tokens .20."),
        ("rounds: 2\nrollouts: {", "rounds: 1\nrollouts: {first_max_new_tokens: 5, ", "there is one round"),
        ("learning_rate: 5e-3", "learning_rate: 5e-3, use_liger_kernel: true", "would be ignored in the rounds"),
        ("learning_rate: 5e-3", "lr_scheduler_type: greedy", "lr_scheduler_type needs an evaluation"),
        ("trainer_args: {max_steps: 3", "validation_prompts: 4, trainer_args: {lr_scheduler_type: greedy", "greedy follows the evaluation"),
        ("learning_rate: 5e-3", "lr_scheduler_kwargs: {num_stable_steps: 1}", "num_stable_steps can't be meant for all rounds"),
        ("learning_rate: 5e-3", "deepspeed: {scheduler: {type: WarmupLR}}", "scheduler of the DeepSpeed config can't run over all"),
        ("max_length: 256", "max_length: 20", "leaves no room for a prompt"),
        ("divergence: reverse_kl", "weight: 0", "weight and nll_weight are both 0"),
    ],
)
def test_damaged_recipes_of_rounds(old: str, new: str, says: str, tmp_path: Path, tiny_model_dir: Path, teacher: Path) -> None:
    path = write_recipe(tmp_path, tiny_model_dir, teacher)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=says):
        load_recipe(path)


@pytest.mark.slow
def test_more_rounds_go_on_from_those_there_are(tmp_path: Path, tiny_model_dir: Path, teacher: Path) -> None:
    """Where the schedule and the horizon are each round's own; else the key that stands in the way is named, before anything is spent."""
    recipe = write_recipe(tmp_path, tiny_model_dir, teacher, rollouts=", schedule_over: each_round", start="base")
    assert distill("run", recipe, "--no-check", "--rounds", "1").returncode == 0
    before = {name: read_manifest(tmp_path / "run" / "rounds" / "01" / name) for name in ("rollouts", "targets", "student")}
    more = distill("run", recipe, "--no-check")
    assert more.returncode == 0, more.stderr[-2000:]
    assert {name: read_manifest(tmp_path / "run" / "rounds" / "01" / name) for name in before} == before
    assert read_manifest(tmp_path / "run" / "eval").inputs.keys() == {"prompts", "rounds/02/student"}
    assert "2 on-policy rounds" in (tmp_path / "run" / "report" / "report.md").read_text()
    refused = distill("run", recipe, "--rounds", "3", "--rollouts.schedule_over", "all_rounds")
    assert refused.returncode == 1 and "rollouts.schedule_over is 'part 1 of 1' there and 'part 1 of 3' here" in refused.stderr
    assert not (tmp_path / "run" / "rounds" / "03").exists()
