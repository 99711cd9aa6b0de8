"""A step of SFT and of KD against one of TRL's SFTTrainer on a CPU: seconds and peak memory. Prints Markdown.

    python scripts/bench_sft.py                       # the bars: 4 layers x 512 and the head of Qwen2.5, some minutes
    python scripts/bench_sft.py --shape 0.5B --length 128 --batch 1     # Qwen2.5-0.5B's own shape
    python scripts/bench_sft.py --shape tiny --length 32                # seconds: does it run?

All train the same random model on the same random rows under LoRA of rank 32, in float32 and with their own defaults beside
that, each in a process of its own: memory is the peak of resident memory (`ru_maxrss`) over what stood there before the
first step, model included; time is the median of the steps behind two of warm-up, by the clock, so let the machine be idle.
`bench_gpu.py` measures the same on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from gpu_sections import shapes
from gpu_sections.frame import Figures
from gpu_sections.steps import make_trainer, measure

from distill.run.clock import versions

SMALL = shapes.Shape("4 x 512", 512, 2048, 4, 8, 2)
SHAPES = {"4x512": SMALL, "tiny": shapes.TINY, **shapes.SHAPES}
CONTENDERS = {"TRL SFT": None, "SFT": None, "KD sampled 50": shapes.DRAWS, "KD top_k 64": shapes.TOP_K}


def run_one(name: str, arguments: argparse.Namespace) -> Figures:
    """Milliseconds of a step and GiB of memory of one contender, in this process."""
    shape, target = SHAPES[arguments.shape], CONTENDERS[name]
    lengths = [arguments.length] * arguments.batch * 4
    model = shapes.build_model(shape, torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        stored = None if target is None else shapes.store_targets(Path(folder), lengths, target, shape.vocab_size)
        rows = shapes.make_rows(lengths, shape.vocab_size, stored)
        trainer = make_trainer(
            "TRL" if name.startswith("TRL") else "ours",
            model,
            rows,
            shapes.tokenizer(shape.vocab_size),
            stored=stored,
            steps=2 + arguments.steps,
            per_device_train_batch_size=arguments.batch,
            max_length=arguments.length,
            gradient_checkpointing=False,
            warmup_steps=0,
            bf16=False,
        )
        before = psutil.Process().memory_info().rss / 2**30
        found = measure(trainer)
    return {"step_ms": found["step_ms"], "peak_gib": _peak_gib() - before, "whole_gib": _peak_gib()}


def _peak_gib() -> float:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="4x512")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--only", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(run_one(arguments.only, arguments)))
        return
    packages = ", ".join(f"{name} {version}" for name, version in versions(("torch", "transformers", "trl", "peft")).items())
    print(f"{datetime.now(UTC):%Y-%m-%d}, {torch.get_num_threads()} CPU threads, float32, {packages}; {arguments.shape}, ", end="")
    print(f"V = {SHAPES[arguments.shape].vocab_size:,}, {arguments.batch} rows of {arguments.length} tokens, LoRA r 32, head frozen\n")
    print("| | step, ms | of TRL | peak over the start, GiB | of TRL | whole peak, GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    peer: Figures | None = None
    for name in CONTENDERS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            sys.exit(f"error: {name} failed:\n{done.stderr}")
        found: Figures = json.loads(done.stdout.splitlines()[-1])
        peer = peer or found
        step, peak = found["step_ms"] / peer["step_ms"], found["peak_gib"] / max(peer["peak_gib"], 1e-9)
        print(
            f"| {name} | {found['step_ms']:,.0f} | {step:.2f} | {found['peak_gib']:.2f} | {peak:.2f} | {found['whole_gib']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
