"""Traces curated a second and peak memory, without the math check (bench_checks.py measures that). Prints Markdown.

    python scripts/bench_curate.py                        # ten minutes, 3 GB of disk for a while

Traces are as long as those to GSM8K: a question of 45 words, reasoning of 150, ids of both; four to a prompt, one in ten cut off,
one in twenty a duplicate. Each size is curated in a process of its own, whose peak is compared with that of the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.recipe.experiment import Recipe
from distill.run.folder import StageFolder
from distill.run.schema import TRACE, prompt_id
from distill.stages import curate

SAMPLES = 4
SIZES = (10_000, 100_000, 1_000_000)


def traces(count: int) -> Iterator[dict[str, Any]]:
    """Rows of the table `traces`."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(3000)]
    pool = [draw.choices(words, k=150) for _ in range(512)]
    for index in range(count):
        question = f"Question {index // SAMPLES}: " + " ".join(pool[index // SAMPLES % 512][:45])
        reasoning = " ".join(pool[index % 512]) + f" so it is {index}"
        cut = index % 10 == 3
        completion = f"<think>\n{reasoning}" + ("" if cut else f"\n</think>\n\nThe answer is \\boxed{{{index}}}.")
        messages = [{"role": "user", "content": question}]
        yield {
            "prompt_id": prompt_id(messages),
            "sample_index": index % SAMPLES,
            "author": "teacher",
            "messages": messages,
            "reference": str(index),
            "completion": completion if index % 20 else f"<think>\n{question}\n</think>\n\nNone.",
            "prompt_ids": [(17 * index + step) % 50_000 for step in range(70)],
            "completion_ids": [(31 * index + 7 * step) % 50_000 for step in range(230)],
            "finish_reason": "length" if cut else "stop",
            "seed": index,
        }


def curate_once(run_dir: Path) -> None:
    """Curates the traces of a run, and prints seconds and peak memory of this process in MB."""
    sections = {"student": {"model": "none"}, "prompts": {"source": "none.jsonl"}, "traces": {"source": "none.jsonl"}, "evaluate": None}
    recipe = Recipe.model_validate({"name": "bench", "run_dir": str(run_dir), **sections, "curate": {"checks": ["finish", "think"]}})
    start = time.perf_counter()
    curate.run(recipe)
    wall_s = time.perf_counter() - start
    print(json.dumps({"wall_s": wall_s, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # what the process of one size is told
    arguments = parser.parse_args()
    if arguments.only:
        return curate_once(arguments.only)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}\n")
    print("| traces | seconds | traces/s | peak memory, MB | over the smallest, MB |\n| ---: | ---: | ---: | ---: | ---: |")
    smallest = None
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as place:
            with StageFolder(Path(place) / "traces", "generate", {}) as out:
                out.write_table("traces", traces(size), TRACE)
                out.finish()
            command = [sys.executable, __file__, "--only", place]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        smallest = smallest or found["peak_mb"]
        print(f"| {size:,} | {found['wall_s']:,.1f} | {size / found['wall_s']:,.0f} ", end="")
        print(f"| {found['peak_mb']:,.0f} | {found['peak_mb'] - smallest:,.0f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
