"""`slurm/serve.sbatch`: under bash, with `transformers serve` and a stage that finds it, and as jobs of a real Slurm."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import distill, said, site
from test_serving import RECIPE, family, gone, tiny, until  # noqa: F401 (a fixture)
from test_submit import bash

from distill.cluster.tasks import tasks_of
from distill.errors import EARLY
from distill.run.files import read_json
from distill.run.tables import read_rows
from distill.servers import alive
from distill.servers.left import WAIT

ROOT = Path(__file__).resolve().parent.parent
TRANSFORMERS = ["--teacher.server", "{kind: transformers}"]


def written(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    # Greedy, which is the same whoever writes, and long enough that no thought is cut: of that the server's reader loses white space.
    path.write_text(RECIPE.replace("{max_new_tokens: 64, temperature: 1.0, top_p: 1.0}", "{max_new_tokens: 192, temperature: 0.0}"))
    return path


@pytest.mark.slow
def test_it_serves_until_a_signal_comes_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    run, server = tmp_path / "run", json.dumps({"kind": "vllm", "command": [sys.executable, str(tiny)]})
    words = [str(written(tmp_path)), "teacher", "--run_dir", str(run), "--teacher.server", server]
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "2"}
    with bash("serve.sbatch", *words, tmp_path=tmp_path, **array) as process:
        file = run / "servers" / "teacher-16_2.json"
        until(lambda: file.exists() or process.poll() is not None, 120)
        assert file.exists(), said(run)
        assert alive.answers(read_json(file)["url"])
        living = family(read_json(run / "servers" / "server-teacher-16_2.json")["pid"])
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == EARLY
    assert gone(living) and not list((run / "servers").glob("*.json"))
    (task,) = tasks_of(run)
    assert (task.name, task.job, task.task) == ("serve-teacher", 16, 2)
    assert (task.attempts[0].code, task.attempts[0].signal) == (EARLY, "USR1")


@pytest.mark.slow
def test_over_two_nodes_each_starts_its_share(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """`srun`, as far as it matters: the command on each node, a signal passed on."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(
        '#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\n'
        'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\ntrap "kill -USR1 $first $second" USR1\n'
        "while :; do wait $first; code=$?; kill -0 $first 2>/dev/null || break; done\nwait $second\nexit $code\n"
    )
    scontrol = srun.with_name("scontrol")
    scontrol.write_text('#!/bin/sh\ncase $2 in hostnames) printf "localhost\\nn2\\n";; esac\n')
    for program in (srun, scontrol):
        program.chmod(0o755)
    run, server = tmp_path / "run", json.dumps({"kind": "vllm", "command": [sys.executable, str(tiny)]})
    words = [str(written(tmp_path)), "teacher", "--run_dir", str(run), "--teacher.server", server]
    nodes = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{srun.parent}:/usr/bin:/bin"}
    place = run / "servers"
    with bash("serve.sbatch", *words, tmp_path=tmp_path, **nodes) as process:
        logs = [place / f"server-teacher-17{node}.log" for node in ("", "-node-1")]
        until(lambda: process.poll() is not None or ((place / "teacher-17.json").exists() and logs[1].exists()), 120)
        assert (place / "teacher-17.json").exists(), said(run)
        until(lambda: "listening" in logs[1].read_text(), 60)
        process.send_signal(signal.SIGTERM)  # which reaches them as USR1
        assert process.wait(60) == EARLY, said(run)
    first, second = (log.read_text().splitlines()[0] for log in logs)
    assert "--node-rank 0" in first and "--headless" not in first and "--node-rank 1" in second and "--headless" in second
    assert not list(place.glob("*.json"))


@pytest.mark.slow
def test_a_stage_finds_transformers_serve_of_a_job_and_writes_what_it_writes_here(tmp_path: Path) -> None:
    recipe, here, run = written(tmp_path), tmp_path / "here", tmp_path / "run"
    for place in (here, run):
        distill("prompts", recipe, "--run_dir", place)
    distill("generate", recipe, "--run_dir", here)
    words = [str(recipe), "--run_dir", str(run), *TRANSFORMERS]
    with bash("serve.sbatch", *words, tmp_path=tmp_path) as process:
        told = distill("generate", *words, environment=_environment({WAIT: "300"}))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EARLY, said(run)
    assert "teacher is served by `distill serve` at http" in told
    _same_answers(here, run)
    assert not list((run / "traces").glob("server-*.log"))  # it started none


@pytest.mark.slow
def test_a_job_that_serves_is_found_from_another_node(slurm: Cluster, tmp_path: Path) -> None:
    recipe, here, run = written(tmp_path), tmp_path / "here", tmp_path / "run"
    for place in (here, run):
        distill("prompts", recipe, "--run_dir", place)
    distill("generate", recipe, "--run_dir", here)
    words = [recipe, "--run_dir", run, *TRANSFORMERS]
    environment = {"DISTILL_PYTHON": sys.executable, WAIT: "600", **site(tmp_path)}
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
    sbatch = ["--chdir", ROOT, "--export", export, "--output", tmp_path / "sbatch-%j.log"]
    client = slurm.submit(*sbatch, "--nodelist=node2", ROOT / "slurm" / "stage.sbatch", "generate", *words)
    slurm.until(lambda: "waiting for a server of teacher" in said(run), "the stage waits for its server")
    server = slurm.submit(*sbatch, "--nodelist=node1", ROOT / "slurm" / "serve.sbatch", *words)
    slurm.until(lambda: slurm.job(client)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the stage has ended")
    assert slurm.job(client)["JobState"] == "COMPLETED", said(run)
    _same_answers(here, run)
    assert (run / "servers" / f"teacher-{server}.json").exists()
    slurm.run("scancel", str(server))
    slurm.until_ended(server)
    slurm.until(lambda: not list((run / "servers").glob("*.json")), "the server has left nothing")
    assert {task.name: task.attempts[0].host for task in tasks_of(run)} == {"generate": "node2", "serve-teacher": "node1"}


def _same_answers(here: Path, run: Path) -> None:
    one, other = (
        {(row["prompt_id"], row["sample_index"]): (row["completion"].rstrip(), row["finish_reason"]) for row in read_rows(place, "traces")}
        for place in (here / "traces", run / "traces")
    )
    assert one == other and len(one) == 24


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **more}
