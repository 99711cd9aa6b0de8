"""The rows of all cards as Markdown: a heading for each section, a table for each card, the newest row of each case."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpu_sections.frame import CUT, ITSELF, Row, Run, Section

_COMMAND = "python scripts/bench_gpu.py"
_UNITS = {"ms": "ms", "s": "s", "gib": "GiB", "mib": "MiB", "gb": "GB", "nats": "nats", "percent": "%", "tokens": "tokens"}
_NAMES = {"trl": "TRL", "sft": "SFT", "kd": "KD", "nll": "NLL", "lora": "LoRA", "gib": "GiB", "gpu": "GPU"}
_MOST_COLUMNS = 12
_ABOUT = """Made by the command above, which measures every case beside its peer in one run. Ratios (*of ...*) are multiples of that
peer's figure; peaks are those of torch's allocator, in GiB. A card's rows are the newest of each case; a later run that had no
time for a case keeps the earlier row, and the numbers of runs stand under *Runs* at the end."""


class _Kept(NamedTuple):
    row: Row
    run: int
    """Place of its run in the file, from 1."""


def write_table(path: Path, sections: Sequence[Section], runs: Sequence[Run]) -> None:
    """Writes the document that shows all runs.

    Args:
        path: Where it goes.
        sections: In the order in which they are shown.
        runs: Of all cards, oldest first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# What was measured on GPUs", f"```\n{_COMMAND}\n```"]
    cards = dict.fromkeys(run.card for run in runs if run.rows)
    if not cards:
        parts.append(f"No card yet: nothing was measured. `{_COMMAND}` on a machine with a GPU writes this file.")
    else:
        parts.append(_ABOUT)
    for section in sections if cards else ():
        parts.append(f"## {section.title[0].upper()}{section.title[1:]} (`{section.name}`)")
        for card in cards:
            parts += [f"### {_cell(card)}", _table(_newest(section.name, card, runs))]
    if cards:
        parts += ["## Runs", _runs(runs)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _newest(section: str, card: str, runs: Sequence[Run]) -> list[_Kept]:
    """The rows to be shown, in the order in which their cases were first seen."""
    kept: dict[str, _Kept] = {}
    for number, run in enumerate(runs, 1):
        rows = [row for row in run.rows if row.section == section] if run.card == card else []
        if rows:
            kept.pop(ITSELF, None)  # what broke off an earlier run says nothing of this one
        for row in rows:
            # To have had no time for a case is no news of it.
            if row.problem != CUT or row.case not in kept:
                kept[row.case] = _Kept(row, number)
    return list(kept.values())


def _table(kept: Sequence[_Kept]) -> str:
    """A row for each case; the runs are named where there are several."""
    if not kept:
        return "not measured yet"
    names = list(dict.fromkeys(name for row, _ in kept for name in row.figures))
    if len(names) > _MOST_COLUMNS:
        kept, names = [_in_words(each) for each in kept], []
    several = len({run for _, run in kept}) > 1
    problems = any(row.problem for row, _ in kept)
    figures_or_why = "found, or why not" if not names else "why not"
    heads = ["case", *map(_head, names), *([figures_or_why] if problems else []), *(["run"] if several else [])]
    whole = {name: all(float(row.figures.get(name, 0)).is_integer() for row, _ in kept) for name in names}
    lines = [_line(heads), _line(["---", *(["---:"] * len(names)), *(["---"] if problems else []), *(["---:"] if several else [])])]
    for row, run in kept:
        figures = [_number(row.figures[name], whole[name]) if name in row.figures else "" for name in names]
        lines.append(_line([row.case, *figures, *([row.problem or ""] if problems else []), *([str(run)] if several else [])]))
    return "\n".join(lines)


def _in_words(kept: _Kept) -> _Kept:
    """A row whose figures are words, for a section whose cases found too different things for columns."""
    row = kept.row
    found = "; ".join(f"{_head(name)} {_number(value, float(value).is_integer())}" for name, value in row.figures.items())
    return _Kept(replace(row, figures={}, problem=row.problem or found), kept.run)


def _runs(runs: Sequence[Run]) -> str:
    """Where and with what everything was measured; runs without rows are left out."""
    heads = ["run", "card", "memory, GiB", "driver", "date", "revision", "versions"]
    lines = [_line(heads), _line(["---:", "---", "---:", *(["---"] * 4)])]
    for number, run in enumerate(runs, 1):
        if run.rows:
            memory = f"{run.memory_gib:.1f}" if run.memory_gib else ""
            lines.append(_line([str(number), run.card, memory, run.driver, run.date, run.git_revision or "", _versions(run.versions)]))
    return "\n".join(lines)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _head(name: str) -> str:
    """A figure's name as the head of a column: `step_ms` is "step, ms", `tokens_per_s` "tokens/s", `tokens_in_8_gib` "tokens in 8 GiB",
    `step_of_trl` "step, of TRL".
    """
    figure, of, peer = f"_{name}".rpartition("_of_")
    figure = (figure if of else name).strip("_")
    match = re.fullmatch(rf"(.+)_({'|'.join(_UNITS)})", figure)
    if "_per_" in figure:
        figure = "/".join(_words(part) for part in figure.split("_per_"))
    elif match and "_in_" not in figure:
        figure = f"{_words(match[1])}, {_UNITS[match[2]]}"
    else:
        figure = _words(figure)
    return ", ".join(part for part in (figure, f"of {_words(peer)}" if of else "") if part)


def _words(name: str) -> str:
    return " ".join(_NAMES.get(word, word) for word in name.split("_"))


def _number(value: float, whole: bool) -> str:
    """At least three digits that count, thousands separated; no decimals where the whole column has none."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if whole or size >= 1000:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    decimals = 1 if size >= 100 else 2 if size >= 1 else min(6, 2 - math.floor(math.log10(size)))
    text = f"{value:.{decimals}f}"
    return text if float(text) else "0"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """Text that neither ends a cell nor a line."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
