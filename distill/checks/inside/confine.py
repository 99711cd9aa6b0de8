"""What a process does to itself before it runs code of others: limits, and another user where it is root."""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

MIB = 1 << 20


def read_job(fd: int) -> dict[str, Any]:
    """What this process is to do, from a file that is closed before anything else happens; the limits in it hold from then on."""
    with os.fdopen(fd, "rb") as file:
        job: dict[str, Any] = json.loads(file.read())
    _limit(job)
    return job


def _limit(job: dict[str, Any]) -> None:
    """Sets what the job says. The user comes last: only root may become another one, and afterwards nothing can be raised again."""
    limits = {
        resource.RLIMIT_AS: job["memory_mib"] * MIB,
        resource.RLIMIT_DATA: job["memory_mib"] * MIB,  # what started this may have a lower one
        resource.RLIMIT_FSIZE: job["files_mib"] * MIB,
        resource.RLIMIT_CPU: job["processor_s"],
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for name in ("RLIMIT_MSGQUEUE", "RLIMIT_SIGPENDING"):
        if hasattr(resource, name):
            limits[getattr(resource, name)] = 64
    if job["processes"] is not None:
        limits[resource.RLIMIT_NPROC] = job["processes"]
    for which, most in limits.items():
        _, hard = resource.getrlimit(which)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    if job["user"] is not None:
        os.setgroups([])
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    sys.set_int_max_str_digits(0)  # numbers of any length are read and written; the time for it is limited
