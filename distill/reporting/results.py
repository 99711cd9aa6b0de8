"""What was measured, as tables of text: a table a held-out set, what tags come to, how labels are found."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from distill.measure.intervals import Estimate
from distill.measure.labels import of_labels
from distill.reporting.alike import alike_texts, table_text
from distill.reporting.measured import NOT_MEASURED, ModelResult, SetResults, percent_text
from distill.reporting.summary import RunSummary, parameters_text

_MOST_LABELS = 25  # in a table or a picture
_LONGEST_LABEL = 60  # characters
_NONE = "none"


class Results(NamedTuple):
    """The table of a held-out set as text."""

    found: SetResults
    title: str
    """Empty for the run's own."""
    columns: list[str]
    rows: list[list[str]]


def results_tables(summary: RunSummary) -> list[Results]:
    """A table a set, a row a model; the run's own first."""
    return [_results(found) for found in summary.sets]


def _results(found: SetResults) -> Results:
    further = list(dict.fromkeys(metric for result in found.results for metric in _shown(result.more)))
    has_form = any(result.format_rate is not None for result in found.results)
    columns = ["model", "accuracy" if found.samples_per_prompt == 1 else f"avg@{found.samples_per_prompt}", "interval", *further]
    columns += ["tokens an answer", "truncated", "unjudged", *(["in form"] if has_form else []), *(["parameters"] if found.is_main else [])]
    title = "" if found.is_main else f"{found.name}: {found.num_prompts:,} prompts, {found.samples_text}"
    return Results(found, title, columns, [_result(result, further, has_form, found.is_main) for result in found.results])


def _shown(measures: Iterable[str]) -> list[str]:
    """Of several pass@k the last, which is of all samples."""
    passes = [metric for metric in measures if metric.startswith("pass@")]
    return [metric for metric in measures if metric not in passes[:-1]]


def _result(result: ModelResult, further: Sequence[str], has_form: bool, is_main: bool) -> list[str]:
    return [
        result.role,
        _accuracy_text(result),
        f"[{percent_text(result.accuracy.low)}, {percent_text(result.accuracy.high)}]",
        *(percent_text(result.more[metric].value) if metric in result.more else "" for metric in further),
        "" if result.mean_tokens is None else f"{result.mean_tokens:.0f}",
        percent_text(result.truncation_rate),
        percent_text(result.unjudged_rate),
        *([percent_text(result.format_rate)] if has_form else []),
        *([parameters_text(result.parameters)] if is_main else []),
    ]


def results_text(summary: RunSummary) -> str:
    """The tables, the differences and the gaps as plain text for a terminal."""
    if not summary.sets and summary.alike is None and not summary.wins:
        return f"{NOT_MEASURED}: this recipe leaves the evaluation out\n"
    return "\n\n".join([*map(_set_text, results_tables(summary)), *map(_win_text, win_tables(summary)), *alike_texts(summary.alike)]) + "\n"


def _set_text(results: Results) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(results.columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in results.rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=120, no_color=True).print(table)
    table_text = "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
    found, title = results.found, [results.title, ""] if results.title else []
    said = [*found.difference_texts, found.gap_text, found.doubt_text, found.left_out_text]
    return "\n".join([*title, table_text, "", *filter(None, said)])


def _win_text(table: TagTable) -> str:
    return table_text(table.title, table.columns, table.rows).rstrip("\n")


def _accuracy_text(result: ModelResult) -> str:
    """The accuracy; where answers could not be judged, from all of them wrong to all of them right."""
    least, most = percent_text(result.accuracy.value), percent_text(result.accuracy_at_most)
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


class TagTable(NamedTuple):
    """The accuracy on the prompts of each tag of a set, or what a judge prefers."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tag_tables(summary: RunSummary) -> list[TagTable]:
    """A table for each set whose prompts have tags."""
    return [_tags(found) for found in summary.sets if found.tags]


def win_tables(summary: RunSummary) -> list[TagTable]:
    """How often a judge prefers the answers of one model to those of another, where one was asked."""
    columns = ["answers of", "against", "preferred", "prompts", "ties", "unjudged"]
    title = "By a judge, in both orders; a tie counts as half"
    return [TagTable(title, columns, [_win(row) for row in summary.wins])] if summary.wins else []


def _win(row: Mapping[str, Any]) -> list[str]:
    rate = _with_interval(Estimate(row["value"], row["low"], row["high"]))
    return [row["model_role"], row["against"], rate, f"{row['num_prompts']:,}", *map(percent_text, (row["tie_rate"], row["unjudged_rate"]))]


def _tags(found: SetResults) -> TagTable:
    roles = [result.role for result in found.results]
    rows = [[each.tag, f"{each.num_prompts:,}", *(_with_interval(each.accuracy[role]) for role in roles)] for each in found.tags]
    return TagTable(f"{found.name}, by tag", ["tag", "prompts", *roles], rows)


def _with_interval(found: Estimate) -> str:
    return f"{percent_text(found.value)} [{percent_text(found.low)}, {percent_text(found.high)}]"


class LabelTable(NamedTuple):
    """How a model finds each label of a set."""

    title: str
    name: str
    """Of the set, for the picture's ids."""
    columns: list[str]
    rows: list[list[str]]
    square: tuple[list[str], list[list[int]]]
    """The labels, and how often each (a row) was answered by each (a column, the last for none or several)."""
    confused: list[str]
    """What was answered wrongly most often, in words."""
    left_out: int
    """Labels that are not shown: those that are right most rarely."""


def label_tables(summary: RunSummary) -> list[LabelTable]:
    """A table for each set in which labels are answered: of the student, or of the last model where it was not measured."""
    return [_labels(found) for found in summary.sets if found.confusion]


def _labels(found: SetResults) -> LabelTable:
    roles = [result.role for result in found.results]
    role = "student" if "student" in roles else roles[-1]
    mine = [row for row in found.confusion if row["model_role"] == role]
    wanted: Counter[str] = Counter()
    for row in mine:
        wanted[row["reference"]] += row["count"]
    every = list(dict.fromkeys([*(label for label, _ in wanted.most_common()), *(row["answer"] for row in mine if row["answer"])]))
    places = {label: place for place, label in enumerate(every)}
    counts = np.zeros((len(every), len(every) + 1), np.int64)
    for row in mine:
        counts[places[row["reference"]], places.get(row["answer"], -1)] += row["count"]
    shown = every[:_MOST_LABELS]
    rows = [
        [_short(each.label), f"{each.answers:,}", *(percent_text(value) for value in (each.precision, each.recall, each.f1))]
        for each in of_labels(counts, every)[:_MOST_LABELS]
    ]
    keep = [*range(len(shown)), len(every)]
    square = shown, counts[: len(shown)][:, keep].tolist()
    wrong = sorted((row for row in mine if row["answer"] != row["reference"]), key=lambda row: -row["count"])[:10]
    confused = [f"{_short(row['reference'])} as {_short(row['answer'] or _NONE)}: {row['count']:,}" for row in wrong]
    columns = ["label", "answers", "precision", "recall", "F1"]
    return LabelTable(f"{found.name}, labels by the {role}", found.name, columns, rows, square, confused, len(every) - len(shown))


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
