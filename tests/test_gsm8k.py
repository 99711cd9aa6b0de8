"""Real input: all of GSM8K as prompts and brought traces, the real Qwen3 tokenizer, and a random Qwen3 trained on them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.run.manifest import read_manifest
from distill.run.tables import read_rows

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "gsm8k-worked-answers.yaml"
pytestmark = pytest.mark.slow
# glibc gives the 152k-row buffers back to the system at every step, and half of the time goes into getting them again.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=2400)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def distill(stage: str, *overrides: str | Path) -> str:
    return run(sys.executable, "-m", "distill", stage, RECIPE, *overrides)


@pytest.fixture(scope="module")
def sources(shared: Path) -> list[str]:
    """The overrides that put local files in the place of the Hub's."""
    train, test = shared / "data" / "gsm8k" / "train.jsonl", shared / "data" / "gsm8k" / "test.jsonl"
    return [
        *("--prompts.source", str(train), "--prompts.subset", "null"),
        *("--prompts.heldout_source", str(test)),
        *("--traces.source", str(train), "--traces.subset", "null"),
    ]


@pytest.fixture(scope="module")
def curated(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its curated traces."""
    folder = tmp_path_factory.mktemp("gsm8k") / "run"
    for stage in ("prompts", "generate", "curate"):
        distill(stage, *sources, "--run_dir", folder)
    return folder


@pytest.fixture(scope="module")
def student(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Qwen3, 4 layers of 128, with the real tokenizer and its 151,936 rows."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("student")
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / "qwen3")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_every_worked_answer_passes_against_its_gold(curated: Path) -> None:
    assert read_manifest(curated / "prompts").facts["train"] == 7_473
    manifest = read_manifest(curated / "curated")
    assert (manifest.rows_in, manifest.rows_kept, manifest.drops) == (7_473, 7_473, {})
    assert manifest.facts["verdicts"]["math"] == {"passed": 7_473, "failed": 0, "unjudged": 0}
    trace = read_rows(curated / "curated", "curated")[0]["completion"]
    assert trace.startswith("<think>\nNatalia sold 48/2") and trace.endswith("</think>\n\n\\boxed{72}")


def test_with_one_digit_changed_none_passes(shared: Path, sources: list[str], curated: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.jsonl"
    with (shared / "data" / "gsm8k" / "train.jsonl").open() as file, changed.open("w") as out:
        for number, line in enumerate(file):
            row = json.loads(line)
            head, separator, final = row["answer"].rpartition("####")
            digits = [match.start() for match in re.finditer(r"\d", final)]
            place = digits[number % len(digits)]
            row["answer"] = head + separator + final[:place] + str((int(final[place]) + 1) % 10) + final[place + 1 :]
            out.write(json.dumps(row) + "\n")
    folder = tmp_path / "run"
    shutil.copytree(curated / "prompts", folder / "prompts")
    arguments = [*sources, "--traces.source", changed, "--run_dir", folder]
    distill("generate", *arguments)
    result = subprocess.run(
        [sys.executable, "-m", "distill", "curate", str(RECIPE), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 1
    assert "none of 7,473 traces is kept: 7,473 math:wrong_answer" in result.stderr, result.stderr[-500:]


def test_a_random_student_learns_from_it_alike_in_one_process_and_in_two(sources: list[str], curated: Path, student: Path) -> None:
    overrides = [
        *sources,
        *("--student.model", str(student), "--student.adapter", "{type: full}", "--train.trainer_args.max_steps", "60"),
        *("--train.trainer_args.learning_rate", "2e-3", "--train.max_length", "256"),
    ]
    accelerate = Path(sys.executable).parent / "accelerate"
    ends = {}
    for processes, rows in ((1, 2), (2, 1)):
        folder = curated.parent / f"run-{processes}"
        shutil.copytree(curated, folder)
        launcher = [sys.executable] if processes == 1 else [accelerate, "launch", "--multi_gpu", "--num_processes", "2"]
        batch = ["--train.trainer_args.per_device_train_batch_size", str(rows), "--run_dir", str(folder)]
        run(*launcher, ROOT / "distill" / "train.py", "--config", RECIPE, *overrides, *batch, ACCELERATE_USE_CPU="true", **KEEP_MEMORY)
        manifest = read_manifest(folder / "student")
        assert manifest.facts["world_size"] == processes and manifest.facts["steps"] == 60
        logged = [json.loads(line) for line in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in logged if "loss" in entry]
        assert losses[0] > 11 and losses[-1] < 0.65 * losses[0], losses  # ln 151,936 = 11.9
        ends[processes] = losses[-1]
    assert ends[1] == pytest.approx(ends[2], rel=1e-3)
    # 60 steps of 2 rows teach how often a token is a target, not yet where: about ln(1/100) for one that each row has once,
    # and ever less than a uniform ln(1/151,936) = -11.9 for one that is never a target, as the start of a turn is.
    before, _ = log_probs_at_the_end(student, curated)
    ends, starts = log_probs_at_the_end(curated.parent / "run-1" / "student" / "model", curated)
    assert before < -10 and ends > -6 and ends > starts + 4, (before, ends, starts)


def log_probs_at_the_end(model_folder: Path, curated: Path) -> tuple[float, float]:
    """Mean log-probability where 16 rows end their turn, in nats: of the end of a turn, and of the start of one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill.models.chat import chat_format

    tokenizer_folder = model_folder if (model_folder / "tokenizer.json").exists() else model_folder.parent / "tokenizer"
    chat = chat_format(AutoTokenizer.from_pretrained(tokenizer_folder))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    found = []
    for row in read_rows(curated / "curated", "curated")[:16]:
        input_ids, labels = chat.row(row["messages"], row["completion"])
        assert labels[-1] == chat.end_of_turn_id
        with torch.no_grad():
            log_probs = model(torch.tensor([input_ids])).logits[0, -2].log_softmax(-1)
        found.append([float(log_probs[chat.end_of_turn_id]), float(log_probs[chat.tokenizer.convert_tokens_to_ids("<|im_start|>")])])
    ends, starts = torch.tensor(found).mean(dim=0).tolist()
    return ends, starts
