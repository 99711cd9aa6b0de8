"""Everything that needs a GPU, measured by one command: rows in bench_gpu.json, the tables of all cards in bench_gpu.md.

    python scripts/bench_gpu.py                                    # all sections, 8 minutes on one H100
    python scripts/bench_gpu.py --only kd_step loss --minutes 3    # some of them
    python scripts/bench_gpu.py --rehearse                         # tiny shapes on a CPU: does every section run?

Nothing is downloaded: models, rows and targets are random, of real sizes. Each row is on disk as soon as it is measured; a case
that fails is a row with its reason, and the next one goes on. Sections come in the order of their importance; each has a share
of the time, and what doesn't fit into it is a row that says so. Peers are measured in the same run, so ratios hold whatever
the card; medians of several steps after warm-up; peaks are those of torch's allocator, in GiB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from gpu_sections import loss, memory, reading, tests, training, writing
from gpu_sections.frame import Row, Section, load_runs, new_run, run_sections, save_runs
from gpu_sections.table import write_table

OUT = Path(__file__).resolve().with_suffix(".json")
REHEARSAL = OUT.parent.parent / "runs" / "bench_gpu_rehearsal.json"

# Shares: seconds on an H100 or H200 beside a slow processor, and some more.
SECTIONS = [
    Section("kd_step", "a KD step against an SFT step", 72, training.kd_against_sft),
    Section("trl", "ours against TRL's SFTTrainer", 45, training.ours_against_trl),
    Section("tests", "tests marked gpu", 120, tests.cases),
    Section("loss", "the loss alone", 45, loss.cases),
    Section("longest", "the longest sequence under a limit of memory", 150, memory.cases),
    Section("score", "score against the bare forward", 55, reading.cases),
    Section("generate", "generate against the bare one", 30, writing.cases),
    Section("fp16", "fp16 as a T4 would have it", 16, training.old_chips),
]


def main() -> None:
    """Runs the sections asked for, and writes the tables."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=f"only these: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=8, help="for all sections together (default 8)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU; rows go to runs/, not beside this file")
    parser.add_argument("--out", type=Path, help="where the rows go; the table lies beside them, as .md")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("error: no CUDA device is seen by torch. `--rehearse` runs every section in a tiny shape on a CPU.")
    device = torch.device("cpu" if arguments.rehearse else "cuda:0")
    out = arguments.out or (REHEARSAL if arguments.rehearse else OUT)
    runs = load_runs(out)
    run = new_run(device)
    runs.append(run)

    def keep(row: Row) -> None:
        run.rows.append(row)
        save_runs(out, runs)

    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    wanted = [section for section in SECTIONS if arguments.only is None or section.name in arguments.only]
    run_sections(wanted, device, arguments.rehearse, arguments.minutes, keep)
    write_table(out.with_suffix(".md"), SECTIONS, runs)
    failed = [row for row in run.rows if row.failed]
    measured = sum(row.problem is None for row in run.rows)
    print(f"{measured} of {len(run.rows)} cases measured, {len(failed)} failed or cut: {out.with_suffix('.md')}")
    if arguments.rehearse and failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
