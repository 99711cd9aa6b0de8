"""Kills and damages runs on the embedded pair, and shows whether any of it goes unnoticed: exit code 1 if so.

    python scripts/torment.py kills              # 200 SIGKILLs: before and after each renaming of each stage, and at random moments
    python scripts/torment.py damage             # 260 damaged files of finished and half-finished runs
    python scripts/torment.py damage --count 40 --stages score train

The run has all stages and two on-policy rounds; score and train are killed in two processes, too. Commands run in processes forked
from one that has imported everything, on one CPU core: about 6 minutes for the kills, 8 for the damage.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

SEED = 20261126


def main() -> None:
    """Torments as the command line asks for, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "damage"))
    parser.add_argument("--count", type=int, default=None, help="kills, or damaged files")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--stages", nargs="*", default=[], help="only these")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing more after so long; the table is of what was done")
    parser.add_argument("--keep", type=Path, help="folder for the runs, which are kept and used again; else a temporary one")
    asked = parser.parse_args()
    # Imported here: a worker that checks answers imports this file, and nothing of this.
    from torment_parts import children, damage, kills

    until_s = time.monotonic() + 60 * asked.minutes
    children.prepare()
    place = asked.keep or Path(tempfile.mkdtemp(prefix="torment-"))
    faults: list[tuple[str, ...]]
    try:
        if asked.what == "kills":
            rows = kills.torment(place, asked.count or 200, asked.seed, asked.stages, until_s)
            faults = [row for row in rows if row[-1] != kills.EQUAL]
            rows = [("step", "kills", "end"), *rows, ("all", str(sum(int(row[1]) for row in rows)), f"{len(faults)} faults")]
        else:
            rows, faults = damage.torment(place, asked.count or 260, asked.seed, asked.stages, until_s)
    finally:
        if asked.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for fault in faults:
        print("FAULT", *fault, sep="  ")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
