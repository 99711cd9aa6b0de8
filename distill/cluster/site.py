"""What is the site's own, from one small file outside the repository that batch scripts source and Python reads alike.

KEY=VALUE lines: `SITE_...`, the kit's (below), and `SBATCH_...`, which Slurm's sbatch takes from the environment. Its example is
`slurm/site.env.example`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from distill.errors import ClusterError, shown, visible

SITE = "DISTILL_SITE"
"""Environment variable with the path of the file."""
_PREFIX = "SITE_"
_SLURM = re.compile(r"SBATCH_[A-Z][A-Z0-9_]*")
_USUAL = tuple(
    "SBATCH_" + name
    for name in (
        *(
            "ACCOUNT",
            "CLUSTERS",
            "CONSTRAINT",
            "CPUS_PER_GPU",
            "EXCLUSIVE",
            "EXPORT",
            "GPUS_PER_NODE",
            "GRES",
            "MEM_PER_CPU",
            "MEM_PER_GPU",
        ),
        *("MEM_PER_NODE", "PARTITION", "QOS", "RESERVATION", "TIMELIMIT", "WCKEY"),
    )
)
"""What people set of sbatch's variables; a key that nearly is one of these is misspelt, any other passes."""
_FOR_SHELLS_ALONE = frozenset({"SITE_SETUP", "SITE_SCRATCH"})  # Python reads no meaning in them, so a shell may expand them


def _is_one(value: object) -> bool:
    if value not in ("0", "1", True, False):
        raise ValueError("is 0 or 1")  # as the batch scripts take it
    return value in ("1", True)


_WORDS = BeforeValidator(lambda value: shlex.split(value) if isinstance(value, str) else value)


class Site(BaseModel):
    """A cluster, as its users are given it; field `gres` is `SITE_GRES` in the file, and so on."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    setup: str = ""
    """A line of shell that makes `python` the one that has the kit."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of a node; 0 for nodes without."""
    gres: str = "gpu"
    """How a GPU is asked for: `gpu`, or with its type, `gpu:a100`."""
    cpu_processes: Annotated[int, Field(ge=1)] = 1
    """Processes that train on a node without GPUs."""
    gpu_args: Annotated[tuple[str, ...], _WORDS] = ()
    """Further words for sbatch, of jobs that have GPUs."""
    cpu_args: Annotated[tuple[str, ...], _WORDS] = ()
    """Further words for sbatch, of jobs that have none."""
    max_array: Annotated[int, Field(ge=1)] = 1000
    """The highest task id that an array may have: Slurm's MaxArraySize less one."""
    max_at_once: Annotated[int, Field(ge=1)] | None = None
    """Tasks of a step that may run at once; null: as many as there is room for."""
    signal_s: Annotated[int, Field(ge=1)] = 300
    """Seconds before its time limit at which a job is told to end."""
    follow_ups: Annotated[int, Field(ge=0)] = 2
    """Further jobs that go on where one ended early; each ends at once where nothing is left."""
    requeue: Annotated[bool, BeforeValidator(_is_one)] = False
    """Have a job that ended early queued again, instead of further jobs."""
    max_idle_restarts: Annotated[int, Field(ge=1)] = 3
    """Attempts without any progress after which a task is given up."""
    scratch: str = ""
    """A node's own disk, for temporary files."""
    slurm: dict[str, str] = Field(default_factory=dict)
    """The variables of sbatch: `SBATCH_PARTITION`, `SBATCH_ACCOUNT`, `SBATCH_TIMELIMIT`, ..."""


def site_file() -> Path:
    """Where the file is looked for."""
    return Path(os.environ.get(SITE) or "~/.config/distill/site.env").expanduser()


