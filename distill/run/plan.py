"""What a stage is asked to make, and how that stands to what is in its folder already.

Equal settings and inputs: there is nothing to do. Settings that only add (more prompts, more samples, more epochs): the folder
*grows*, from what is there. Anything else is refused, naming keys and both values, because rows of two recipes would be mixed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.errors import StageConflictError
from distill.run.files import digest_json, read_json
from distill.run.manifest import MANIFEST, PLAN, Manifest, check_sizes, read_manifest
from distill.run.owned import EARLIER, has_made, is_of_another_run, listed, strangers

Kind = Literal["new", "begun", "complete", "grows", "refused"]
NO_LIMIT = math.inf
_LONGEST = 200  # characters of a value that is shown
HOLDS = "holds no stage of a run, but"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Growth:
    """Which changes of a finished stage only add to it."""

    rising: Mapping[str, float] = field(default_factory=dict)
    """Dotted settings that may rise, and what null stands for there; `*` stands for one name."""
    free: frozenset[str] = frozenset()
    """Dotted settings that may change in any way: what follows from them is added, or made anew."""
    looks_itself: bool = False
    """Whether the stage looks first whether rows are only added: what is there stays in its place until it calls `grow`."""
    inputs: Literal["follow", "ignore"] = "follow"
    """What follows from inputs that have grown: the stage grows, too, or it stays as it is."""
    other_inputs: bool = False
    """Whether inputs may be others altogether: what was made from them is made anew."""
    anything: bool = False
    """Whether any change is right, because nothing but a little time is lost."""
    adds: bool = True
    """Whether the new result holds the old one, so that what was made from that can grow in its turn."""


NO_GROWTH = Growth()
"""Only inputs that have grown make it grow."""


class StagePlan(NamedTuple):
    """What a stage is asked to make."""

    path: Path
    stage: str
    settings: dict[str, Any]
    """Everything that decides the rows, as JSON values, under the recipe's own keys."""
    inputs: Sequence[Path] = ()
    """Folders of the stages read."""
    growth: Growth = NO_GROWTH
    made_with: dict[str, Any] = {}  # noqa: RUF012
    """The whole recipe, for the record."""
    writes: Sequence[str] = ("*.parquet",)
    """Patterns of the files that the stage may write, by their path within its folder."""
    scratch: str | None = None
    """A folder in it that a restart needs, and nobody once the stage is finished."""


class Relation(NamedTuple):
    """How a plan stands to what is there."""

    kind: Kind
    changes: list[str] = []  # noqa: RUF012
    """What differs, as clauses with key and values; of `grows` what is added, of `refused` what stands in the way."""


def relation(plan: StagePlan, *, shared: bool = False, inputs: bool = True, files: bool = True) -> Relation:
    """How a plan stands to what is in its folder; all its inputs must be complete.

    Args:
        plan: What is asked.
        shared: Whether others may have begun a part of it, so that a plan alone counts.
        inputs: Whether to look at what it reads; False judges by the settings alone.
        files: Whether to look if the files of a finished stage are there.

    Raises:
        MissingStageError: an input is absent or unfinished.
        IntegrityError: a manifest or plan can't be read, or a file of a finished stage is gone or has another size.
    """
    if not plan.path.exists():
        return Relation("new")
    found = read_json(plan.path / PLAN) if (plan.path / PLAN).exists() and (shared or has_made(plan.path)) else None
    if found is not None and not _ended(plan.path, found):
        changes = list(_differences(found.get("settings"), plan.settings))
        clauses = [clause for _, clause in changes]
        clauses += [clause for _, clause in _changed_inputs(found["inputs"], plan)] if inputs else []
        return Relation("refused", clauses) if clauses else Relation("begun")
    if (plan.path / MANIFEST).exists():
        manifest = read_manifest(plan.path)
        if files:
            check_sizes(plan.path, manifest)
        return _to_finished(plan, manifest.settings, manifest.inputs if inputs else {})
    others = in_the_way(plan.path)
    return Relation("refused", [f"{HOLDS} {listed(others)}"]) if others else Relation("new")


def linked(plan: StagePlan) -> Manifest | None:
    """The manifest of a stage whose folder is a link into another run; null where the folder is this run's own.

    Raises:
        StageConflictError: it is not what is asked for here, and nothing is written there.
    """
    if not is_of_another_run(plan.path):
        return None
    found = relation(plan, shared=True)
    if found.kind != "complete":
        raise StageConflictError(refusal(plan, found.changes))
    return read_manifest(plan.path)


