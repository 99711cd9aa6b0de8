"""Compares the ways to distil on the embedded pair: what each recovers, with paired intervals, and what it costs.

    python scripts/compare_methods.py                     # resumes; a finished part is not run again
    python scripts/compare_methods.py --tune              # learning rates, on a seed that is not compared
    python scripts/compare_methods.py --methods sft_34 rounds_fresh --seeds 8 9 10 11 12 13 14 15 --keep    # more of a claim

Every method learns from the same prompts, the same traces of the teacher and in the same number of optimizer steps, each
through the kit's own stages in a process of its own. `score` has the teacher read the traces once more; on-policy methods have
it read what the student wrote, so rounds are set beside SFT on so many traces a prompt that it costs about as many of its tokens.
Rounds go on with the adapter of a warm start; the live method begins a new one on the merged warm start. Writes compare_methods.md,
.svg and .json beside this file; the runs go to runs/compare.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from distill.pipeline import run_rounds, run_stage
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe
from distill.run.manifest import MANIFEST, read_manifest
from distill.run.tables import read_rows
from distill.stages import FOLDERS, folder, run_dir, stages_of

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().with_suffix("")
RUNS = ROOT / "runs" / "compare"
SHARED_STAGES = ("prompts", "generate", "curate")

BUDGET = 64  # prompts, with one trace of the teacher each
STEPS = 192
BATCH = 16
HELDOUT = 600
WARM_START_RATE = 1e-3
SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
TUNING_SEED = 100  # its traces and weights are in no comparison
LEARNING_RATES = (5e-4, 1e-3, 3e-3)
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
"""Else glibc gives a CPU trainer's buffers back to the system, and asks for them again, at every step."""


@dataclass(frozen=True)
class Method:
    """A way to distil, as what it adds to the common recipe."""

    label: str
    keys: dict[str, Any]
    learning_rate: float
    """Behind the warm start, where there is one."""
    warm_start: int = 0
    """Steps of plain SFT, out of all; the others are shared by what follows."""
    samples_per_prompt: int = 1


def _kd(target: dict[str, Any]) -> dict[str, Any]:
    return {"score": {"target": target}, "train": {"method": "kd"}}


def _rounds(number: int, target: dict[str, Any], kd: dict[str, Any], samples_per_prompt: int = 1) -> dict[str, Any]:
    rollouts = {"samples_per_prompt": samples_per_prompt}
    return {"score": {"target": target}, "rounds": number, "train": {"kd": kd}, "rollouts": rollouts}


TOP_64, REVERSE_KL = {"kind": "top_k", "k": 64}, {"divergence": "reverse_kl"}


