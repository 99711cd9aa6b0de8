r"""Peak memory and speed of the stages over many brought traces, each stage a process of its own. Prints a Markdown table.

    python scripts/bench_data.py                                        # 10,000 and 1,000,000 rows: about an hour on 2 cores
    python scripts/bench_data.py --rows 10000 100000 --stages prompts generate --form jsonl
    python scripts/bench_data.py --length short --out table.md
    python scripts/bench_data.py --rows 10000 100000 --stages prompts --prompts '{"near_duplicates": {}}'

A made-up source holds a question of about 200 characters, a reference, and a trace of 6,600 characters, which is what 1,500 tokens
of English and LaTeX come to (`--length short`: 300), as `<think>`, word-like text, `</think>` and a `\boxed{}`. Words are drawn by
Zipf's law, so that it compresses like text, to half. Peak memory is `ru_maxrss` of the whole process, interpreter and libraries
included; what may grow with the rows is the difference between the sizes, which is to be at most 100 MB.

Rows a second are those of the difference between the sizes too, and what a process needs besides them (imports, start and end) is
in a column of its own. `tokenise` is `training_rows` with the tokenizer of `--student`; one trace in a hundred is short, and only
those fit into `train.max_length`, so that tokens of a million traces need no disk. `train` is one step after that; without it `report`
gets a student that a step on 200 rows has made.
A million long rows take about 15 GB of disk, which are removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = {"long": 6600, "short": 300}
QUESTION = 200
SHORT_EVERY = 100  # rows: one of so many has a trace that fits into MAX_LENGTH with any tokenizer
MAX_LENGTH = 512
STAGES = ["prompts", "generate", "curate", "tokenise", "check-quick", "check", "train", "report"]
TOKENISE = """
import sys
from pathlib import Path
from distill.models.loading import load_chat_format
from distill.recipe.reading import load_recipe
from distill.trainers.rows import TraceTable, training_rows

recipe = load_recipe(sys.argv[1])
table = TraceTable(Path(recipe.run_dir, "curated"), "curated")
rows = training_rows([table], load_chat_format(recipe.student), recipe.train, Path(recipe.run_dir, "tokens"), recipe.seed)
print(f"{len(rows.dataset):,} rows fit, of {rows.rows_in:,}")
"""


class Measured(NamedTuple):
    """What a process took."""

    peak_mib: float
    seconds: float


def command(stage: str, recipe: Path) -> list[str]:
    """How a stage is run."""
    if stage == "tokenise":
        return [sys.executable, "-c", TOKENISE, str(recipe)]
    name, _, quick = stage.partition("-")
    return [sys.executable, "-m", "distill", name, str(recipe), *(["--quick"] if quick else [])]


def measure(stage: str, words: list[str]) -> Measured | None:
    """Peak resident memory and wall seconds of a stage's command; null where it failed. Prints the last line that it said."""
    with tempfile.TemporaryFile("w+") as said:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=said, stderr=said, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = [line for line in said.read().replace("\r", "\n").splitlines() if line.strip()]
    print(f"  {stage}: {seconds:.1f} s, {usage.ru_maxrss / 1024:.0f} MiB: {lines[-1] if lines else ''}", flush=True)
    return Measured(usage.ru_maxrss / 1024, seconds) if process.returncode == 0 else None


