"""A real Slurm of two nodes on this host, for tests and by hand: `python tests/slurm_cluster.py --hold FOLDER` until Ctrl-C.

One process, the keeper, starts munged, slurmctld and a slurmd a node, on free ports and with files in one folder, and ends them and
whatever they have started: on a signal, and when the test's process, which holds its standard input, is no more. It is the subreaper of
all that they start, so a task that has left its parents is still found among its children. By hand a node is taken down, as by a loss of
power, and up again with `echo down node2 > FOLDER/do` and `echo up node2 > FOLDER/do`.
"""

from __future__ import annotations

import argparse
import ctypes
import getpass
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

NODES = ("node1", "node2")
GPUS = 2
"""A node's, only pretended: Slurm counts them, and nothing can be computed on them."""
LIMIT_S = 900
"""How long anything may take before it counts as hung; two cores are slow when others use them."""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo", "srun", "scancel")
_PAUSE_S = 0.1
_ANSWER_S = 30
_UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")
_FOR_EVER = ("DependencyNeverSatisfied", "JobHeldUser", "JobHeldAdmin")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

# Intervals are short, so that nothing waits for the scheduler; what a slow machine could miss (an answer of a node) is long. Jobs that
# ended stay known to scontrol. cred_expire is also how long a requeued job waits, 120 s by default.
_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=90
KillWait={kill_wait_s}
MinJobAge=7200
InactiveLimit=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [name for name in _PROGRAMS if _program(name) is None]
    return f"needs Slurm: no {', '.join(absent)} (apt-get install slurm-wlm slurmctld slurmd slurm-client munge)" if absent else ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