def refusal(plan: StagePlan, changes: Sequence[str]) -> str:
    """Why a plan is refused, and what to do, for people."""
    if is_of_another_run(plan.path):
        why = "; ".join(changes[:5]) or "it is under way"
        return (
            f"{plan.path}: is a link to {plan.path.resolve()}, of another run, into which nothing is written, and by this recipe it would "
            f"be another: {why}. Keep to what is there, let that run make what is asked for, or give another run_dir."
        )
    if changes[0].startswith(HOLDS):
        return f"{plan.path}: {changes[0]}, which would be in the way. Move the folder away, or give another run_dir."
    if (plan.path / EARLIER / MANIFEST).exists() and not (plan.path / MANIFEST).exists():
        changes = [*changes, "what was there before stands in its folder earlier/, and comes back if it is asked for as it was made"]
    state = "is under way with other settings or inputs" if (plan.path / PLAN).exists() else "was made with other settings or inputs"
    more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
    return (
        f"{plan.path}: {state}: {'; '.join(changes[:5])}{more}. Keep to what is there, give another run_dir, or make it anew with "
        "--redo, and all that follows from it with `distill run --redo "
        f"{plan.stage}`."
    )


def in_the_way(folder: Path) -> list[str]:
    """Files in a folder that holds no stage: nobody's but the user's."""
    others = strangers(folder, ()) if folder.exists() else []
    # Looked for afterwards, because another process may have begun meanwhile.
    return [] if (folder / PLAN).exists() or (folder / MANIFEST).exists() else others


def _ended(path: Path, found: dict[str, Any]) -> bool:
    """Whether what was planned is done, and only the plan was left behind by a kill; else a folder with a manifest begins to grow."""
    return (path / MANIFEST).exists() and read_manifest(path).digest != found.get("grows_from")


def _to_finished(plan: StagePlan, settings: dict[str, Any], inputs: dict[str, str]) -> Relation:
    added: list[str] = []
    refused: list[str] = []
    for key, clause in _differences(settings, plan.settings):
        there, here = _at(settings, key), _at(plan.settings, key)
        is_free = any(_means(name, key) for name in plan.growth.free)
        allowed = plan.growth.anything or is_free or _rises(plan.growth.rising, key, there, here)
        (added if allowed else refused).append(clause)
    for grown, clause in _changed_inputs(inputs, plan):
        if grown and plan.growth.inputs == "ignore":
            continue
        (added if grown or plan.growth.other_inputs or plan.growth.anything else refused).append(clause)
    if refused:
        return Relation("refused", refused)
    return Relation("grows", added) if added else Relation("complete")


def _rises(rising: Mapping[str, float], key: str, there: Any, here: Any) -> bool:
    least = next((value for name, value in rising.items() if _means(name, key)), None)
    if least is None:
        return False
    before, after = (least if value is None else value for value in (there, here))
    return isinstance(before, int | float) and isinstance(after, int | float) and after > before


def _means(name: str, key: str) -> bool:
    """Whether a dotted name of a `Growth` stands for a setting."""
    wanted, parts = name.split("."), key.split(".")
    return len(wanted) == len(parts) and all(want in ("*", part) for want, part in zip(wanted, parts, strict=True))


def binding(stage: str, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """What a journal's rows are made of and from, as a digest: no line of another journal is taken for one of it."""
    return digest_json([stage, settings, inputs])


def input_digests(plan: StagePlan) -> dict[str, str]:
    """Name of each stage that is read, and the digest of what it holds."""
    return {name_in_run(folder): read_manifest(folder).digest for folder in plan.inputs}


def _changed_inputs(found: dict[str, str], plan: StagePlan) -> Iterator[tuple[bool, str]]:
    """Whether an input has only grown, and a clause, for each that is not what it was."""
    asked: dict[str, Manifest] = {name_in_run(folder): read_manifest(folder) for folder in plan.inputs}
    for name in sorted(set(found) | set(asked)):
        if name not in asked or name not in found:
            yield False, f"{name}/ {'was' if name in found else 'was not'} read for it"
        elif found[name] != asked[name].digest:
            grown = found[name] in asked[name].grew_from
            yield grown, f"{name}/ has {'grown' if grown else 'changed'} since"


def name_in_run(folder: Path) -> str:
    """A stage's folder as its run names it: `curated`, or `rounds/01/targets`."""
    *_, grandparent, parent, name = ("", "", *folder.parts)
    return f"{grandparent}/{parent}/{name}" if grandparent == "rounds" else name


def _differences(found: Any, asked: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys at which two JSON values differ, each with a clause that names both values."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in sorted(set(found) | set(asked)):
            if name not in found and _DIGEST.fullmatch(str(asked[name])):  # an earlier kit did not record it
                continue
            yield from _differences(found.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif found != asked:
        digests = all(value is None or _DIGEST.fullmatch(str(value)) for value in (found, asked))
        if _is_section(found, asked):
            yield key, f"{key} is {'new' if found is None else 'left out here'}"
        else:
            yield key, f"{key}: its content has changed" if digests else f"{key} is {found!r} there and {asked!r} here"


def _is_section(found: Any, asked: Any) -> bool:
    """Whether a mapping, too long to be read in a line, stands against nothing."""
    one = asked if found is None else found if asked is None else None
    return isinstance(one, dict) and len(repr(one)) > _LONGEST


def _at(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
