"""`distill compare`: finished runs beside each other, with other teachers, students, methods, or the trainings of a sweep.

How the students do on the held-out prompts that they share is found in one way for all (`reporting.beside`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from distill.data.catalogue import UNKNOWN
from distill.errors import MissingStageError, visible
from distill.measure.between import Between, Lead
from distill.measure.intervals import Estimate
from distill.reporting.beside import About, Answered, about, compared, read_answered
from distill.reporting.costs import amount_object, amount_text
from distill.reporting.measured import percent_text
from distill.reporting.prices import Rates, rates_of
from distill.reporting.summary import RunSummary, summarise
from distill.run.files import write_text
from distill.run.log import say
from distill.stages import RECIPE, SWEEP, folders_in

_NOT_COMPARED = frozenset({"run_dir", "name", "inputs", "inputs.run", "inputs.until"})
_ABOUT = ("teacher", "student", "method", "terms")
_FEW = 6
"""Keys that may be columns; more stand in a table of their own."""
NOT_THERE = "not there yet"


class Compared(NamedTuple):
    """A run among others."""

    name: str
    keys: dict[str, Any]
    """All of its recipe, by their dotted names."""
    found: RunSummary
    about: About
    answered: Answered | None
    """Null where its student was not measured, or its answers are not kept."""


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other, the best student first."""

    runs: list[Compared]
    pairs: Between | None
    """On the held-out prompts that they share; null where fewer than two have answers."""
    notes: list[str]

    def as_object(self) -> dict[str, Any]:
        """For machines."""
        keys = differing(self.runs)
        return {
            "runs": [
                {
                    "run": run.name,
                    **run.about._asdict(),
                    "cost": amount_object(run.about.cost),
                    "accuracy": _accuracy(run)._asdict(),
                    "gap_recovered": None if run.found.gap is None else run.found.gap._asdict(),
                    "keys": {key: run.keys.get(key) for key in keys},
                }
                for run in self.runs
            ],
            "shared": None
            if self.pairs is None
            else {
                "prompts": self.pairs.num_prompts,
                "confidence": self.pairs.confidence,
                "accuracy": {name: each._asdict() for name, each in self.pairs.accuracies.items()},
                "leads": [lead._asdict() | {"difference": lead.difference._asdict()} for lead in self.pairs.leads],
            },
            "notes": self.notes,
        }


def compare(places: Sequence[Path], *, file: Path | None = None, rates: Rates | None = None, as_json: bool = False) -> str:
    """The table of runs as text, the best student first; says it, and writes it as Markdown with a picture beside it if asked.

    Args:
        places: Folders of runs; of one that holds no run itself all runs in it, as in a sweep's.
        file: For the Markdown.
        rates: What costs are counted with; null: the kit's prices.
        as_json: Say one JSON object instead.

    Raises:
        MissingStageError: there is no run in one of them.
        DataError: their students can't be compared.
    """
    found = comparison(places, rates or rates_of())
    runs = found.runs
    told = [column for column in _ABOUT if len({getattr(run.about, column) for run in runs} - {UNKNOWN}) > 1]
    keys = [key for key in differing(runs) if key not in ("teacher.model", "student.model", "train.method") or not told]
    columns = ["run", *(keys if len(keys) <= _FEW else []), *told, "training loss", "accuracy", "interval", "gap recovered"]
    columns += ["tokens an answer", "cost"]
    rows = [_row(run, columns) for run in runs]
    table = _printed(columns, rows)
    if len(keys) > _FEW:
        table += "\n\n" + _printed(
            ["key", *(run.name for run in runs)], [[key, *(_value(run.keys.get(key)) for run in runs)] for key in keys]
        )
    lines = [*_same(runs, told), *_pairs_text(found.pairs), *found.notes]
    table = "\n".join([table, "", *map(visible, lines)])
    say(json.dumps(found.as_object(), indent=2) if as_json else table, result=True)
    if file is not None:
        write_text(file, _markdown(columns, rows, lines, _plot(runs, file)))
        if not as_json:
            say(f"\ncompare   {file}", result=True)
    return table


