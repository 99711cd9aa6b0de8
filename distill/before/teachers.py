"""`distill pair --traces`: whose traces suit the student, by its Rank-Surprisal Ratio, before anything is trained on one of them.

The student reads the same number of traces of each teacher, in this process; of prompts that several teachers have answered the same ones
are drawn. What was found is printed and kept in the run's folder `teachers`, which resumes and is not made twice, like a stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table

from distill.data.completions import columns_of, traces_of
from distill.data.mapping import PromptMapping
from distill.data.sources import brought_traces
from distill.engines.ranking import RankReader, Ranks
from distill.engines.reading import COLUMNS
from distill.errors import DataError
from distill.measure.suited import CONFIDENCE, compare, sentences
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Traces
from distill.run.clock import Clock
from distill.run.files import digest_json, write_text
from distill.run.folder import StageFolder, delete_stage
from distill.run.log import say
from distill.run.manifest import MANIFEST, check_files, read_manifest
from distill.run.schema import RANKS, prompt_id
from distill.run.tables import iter_rows, rows_at
from distill.stages import FOLDERS, run_dir

Row = dict[str, Any]
_FOLDER, _FINDINGS = "teachers", "findings.json"
_WRITES = ("ranks-*.parquet", _FINDINGS)
_TABLE = RANKS.append(pa.field("traces", pa.string()))
_WIDTH = 100  # of the table, where the output is no terminal


class _Candidate(NamedTuple):
    """Traces of a teacher."""

    name: str
    """As they were asked for."""
    author: str | None
    rows: list[Row]


def run(recipe: Recipe, sources: Sequence[str], num_prompts: int, *, redo: bool = False) -> None:
    """Reads, prints, and keeps what was found.

    Args:
        recipe: Whose student reads, and how rows of files are mapped: by `traces`, where it has that section, else by `prompts.columns`.
        sources: Folders of runs or of their stages, or whatever `traces.source` takes.
        num_prompts: Prompts of each, of which the first trace is read.
        redo: Delete what an earlier call found.

    Raises:
        DataError: there are no traces.
    """
    sources = list(dict.fromkeys(sources))
    candidates = [_candidate(recipe, source, num_prompts) for source in sources]
    settings = {
        "student": recipe.student.identity_here(),
        "train": {"max_length": recipe.train.max_length, "overlong": recipe.train.overlong},
        "traces": {each.name: digest_json(each.rows) for each in candidates},
        "num_prompts": num_prompts,
        "seed": recipe.seed,
    }
    place = run_dir(recipe) / _FOLDER
    if redo:
        delete_stage(place, _WRITES)
    with StageFolder(place, _FOLDER, settings, writes=_WRITES) as out:
        if out.manifest is None:
            _measure(recipe, candidates, out)
        check_files(out.path)
        found = json.loads((out.path / _FINDINGS).read_text(encoding="utf-8"))
    _print(found)
    say(f"\nkept in {place / _FINDINGS}")


def _measure(recipe: Recipe, candidates: Sequence[_Candidate], out: StageFolder) -> None:
    clock, reader = Clock(out.path), RankReader(recipe)
    rows = [row for each in candidates for row in each.rows]
    read = reader.read_numbered((row | {"row": number} for number, row in enumerate(rows)), len(rows), out.journal())
    table, means, start = [], [], 0
    for each in candidates:
        ranks = [read[number] for number in range(start, start + len(each.rows))]
        start += len(ranks)
        names = [{"traces": each.name, "prompt_id": row["prompt_id"], "sample_index": row["sample_index"]} for row in each.rows]
        table += [name | Ranks.entry(one) for name, one in zip(names, ranks, strict=True)]
        there = {row["prompt_id"]: one for row, one in zip(each.rows, ranks, strict=True) if one is not None}
        if not there:
            raise DataError(
                f"{each.name}: the student would train on none of {len(ranks):,} traces: they don't go with its template, or are longer "
                f"than train.max_length ({recipe.train.max_length:,})."
            )
        means.append({prompt: (one.rank / one.tokens, one.surprisal / one.tokens) for prompt, one in there.items()})
    suited = compare(means, recipe.seed)
    teachers = [
        {"traces": each.name, "author": each.author, "read": len(own), "left_out": len(each.rows) - len(own), **one._asdict()}
        for each, own, one in zip(candidates, means, suited, strict=True)
    ]
    kept = {
        "confidence": CONFIDENCE,
        "teachers": [_plain(one) for one in teachers],
        "verdict": sentences([one.name for one in candidates], suited),
    }
    write_text(out.path / _FINDINGS, json.dumps(kept, indent=2))
    out.write_table("ranks", table, _TABLE)
    facts = clock.facts(device=reader.device)
    out.finish(rows_in=len(rows), rows_kept=sum(map(len, means)), files=[out.path / _FINDINGS], facts=facts)


def _plain(teacher: dict[str, Any]) -> dict[str, Any]:
    """With estimates as mappings."""
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in teacher.items()}


def _candidate(recipe: Recipe, source: str, number: int) -> _Candidate:
    """The first traces of so many prompts, drawn by what they ask: of two sources with the same prompts they are the same."""
    drawn, place = _Drawn(number, recipe.seed), _finished(Path(source).expanduser())
    if place is not None:
        table = next(name for name in ("curated", "traces") if name in read_manifest(place).tables)
        for row, trace in enumerate(iter_rows(place, table, columns=["prompt_id"])):
            drawn.add(trace["prompt_id"], row)
        rows = list(rows_at(place, table, sorted(drawn.kept().values()), COLUMNS))
        author = read_manifest(place).facts.get("author") or {}
        return _Candidate(source, author.get("model"), rows)
    for trace in _brought(recipe, source):
        drawn.add(trace["prompt_id"], trace)
    rows = [trace for _, trace in sorted(drawn.kept().items(), key=lambda found: found[0])]
    if not rows:
        raise DataError(f"{source}: holds no traces that can be read. Give the section traces, which says how rows are mapped.")
    return _Candidate(source, None, rows)


def _finished(path: Path) -> Path | None:
    """The folder of the finished stage with traces that a path means: itself, or in a run what was curated, or else written."""
    places = [path, *(path / FOLDERS[stage] for stage in ("curate", "generate"))]
    return next((place for place in places if (place / MANIFEST).exists()), None)


def _brought(recipe: Recipe, source: str) -> Iterator[Row]:
    """The traces of files or a data set, as far as they can be read."""
    given = recipe.traces or Traces(source=source, columns=recipe.prompts.columns)
    traces = given.model_copy(update={"source": source})
    mapping = PromptMapping(recipe.prompts, traces.columns, source, with_fields=False)
    for where, raw in brought_traces(traces).rows([*mapping.columns, *columns_of(traces)], "traces"):
        for asked, found in traces_of(traces, mapping, raw, where):
            if found.reason is None and asked.messages:
                yield {
                    "prompt_id": prompt_id(asked.messages),
                    "sample_index": 0,
                    "author": "teacher",
                    "messages": asked.messages,
                    "completion": found.text,
                    "finish_reason": found.finish_reason,
                }


class _Drawn:
    """Something of each of some prompts, the first that comes; which prompts, their names and a seed decide alone."""

    def __init__(self, number: int, seed: int) -> None:
        self._number, self._seed = number, seed
        self._found: dict[str, tuple[bytes, Any]] = {}

    def add(self, prompt: str, item: Any) -> None:
        """Looks at one more."""
        if prompt not in self._found:
            self._found[prompt] = hashlib.blake2b(f"{self._seed}/{prompt}".encode(), digest_size=8).digest(), item
        if len(self._found) > 2 * self._number + 1000:
            self._found = self._first()

    def kept(self) -> dict[str, Any]:
        """The drawn ones, by their prompts."""
        return {prompt: item for prompt, (_, item) in self._first().items()}

    def _first(self) -> dict[str, tuple[bytes, Any]]:
        return dict(sorted(self._found.items(), key=lambda found: found[1][0])[: self._number])


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _WIDTH)
    title = "what the student makes of their traces (Rank-Surprisal Ratio: lower suits better)"
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title=title)
    for name in ("traces", "read", "mean rank", "surprisal, nats", "ratio", "95 % interval"):
        table.add_column(name, justify="left" if name == "traces" else "right")
    for one in sorted(found["teachers"], key=lambda one: one["ratio"]["value"]):
        name = one["traces"] if one["author"] is None else f"{one['traces']} ({one['author']})"
        left_out = f" of {one['read'] + one['left_out']:,}" if one["left_out"] else ""
        low, high = one["ratio"]["low"], one["ratio"]["high"]
        numbers = f"{one['rank']:.2f}", f"{one['surprisal']:.3f}", f"{one['ratio']['value']:.3f}", f"{low:.3f} to {high:.3f}"
        table.add_row(name, f"{one['read']:,}{left_out}", *numbers)
    console.print(table)
    for sentence in found["verdict"]:
        console.print(sentence)
