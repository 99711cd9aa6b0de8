"""Training by invariances, through the user's own commands: processes, accumulation, packing, resume, adapters."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.schema import PROMPT, TRACE, prompt_id

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes"]


def traces(count: int, filler: str = " and so on") -> list[dict[str, Any]]:
    """Rows of different lengths, so that padding and token counts differ from batch to batch."""
    rows = []
    for index in range(count):
        messages = [{"role": "user", "content": f"What is {index} plus {3 * index}?"}]
        completion = f"<think>\n{index} and {3 * index}{filler * (index % 5)}\n</think>\n\n\\boxed{{{4 * index}}}"
        rows.append(
            {"prompt_id": prompt_id(messages), "sample_index": 0, "author": "teacher", "messages": messages, "completion": completion}
        )
    return rows


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """Makes a run folder with curated traces, and a recipe over it."""

    def make(name: str, *, trainer_args: dict[str, Any] | None = None, student: str = "", train: str = "", count: int = 48) -> Path:
        run_dir = tmp_path / name
        rows = traces(count)
        with StageFolder(run_dir / "curated", "curate", {}) as out:
            if not out.complete:
                out.write_table("curated", rows, TRACE)
                out.finish(rows_in=count, rows_kept=count)
        with StageFolder(run_dir / "prompts", "prompts", {}) as out:
            if not out.complete:
                prompts = [{"prompt_id": row["prompt_id"], "messages": row["messages"]} for row in rows]
                out.write_table("train", prompts, PROMPT)
                out.write_table("heldout", prompts[:4], PROMPT)
                out.finish()
        settings = {"max_steps": 6, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "warmup_steps": 0, **(trainer_args or {})}
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: {name}\nrun_dir: {run_dir}\nseed: 1\nteacher: {{model: {tiny_model_dir}}}\n"
            f"student:\n  model: {tiny_model_dir}\n  adapter: {{type: lora, r: 4}}\n{student}"
            f"prompts: {{source: none.jsonl}}\ngenerate: {{}}\n"
            f"train:\n  max_length: 256\n{train}  trainer_args: {json.dumps(settings)}\n"
        )
        return path

    return make


def train(recipe: Path, *, processes: int = 0, overrides: list[str] | None = None) -> Path:
    """Trains through the command line, and returns the student's folder; in several processes as a user starts them, from nothing."""
    words = [str(ROOT / "distill" / "train.py"), "--config", str(recipe), *(overrides or [])]
    if processes:
        result = subprocess.run([*LAUNCH, str(processes), *words], capture_output=True, text=True, timeout=900)
    else:
        result = commands.run(words, timeout_s=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return recipe.with_suffix("") / "student"


def logged(student: Path, name: str) -> list[float]:
    entries = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


def losses(student: Path) -> list[float]:
    return logged(student, "loss")


def adapter(student: Path) -> dict[str, torch.Tensor]:
    return load_file(student / "adapter" / "adapter_model.safetensors")


def same(left: Path, right: Path, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(losses(left), losses(right), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(adapter(left), adapter(right), rtol=100 * tolerance, atol=100 * tolerance)


def test_training_learns_and_leaves_only_the_result(recipe: Callable[..., Path]) -> None:
    student = train(recipe("plain", trainer_args={"max_steps": 20, "learning_rate": 1e-2}))
    found = losses(student)
    assert len(found) == 20 and found[-1] < found[0] - 0.1
    manifest = read_manifest(student)
    assert manifest.rows_in == manifest.rows_kept == 48 and manifest.facts["steps"] == 20
    assert manifest.facts["world_size"] == 1 and manifest.facts["precision"] == "fp32"
    assert {path.name for path in student.iterdir()} == {"adapter", "tokenizer", "metrics.jsonl", "manifest.json", ".lock"}
    config = json.loads((student / "adapter" / "adapter_config.json").read_text())
    assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


@pytest.mark.slow
def test_one_process_equals_two(recipe: Callable[..., Path]) -> None:
    """Equal global batch: same losses, same weights; and both ranks hold the same parameters at the end."""
    one = train(recipe("one"))
    two = train(recipe("two", trainer_args={"per_device_train_batch_size": 4}), processes=2)
    assert read_manifest(two).facts["world_size"] == 2
    same(one, two)


@pytest.mark.slow
def test_all_ranks_end_with_the_same_parameters(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("ranks", trainer_args={"per_device_train_batch_size": 4})
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, torch, transformers\n"
        "from distill.pipeline import run_stage\n"
        "from distill.recipe.reading import load_recipe\n"
        "plain = transformers.Trainer.train\n"
        "def train(self, *args, **kwargs):\n"
        "    result = plain(self, *args, **kwargs)\n"
        "    weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}\n"
        "    torch.save(weights, f'{sys.argv[2]}/rank{os.environ[\"RANK\"]}.pt')\n"
        "    return result\n"
        "transformers.Trainer.train = train\n"
        "run_stage('train', load_recipe(sys.argv[1]))\n"
    )
    result = commands.launch([script, path, tmp_path], 2)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys() and any("lora" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
def test_processes_wait_for_the_first_as_long_as_it_takes(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The first reads its traces, and writes its manifest, for longer than the group waits in a collective."""
    path = recipe("patient", trainer_args={"max_steps": 2, "save_steps": 1})
    script = tmp_path / "patient.py"
    script.write_text(
        "import sys, time, transformers, trl, peft\n"
        "from datetime import timedelta\n"
        "from accelerate import PartialState\n"
        "from distill.pipeline import run_stage\n"
        "from distill.recipe.reading import load_recipe\n"
        "from distill.run.folder import StageFolder\n"
        "from distill.trainers import encoded\n"
        "plain_pieces, plain_finish = encoded.iter_pieces, StageFolder.finish\n"
        "def pieces(*arguments):\n"
        "    time.sleep(12)\n"
        "    yield from plain_pieces(*arguments)\n"
        "def finish(*arguments, **more):\n"
        "    time.sleep(12)\n"
        "    return plain_finish(*arguments, **more)\n"
        "encoded.iter_pieces, StageFolder.finish = pieces, finish\n"
        "PartialState(cpu=True, timeout=timedelta(seconds=8))\n"
        "run_stage('train', load_recipe(sys.argv[1]))\n"
    )
    result = commands.launch([script, path], 2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_manifest(path.with_suffix("") / "student").facts["world_size"] == 2


@pytest.mark.slow
def test_processes_on_cpus_find_each_other_without_a_setting(recipe: Callable[..., Path]) -> None:
    """Without `use_cpu` each process of a launch on CPUs trains alone, and nothing in the libraries complains."""
    path = recipe("together", trainer_args={"max_steps": 1})
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    result = commands.launch([ROOT / "distill" / "train.py", "--config", path], 2, environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_manifest(path.with_suffix("") / "student").facts["world_size"] == 2


def test_a_launch_that_would_train_alone_is_refused() -> None:
    code = "from accelerate import PartialState\nPartialState()\nimport os\nos.environ['WORLD_SIZE'] = '2'\n"
    code += "from distill.models.processes import Processes\nProcesses()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "2 processes were launched, but this one sees 1, so each would do all the work" in result.stderr


def test_accumulation_does_not_change_the_loss(recipe: Callable[..., Path]) -> None:
    whole = train(recipe("whole"))
    split = train(recipe("split", trainer_args={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}))
    same(whole, split)


def test_packing_leaks_nothing(recipe: Callable[..., Path]) -> None:
    """All rows in one step: packed into a few long sequences, or padded side by side, the loss is the same."""
    one_batch = {"max_steps": 1, "per_device_train_batch_size": 48}
    padded = losses(train(recipe("padded", trainer_args=one_batch)))
    student = train(recipe("packed", trainer_args=one_batch | {"packing": True}))
    assert losses(student) == pytest.approx(padded, rel=1e-5)
    # The rows really were packed: 48 of them are far fewer sequences, so one epoch is over before the first step ends.
    [entry] = [
        json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines() if "loss" in line and "train_loss" not in line
    ]
    assert entry["num_tokens"] == sum(map(len, _row_ids()))


def _row_ids() -> list[list[int]]:
    from conftest import CHATML  # the template the tiny model has

    assert CHATML
    texts = [f"<|im_start|>user\n{r['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n" for r in traces(48)]
    specials = [
        text.count("<|im_start|>") * (len("<|im_start|>") - 1) + text.count("<|im_end|>") * (len("<|im_end|>") - 1) for text in texts
    ]
    tags = len("<think>") + len("</think>") - 2
    return [
        [0] * (len(text) - special + len(row["completion"]) - tags + 1)
        for text, special, row in zip(texts, specials, traces(48), strict=True)
    ]


@pytest.mark.slow
def test_ten_steps_equal_five_and_a_kill_and_five(recipe: Callable[..., Path]) -> None:
    settings = {"max_steps": 10, "save_steps": 5, "lr_scheduler_type": "linear"}
    undisturbed = train(recipe("undisturbed", trainer_args=settings))
    path = recipe("killed", trainer_args=settings)
    student = path.with_suffix("") / "student"
    words = [ROOT / "distill" / "train.py", "--config", path]
    with commands.Command(words) as command:
        command.until((student / "checkpoints" / "checkpoint-5" / "whole").exists)
    assert not (student / "manifest.json").exists()
    result = commands.run(words)
    assert result.returncode == 0 and "going on from step 5" in result.stdout, result.stderr[-2000:]
    assert losses(student) == losses(undisturbed)  # to the last bit, and no step twice
    assert logged(student, "num_tokens") == logged(undisturbed, "num_tokens")
    facts, expected = read_manifest(student).facts, read_manifest(undisturbed).facts
    assert facts["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5) and facts["tokens"] == expected["tokens"]
    assert "10 steps of 8 rows; 1 x CPU" in result.stdout and "fp32" in result.stdout
    for name, value in adapter(undisturbed).items():
        assert torch.equal(value, adapter(student)[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "modules"),
    [
        ("    # DoRA\n", "use_dora: true"),
        ("    # rsLoRA\n", "use_rslora: true"),
        ("    # one module\n", "target_modules: [q_proj]"),
    ],
)
def test_adapter_variants_train(recipe: Callable[..., Path], student: str, modules: str) -> None:
    path = recipe("variant", trainer_args={"max_steps": 8, "learning_rate": 1e-2})
    path.write_text(path.read_text().replace("r: 4}", f"r: 4, {modules}}}"))
    found = losses(train(path))
    assert found[-1] < found[0]


@pytest.mark.slow
def test_qlora_trains(recipe: Callable[..., Path]) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra qlora")
    path = recipe("qlora", trainer_args={"max_steps": 8, "learning_rate": 1e-2}, student="  quantization: nf4\n")
    student = train(path)
    assert losses(student)[-1] < losses(student)[0]
    assert all(torch.isfinite(value).all() for value in adapter(student).values())


@pytest.mark.slow
def test_full_finetuning_changes_every_weight_and_keeps_fp32(recipe: Callable[..., Path], tiny_model_dir: Path) -> None:
    path = recipe("full", trainer_args={"max_steps": 4, "learning_rate": 1e-3})
    path.write_text(path.read_text().replace("{type: lora, r: 4}", "{type: full}"))
    student = train(path)
    after, before = load_file(student / "model" / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.float32 and not torch.equal(after[name], before[name]) for name in after)


def test_over_long_rows_are_dropped_and_counted_or_cut_when_asked(recipe: Callable[..., Path]) -> None:
    lengths = sorted(map(len, _row_ids()))
    limit = lengths[len(lengths) // 2]
    over = sum(length > limit for length in lengths)
    dropped = read_manifest(train(recipe("drop", trainer_args={"max_steps": 1}), overrides=["--train.max_length", str(limit)]))
    assert dropped.drops == {"too_long": over} and dropped.rows_kept == 48 - over
    cut = read_manifest(
        train(recipe("cut", trainer_args={"max_steps": 1}), overrides=["--train.max_length", str(limit), "--train.overlong", "cut"])
    )
    assert cut.drops == {} and cut.rows_kept == 48


def test_nothing_that_fits_is_an_error_that_says_so(recipe: Callable[..., Path]) -> None:
    result = commands.run([ROOT / "distill" / "train.py", "--config", recipe("none"), "--train.max_length", "3"])
    assert result.returncode == 1 and "none of 48 traces fits into 3 tokens" in result.stderr and "Traceback" not in result.stderr


def test_a_loss_that_is_no_number_ends_training(recipe: Callable[..., Path], tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    path = recipe("nan")
    path.write_text(path.read_text().replace(f"student:\n  model: {tiny_model_dir}", f"student:\n  model: {broken}"))
    result = commands.run([ROOT / "distill" / "train.py", "--config", path])
    assert result.returncode == 1 and "Lower train.trainer_args.learning_rate" in result.stderr, result.stderr[-1500:]
    assert not (path.with_suffix("") / "student" / "manifest.json").exists()


def test_a_value_that_trl_refuses_is_an_error_of_the_recipe(recipe: Callable[..., Path]) -> None:
    path = recipe("refused", trainer_args={"lr_scheduler_type": "cosinus"})
    result = commands.run([ROOT / "distill" / "train.py", "--config", path])
    assert result.returncode == 1 and "train.trainer_args" in result.stderr and "cosinus" in result.stderr
    assert "Traceback" not in result.stderr


def test_precision_follows_the_device() -> None:
    """What is chosen, without the device: fp32 on a CPU; bf16 only where it is real; fp16 on older chips."""
    from distill.models.loading import pick_dtype

    assert pick_dtype(torch.device("cpu")) is torch.float32
    assert pick_dtype(torch.device("mps")) is torch.float16
    assert pick_dtype(torch.device("cpu"), "bfloat16") is torch.bfloat16


def test_a_finished_student_is_not_trained_again(recipe: Callable[..., Path]) -> None:
    path = recipe("done", trainer_args={"max_steps": 1})
    student = train(path)
    before = (student / "manifest.json").stat().st_mtime_ns
    result = commands.run([ROOT / "distill" / "train.py", "--config", path])
    assert "nothing to do" in result.stdout and (student / "manifest.json").stat().st_mtime_ns == before
    assert not math.isnan(read_manifest(student).facts["train_loss"])


@pytest.mark.parametrize("folder", ["s*", "exp[1]:2?"])
def test_a_run_is_where_its_path_says(folder: str, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Not where a pattern would find another run, and whatever a URL looks like."""
    from test_kd import command

    path = recipe("s1", trainer_args={"max_steps": 1, "packing": True, "num_train_epochs": 1}, count=8)
    run = tmp_path / folder
    shutil.copytree(tmp_path / "s1", run)
    rows = traces(5)
    shutil.rmtree(run / "curated")
    with StageFolder(run / "curated", "curate", {}) as out:
        out.write_table("curated", rows, TRACE)
        out.finish(rows_in=5, rows_kept=5)
    assert command("train", path, "--run_dir", str(run)) == 0
    assert read_manifest(run / "student").rows_in == 5 and not (tmp_path / "s1" / "student").exists()


def test_what_a_reporter_writes_is_kept(recipe: Callable[..., Path]) -> None:
    """TensorBoard's files lie beside the checkpoints, which go."""
    from transformers import TrainerCallback

    from distill.recipe.reading import load_recipe
    from distill.stages.train import run

    class Reporter(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name in ("runs/today/events.out.tfevents.1", "emissions.csv"):
                place = Path(args.output_dir) / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text("reported")

    path = recipe("reported", trainer_args={"max_steps": 1}, count=8)
    manifest = run(load_recipe(path), watchers=[Reporter()])
    student = path.with_suffix("") / "student"
    assert set(manifest.records) == {"metrics.jsonl", "logs/today/events.out.tfevents.1", "logs/emissions.csv"}
    assert (student / "logs" / "emissions.csv").read_text() == "reported" and not (student / "checkpoints").exists()