class Cluster:
    """One that runs; made by `cluster`.

    Args:
        folder: Of its configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment["SLURM_CONF"] = str(self.conf)

    def run(self, *words: str | Path) -> str:
        """What a command prints that must succeed."""
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert result.returncode == 0, (
            f"{' '.join(map(str, words))} ended with {result.returncode}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
        )
        return result.stdout

    def ask(self, *words: str) -> str:
        """What a command prints that changes nothing; asked again where no answer comes, as was seen on a busy machine."""
        for _ in range(LIMIT_S // _ANSWER_S):
            with suppress(subprocess.TimeoutExpired):
                result = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=_ANSWER_S)
                assert result.returncode == 0, (
                    f"{' '.join(words)} ended with {result.returncode}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
                )
                return result.stdout
        raise AssertionError(f"{' '.join(words)}: no answer within {LIMIT_S} s\n{self.last_words()}")

    def submit(self, *words: str | Path) -> int:
        """The number of a job that `sbatch WORDS` makes."""
        return int(self.run("sbatch", "--parsable", *words).strip().split(";")[0])

    def jobs(self) -> list[dict[str, str]]:
        """All jobs and tasks of arrays, also ended ones, as `scontrol show job -o` has them."""
        lines = self.ask("scontrol", "show", "job", "-o").splitlines()
        return [dict(word.partition("=")[::2] for word in line.split(" ") if "=" in word) for line in lines if line.startswith("JobId=")]

    def job(self, number: int) -> dict[str, str]:
        """One of them, no array."""
        return next(job for job in self.jobs() if job["JobId"] == str(number))

    def until(self, holds: Callable[[], object], what: str, *, by_jobs: bool = True) -> None:
        """Returns when it holds; an error with all jobs and the daemons' last words when it does not within the limit.

        Args:
            holds: Whether it does.
            what: For that error.
            by_jobs: Only jobs can bring it about, so that it is an error, too, when none is left to run.
        """
        end_s = time.monotonic() + LIMIT_S
        while not holds():
            left = self._left()
            assert left or not by_jobs or holds(), f"all jobs have ended, but not: {what}\n{self.run('scontrol', 'show', 'job')}"
            assert time.monotonic() < end_s, f"not within {LIMIT_S} s: {what}\n{self.run('scontrol', 'show', 'job')}\n{self.last_words()}"
            for number, state, reason in left:
                if (state, reason) == ("PENDING", "BeginTime"):  # queued again: it would wait for a while
                    words = ["scontrol", "update", f"JobId={number}", "StartTime=now"]
                    with suppress(subprocess.TimeoutExpired):
                        subprocess.run(words, env=self.environment, capture_output=True, timeout=_ANSWER_S)
            time.sleep(_PAUSE_S)

    def _left(self) -> list[tuple[str, str, str]]:
        """Number, state, and why it waits, of each job that is yet to end."""
        lines = [line.split("|") for line in self.ask("squeue", "-h", "-r", "-t", "all", "-o", "%A|%T|%r").splitlines()]
        return [(number, state, reason) for number, state, reason in lines if state in _UNFINISHED]

    def until_ended(self, first: int = 0) -> list[dict[str, str]]:
        """Waits until no job is left to run, and returns those from a number on; one that never can is an error."""

        def none_left() -> bool:
            left = self._left()
            for number, _, reason in left:
                assert reason not in _FOR_EVER, f"job {number} waits for ever: {reason}"
            return not left

        self.until(none_left, "all jobs end")
        return [job for job in self.jobs() if int(job.get("ArrayJobId", job["JobId"])) >= first]

    def preempt(self) -> int:
        """Submits a job that is more urgent than all others, needs both nodes, and ends at once; returns its number."""
        return self.submit("--partition=urgent", "--exclusive", f"--nodes={len(NODES)}", "--output=/dev/null", "--wrap", "true")

    def down(self, node: str) -> None:
        """A node loses power: all its processes are gone, and Slurm knows it, as after its time-out; its jobs are requeued."""
        self._do(f"down {node}")
        self.until(lambda: "DOWN" in self._state(node), f"{node} is down", by_jobs=False)

    def up(self, node: str) -> None:
        """The node is back."""
        self._do(f"up {node}")
        self.until(lambda: self._state(node) in ("IDLE", "MIXED", "ALLOCATED"), f"{node} is up", by_jobs=False)

    def _state(self, node: str) -> str:
        # Of all nodes: asked for one alone, 22.05 tells its CPUs as they were when all were asked for last, so that a dead one is "mixed".
        lines = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N|%T").splitlines()
        return dict(line.strip().split("|") for line in lines)[node].upper()

    def _do(self, command: str) -> None:
        with (self.folder / "do").open("w") as file:
            file.write(f"{command}\n")

    def last_words(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {log.name}\n" + _tail(log, lines) for log in sorted(self.folder.glob("*.log")))


@contextmanager
def cluster(folder: Path, *, kill_wait_s: int = 30, grace_s: int = 0) -> Iterator[Cluster]:
    """A cluster in a folder that is not there, both nodes idle; ended with all its jobs at the end.

    Args:
        folder: Its path is short: a Unix socket lies in it.
        kill_wait_s: Between SIGTERM and SIGKILL of a job that is ended.
        grace_s: Between the news of its preemption (SIGTERM) and that.
    """
    words = [sys.executable, __file__, "--hold", str(folder), "--while-stdin", f"--kill-wait-s={kill_wait_s}", f"--grace-s={grace_s}"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as keeper:
        assert keeper.stdin and keeper.stdout
        try:
            said = keeper.stdout.readline()
            assert said.startswith("export SLURM_CONF="), f"Slurm did not start: {said}{keeper.stdout.read()}"
            yield Cluster(folder)
        finally:
            keeper.stdin.close()  # which ends it


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


class _Keeper:
    """The daemons, as children of this process.

    Args:
        folder: For all their files; made.
        kill_wait_s: See `cluster`.
        grace_s: See `cluster`.
    """

    def __init__(self, folder: Path, kill_wait_s: int, grace_s: int) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self._environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._daemons: dict[str, psutil.Process] = {}
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        os.mkfifo(folder / "do")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for number in range(GPUS):
            (folder / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        ports, host = _free_ports(1 + len(NODES)), socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=65536 Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        values = {"folder": folder, "host": host, "ports": ports, "user": getpass.getuser(), "nodes": "\n".join(nodes)}
        self.conf.write_text(_CONF.format(**values, kill_wait_s=kill_wait_s, grace_s=grace_s))

    def start(self) -> None:
        """Returns when all nodes are idle."""
        folder = self.folder
        munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", ["munged", "--foreground", "--force", "--num-threads=8", f"--key-file={folder}/munge.key", *munge])
        self._wait(lambda: (folder / "munge.socket").exists(), "munged answers")
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        for node in NODES:
            self.up(node)
        self._wait(lambda: self._ask("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(NODES), "all nodes are idle")

    def preempt(self) -> int:
        """Submits a job that is more urgent than all others, needs both nodes, and ends at once; returns its number."""
        return self.submit("--partition=urgent", "--exclusive", f"--nodes={len(NODES)}", "--output=/dev/null", "--wrap", "true")

    def down(self, node: str) -> None:
        """Kills a node's daemon and all that it has started: it is their subreaper."""
        slurmd = self._daemons.pop(node)
        for process in [slurmd, *slurmd.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def up(self, node: str) -> None:
        """Starts a node's daemon."""
        self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf)])

    def obey(self, *, while_stdin: bool) -> None:
        """Does what is written to the folder's `do`, until a signal comes or, if asked, nobody holds the standard input."""
        fifo = os.open(self.folder / "do", os.O_RDWR | os.O_NONBLOCK)  # for writing, too: so it never ends
        watched = [fifo, 0] if while_stdin else [fifo]
        while True:
            ready, _, _ = select.select(watched, [], [], 1.0)
            if 0 in ready and not os.read(0, 4096):
                return
            for line in os.read(fifo, 4096).decode().splitlines() if fifo in ready else []:
                verb, node = line.split()
                self._say(f"begins {line}")
                {"down": self.down, "up": self.up}[verb](node)
                self._say(f"has done {line}")
            self._reap()

    def end(self) -> None:
        """Kills all children, and theirs, until there are none."""
        while children := psutil.Process().children(recursive=True):
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            self._reap()
            time.sleep(0.01)

    def _say(self, what: str) -> None:
        with (self.folder / "keeper.log").open("a") as log:
            log.write(f"{time.strftime('%FT%T')} {what}\n")

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _start(self, name: str, words: Sequence[str]) -> None:
        program = _program(words[0])
        assert program, missing()

        def before() -> None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

        with (self.folder / f"{name}.out.log").open("ab") as log:
            process = subprocess.Popen(
                [program, *words[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment, preexec_fn=before
            )
        self._daemons[name] = psutil.Process(process.pid)

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + 120
        while not holds():
            dead = [name for name, daemon in self._daemons.items() if not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE]
            if dead or time.monotonic() > end_s:
                logs = [f"== {log.name}\n{_tail(log)}" for log in sorted(self.folder.glob("*.log"))]
                sys.exit("\n".join([f"not so: {what}; ended: {dead}", *logs]))
            time.sleep(_PAUSE_S)

    def _ask(self, *words: str) -> str:
        return subprocess.run(words, env=self._environment, capture_output=True, text=True, timeout=60).stdout


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main() -> None:
    """Starts a cluster, says how to use it, and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hold", type=Path, required=True, metavar="FOLDER", help="for its files; emptied first, if a cluster's")
    parser.add_argument("--while-stdin", action="store_true", help="end when the standard input ends")
    parser.add_argument("--kill-wait-s", type=int, default=30)
    parser.add_argument("--grace-s", type=int, default=0)
    asked = parser.parse_args()
    if missing():
        parser.exit(1, missing() + "\n")
    folder = asked.hold.resolve()
    if (folder / "slurm.conf").exists():
        shutil.rmtree(folder)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in signals:
        signal.signal(number, lambda *_: sys.exit(0))
    keeper = _Keeper(folder, asked.kill_wait_s, asked.grace_s)
    try:
        keeper.start()
        print(f"export SLURM_CONF={keeper.conf}", flush=True)
        keeper.obey(while_stdin=asked.while_stdin)
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)  # one more would leave some behind
        keeper.end()


if __name__ == "__main__":
    main()
