"""Public benchmarks as people look at them: a table of models, what was forgotten in words. From the stage's files alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from distill.run.manifest import MANIFEST, read_manifest
from distill.run.tables import read_rows

DIFFERENCE = "student - base"


class Shown(NamedTuple):
    """What a report shows of them; nothing where the stage was left out."""

    columns: list[str]
    rows: list[list[str]]
    forgetting: list[str]
    """A sentence for each number of the tasks that must not have got worse."""
    note: str


NOTHING = Shown([], [], [], "")


def benchmarks_shown(folder: Path) -> Shown:
    """The numbers of a finished stage `benchmark`, a row a task, metric and scorer.

    Args:
        folder: Of the stage; it need not be there.
    """
    if not (folder / MANIFEST).exists():
        return NOTHING
    facts = read_manifest(folder).facts
    roles = list(facts["models"])
    compares = {"base", "student"} <= set(roles)
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in read_rows(folder, "scores"):
        found.setdefault(tuple(row[name] for name in ("task", "metric", "filter", "scorer")), {})[row["model_role"]] = row
    rows = []
    for (task, metric, kind, _), by_role in found.items():
        first = next(iter(by_role.values()))
        better = {True: "", False: " (less is better)", None: ""}[first["higher_is_better"]]
        named = metric if kind == "none" else f"{metric}, {kind}"
        version = "" if first["task_version"] is None else f" v{first['task_version']}"
        rows.append(
            [
                f"{task}{version}",
                f"{named}{better}",
                f"{first['scorer']} {first['scorer_version']}",
                *(_value(by_role.get(role)) for role in roles),
                *([_difference(by_role.get(DIFFERENCE))] if compares else []),
                "" if first["num_documents"] is None else f"{first['num_documents']:,}",
            ]
        )
    columns = ["task", "metric", "scorer", *roles, *([DIFFERENCE] if compares else []), "questions"]
    sentences = [_sentence(each, found) for each in facts["forgetting"]]
    limit = read_manifest(folder).settings["benchmarks"].get("limit")
    note = f"{100 * facts['confidence']:g} % intervals, by the paired bootstrap over questions where lm-eval keeps a value for each."
    if limit is not None:
        note += f" Only the first {limit:,} questions of each task were asked: no numbers to be compared with published ones."
    return Shown(columns, rows, sentences, note)


def benchmarks_text(shown: Shown) -> str:
    """The same for a terminal; empty where there is nothing."""
    if not shown.rows:
        return ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(shown.columns):
        table.add_column(name, justify="left" if index < 3 else "right")
    for row in shown.rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=140, no_color=True).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(["", "public benchmarks", "\n".join(lines).strip("\n"), "", *shown.forgetting]).rstrip("\n") + "\n"


def _sentence(each: dict[str, Any], found: dict[tuple[str, ...], dict[str, dict[str, Any]]]) -> str:
    key = tuple(each[name] for name in ("task", "metric", "filter", "scorer"))
    named = each["metric"] if each["filter"] == "none" else f"{each['metric']}, {each['filter']}"
    return f"{each['task']} ({named}, {each['scorer']}): {each['finding']}, {_difference(found[key][DIFFERENCE])}"


def _value(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['value']:.3f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.3f}")


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['value']:+.3f}" + (" (no interval)" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]")
