"""Where a job of a cluster runs: as which replica, over how many nodes, and under which address other nodes reach this one."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
from typing import NamedTuple

from distill.errors import ServerError, shown

_OVER = "DISTILL_SERVE_NODES"
"""Environment variable: over how many nodes a server is spread; set by `slurm/serve.sbatch`, which then starts a process on each."""
_FIRST_PORT, _PORTS = 20_000, 10_000  # at which the nodes of one server meet: all know it by the number of their job
_ASK_S = 30.0
_TEST_NET = ("192.0.2.1", 9)  # RFC 5737: nothing is sent there


class Nodes(NamedTuple):
    """The nodes over which one server is spread."""

    size: int = 1
    rank: int = 0
    """Of this one; the first answers requests."""
    head: str = "127.0.0.1"
    """Address of the first."""
    port: int = 0
    """On the first, where the others find it."""


ONE_NODE = Nodes()


def replica() -> str:
    """Which of a role's servers a job is, named as its log is: `123`, or `123_4` in an array; empty outside of a cluster."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{job}_{task}" if job and task else job


def nodes() -> Nodes:
    """The nodes of this process's server; one, unless `slurm/serve.sbatch` has started it on several.

    Raises:
        ServerError: Slurm doesn't say which these are.
    """
    count = int(os.environ.get(_OVER) or 1)
    if count == 1:
        return ONE_NODE
    listed, job = os.environ.get("SLURM_JOB_NODELIST", ""), int(os.environ.get("SLURM_JOB_ID") or 0)
    names = _scontrol("show", "hostnames", listed).split()
    if not names:
        raise ServerError(f"SLURM_JOB_NODELIST: scontrol knows no nodes by {shown(listed)}. Start it by sbatch slurm/serve.sbatch.")
    return Nodes(count, int(os.environ.get("SLURM_NODEID") or 0), address_of(names[0]), _FIRST_PORT + job % _PORTS)


def own_address() -> str:
    """Under which other nodes reach this one: its name, if that stands for more than this machine, else an address."""
    node = os.environ.get("SLURMD_NODENAME", "")
    named = next((name for name in (socket.getfqdn(), socket.gethostname(), node) if _leads_here_from_elsewhere(name)), None)
    return named or (_address_in_slurm(node) if node else None) or _address_of_the_route() or socket.gethostname()


def address_of(node: str) -> str:
    """Of another node of the job: its name, if it is known, else what Slurm reaches it by."""
    return node if _leads_here_from_elsewhere(node) else _address_in_slurm(node) or node


def _leads_here_from_elsewhere(name: str) -> bool:
    """Whether a name stands for an address of the network; Debian gives a machine's own name one that is the machine's alone."""
    try:
        found = socket.getaddrinfo(name, None) if name else []
    except OSError:
        return False
    return any(not ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def _address_in_slurm(node: str) -> str | None:
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node, "--oneliner"))
    return found[1] if found and _resolves(found[1]) else None


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _address_of_the_route() -> str | None:
    """The address of this machine on the way to others."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_TEST_NET)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _scontrol(*words: str) -> str:
    """What it says; nothing where it isn't there or fails."""
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_ASK_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
