"""`distill compare`: finished runs beside each other, with the keys in which their recipes differ; a sweep's trainings, say."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from distill.errors import MissingStageError, visible
from distill.measure.intervals import Estimate
from distill.reporting.measured import percent_text
from distill.reporting.summary import RunSummary, summarise
from distill.run.files import write_text
from distill.run.log import say
from distill.stages import FOLDERS, RECIPE, SWEEP

_NOT_COMPARED = frozenset({"run_dir", "name", "inputs", "inputs.run", "inputs.until"})
NOT_THERE = "not there yet"


class Compared(NamedTuple):
    """A run among others."""

    name: str
    keys: dict[str, Any]
    """All of its recipe, by their dotted names."""
    found: RunSummary


def compare(places: Sequence[Path], *, file: Path | None = None) -> str:
    """The table of runs as text, the best student first; says it, and writes it as Markdown with a picture beside it if asked.

    Args:
        places: Folders of runs; of one that holds no run itself all runs in it, as in a sweep's.
        file: For the Markdown.

    Raises:
        MissingStageError: there is no run in one of them.
    """
    runs = sorted((_read(run) for place in places for run in _runs_in(place)), key=lambda run: -(_accuracy(run).value or -1.0))
    columns = ["run", *differing(runs), "training loss", "accuracy", "interval", "gap recovered"]
    rows = [_row(run, columns) for run in runs]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(visible, row))
    text = io.StringIO()
    Console(file=text, width=160, no_color=True).print(shown, markup=False)
    table = "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
    say(table, result=True)
    if file is not None:
        write_text(file, _markdown(columns, rows, _plot(runs, file)))
        say(f"\ncompare   {file}", result=True)
    return table


def _runs_in(place: Path) -> list[Path]:
    if (place / RECIPE).is_file():
        return [place]
    found = sorted(run for run in place.glob("*") if (run / RECIPE).is_file())
    if not found:
        raise MissingStageError(f"{place}: holds no run that has begun. Give the folders of runs, or of a sweep, e.g. runs/x/sweep.")
    return found


def _read(run: Path) -> Compared:
    keys = dict(_flat(YAML(typ="safe").load((run / RECIPE).read_text(encoding="utf-8"))))
    folders = {stage: run / FOLDERS[stage] for stage in ("train", "evaluate")}
    return Compared(run.name, keys, summarise(folders, [], {}))


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def differing(runs: Sequence[Compared]) -> list[str]:
    """The dotted keys that do not have the same value in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    return [key for key in keys if key not in _NOT_COMPARED and len({json.dumps(run.keys.get(key)) for run in runs}) > 1]


def _accuracy(run: Compared) -> Estimate:
    return next((result.accuracy for result in run.found.results if result.role == "student"), Estimate(None, None, None))


def _row(run: Compared, columns: Sequence[str]) -> list[str]:
    accuracy, gap, trained = _accuracy(run), run.found.gap, run.found.manifests.get("train")
    loss = None if trained is None else trained.facts.get("train_loss")
    measured = {
        "run": run.name,
        "training loss": NOT_THERE if loss is None else f"{loss:.4f}",
        "accuracy": NOT_THERE if accuracy.value is None else percent_text(accuracy.value),
        "interval": "" if accuracy.low is None else f"[{percent_text(accuracy.low)}, {percent_text(accuracy.high)}]",
        "gap recovered": "" if gap is None or gap.value is None else f"{gap.value:.2f}",
    }
    return [measured[column] if column in measured else _value(run.keys.get(column)) for column in columns]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], picture: Path | None) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(visible(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    lines = ["# Comparison", "", line(columns), line(["---"] * len(columns)), *map(line, rows), ""]
    return "\n".join([*lines, *([f"![accuracy]({picture.name})", ""] if picture else [])])


def _plot(runs: Sequence[Compared], file: Path) -> Path | None:
    """A picture of the accuracies beside the Markdown; null where none was measured."""
    from distill.reporting.plots import runs_bars

    measured = [(run.name, _accuracy(run)) for run in runs if _accuracy(run).value is not None]
    if not measured:
        return None
    picture = file.with_suffix(".svg")
    write_text(picture, runs_bars(measured))
    return picture


def compare_folders(places: Sequence[Path]) -> None:
    """What the command does: the table; of a sweep also `comparison.md` in its folder."""
    is_sweep = len(places) == 1 and places[0].name == SWEEP
    compare(places, file=places[0] / "comparison.md" if is_sweep else None)
