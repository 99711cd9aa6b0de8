"""Where rows come from: a file, a folder or a glob of files, an embedded set, or the Hub; streamed. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill import embedded
from distill.data.files import KINDS, PACKED, DataFile, Placed, Row, kind_of
from distill.data.names import top_levels
from distill.errors import DataError, of_system, shown, visible
from distill.recipe.alike import Benchmark
from distill.recipe.base import expanded
from distill.recipe.prompts import Prompts
from distill.recipe.sets import HeldOutSet
from distill.recipe.traces import Traces
from distill.run.log import progress
from distill.run.manifest import MANIFEST, read_manifest
from distill.run.owned import EARLIER

_NO_DATA = ("README", "LICENSE", "LICENCE")  # what lies beside data without being any, with names in `.md`, `.` and `_`
_EXAMPLES = 3  # names shown in an error


class Source:
    """Rows, read one at a time as often as asked.

    Args:
        name: Path of a jsonl, json, csv or parquet file (the first three also as `.gz` or `.zst`), a folder or a glob of such
            files, `embedded:arithmetic`, or a Hub id.
        subset: Configuration of a Hub data set.
        split: Split of a Hub data set.

    Raises:
        DataError: there are no such files, or some are no data.
    """

    def __init__(self, name: str, subset: str | None = None, split: str = "train") -> None:
        self.name = name
        self._subset, self._split = subset, split
        self._files = _files(name)

    @property
    def is_local(self) -> bool:
        """Whether it is files, and not a data set of the Hub."""
        return self._files is not None

    def rows(self, columns: Sequence[str] | None = None, description: str = "read") -> Iterator[Placed]:
        """All rows with their places, in the order of the files' names.

        Args:
            columns: Names that will be looked up; where others can be left unread, they are. None reads all.
            description: Of the bar that shows how far the reading is.

        Raises:
            DataError: there are none, or one can't be read; names its line.
        """
        place = None
        for place in self._hub_rows(columns) if self._files is None else self._file_rows(self._files, columns, description):
            yield place
        if place is None:
            raise DataError(f"{self.name}: holds no rows.")

    def recall(self, finished: Path) -> str | None:
        """SHA-256 of the files as they are now, if a finished stage is there to compare them with; else null, as for the Hub.

        A file whose size and time of the last change are what the stage recorded is not read again.
        """
        # A stage that began to grow, and was killed, has its manifest aside.
        there = [folder for folder in (finished, finished / EARLIER) if (folder / MANIFEST).exists()]
        if self._files is None or not there:
            return None
        for file in self._files:
            file.recognise(read_manifest(there[0]).facts.get("sources", []))
        return self.sha256

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the file, or of the digests of several; null for the Hub. Reads whatever was not read before."""
        if self._files is None:
            return None
        digests = [file.sha256 for file in self._files]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def records(self) -> list[dict[str, Any]]:
        """What a manifest says of the files: path as given, size, time of the last change, digest."""
        return [file.record() for file in self._files or []]

    def _file_rows(self, files: list[DataFile], columns: Sequence[str] | None, description: str) -> Iterator[Placed]:
        with progress(sum(file.size for file in files), "B", description, passing=True) as bar:
            for file in files:
                yield from file.rows(columns, bar.update)

    def _hub_rows(self, columns: Sequence[str] | None) -> Iterator[Placed]:
        try:
            rows = self._opened_on_hub()
            known = rows.column_names
            names = top_levels(columns, known) if columns is not None and known else None
            rows = rows.select_columns(names) if names else rows
            yield from ((f"{self.name}: row {number}", dict(row)) for number, row in enumerate(rows, start=1))
        except Exception as error:  # the library raises many kinds, of which the message alone tells
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            part = f"subset {shown(self._subset)}, split {shown(self._split)}"
            raise DataError(
                f"{visible(self.name, 200)}: is no file here, and can't be loaded from the Hub ({part}): {visible(reason, 300)}"
            ) from None

    def _opened_on_hub(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.name, self._subset, split=self._split, streaming=True)
        except Exception:  # no network: what an earlier download left is read from a memory-mapped file
            return load_dataset(self.name, self._subset, split=self._split)


