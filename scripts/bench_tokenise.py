"""Training's tokenisation against `datasets.map` on one core, which it was before: speed, peak memory, disk. Prints Markdown.

    python scripts/bench_tokenise.py --tokenizer Qwen/Qwen2.5-0.5B-Instruct         # a minute; a folder does too
    python scripts/bench_tokenise.py --tokenizer ... --ids --rows 10240 1000000     # the bar on memory, 12 GB of disk, removed after it

Traces are of some 1,500 tokens: word-like text, or with `--ids` what a student wrote, whose ids are taken as they are, so that a
million rows pass in minutes. A table is one shard of 4,096 rows, linked as often as needed. Each contender runs in a process of its
own; peak memory is `ru_maxrss` of all of it, and for the bar `ru_maxrss` may grow by 100 MB from the least number of rows to the most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from bench_data import made_up

from distill.models.loading import load_chat_format
from distill.recipe.learning import Train
from distill.recipe.models import ModelSpec
from distill.run.clock import versions
from distill.run.folder import StageFolder
from distill.run.manifest import MANIFEST, Shard, read_manifest
from distill.run.schema import TRACE, prompt_id

SHARD = 4096
CHARACTERS = 3000  # made-up words take two tokens where a real one takes one
TOKENS = 1500
CONTENDERS = ("map on one core", "the kit")


def write_shard(folder: Path, ids: bool) -> None:
    """A stage's folder with one shard of traces."""
    draw = np.random.default_rng(0)
    pool = draw.integers(0, 150_000, 100_000).tolist()
    with StageFolder(folder, "curate", {}) as out:
        table = out.table("curated", TRACE)
        for number, row in enumerate(made_up(SHARD, CHARACTERS)):
            messages = [{"role": "user", "content": row["question"]}]
            trace = {"prompt_id": prompt_id(messages), "sample_index": 0, "author": "teacher", "messages": messages}
            if ids:
                start = int(draw.integers(0, len(pool) - TOKENS))
                written = pool[start + 50 : start + TOKENS]
                trace |= {"author": "student", "completion": "", "prompt_ids": pool[start : start + 50], "completion_ids": written}
            else:
                trace["completion"] = made_whole(row["completion"], number)
            table.append(trace)
        out.finish(rows_in=SHARD, rows_kept=SHARD)


def made_whole(completion: str, number: int) -> str:
    """One in a hundred of `made_up` is short; here all are long."""
    return completion if len(completion) > CHARACTERS // 2 else f"{number} " + completion * (CHARACTERS // max(len(completion), 1))


def linked(shard: Path, folder: Path, rows: int) -> None:
    """A stage's folder whose table is the one shard, over and over."""
    manifest = read_manifest(shard)
    whole = manifest.tables["curated"][0]
    shards = []
    for number in range(-(-rows // SHARD)):
        name = f"curated-{number:05d}.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(shard / whole.file, folder / name)
        shards.append(Shard(file=name, rows=whole.rows, sha256=whole.sha256))
    (folder / MANIFEST).write_text(manifest.model_copy(update={"tables": {"curated": shards}}).model_dump_json())


def run_one(name: str, folder: Path, tokenizer: str) -> dict[str, float]:
    """Seconds, tokens and peak memory of one contender, in this process."""
    chat = load_chat_format(ModelSpec(model=tokenizer))
    cache = folder.parent / "cache"
    if name == "the kit":
        from distill.trainers.rows import TraceTable, training_rows

        start = time.perf_counter()
        found = training_rows([TraceTable(folder, "curated")], chat, Train(max_length=10**6), cache, 0)
        rows, tokens = found.rows_in, found.num_tokens
    else:
        from datasets import load_dataset

        start = time.perf_counter()
        files = [str(file) for file in sorted(folder.glob("*.parquet"))]
        traces = load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))

        def encode(trace: dict[str, Any]) -> dict[str, Any]:
            input_ids, labels = chat.trace_row(trace)
            return {"input_ids": input_ids, "labels": labels, "length": len(input_ids)}

        lengths = traces.map(encode, remove_columns=traces.column_names)["length"]
        rows, tokens = len(lengths), sum(lengths)
    seconds = time.perf_counter() - start
    disk = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return {"seconds": seconds, "rows": rows, "tokens": tokens, "disk_mb": disk / 1e6, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="embedded:student", help="a model's name or folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096], help="whole shards are taken")
    parser.add_argument("--ids", action="store_true", help="traces of the student's, as ids")
    parser.add_argument("--folder", type=Path, help="for the tables; null takes a temporary one")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(run_one(arguments.only[0], Path(arguments.only[1]), arguments.tokenizer)))
        return
    packages = ", ".join(f"{name} {version}" for name, version in versions(("tokenizers", "transformers", "datasets")).items())
    what = "ids as drawn" if arguments.ids else f"text, tokenizer {Path(arguments.tokenizer).name}"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {len(os.sched_getaffinity(0))} CPU cores, {packages}; {what}\n")
    print("| | rows | tokens a row | rows/s | tokens/s | peak, MiB | disk, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        write_shard(Path(place, "shard"), arguments.ids)
        for rows in arguments.rows:
            for name in CONTENDERS if not arguments.ids else CONTENDERS[1:]:
                with tempfile.TemporaryDirectory(dir=place) as work:
                    linked(Path(place, "shard"), Path(work, "curated"), rows)
                    command = [sys.executable, __file__, "--tokenizer", arguments.tokenizer, "--only", name, str(Path(work, "curated"))]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"error: {name} failed:\n{done.stderr}")
                    found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {name} | {found['rows']:,} | {found['tokens'] / found['rows']:,.0f} | {found['rows'] / found['seconds']:,.0f} | "
                    f"{found['tokens'] / found['seconds']:,.0f} | {found['peak_mib']:,.0f} | {found['disk_mb']:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