def write_recipe(folder: Path, source: Path, student: str, more: dict[str, Any] | None = None) -> Path:
    """The recipe of a run over brought traces, with further keys of `prompts` if there are some."""
    recipe = {
        "name": "bench-data",
        "run_dir": str(folder / "run"),
        "student": {"model": student},
        "prompts": {"source": str(source), "columns": {"prompt": "question", "reference": "answer"}} | (more or {}),
        "traces": {"source": str(source), "columns": {"prompt": "question"}, "author_model": "nobody", "licence": "MIT"},
        "curate": {"checks": ["finish", "think"]},
        "train": {"max_length": MAX_LENGTH, "trainer_args": {"max_steps": 1, "per_device_train_batch_size": 1}},
        "evaluate": None,
        "export": None,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def text_like(length: int) -> str:
    """Words of random letters whose frequencies follow Zipf's law."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(20_000)]
    chances = 1 / (np.arange(len(words)) + 10)
    return " ".join([words[number] for number in rng.choice(len(words), length // 5, p=chances / chances.sum())])


def made_up(count: int, characters: int) -> Iterator[dict[str, Any]]:
    """Rows of the source: cuts from one long text at random places."""
    import random

    text, draw = text_like(60_000_000), random.Random(0)
    for number in range(count):
        at = draw.randrange(len(text) - 20_000)
        length = 200 if number % SHORT_EVERY == 0 else int(characters * draw.uniform(0.6, 1.4))
        reasoning = text[at + QUESTION : at + QUESTION + length]
        yield {
            "question": f"{number}: {text[at : at + QUESTION]}?",
            "answer": str(number % 1000),
            "completion": f"<think>\n{reasoning}\n</think>\n\n\\boxed{{{number % 1000}}}",
        }


def make_source(path: Path, count: int, characters: int) -> None:
    """Writes the source, in the form that its name says."""
    import itertools

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = made_up(count, characters)
    if path.suffix == ".parquet":
        schema = pa.schema([(name, pa.string()) for name in ("question", "answer", "completion")])
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as file:
            while piece := list(itertools.islice(rows, 2000)):
                file.write_table(pa.Table.from_pylist(piece, schema=schema))
        return
    with pa.output_stream(str(path), compression="zstd" if path.suffix == ".zst" else None) as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")


def run(count: int, options: argparse.Namespace) -> dict[str, Measured | None]:
    """All wanted stages over so many rows, in the pipeline's order; those before a wanted one run too."""
    print(f"{count:,} rows", flush=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as place:
        folder = Path(place)
        source = folder / f"source.{options.form}"
        maker = ["--make", str(source), "--rows", str(count), "--length", options.length]
        subprocess.run([sys.executable, __file__, *maker], check=True)  # a process of its own: peaks are inherited by children
        print(f"  source: {source.stat().st_size / 2**20:,.0f} MiB", flush=True)
        recipe = write_recipe(folder, source, options.student, options.prompts)
        found: dict[str, Measured | None] = {}
        last = max(STAGES.index(stage) for stage in options.stages)
        needed = {"generate": ["prompts"], "curate": ["generate"], "tokenise": ["curate"], "train": ["curate"], "report": ["curate"]}
        wanted = set(options.stages)
        for stage in reversed(STAGES):
            wanted |= set(needed.get(stage, [])) if stage in wanted else set()
        for stage in [name for name in STAGES[: last + 1] if name in wanted]:
            if stage == "report" and "train" not in wanted:
                lend_student(folder, options.student)
            found[stage] = measure(stage, command(stage, recipe))
            shutil.rmtree(folder / "run" / "tokens", ignore_errors=True)
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"  disk at the end: {disk / 2**20:,.0f} MiB", flush=True)
    return found


def lend_student(folder: Path, student: str) -> None:
    """Puts a student into the run that was trained on few rows of the same kind."""
    few = folder / "few"
    few.mkdir()
    source = few / "source.jsonl"
    subprocess.run([sys.executable, __file__, "--make", str(source), "--rows", "200", "--length", "short"], check=True)
    recipe = write_recipe(few, source, student)
    words = [sys.executable, "-m", "distill", "run", str(recipe), "--until", "train", "--prompts.heldout_size", "20"]
    subprocess.run(words, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    shutil.copytree(few / "run" / "student", folder / "run" / "student")


def table(sizes: list[int], found: list[dict[str, Measured | None]], stages: list[str]) -> str:
    """The Markdown table: peaks, their difference, speed, and what a process takes besides the rows."""
    head = ["stage", *(f"peak MiB, {size:,} rows" for size in sizes), "difference, MB", "rows/s", "start and end, s"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for stage in stages:
        measured = [each.get(stage) for each in found]
        cells = [f"{one.peak_mib:,.0f}" if one else "failed" for one in measured]
        first, last = measured[0], measured[-1]
        if first and last and len(sizes) > 1:
            rate = (sizes[-1] - sizes[0]) / (last.seconds - first.seconds)
            growth = (last.peak_mib - first.peak_mib) * 2**20 / 1e6
            cells += [f"{growth:,.0f}", f"{rate:,.0f}", f"{first.seconds - sizes[0] / rate:.1f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| `{stage}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="sizes, the smallest first")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what is shown; what these need runs too")
    parser.add_argument("--form", choices=["parquet", "jsonl", "jsonl.zst"], default="parquet", help="of the source")
    parser.add_argument("--length", choices=list(CHARACTERS), default="long", help="of a trace")
    parser.add_argument("--student", default="embedded:student", help="whose tokenizer tokenises, and who trains a step")
    parser.add_argument("--prompts", type=json.loads, help="further keys of the recipe's section of that name, as JSON")
    parser.add_argument("--scratch", help="folder for what is made and removed again; null means the system's")
    parser.add_argument("--out", type=Path, help="file that the table is added to")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Makes the sources, runs the stages, prints the table."""
    options = parsed()
    if options.make:
        make_source(options.make, options.rows[0], CHARACTERS[options.length])
        return
    found = [run(count, options) for count in options.rows]
    title = f"{datetime.now(UTC):%Y-%m-%d}, {len(os.sched_getaffinity(0))} CPU cores, {options.length} traces, {options.form}"
    text = f"{title}\n\n{table(options.rows, found, options.stages)}\n"
    print(f"\n{text}")
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