LIVE = {"method": "on_policy", "on_policy": {"max_new_tokens": 192}}
WHOLE_VOCABULARY = 403  # every token of the embedded pair
METHODS = {
    "sft": Method("SFT", {}, 5e-4),
    "kd_full": Method("KD, full distribution", _kd({"kind": "top_k", "k": WHOLE_VOCABULARY}), 1e-3),
    "kd_top_k": Method("KD, top 8", _kd({"kind": "top_k", "k": 8}), 1e-3),
    "kd_sampled": Method("KD, 50 draws", _kd({"kind": "sampled", "draws": 50}), 1e-3),
    "sft_six": Method("SFT, 6 traces a prompt", {}, 5e-4, samples_per_prompt=6),
    "rounds": Method("on-policy, 4 rounds", _rounds(4, TOP_64, REVERSE_KL), 1e-3, warm_start=STEPS // 2),
    "chosen_token": Method("chosen token, 4 rounds", _rounds(4, {"kind": "chosen_token"}, {}), 1e-4, warm_start=STEPS // 2),
    "sft_34": Method("SFT, 34 traces a prompt", {}, 5e-4, samples_per_prompt=34),
    "rounds_fresh": Method("on-policy, 8 rounds of 3 a prompt", _rounds(8, TOP_64, REVERSE_KL, 3), 1e-3, warm_start=STEPS // 4),
    "live": Method("on-policy, live teacher", {"train": LIVE}, 1e-3, warm_start=STEPS // 2),
}

BASE = Method("base student", {}, 0.0)


def main() -> None:
    """Runs what is missing, and writes the results of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of prompts, traces and training")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--keep", action="store_true", help="show the results of compare_methods.json too, where they are not run here")
    parser.add_argument("--tune", action="store_true", help="compare learning rates of each method on one other seed")
    arguments = parser.parse_args()
    os.environ |= KEEP_MEMORY | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "ACCELERATE_USE_CPU": "true"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl", "peft", "transformers", "distill.stages.train", "distill.stages.evaluate"])
    with ProcessPoolExecutor(arguments.processes, mp_context=context, max_tasks_per_child=1) as pool:
        seeds = [TUNING_SEED] if arguments.tune else arguments.seeds
        counts = sorted({1} | {METHODS[name].samples_per_prompt for name in arguments.methods})
        for done in as_completed([pool.submit(share, seed, samples) for seed in seeds for samples in counts]):
            done.result()
        rates: tuple[float | None, ...] = LEARNING_RATES if arguments.tune else (None,)
        jobs = [pool.submit(run, name, seed, rate) for rate in rates for seed in seeds for name in [*arguments.methods, "base"]]
        for job in as_completed(jobs):
            record = job.result()
            print(f"{record['method']:<13} seed {record['seed']} lr {record['learning_rate'] or 0:g}: {record['accuracy']:.3f}", flush=True)
    if not arguments.tune:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RUNS.glob("seed*/*/record.json"))]
        found = [record for record in found if record["seed"] != TUNING_SEED]
        write([*(_kept(found) if arguments.keep else []), *found])


def share(seed: int, samples: int) -> None:
    """Makes the prompts and curated traces that all methods of a seed have in common."""
    name = f"shared{samples}"
    _stages(_recipe(name, Method("shared", {}, 1e-3, samples_per_prompt=samples), seed, None), SHARED_STAGES)


def run(name: str, seed: int, learning_rate: float | None) -> dict[str, Any]:
    """Trains and measures one method on one seed, or finds it done."""
    method = METHODS.get(name, BASE)
    place = RUNS / f"seed{seed}" / (name if learning_rate is None else f"{name}-{learning_rate:g}")
    record = place / "record.json"
    if not record.exists():
        _copy_shared(place, seed, method.samples_per_prompt)
        recipe = _recipe(place.name, method, seed, learning_rate)
        start = _recipe(f"{place.name}/start", METHODS["sft"], seed, WARM_START_RATE, steps=method.warm_start) if name == "live" else None
        if start is not None:
            _copy_shared(run_dir(start), seed, 1)
            _stages(start, ("train", "export"))
        _stages(recipe, [stage for stage in stages_of(recipe) if stage in ("score", "train") and name != "base"])
        run_rounds(recipe)
        _stages(recipe, ("evaluate",))
        record.write_text(json.dumps(_record(recipe, name, seed, learning_rate)), encoding="utf-8")
    return dict(json.loads(record.read_text(encoding="utf-8")))


def _kept(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of earlier runs, of other machines perhaps, that have no successor here."""
    earlier: list[dict[str, Any]] = json.loads(OUT.with_suffix(".json").read_text(encoding="utf-8"))
    again = {(record["method"], record["seed"]) for record in found}
    return [record for record in earlier if (record["method"], record["seed"]) not in again]


def _copy_shared(place: Path, seed: int, samples: int) -> None:
    for stage in SHARED_STAGES:
        shutil.copytree(RUNS / f"seed{seed}" / f"shared{samples}" / FOLDERS[stage], place / FOLDERS[stage], dirs_exist_ok=True)


def _stages(recipe: Recipe, names: Sequence[str]) -> None:
    for name in names:
        run_stage(name, recipe)


def _recipe(name: str, method: Method, seed: int, learning_rate: float | None, steps: int | None = None) -> Recipe:
    """The recipe of a method, written as a file that can be run by hand."""
    place = RUNS / f"seed{seed}" / name
    arguments = {
        "learning_rate": learning_rate or method.learning_rate,
        "max_steps": steps or (STEPS - method.warm_start if method is METHODS["live"] else method.warm_start or STEPS),
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "logging_steps": 8,
    }
    sampling = {"max_new_tokens": 192, "temperature": 1.0, "top_p": 1.0, "batch_size": 128}
    keys: dict[str, Any] = {
        "name": "compare",
        "run_dir": str(place),
        "seed": seed,
        "teacher": {"model": "embedded:teacher", "dtype": "float32"},
        "student": {"model": "embedded:student", "dtype": "float32", "adapter": {"type": "lora", "r": 32, "lora_alpha": 64}},
        "prompts": {"source": "embedded:arithmetic", "max_prompts": BUDGET, "heldout_size": HELDOUT},
        "generate": {"samples_per_prompt": method.samples_per_prompt, **sampling},
        "train": {"max_length": 256, "trainer_args": arguments},
        "evaluate": {"models": ["base" if method is BASE else "student"], "max_new_tokens": 192, "batch_size": 200},
        "export": {"parity_prompts": 1} if steps else None,
    }
    if steps:
        keys["evaluate"] = None
    if "rounds" in method.keys:
        keys["rollouts"] = {**sampling, "prompts_per_round": BUDGET}
        keys["rollouts"]["trainer_args"] = {
            "max_steps": (STEPS - method.warm_start) // method.keys["rounds"],
            "learning_rate": arguments["learning_rate"],
            "warmup_steps": 2,
        }
        arguments["learning_rate"] = WARM_START_RATE
    if method is METHODS["live"]:
        del keys["generate"]
        keys["student"]["model"] = str(place / "start" / FOLDERS["export"] / "model")
    for section, values in method.keys.items():
        keys[section] = {**keys.get(section, {}), **values} if isinstance(values, dict) else values
    path = place.with_name(place.name + ".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(keys, indent=2), encoding="utf-8")  # JSON is YAML
    return load_recipe(path)


def _record(recipe: Recipe, name: str, seed: int, learning_rate: float | None) -> dict[str, Any]:
    """What a run found and cost, from its manifests."""
    made = [read_manifest(path.parent) for path in sorted(run_dir(recipe).rglob(MANIFEST)) if "start/prompts" not in str(path)]
    right = {row["prompt_id"]: row["correct"] is True for row in read_rows(folder(recipe, "evaluate"), "answers")}
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for manifest in made:
        by_stage.setdefault(manifest.stage, []).append(manifest.facts)
    live = [facts for facts in by_stage.get("train", []) if facts["method"] == "on_policy"]  # the teacher reads what is trained on
    learning = by_stage.get("train", []) + by_stage.get("score", []) + by_stage.get("rollouts", [])
    return {
        "method": name,
        "seed": seed,
        "learning_rate": learning_rate,
        "accuracy": float(np.mean(list(right.values()))),
        "right": right,
        "teacher_tokens": sum(facts["tokens"] for facts in [*by_stage.get("generate", [])[:1], *by_stage.get("score", []), *live]),
        "bytes": sum(facts["bytes"] for facts in by_stage.get("score", [])),
        "positions": sum(facts["positions"] for facts in by_stage.get("score", [])),
        "wall_s": sum(facts["wall_s"] for facts in learning),
        "peak_memory_gib": max((facts["peak_memory_gib"] for facts in by_stage.get("train", [])), default=None),
    }


def write(records: list[dict[str, Any]]) -> None:
    """Writes the table, the figure and the numbers behind them."""
    names = [name for name in ["base", *METHODS] if any(record["method"] == name for record in records)]
    by_method = {name: {r["seed"]: r for r in records if r["method"] == name} for name in names}
    numbers = [{name: value for name, value in record.items() if name != "right"} for record in records]
    OUT.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    rows = [_row(name, by_method) for name in names]
    header = ("method", "seeds", "accuracy", "less SFT", "teacher tokens", "bytes stored", "bytes a token", "seconds", "GiB")
    lines = [" | ".join(header), " | ".join(["---"] + ["---:"] * (len(header) - 1)), *(" | ".join(row) for row in rows)]
    claims = [
        _claim("KD from 50 draws, less KD from the full distribution", by_method, "kd_sampled", "kd_full"),
        _claim(
            "Eight on-policy rounds of 3 rollouts a prompt, less SFT on 34 traces a prompt, 160,000 teacher tokens each",
            by_method,
            "rounds_fresh",
            "sft_34",
        ),
        _claim("Four of one rollout a prompt, less SFT on 6 traces a prompt, 30,000 each", by_method, "rounds", "sft_six"),
        _claim("A live teacher, less SFT on 34 traces a prompt, 160,000 each", by_method, "live", "sft_34"),
        _claim("Eight rounds, less a live teacher, 160,000 each", by_method, "rounds_fresh", "live"),
    ]
    seeds = sorted({record["seed"] for record in records})
    text = PAGE.format(
        table="\n".join(f"| {line} |" for line in lines),
        claims="\n".join(f"- {claim}" for claim in claims if claim),
        budget=BUDGET,
        steps=STEPS,
        batch=BATCH,
        heldout=HELDOUT,
        seeds=len(seeds),
        date=datetime.now(UTC).date().isoformat(),
        warm_start=WARM_START_RATE,
        rates=", ".join(f"{name} {METHODS[name].learning_rate:g}" for name in names if name in METHODS),
    )
    OUT.with_suffix(".md").write_text(text, encoding="utf-8")
    _figure(names, by_method)
    print(text)


PAGE = """# What each method recovers

`python scripts/compare_methods.py`: the embedded pair, {budget} prompts with one trace of the teacher each (those that pass
curation), {steps} optimizer steps of {batch} rows, LoRA of rank 32, up to {seeds} seeds (other prompts, traces, held-out prompts and
initial weights in each), {heldout} held-out prompts answered greedily. {date}, 2 CPU cores, one thread a run.

![accuracies with intervals](compare_methods.svg)

{table}

Intervals are 95 %, from Student's t over the seeds; *less SFT* is paired by seed. *Teacher tokens* are those the teacher wrote or
read; *bytes a token*, of the supervised tokens that were scored; *seconds* of scoring, rollouts and training, comparable only between
rows of one machine (see the log); *GiB*, the most resident memory of the process, which for most methods has held the teacher
before the student.

{claims}

All have the same number of steps, at which SFT begins to learn its few traces by heart; on the seeds for tuning, SFT stopped at
half of them was about level with KD. Learning rates: {rates}; of warm starts {warm_start:g}. How they were chosen, and what the
numbers say: `compare_methods_log.md`.
"""


def _values(by_method: dict[str, dict[int, dict[str, Any]]], name: str, key: str = "accuracy") -> np.ndarray:
    return np.array([record[key] for _, record in sorted(by_method[name].items())], dtype=np.float64)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds, and its 95 % interval."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    low, high = stats.t.interval(0.95, len(values) - 1, mean, max(stats.sem(values), 1e-12))
    return mean, float(low), float(high)


def _row(name: str, by_method: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    mean, low, high = _interval(_values(by_method, name))
    less = ""
    if name != "sft" and "sft" in by_method:
        less = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * part for part in _difference(by_method, name, "sft")))
    trained = name != "base"
    stored, tokens = _values(by_method, name, "bytes").mean(), _values(by_method, name, "positions").mean()
    return [
        METHODS[name].label if trained else BASE.label,
        str(len(by_method[name])),
        f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
        less,
        f"{_values(by_method, name, 'teacher_tokens').mean():,.0f}" if trained else "",
        f"{stored:,.0f}" if stored else "",
        f"{stored / tokens:.1f}" if stored else "",
        f"{_values(by_method, name, 'wall_s').mean():.0f}" if trained else "",
        f"{_values(by_method, name, 'peak_memory_gib').mean():.2f}" if trained else "",
    ]


def _difference(by_method: dict[str, dict[int, dict[str, Any]]], name: str, other: str) -> tuple[float, float, float]:
    """Mean difference in accuracy, paired by seed, and its 95 % interval."""
    seeds = sorted(set(by_method[name]) & set(by_method[other]))
    return _interval(np.array([by_method[name][seed]["accuracy"] - by_method[other][seed]["accuracy"] for seed in seeds]))


def _claim(text: str, by_method: dict[str, dict[int, dict[str, Any]]], name: str, other: str) -> str:
    if not {name, other} <= set(by_method):
        return ""
    return text + ": {:+.1f} [{:+.1f}, {:+.1f}] points.".format(*(100 * part for part in _difference(by_method, name, other)))


def _figure(names: list[str], by_method: dict[str, dict[int, dict[str, Any]]]) -> None:
    """A point a method with its interval, and the seeds beside it."""
    figure = Figure(figsize=(7, 0.42 * len(names) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(reversed(names)):
        mean, low, high = _interval(100 * _values(by_method, name))
        axes.plot([low, high], [place, place], color="#2f7ed8", linewidth=2)
        axes.plot(100 * _values(by_method, name), [place - 0.2] * len(by_method[name]), ".", color="#9aa3ad", markersize=5)
        axes.plot([mean], [place], "o", color="#2f7ed8")
    axes.set_yticks(range(len(names)), [METHODS[name].label if name in METHODS else BASE.label for name in reversed(names)])
    axes.set(xlabel="held-out prompts answered correctly, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