def comparison(places: Sequence[Path], rates: Rates) -> Comparison:
    """What the runs in some folders are beside each other; raises as `compare`."""
    folders = list(dict.fromkeys(run.resolve() for place in places for run in _runs_in(place)))
    names = _names(folders)
    read = [_read(run, name, rates) for run, name in zip(folders, names, strict=True)]
    runs = sorted(read, key=lambda run: -(_accuracy(run).value or -1.0))
    answered = [run.answered for run in runs if run.answered is not None]
    silent = [run.name for run in runs if run.answered is None and "evaluate" in run.found.manifests]
    notes = [f"{', '.join(silent)}: no answers that were judged are kept, so that no prompts can be paired"] if silent else []
    if len(answered) < 2:
        return Comparison(runs, None, notes)
    pairs, more = compared(answered)
    return Comparison(runs, pairs, [*notes, *more])


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of runs: those of their folders, with as much before them as tells them apart."""
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def _runs_in(place: Path) -> list[Path]:
    if (place / RECIPE).is_file():
        return [place]
    found = sorted(run for run in place.glob("*") if (run / RECIPE).is_file())
    if not found:
        raise MissingStageError(f"{place}: holds no run that has begun. Give the folders of runs, or of a sweep, e.g. runs/x/sweep.")
    return found


def _read(run: Path, name: str, rates: Rates) -> Compared:
    keys = dict(_flat(YAML(typ="safe").load((run / RECIPE).read_text(encoding="utf-8"))))
    folders, rounds = folders_in(run)
    found = summarise(folders, rounds, {})
    made = found.manifests.get("evaluate")
    answered = None if made is None else read_answered(name, folders["prompts"], folders["evaluate"], made)
    return Compared(name, keys, found, about(found, rates), answered)


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
        **{column: getattr(run.about, column) for column in _ABOUT},
        "tokens an answer": "" if run.about.tokens is None else f"{run.about.tokens:,.0f}",
        "cost": amount_text(run.about.cost),
        "training loss": NOT_THERE if loss is None else f"{loss:.4f}",
        "accuracy": NOT_THERE if accuracy.value is None else percent_text(accuracy.value),
        "interval": "" if accuracy.low is None else f"[{percent_text(accuracy.low)}, {percent_text(accuracy.high)}]",
        "gap recovered": "" if gap is None or gap.value is None else f"{gap.value:.2f}",
    }
    return [measured[column] if column in measured else _value(run.keys.get(column)) for column in columns]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _printed(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        shown.add_column(visible(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(visible, row))
    text = io.StringIO()
    Console(file=text, width=160, no_color=True).print(shown, markup=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def _same(runs: Sequence[Compared], told: Sequence[str]) -> list[str]:
    """What all have alike, in a line."""
    alike = {column: {getattr(run.about, column) for run in runs} - {UNKNOWN} for column in _ABOUT if column not in told}
    known = ", ".join(f"{column} {min(values)}" for column, values in alike.items() if values)
    return [f"all: {known}"] if known else []


def _pairs_text(pairs: Between | None) -> list[str]:
    """Who is better on the shared prompts, as far as that can be said."""
    if pairs is None:
        return []
    basis = f"{100 * pairs.confidence:g} % intervals, paired bootstrap over {pairs.num_prompts:,} held-out prompts that all share"
    shown = ", ".join(f"{name} {percent_text(found.value)}" for name, found in pairs.accuracies.items())
    many = f"; p-values are held against {1 - pairs.confidence:.2g} / {len(pairs.leads)}" if len(pairs.leads) > 1 else ""
    return [f"on these: {shown} ({basis}{many})", *map(_lead_text, pairs.leads)]


def _lead_text(lead: Lead) -> str:
    value, low, high = (100 * (number or 0.0) for number in lead.difference)
    span = f"{value:.1f} points [{low:.1f}, {high:.1f}], p = {lead.by_chance:.2g}"
    if lead.is_beyond_noise:
        return f"{lead.better} is better than {lead.other} by {span}"
    return f"no difference between {lead.better} and {lead.other} beyond the noise ({span})"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], told: Sequence[str], picture: Path | None) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(visible(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    lines = [
        "# Comparison",
        "",
        line(columns),
        line(["---"] * len(columns)),
        *map(line, rows),
        "",
        *(f"- {visible(each)}" for each in told),
        "",
    ]
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


def compare_folders(places: Sequence[Path], rates: Rates | None = None, *, as_json: bool = False) -> None:
    """What the command does: the table; of a sweep also `comparison.md` in its folder."""
    is_sweep = len(places) == 1 and places[0].name == SWEEP
    compare(places, file=places[0] / "comparison.md" if is_sweep else None, rates=rates, as_json=as_json)
