"""The cluster of the tests in itself: a real Slurm that starts, loses a node, and leaves nothing behind, also when its test is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster, cluster, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


def processes_of(folder: Path) -> list[psutil.Process]:
    """All that name a folder in their command or have it in their environment's SLURM_CONF."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join([*process.cmdline(), process.environ().get("SLURM_CONF", "")]):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a cluster is to be; its path is short, because the sockets of its tasks lie in it."""
    return tmp_path_factory.mktemp("c") / "c"


def gone(folder: Path) -> bool:
    end_s = time.monotonic() + 60
    while processes_of(folder) and time.monotonic() < end_s:
        time.sleep(0.05)
    return not processes_of(folder)


def long_job(slurm: Cluster, *words: str) -> Path:
    """Submits one that would never end, but ends at once when it is run again; returns what it writes once it runs."""
    out = slurm.folder / "out"
    script = 'echo begun; trap "echo signal" USR1; [ -n "$SLURM_RESTART_COUNT" ] || while true; do sleep 1000 & wait $!; done; echo whole'
    slurm.submit("--output", out, "--open-mode=append", *words, "--wrap", script)
    slurm.until(lambda: out.exists() and "begun" in out.read_text(), "the job runs")
    return out


def test_a_node_that_dies_gives_its_job_back(place: Path) -> None:
    with cluster(place) as slurm:
        out = long_job(slurm, "--nodelist=node2")
        slurm.down("node2")
        slurm.up("node2")
        slurm.until_ended()
        assert out.read_text().split() == ["begun", "begun", "whole"]
        out.unlink()
        out = long_job(slurm, "--requeue", "--exclusive", "--nodes=2")
        slurm.submit("--partition=urgent", "--exclusive", "--nodes=1", "--output=/dev/null", "--wrap", "true")
        assert [job["JobState"] for job in slurm.until_ended()] == ["COMPLETED"] * 3
        assert [line for line in out.read_text().splitlines() if " " not in line] == ["begun", "begun", "whole"]
        assert "DUE TO PREEMPTION" in out.read_text()
    assert gone(place)


def test_nothing_is_left_of_one_whose_test_is_killed(place: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from slurm_cluster import cluster
from test_slurm_cluster import long_job
with cluster(Path(sys.argv[1])) as slurm:
    long_job(slurm)
    print("runs", flush=True)
    time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    words = [sys.executable, "-c", code, str(place)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as test:
        assert test.stdout and test.stdout.readline() == "runs\n"
        assert len(processes_of(place)) > 5
        test.send_signal(signal.SIGKILL)
    assert gone(place)
