r"""What a stage in many parts costs the file system and the task that puts them together. Prints a Markdown table.

    python scripts/bench_slurm.py                                       # about five minutes on one core
    python scripts/bench_slurm.py --shapes 20x100 40x100 20x200 --tokens 128

A shape is parts x rows of each. Parts of `generate` are written as their tasks write them, with made-up traces; parts of `score` by the
kit itself, which reads those traces with the embedded teacher (58 symbols, one a character; top_k of 16). Then a process of its own does
what the last task of an array does behind its own part: it looks for the others and puts them together. Counted are files and bytes in
the stage's folder before that, the files which that process opens, and its seconds of processor time; of `score`, whose last task has its
own part to read first, what it takes more than the task before it. Nothing of a file system that many nodes share is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.recipe.experiment import Recipe
from distill.run.folder import StageFolder
from distill.run.log import be_quiet, calm_libraries
from distill.run.manifest import Manifest
from distill.run.parts import Part, write_part
from distill.run.schema import PROMPT, TRACE, prompt_id
from distill.stages import folder, generate, open_stage, score

_LAST_TASK = """
import json, resource, sys
import torch, transformers
from distill.recipe.experiment import Recipe
from distill.stages import generate, score
recipe = Recipe.model_validate_json(open(sys.argv[1]).read())
opened, counts = 0, False
def count(event, arguments):
    global opened
    opened += counts and event == "open"
sys.addaudithook(count)
before, counts = resource.getrusage(resource.RUSAGE_SELF), True
generate.run(recipe) if sys.argv[2] == "generate" else score.run_shard(recipe, sys.argv[2])
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, opened]))
"""


class Shape(NamedTuple):
    """Of an array."""

    parts: int
    rows: int
    """Of each part."""

    @classmethod
    def of(cls, text: str) -> Shape:
        """`20x100` as one."""
        parts, _, rows = text.partition("x")
        return cls(int(parts), int(rows))


class Cost(NamedTuple):
    """Of putting a stage together."""

    files: int
    mib: float
    cpu_s: float
    opened: int


def recipe_for(run: Path, limit: int) -> Recipe:
    """One whose teacher writes traces of at most so many tokens, and scores them."""
    return Recipe.model_validate(
        {
            "name": "bench",
            "run_dir": str(run),
            "teacher": {"model": "embedded:teacher"},
            "student": {"model": "embedded:student"},
            "prompts": {"source": "embedded:arithmetic"},
            "generate": {"max_new_tokens": limit},
            "curate": {"checks": []},
            "score": {"target": {"kind": "top_k", "k": 16}, "batch_size": 64, "verify_rows": 0},
            "train": {"method": "kd", "max_length": 2 * limit},
        }
    )


def prompts_of(count: int) -> list[dict[str, Any]]:
    """So many questions."""
    turns = [[{"role": "user", "content": f"{number}+{number + 1}"}] for number in range(count)]
    return [{"prompt_id": prompt_id(turn), "messages": turn, "reference": None, "source": "bench", "tags": []} for turn in turns]


def trace_of(prompt: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What a teacher might have written: digits, which compress as little as text does."""
    drawn = random.Random(prompt["prompt_id"])
    text = "".join(drawn.choices("0123456789+*= ", k=tokens))
    ids = [drawn.randrange(58) for _ in range(tokens)]
    more = {"author": "teacher", "sample_index": 0, "prompt_ids": ids[:32], "completion_ids": ids, "finish_reason": "stop", "seed": 1}
    return {**{name: prompt[name] for name in ("prompt_id", "messages", "reference")}, **more, "completion": text}


def write_prompts(recipe: Recipe, prompts: list[dict[str, Any]]) -> None:
    """The stage that all parts read."""
    with StageFolder(folder(recipe, "prompts"), "prompts", {}) as out:
        out.write_table("train", prompts, PROMPT)
        out.write_table("heldout", prompts[:1], PROMPT)
        out.finish(rows_in=len(prompts), rows_kept=len(prompts))


def write_traces(recipe: Recipe, prompts: list[dict[str, Any]], shape: Shape, tokens: int) -> None:
    """All parts of `generate`."""
    asked = generate.plan(recipe)
    for index in range(shape.parts):
        part = Part(index, shape.parts)

        def write(out: StageFolder, part: Part = part) -> Manifest:
            rows = [trace_of(prompt, tokens) for prompt in prompts[part.slice]]
            out.write_table("traces", rows, TRACE)
            return out.finish(rows_in=len(rows), rows_kept=len(rows), facts={"wall_s": 1.0})

        with open_stage(recipe, asked, str(part)):
            write_part(asked, part, write)


def write_curated(recipe: Recipe, prompts: list[dict[str, Any]], tokens: int) -> None:
    """The stage that is scored."""
    with StageFolder(folder(recipe, "curate"), "curate", {}) as out:
        out.write_table("curated", (trace_of(prompt, tokens) for prompt in prompts), TRACE)
        out.finish(rows_in=len(prompts), rows_kept=len(prompts))


def last_task(recipe: Recipe, stage: str, argument: str) -> Cost:
    """What is there before, and what putting it together costs."""
    place = folder(recipe, stage)
    files = [path for path in place.rglob("*") if path.is_file()]
    mib = sum(path.stat().st_size for path in files) / 2**20
    file = Path(str(recipe.run_dir)) / "recipe.json"
    file.write_text(recipe.model_dump_json())
    done = subprocess.run([sys.executable, "-c", _LAST_TASK, file, argument], check=True, stdout=subprocess.PIPE, text=True)
    return Cost(len(files), mib, *json.loads(done.stdout.splitlines()[-1]))


def measure(shape: Shape, tokens: int, limit: int, stages: list[str]) -> Iterator[tuple[str, Cost]]:
    """Each stage's cost at a shape."""
    with tempfile.TemporaryDirectory() as place:
        recipe, prompts = recipe_for(Path(place) / "run", limit), prompts_of(shape.parts * shape.rows)
        write_prompts(recipe, prompts)
        if "generate" in stages:
            write_traces(recipe, prompts, shape, tokens)
            yield "generate", last_task(recipe, "generate", "generate")
        if "score" in stages:
            write_curated(recipe, prompts, tokens)
            with contextlib.redirect_stdout(sys.stderr):  # each says how many are missing
                for part in range(1, shape.parts - 1):
                    score.run_shard(recipe, f"{part}/{shape.parts}")
            own, last = (last_task(recipe, "score", f"{part}/{shape.parts}") for part in (shape.parts - 1, shape.parts))
            yield "score", last._replace(cpu_s=last.cpu_s - own.cpu_s, opened=last.opened - own.opened)


def main() -> None:
    """Prints a line a stage and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.of, default=[Shape.of(text) for text in ("20x50", "80x50", "20x200", "80x200")])
    parser.add_argument("--tokens", type=int, default=256, help="of a trace")
    parser.add_argument(
        "--limit", type=int, default=32768, help="generate.max_new_tokens: so long may a trace be, and so few are in memory"
    )
    parser.add_argument("--stages", nargs="+", choices=["generate", "score"], default=["generate", "score"])
    asked = parser.parse_args()
    calm_libraries()
    be_quiet()
    print("| stage | parts | rows of each | files before | MiB before | files opened | CPU s |\n" + "| --- |" + " ---: |" * 6)
    for shape in asked.shapes:
        for stage, cost in measure(shape, asked.tokens, asked.limit, asked.stages):
            print(
                f"| {stage} | {shape.parts:,} | {shape.rows:,} | {cost.files:,} | {cost.mib:.1f} | {cost.opened:,} | {cost.cpu_s:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