def read_site(environment: Mapping[str, str] | None = None) -> Site:
    """The site that the file describes; without a file one with nothing set.

    Args:
        environment: Variables that may name the file; those of this process if none are given.

    Raises:
        ClusterError: naming file, line and key.
    """
    given = (environment if environment is not None else os.environ).get(SITE)
    path = Path(given).expanduser() if given else site_file()
    if not path.is_file():
        if given:
            raise ClusterError(f"{SITE}: there is no file {visible(given, 200)}. Copy slurm/site.env.example there, or unset it.")
        return Site()
    values: dict[str, object] = {}
    slurm: dict[str, str] = {}
    places: dict[str, int] = {}
    seen: set[str] = set()
    for number, key, value in _lines(path):
        if key in seen:
            raise ClusterError(f"{path}:{number}: {visible(key, 80)}: is there twice. Keep one.")
        seen.add(key)
        if _SLURM.fullmatch(key) and not _is_misspelt(key):
            slurm[key] = value
        elif key.startswith(_PREFIX) and (name := key.removeprefix(_PREFIX).lower()) in Site.model_fields and name != "slurm":
            if value or name in ("setup", "scratch"):  # an empty value is none
                values[name], places[name] = value, number
        else:
            raise ClusterError(f"{path}:{number}: {visible(key, 80)}: unknown key, got {shown(value)}. {_suggest(key)}")
    try:
        site = Site.model_validate(values | {"slurm": slurm})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        key = f"{_PREFIX}{name.upper()}"
        raise ClusterError(f"{path}:{places[name]}: {key}: {first['msg'].lower()}, got {shown(first['input'])}. Correct it.") from None
    _refuse_late_signal(site, path)
    return site


def _is_misspelt(key: str) -> bool:
    return key not in _USUAL and bool(get_close_matches(key, _USUAL, n=1, cutoff=0.93))


def _refuse_late_signal(site: Site, path: Path) -> None:
    """Refuses a time limit that can't be read, or in which there is no time before the signal.

    Raises:
        ClusterError: naming both keys.
    """
    limit = site.slurm.get("SBATCH_TIMELIMIT") or "UNLIMITED"
    limit_s = seconds_of(limit)
    if limit_s is None:
        raise ClusterError(f"{path}: SBATCH_TIMELIMIT: got {shown(limit)}. Write it as Slurm does: HH:MM:SS, or D-HH.")
    if limit_s <= site.signal_s:
        raise ClusterError(
            f"{path}: SITE_SIGNAL_S: a job of {limit_s:,.0f} s (SBATCH_TIMELIMIT) would be told to end {site.signal_s:,} s before its "
            "limit. Set it lower."
        )


def seconds_of(limit: str) -> float | None:
    """A time limit as Slurm writes it (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, UNLIMITED), in seconds; null for none of these."""
    if limit.upper() in ("UNLIMITED", "INFINITE", "-1", "0"):
        return float("inf")
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return None
    first, second, third = (int(value or 0) for value in match.groups()[1:])
    if match["days"]:
        return int(match["days"]) * 86400.0 + first * 3600 + second * 60 + third
    return first * 3600.0 + second * 60 + third if match[4] else first * 60.0 + second


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number, key and value of each line, as a shell would read it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: can't be read: {visible(str(error), 200)}. Write it as UTF-8.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ClusterError(f"{where}: a shell could not read this: {str(error).lower()}. Close the quotes.") from None
        if not words:
            continue
        key, equals, value = words[0].partition("=")
        if len(words) > 1 or not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ClusterError(f"{where}: expected KEY=VALUE, got {shown(line)}. Put a value with spaces into single quotes.")
        raw = line.partition("=")[2].lstrip()
        if key not in _FOR_SHELLS_ALONE and not raw.startswith("'") and re.search(r"[$`]", value):
            raise ClusterError(f"{where}: {key}: a shell would expand {shown(value)}, and Python does not. Write it out.")
        yield number, key, value


def _suggest(key: str) -> str:
    known = [f"{_PREFIX}{name.upper()}" for name in Site.model_fields if name != "slurm"]
    close = get_close_matches(key, [*known, *_USUAL], n=1)
    if close:
        return f"Did you mean {close[0]}?"
    if not key.startswith(_PREFIX):
        return f"Besides SITE_... only Slurm's own SBATCH_... belong here; put `export {key}=...` into SITE_SETUP."
    return f"There are {', '.join(known)}."