def read_source(name: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """All rows of a source that is known to be short."""
    return [row for _, row in Source(name, subset, split).rows()]


def problems(prompts: Prompts) -> Source:
    """Where a recipe's prompts come from.

    Raises:
        DataError: there are no such files, or a key for the Hub is given with a file.
    """
    source = Source(prompts.source, prompts.subset, prompts.split)
    if prompts.heldout_source is None or Source(prompts.heldout_source).is_local:  # else the subset is that of the other
        _refuse_hub_key(source, prompts, "prompts", "subset")
    return _refuse_hub_key(source, prompts, "prompts", "split")


def heldout_problems(prompts: Prompts) -> Source | None:
    """Where a recipe's held-out prompts come from; null where they are split off the others.

    Raises:
        DataError: there are no such files, or a key for the Hub is given with a file.
    """
    if prompts.heldout_source is None:
        default = type(prompts).model_fields["heldout_split"].default
        if prompts.heldout_split != default:
            raise DataError(
                f"prompts.heldout_split: is the split of prompts.heldout_source, which is not given, got {shown(prompts.heldout_split)}. "
                f"Give that, or set it to {default}."
            )
        return None
    source = Source(prompts.heldout_source, prompts.subset, prompts.heldout_split)
    return _refuse_hub_key(source, prompts, "prompts", "heldout_split")


def brought_traces(traces: Traces) -> Source:
    """Where a recipe's traces come from.

    Raises:
        DataError: there are no such files, or a key for the Hub is given with a file.
    """
    source = _refuse_hub_key(Source(traces.source, traces.subset, traces.split), traces, "traces", "subset")
    return _refuse_hub_key(source, traces, "traces", "split")


def heldout_set(name: str, each: HeldOutSet) -> Source:
    """Where the prompts of a further held-out set come from.

    Args:
        name: Of the set.
        each: What the recipe says of it.

    Raises:
        DataError: there are no such files, or a key for the Hub is given with a file.
    """
    where = f"evaluate.sets.{name}"
    source = _refuse_hub_key(Source(each.source, each.subset, each.split), each, where, "subset")
    return _refuse_hub_key(source, each, where, "split")


def benchmark_source(benchmark: Benchmark) -> Source:
    """Where the questions of a benchmark come from that prompts are kept apart from.

    Raises:
        DataError: there are no such files, or a key for the Hub is given with a file.
    """
    source = Source(benchmark.source, benchmark.subset, benchmark.split)
    for key in ("subset", "split"):
        _refuse_hub_key(source, benchmark, "prompts.decontaminate.benchmarks", key)
    return source


def _refuse_hub_key(source: Source, section: Prompts | Traces | HeldOutSet | Benchmark, name: str, key: str) -> Source:
    """A key that chooses a part of a Hub data set would be ignored with a file, which has no parts."""
    value, default = getattr(section, key), type(section).model_fields[key].default
    if source.is_local and value != default:
        raise DataError(
            f"{name}.{key}: is for data sets of the Hub, and {source.name} is read from files, got {shown(value)}. "
            f"Leave it out, or set it to {default or 'null'}."
        )
    return source


def _files(name: str) -> list[DataFile] | None:
    """The files of a source, sorted; null for a data set of the Hub.

    A name is a path wherever one is there, whatever signs it has; what is no path may be a glob, of which the folders that are there
    are taken as they are called: `exp[1]/*.jsonl` means those in `exp[1]`.
    """
    path = Path(expanded(embedded.resolve(name)))
    try:
        if path.is_file():
            return [DataFile(path, name)]
        if path.is_dir():
            return _checked(name, sorted(path.iterdir()), "Move them away, or name the data with a glob, e.g. 'folder/*.jsonl'.")
        if path.exists():
            raise DataError(f"{name}: is a pipe or a device, which can be read once and without an end. Write its rows into a file.")
        if any(sign in name for sign in "*?["):
            return _checked(name, _matching(path), "Write the glob so that it matches the data alone.")
    except OSError as error:
        raise DataError(of_system(error) or f"{name}: can't be read: {error}. Name another file.") from None
    if path.suffix in (*KINDS, *PACKED) or path.is_absolute() or name.startswith((".", "~")) or path.is_symlink():
        why = "it is a link, and what it names is not there" if path.is_symlink() else "there is no such file"
        raise DataError(
            f"{visible(name, 200)}: {why}. Paths are relative to the folder the command is run in ({Path.cwd()}), or to the recipe's."
        )
    return None


def _matching(path: Path) -> list[Path]:
    """The files that a glob matches, sorted."""
    start = next(folder for folder in path.parents if folder.exists())
    pattern = str(path.relative_to(start))
    try:
        return sorted(each for each in start.glob(pattern) if not each.is_dir())
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: is no glob: {error}. `*`, `?` and `[abc]` stand for parts of a name, `**` for folders.") from None


def _checked(name: str, found: list[Path], advice: str) -> list[DataFile]:
    """The data among some files. What is certainly none is passed over; what may be is an error, lest rows go missing unseen."""
    for path in found:
        if not _is_text(path.name):
            raise DataError(f"{name}: holds a file whose name is no UTF-8, {shown(path.name)}, which no record can hold. Rename it.")
    data = [path for path in found if path.is_file() and kind_of(path) and not path.name.startswith((".", "_"))]
    aside = [path for path in found if path.name.startswith((".", "_", *_NO_DATA)) or path.suffix == ".md"]
    others = [path.name + "/" * path.is_dir() for path in found if path not in {*data, *aside}]
    if not data:
        holds = f"only {_shown([path.name + '/' * path.is_dir() for path in found])}" if found else "nothing"
        kinds = ", ".join(KINDS)
        raise DataError(f"{name}: holds no data, {holds}. Name a file, a folder or a glob of files of a kind that is read ({kinds}).")
    if others:
        raise DataError(f"{name}: holds files that are no data beside {len(data):,} that are: {_shown(others)}. {advice}")
    # Under the name that the recipe gives, so that a run that was moved knows its files again.
    return [DataFile(path, str(Path(name) / path.name) if Path(expanded(name)).is_dir() else str(path)) for path in data]


def _is_text(name: str) -> bool:
    return name.isprintable() or not any("\ud800" <= sign <= "\udfff" for sign in name)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _EXAMPLES:,} more" if len(names) > _EXAMPLES else ""
    return ", ".join(shown(name) for name in names[:_EXAMPLES]) + more
