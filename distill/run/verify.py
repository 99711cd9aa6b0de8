"""Whether a run is still what its stages made: all digests compared, of results, of manifests, of what a restart would go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.errors import IntegrityError, MissingStageError
from distill.run.files import digest_file, is_whole_record, read_json
from distill.run.journal import check_journal
from distill.run.log import progress
from distill.run.manifest import JOURNAL, LOCK, MANIFEST, PLAN, SHARDS, Manifest, read_manifest
from distill.run.owned import EARLIER, is_bookkeeping, is_of_system, names_in, strangers
from distill.run.plan import binding, name_in_run

_ROUNDS = "rounds"


class Fault(NamedTuple):
    """A file that is not as a stage left it."""

    kind: Literal["missing", "altered", "extra", "outdated"]
    """`outdated` is no damage: a stage was made from what another held before it was made anew."""
    path: Path
    why: str = ""


class Verified(NamedTuple):
    """What was found of a run."""

    faults: list[Fault]
    files: int
    """Compared with their digests."""
    unknown: int
    """Of stages under way, which have no digest yet: the stage looks at them itself when it goes on."""


class Layout(NamedTuple):
    """What else is in a run besides the folders of stages."""

    record: str
    """Name of the recipe that is kept in it."""
    cache: str
    """Name of the folder that can be made anew."""
    notes: Sequence[str]
    """Patterns of what commands leave in it for people, or for each other."""
    marks: Sequence[str]
    """Patterns of files, in the cache and of stages under way, that hold the digests of others beside them."""
    writes: Mapping[str, Sequence[str]]
    """Stage, and patterns of the files that it may write."""


Check = Callable[[], Iterable[Fault]]


def verify(run: Path, layout: Layout) -> Verified:
    """Compares all there is of a run with what its manifests say; writes nothing.

    Args:
        run: Its folder.
        layout: What is in it.

    Raises:
        MissingStageError: it holds no stage.
    """
    stages = list(_stages(run))
    if not stages:
        raise MissingStageError(f"{run}: holds no stage of a run. Give the folder of one, e.g. runs/quickstart.")
    faults = list(_extra(run, stages, layout))
    checks: list[Check] = []
    checks += [lambda mark=mark: _of_mark(mark) for mark in _marks(run / layout.cache, layout.marks)]  # type: ignore[misc]
    unknown, earlier_kit = 0, True
    for folder in stages:
        try:
            if (folder / PLAN).exists():
                plan, earlier_kit = read_json(folder / PLAN), False
                faults += [Fault("extra", folder / name) for name in strangers(folder, layout.writes.get(plan.get("stage", ""), ("*",)))]
                begun, without = _of_begun(folder, plan, layout.marks)
                checks += begun
                unknown += without
            elif (folder / MANIFEST).exists():
                manifest = read_manifest(folder)
                checks += _of_finished(run, folder, manifest)
                others = strangers(folder, layout.writes.get(manifest.stage, ("*",)))
                faults += [Fault("extra", folder / name) for name in others if not name.startswith(EARLIER)]
                earlier_kit &= not manifest.sizes
        except (IntegrityError, KeyError) as error:
            faults.append(_altered(error) if isinstance(error, IntegrityError) else Fault("altered", folder / PLAN))
    if not earlier_kit:  # which put no digest into it
        checks.append(lambda: _of_record(run / layout.record))
    with progress(len(checks), "files", "verify") as bar:
        for check in checks:
            faults += check()
            bar.update()
    return Verified(sorted(set(faults), key=lambda fault: fault.path), len(checks), unknown)


def refuse_damaged_inputs(run: Path, folders: Sequence[Path]) -> None:
    """Compares what stages were made from with its digests, before they are deleted to be made from it again.

    Args:
        run: The folder of the run.
        folders: Of the stages; what one of them was made from another of them is not looked at.

    Raises:
        IntegrityError: a file is gone or altered.
    """
    sources: set[Path] = set()
    for folder in folders:
        with contextlib.suppress(IntegrityError, MissingStageError):
            sources |= {run / name for name in read_manifest(folder).inputs}
    for source in sorted(sources - set(folders)):
        fault = first_damage(source)
        if fault is not None:
            raise IntegrityError(
                f"{fault.path}: is {'gone' if fault.kind == 'missing' else 'altered'}, so nothing can be made from it, and nothing was "
                f"deleted. Restore it, or begin earlier: `distill run` with --redo {read_manifest(source).stage}."
            )


def first_damage(folder: Path) -> Fault | None:
    """The first file of a finished stage that is not as its manifest has it; null where all are."""
    named = read_manifest(folder).named.items()
    return next((fault for name, digest in named for fault in _of_file(folder / name, digest)), None)


def _stages(run: Path) -> Iterator[Path]:
    """The folders of stages in a run, those of rounds and what a stage keeps of before among them."""
    for place in sorted(path for path in run.iterdir() if path.is_dir()) if run.is_dir() else ():
        if place.name == _ROUNDS:
            for number in sorted(path for path in place.iterdir() if path.is_dir()):
                yield from _stages(number)
        elif any((place / name).exists() for name in (MANIFEST, PLAN)):
            yield place
            while (place := place / EARLIER).is_dir():
                yield place


def _extra(run: Path, stages: Sequence[Path], layout: Layout) -> Iterator[Fault]:
    known = set(stages)
    for name in names_in(run):
        path = run / name
        plain = name.removesuffix(".tmp")
        ours = (
            plain == layout.record
            or name.startswith(f"{layout.cache}/")
            or name.startswith(LOCK)
            or is_of_system(name)
            or any(fnmatchcase(name, pattern) for pattern in layout.notes)
        )
        if ours or known.intersection((path, *path.parents)):
            continue
        yield Fault("extra", path, "" if path.parent == run else "its folder has no manifest")


def _of_finished(run: Path, folder: Path, manifest: Manifest) -> Iterator[Check]:
    for name, digest in manifest.named.items():
        yield lambda path=folder / name, digest=digest: _of_file(path, digest)  # type: ignore[misc]
    if EARLIER not in folder.relative_to(run).parts:  # of that the inputs may have grown
        yield lambda: _of_inputs(run, folder, manifest)


def _of_begun(folder: Path, plan: dict[str, Any], marks: Sequence[str]) -> tuple[list[Check], int]:
    """What can be looked at of a stage under way, and the number of its files of which that is nothing."""
    belongs_to = binding(str(plan.get("stage", "")), plan["settings"], plan["inputs"])
    checks: list[Check] = []
    known: set[Path] = set()
    for mark in _marks(folder, marks):
        known.add(mark)
        with contextlib.suppress(IntegrityError):
            known |= _named_in(mark).keys()
        checks.append(lambda mark=mark: _of_mark(mark))  # type: ignore[misc]
    without = 0
    for name in names_in(folder):
        path = folder / name
        if name == SHARDS:
            checks.append(lambda path=path: _of_shards(path, belongs_to))  # type: ignore[misc]
        elif name == JOURNAL or (name.startswith("journal-") and name.endswith(".jsonl")):
            checks.append(lambda path=path: _of_journal(path, belongs_to))  # type: ignore[misc]
        elif path not in known and not is_bookkeeping(name) and name != MANIFEST and not name.startswith(f"{EARLIER}/"):
            without += 1
    return checks, without


def _marks(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _named_in(mark: Path) -> dict[Path, str]:
    """The files whose digests a file holds.

    Raises:
        IntegrityError: it was altered.
    """
    content = read_json(mark)
    return {mark.parent / name: digest for name, digest in content.get("files", content).items()}


def _of_mark(mark: Path) -> Iterator[Fault]:
    try:
        for file, digest in _named_in(mark).items():
            yield from _of_file(file, digest)
    except IntegrityError as error:
        yield _altered(error)


def _of_file(path: Path, digest: str) -> Iterator[Fault]:
    if not path.is_file():
        yield Fault("missing", path)
    elif digest_file(path) != digest:
        yield Fault("altered", path)


def _of_journal(path: Path, belongs_to: str) -> Iterator[Fault]:
    try:
        for _ in check_journal(path, belongs_to):
            pass
    except IntegrityError as error:
        yield _altered(error)


def _of_shards(path: Path, belongs_to: str) -> Iterator[Fault]:
    """The shards that a stage under way has finished; one that has been noted need not be there yet."""
    yield from (faults := list(_of_journal(path, belongs_to)))
    for row in () if faults else check_journal(path, belongs_to):
        if (path.parent / row["file"]).exists():
            yield from _of_file(path.parent / row["file"], row["sha256"])


def _of_record(path: Path) -> Iterator[Fault]:
    if not path.exists():
        yield Fault("missing", path, "the next `distill run` writes it anew")
    elif not is_whole_record(path):
        yield Fault("altered", path, "the next `distill run` writes it anew")


def _of_inputs(run: Path, folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Whether what a stage was made from is there, as it was then, or grown."""
    for name, digest in manifest.inputs.items():
        try:
            found = read_manifest(run / name)
        except MissingStageError:
            if not (run / name / PLAN).exists():  # else it is being made anew
                yield Fault("missing", run / name, f"{name_in_run(folder)} was made from it")
        except IntegrityError:  # which is said of itself
            continue
        else:
            if digest in (found.digest, *found.grew_from):
                continue
            if digest in _earlier_digests(run / name):
                yield Fault("outdated", folder, f"{name} was made anew since; the next `distill run` makes it anew, too")
            else:
                yield Fault("altered", run / name, f"{name_in_run(folder)} was made from other contents")


def _earlier_digests(folder: Path) -> Iterator[str]:
    """Of what a stage was before it was made anew, as far as it keeps that."""
    while (folder := folder / EARLIER).is_dir():
        with contextlib.suppress(IntegrityError, MissingStageError):  # which is said of itself
            yield read_manifest(folder).digest


def _altered(error: IntegrityError) -> Fault:
    where, _, what = str(error).partition(": ")
    return Fault("altered", Path(where), what)
