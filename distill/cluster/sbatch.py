"""Slurm's own commands: how a job is given to sbatch, which jobs are queued or running, and what it says when it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.cluster.chain import Job, as_ranges
from distill.cluster.place import scripts
from distill.cluster.site import SITE, Site, site_file
from distill.cluster.tasks import LOGS
from distill.errors import ClusterError, visible

# Of the job that this command may itself run in: what it leaves behind would be taken for the new one's.
_OF_A_JOB = ("SLURM_", "DISTILL_SHARD", "DISTILL_FORERUNNER", "DISTILL_FIRST", "DISTILL_EARLY", "DISTILL_SERV")
_OF_SLURM = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})
_LONGEST_S = 120  # that a scheduler under load may take to answer


def words_of(job: Job, run: Path, site: Site, dependency: str = "") -> list[str]:
    """The words of the command that submits a job.

    Args:
        job: Which.
        run: Its run's folder, absolute.
        site: What sbatch is told besides.
        dependency: What it waits for, as Slurm writes it.
    """
    number = "%A_%a" if job.tasks else "%j"
    words = ["sbatch", "--parsable", f"--job-name={run.name}-{job.name}", f"--comment={comment(run)}", f"--nodes={job.nodes}"]
    words += [f"--gres={site.gres}:{job.gpus}"] if job.gpus else []
    words += [*(site.gpu_args if job.gpus else site.cpu_args)]
    log = str(run / LOGS / job.name).replace("%", "%%")  # which would stand for something
    words += [f"--output={log}-{number}.log", "--open-mode=append"]
    words += ["--time=5"] if job.ends else [f"--signal=B:USR1@{site.signal_s}"]
    words += ["--requeue"] if site.requeue and not job.ends else []
    if job.tasks:
        words.append(f"--array={as_ranges(job.tasks)}" + (f"%{job.at_once}" if job.at_once else ""))
    words += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return [*words, str(scripts() / job.script), *job.words] if job.script else words


def environment_of(job: Job, run: Path, site: Site, more: Mapping[str, str]) -> dict[str, str]:
    """The variables that sbatch gets, and hands on to the job.

    Args:
        job: Which.
        run: Its run's folder, absolute.
        site: Its variables of sbatch; one that is set in this process goes first.
        more: What is told to this job besides.
    """
    own = {"DISTILL_SLURM": str(scripts()), "DISTILL_RUN": str(run), "DISTILL_NAME": job.name, **job.environment, **more}
    own |= {} if site.setup else {"DISTILL_PYTHON": sys.executable}
    own |= {SITE: str(site_file().absolute())} if site_file().is_file() else {}
    kept = {name: value for name, value in os.environ.items() if name in _OF_SLURM or not name.startswith(_OF_A_JOB)}
    found = {**site.slurm, **kept, **own}
    if found.get("SBATCH_EXPORT", "ALL") not in ("", "ALL"):  # then only what is named is handed on
        named = [] if found["SBATCH_EXPORT"] == "NONE" else [found["SBATCH_EXPORT"]]
        found["SBATCH_EXPORT"] = ",".join([*named, *(name for name in own if name.startswith("DISTILL_"))])
    return found


def submit(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Submits a job, and returns its number.

    Raises:
        ClusterError: sbatch is not there, or refuses.
    """
    answer = _call(words, environment).strip().splitlines()
    match = re.match(r"\d+", answer[-1]) if answer else None
    if match is None:
        raise ClusterError(f"sbatch: expected a job's number, got {visible(' '.join(answer), 200)!r}. Is it Slurm's own?")
    return int(match[0])


def cancel(jobs: Sequence[int]) -> None:
    """Ends jobs, the last first, so that none begins when the one before it ends."""
    if jobs:
        _call(["scancel", *map(str, sorted(jobs, reverse=True))])


def comment(run: Path) -> str:
    """What the jobs of a run are known by, also one whose number never arrived because sbatch's answer was lost."""
    return f"distill:{run}"


def under_way(run: Path) -> list[int]:
    """The jobs of a run that are queued or running.

    Args:
        run: Its folder, absolute.

    Raises:
        ClusterError: squeue is not there, or fails.
    """
    lines = [line.partition(" ")[::2] for line in _call(["squeue", "--noheader", "--me", "--format=%F %k"]).splitlines()]
    return sorted({int(job) for job, said in lines if said.strip() == comment(run) and job.isdecimal()})


def _call(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=_LONGEST_S, errors="replace")
    except FileNotFoundError:
        raise ClusterError(
            f"{words[0]}: there is no such command. Call this on a login node of the cluster; --dry-run works anywhere."
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{words[0]}: no answer within {_LONGEST_S} s. Is the scheduler up (`sinfo`)? Try again.") from None
    if done.returncode:
        said = visible(done.stderr.strip() or done.stdout.strip(), 1000)
        raise ClusterError(
            f"{words[0]}: exit code {done.returncode}, {said!r}. Where that speaks of what was asked for, correct the site's file "
            "(SBATCH_..., SITE_...); else try again, or ask your site."
        )
    return done.stdout
