"""A run as jobs of a cluster: which jobs, in which parts, what waits for what; the site's file; the batch scripts, under bash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from fabricated import recipe_for

from distill.cluster.chain import Job, Wanted, as_ranges, jobs_of
from distill.cluster.handed import dependency
from distill.cluster.parts import parts_of
from distill.cluster.sbatch import environment_of, words_of
from distill.cluster.site import Site, read_site, seconds_of
from distill.cluster.tasks import tasks_of
from distill.errors import EARLY, ClusterError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe
from distill.run.manifest import MANIFEST
from distill.run.parts import Part
from distill.stages import Step, folder, steps_of

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "slurm"
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")])


TWO_BY_FOUR = '{kind: vllm, command: [/bin/true], args: [-tp, "4", --pipeline-parallel-size=2]}'
PLAIN = Site()
SERVED = {"teacher": {"model": "Qwen/Qwen3-8B", "server": {"kind": "vllm"}}}
ONE_NODE = Wanted()


def chain(recipe: Recipe, wanted: Wanted = ONE_NODE, site: Site = PLAIN, served: dict[Step, str] | None = None) -> list[Job]:
    return jobs_of(recipe, Path("recipe.yaml"), steps_of(recipe), wanted, site, served or {})


def make_parts(place: Path, done: list[int], count: int) -> None:
    """Parts of a stage that are finished, as far as anybody looks from outside."""
    for shard in done:
        part = Part(shard - 1, count).folder(place)
        part.mkdir(parents=True)
        (part / MANIFEST).touch()


def test_a_run_is_a_chain_in_which_each_job_waits_for_the_one_before(tmp_path: Path) -> None:
    jobs = chain(recipe_for(tmp_path), Wanted(nodes=2, gpus=8, shards=3, follow_ups=1))
    assert [job.name for job in jobs] == ["prompts", "generate", "curate", "train", "evaluate", "report", "export"]
    assert [job.after for job in jobs] == [(), *((job.name,) for job in jobs[:-1])]
    assert {job.name: job.tasks for job in jobs if job.tasks} == {"generate": (1, 2, 3), "evaluate": (1, 2, 3)}
    assert {job.name: (job.nodes, job.gpus) for job in jobs if job.gpus} == {
        "generate": (1, 1), "train": (2, 8), "evaluate": (1, 1), "export": (1, 1)
    }  # fmt: skip
    assert {job.follow_ups for job in jobs} == {1}
    assert jobs[1].commands[1] == "distill generate recipe.yaml --shard 2/3" and jobs[1].writes[1] == "traces/parts/00002-of-00003/"


def test_rounds_are_unrolled_and_scored_in_parts(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "qwen3-8b-to-0.6b-rounds.yaml", {"run_dir": str(tmp_path), "rounds": 2})
    jobs = {job.name: job for job in chain(recipe, Wanted(shards=2))}
    names = list(jobs)
    first = names.index("round-01-rollouts")
    assert names[first : first + 6] == [f"round-0{number}-{stage}" for number in (1, 2) for stage in ("rollouts", "score", "train")]
    assert jobs["round-02-train"].words == ("recipe.yaml", "--round", "2")
    assert jobs["round-02-score"].commands[0] == "distill score recipe.yaml --round 2 --shard 1/2"
    assert "rounds/02/targets/targets-00000-of-00002.targets" in jobs["round-02-score"].writes[0]


def test_only_missing_parts_are_submitted(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    place = folder(recipe, "generate")
    make_parts(place, [1, 3], 5)
    assert parts_of(recipe, Step("generate"), 8) == (5, [2, 4, 5])  # in as many as it was begun in
    jobs = {job.name: job for job in chain(recipe, Wanted(shards=None))}
    assert jobs["generate"].tasks == (2, 4, 5) and jobs["generate"].environment["DISTILL_SHARDS"] == "5"
    with pytest.raises(StageConflictError, match="begun in 5 parts, asked for 8"):
        chain(recipe, Wanted(shards=8))
    make_parts(place, [2, 4, 5], 5)
    assert parts_of(recipe, Step("generate"), 8) is None  # only to be put together
    scored = folder(recipe, "score")
    scored.mkdir()
    for name in ("targets-00000-of-00003.targets", "targets-00001-of-00003.targets.part", "journal-00001-of-00003.jsonl"):
        (scored / name).touch()
    assert parts_of(recipe, Step("score"), 8) == (3, [2, 3])
    with pytest.raises(StageConflictError, match="begun in 3 parts, asked for 8"):
        parts_of(recipe, Step("score"), 8, asked=8)


def test_a_stage_that_was_begun_as_a_whole_goes_on_as_one(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    folder(recipe, "generate").mkdir(parents=True)
    (folder(recipe, "generate") / "traces-00000.parquet").touch()
    assert parts_of(recipe, Step("generate"), 4) is None
    with pytest.raises(StageConflictError, match="begun as a whole"):
        parts_of(recipe, Step("generate"), 4, asked=4)


def test_arrays_above_the_limit_are_split_and_share_what_may_run_at_once(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    make_parts(folder(recipe, "generate"), [*range(1, 1001), 2300], 2500)
    jobs = {job.name: job for job in chain(recipe, Wanted(), Site(max_array=1000, max_at_once=64))}
    assert jobs["generate-1"].tasks == tuple(range(1, 1001)) and jobs["generate-1"].environment["DISTILL_SHARD_OFFSET"] == "1000"
    assert jobs["generate-2"].commands[-1].endswith("--shard 2500/2500") and 300 not in jobs["generate-2"].tasks
    assert max(max(job.tasks) for job in jobs.values() if job.tasks) <= 1000
    assert jobs["generate-1"].at_once == jobs["generate-2"].at_once == 32
    assert jobs["curate"].after == ("generate-1", "generate-2")
    with pytest.raises(ClusterError, match=r"2,500 parts of generate are 3 arrays .* SITE_MAX_AT_ONCE is 2"):
        chain(recipe_for(tmp_path / "other"), Wanted(shards=2500), Site(max_array=1000, max_at_once=2))
    words = words_of(jobs["generate-2"], tmp_path, Site(max_array=1000))
    assert "--array=1-299,301-500%32" in words
    assert as_ranges([1, 2, 3, 5, 7, 8]) == "1-3,5,7-8"


def test_a_served_model_is_a_job_beside_its_clients_that_is_ended_behind_them(tmp_path: Path) -> None:
    jobs = {job.name: job for job in chain(recipe_for(tmp_path, **SERVED), Wanted(gpus=8, shards=2), served={Step("generate"): "teacher"})}
    server, clients, end = jobs["generate-serve"], jobs["generate"], jobs["generate-end"]
    assert server.words == ("recipe.yaml", "teacher") and server.after == ("prompts",) and server.gpus == 1
    assert (clients.beside, clients.after, clients.gpus) == ("generate-serve", ("prompts",), 0)
    assert int(clients.environment["DISTILL_WAIT_FOR_SERVER_S"]) > 0
    assert end.behind == ("generate",) and end.ends == "generate-serve" and jobs["curate"].after == ("generate",)
    given = {"prompts": ["1", "2"], "generate-serve": ["3", "4"], "generate": ["5", "6"]}
    assert dependency(clients, given) == "afterok:2,after:3"
    assert dependency(end, given) == "afterany:6"
    several = {job.name: job for job in chain(recipe_for(tmp_path, **SERVED), Wanted(servers=3), served={Step("generate"): "teacher"})}
    assert dependency(several["generate"], given) == "afterok:2,after:3_1" and several["generate"].environment["DISTILL_SERVERS"] == "3"
    words = words_of(end, tmp_path / "50%", PLAIN)
    assert (
        "--time=5" in words
        and not any("--signal" in word for word in words)
        and f"--output={tmp_path}/50%%/logs/generate-end-%j.log" in words
    )


def test_what_sbatch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(gres="gpu:a100", gpu_args=("--mem", "9G"), signal_s=60, requeue=True, slurm={"SBATCH_PARTITION": "a", "SBATCH_QOS": "low"})
    job = Job("train", "train.sbatch", ("r.yaml",), nodes=2, gpus=4)
    words = words_of(job, tmp_path, site, "afterok:7")
    assert {"--nodes=2", "--gres=gpu:a100:4", "--mem", "--signal=B:USR1@60", "--requeue", "--dependency=afterok:7"} <= set(words)
    assert "--kill-on-invalid-dep=yes" in words and f"--output={tmp_path}/logs/train-%j.log" in words
    assert words[-2:] == [str(SLURM / "train.sbatch"), "r.yaml"]
    monkeypatch.setenv("SBATCH_QOS", "high")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    environment = environment_of(job, tmp_path, site, {"DISTILL_FORERUNNER": "9"})
    assert environment["SBATCH_PARTITION"] == "a" and environment["SBATCH_QOS"] == "high" and "SLURM_JOB_ID" not in environment
    assert environment["DISTILL_RUN"] == str(tmp_path) and environment["DISTILL_PYTHON"] == sys.executable
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTILL_SITE", "~/site.env")
    (tmp_path / "site.env").touch()
    closed = environment_of(job, tmp_path, Site(slurm={"SBATCH_EXPORT": "NONE"}), {})
    assert {"DISTILL_RUN", "DISTILL_SITE"} < set(closed["SBATCH_EXPORT"].split(",")) and "NONE" not in closed["SBATCH_EXPORT"]
    assert closed["DISTILL_SITE"] == str(tmp_path / "site.env")


def site_with(tmp_path: Path, text: str) -> Site:
    (tmp_path / "site.env").write_text(text)
    return read_site({"DISTILL_SITE": str(tmp_path / "site.env")})


def test_the_site_is_read_as_a_shell_would(tmp_path: Path) -> None:
    site = site_with(
        tmp_path,
        "# ours\n\nSBATCH_PARTITION=gpu  # the big one\nSITE_GPUS_PER_NODE=8\nSITE_REQUEUE=1\nSITE_MAX_AT_ONCE=\n"
        "SITE_SETUP='module load cuda; source \"$HOME/v/bin/activate\"'\nSITE_GPU_ARGS='--mem 100G'\nSITE_SCRATCH=$TMP/x\n",
    )
    assert site.slurm == {"SBATCH_PARTITION": "gpu"} and site.gpus_per_node == 8 and site.requeue and site.max_at_once is None
    assert site.setup == 'module load cuda; source "$HOME/v/bin/activate"' and site.gpu_args == ("--mem", "100G")
    example = read_site({"DISTILL_SITE": str(SLURM / "site.env.example")})
    assert example.gpus_per_node == 8 and example.slurm["SBATCH_TIMELIMIT"] == "08:00:00"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("SITE_GPU_PER_NODE=8", r"site.env:2: SITE_GPU_PER_NODE: unknown key, got '8'. Did you mean SITE_GPUS_PER_NODE\?"),
        ("HF_HOME=/x", "put `export HF_HOME=...` into SITE_SETUP"),
        ("SITE_GPUS_PER_NODE=many", "site.env:2: SITE_GPUS_PER_NODE: .*got 'many'"),
        ("SITE_REQUEUE=yes", "site.env:2: SITE_REQUEUE: .*is 0 or 1, got 'yes'"),
        ("SBATCH_PARTITON=gpu", "site.env:2: SBATCH_PARTITON: unknown key, got 'gpu'. Did you mean SBATCH_PARTITION"),
        ("SBATCH_PARTITION=cpu", "site.env:2: SBATCH_PARTITION: is there twice"),
        ("SBATCH_TIMELIMIT=banana", "SBATCH_TIMELIMIT: got 'banana'"),
        ("SBATCH_TIMELIMIT=5", "SITE_SIGNAL_S: a job of 300 s .* told to end 300 s before"),
        ("SITE_MAX_ARRAY=0", "site.env:2: SITE_MAX_ARRAY: .*greater than or equal to 1, got '0'"),
        ("SITE_GPU_ARGS=--mem 9G", "expected KEY=VALUE, got 'SITE_GPU_ARGS=--mem 9G'"),
        ("SITE_SETUP='module load", "Close the quotes"),
        ("SBATCH_ACCOUNT=$USER", "SBATCH_ACCOUNT: a shell would expand"),
    ],
)
def test_a_wrong_line_of_the_site_is_named(line: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=expected):
        site_with(tmp_path, f"SBATCH_PARTITION=gpu\n{line}\n")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("x", None)],
)
def test_time_limits_are_read_as_slurm_does(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


def test_gpus_are_asked_for_where_they_are_used(tmp_path: Path) -> None:
    """A host needs none; a server takes what its arguments say."""
    words = ["--run_dir", str(tmp_path), "--evaluate.models", "[student]"]
    hosted = load_recipe(ROOT / "recipes" / "deepseek-v3.2-hosted-to-1.5b-kd.yaml", words)
    gpus = {job.name: job.gpus for job in chain(hosted, Wanted(gpus=8, shards=2))}
    assert (gpus["generate"], gpus["score"], gpus["train"], gpus["evaluate"]) == (0, 0, 8, 1)
    large = load_recipe(ROOT / "recipes" / "r1-to-32b-lora-4x8.yaml", ["--run_dir", str(tmp_path)])
    with pytest.raises(ClusterError, match=r"teacher.server.args: .*to 16 GPUs, and a server has 8. Add --serve-nodes 2"):
        chain(large, Wanted(gpus=8), served={Step("generate"): "teacher"})
    served = {job.name: job for job in chain(large, Wanted(gpus=8, serve_nodes=2), served={Step("generate"): "teacher"})}
    assert (served["generate-serve"].nodes, served["generate-serve"].gpus, served["generate"].gpus) == (2, 8, 0)


def test_without_a_file_nothing_is_set_unless_one_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_site({}) == Site()
    with pytest.raises(ClusterError, match="there is no file"):
        read_site({"DISTILL_SITE": str(tmp_path / "none")})


# The command


def submit(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = ["-m", "distill", "submit", "recipes/quickstart.yaml", "--run_dir", str(tmp_path / "run"), *words]
    return commands.run(line, environment={**os.environ, "HOME": str(tmp_path), **environment})


def test_a_dry_run_shows_all_and_makes_nothing(tmp_path: Path) -> None:
    done = submit(tmp_path, "--dry-run", "--nodes", "64", "--gpus-per-node", "8", "--shards", "2000", "--train.global_batch_size", "1024")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "512 on 64 nodes; 1,024 rows a step" in done.stdout and "evaluate 300" in done.stdout
    assert "--shard 2000/2000  ->  traces/parts/02000-of-02000/" in done.stdout
    assert "--array=1-1000" in done.stdout and "--dependency=afterok:<generate-1>:<generate-2>" in done.stdout
    assert "accelerate launch --num_processes 512 --num_machines 64 -m distill.train --config" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes", "64", "--gpus-per-node", "8"], "32 rows a step leave 480 of 512 processes without any. Set it to 512 or more"),
        (["--shards", "2001"], "2,001 parts of 2,000 prompts would leave some without any. Give at most 2,000"),
        (["--launch", "fdsp"], "there is no file fdsp"),
        (["--launch", "zero3", "--student.quantization", "nf4"], "student.quantization"),
        (["--gpus-per-node", "2", "--processes", "4"], "--processes: 4 on a node of 2 GPUs"),
        (
            ["--gpus-per-node", "8", "--teacher.server", TWO_BY_FOUR],
            "teacher.server.args: evaluate starts this server itself, on 8 GPUs, and a task of it has 1. Add --gpus-per-task 8",
        ),
    ],
)
def test_a_dry_run_refuses_what_does_not_come_out(words: list[str], expected: str, tmp_path: Path) -> None:
    done = submit(tmp_path, "--dry-run", *words)
    assert done.returncode == 1 and expected in done.stdout + done.stderr


def test_where_there_is_no_slurm_that_is_said(tmp_path: Path) -> None:
    done = submit(tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1 and "nothing says whether nodes have GPUs" in done.stderr and not (tmp_path / "run").exists()
    done = submit(tmp_path, "--gpus-per-node", "0", PATH=str(tmp_path))
    assert done.returncode == 1 and "squeue: there is no such command" in done.stderr and "--dry-run works anywhere" in done.stderr


def test_jobs_are_given_once_and_known_by_their_run(tmp_path: Path) -> None:
    """With programs in the place of Slurm's; the third job is accepted, but its number does not arrive."""
    sbatch = 'n=$(($(wc -l < jobs) + 101)); echo "$* $DISTILL_FORERUNNER $DISTILL_FIRST" >> jobs; if [ $n = 103 ]; then exit 1; fi; echo $n'
    squeue = f'while read -r line; do echo "$((++n + 100)) distill:{tmp_path}/run"; done < jobs; echo "7 distill:/another"; echo "8 (null)"'
    for name, text in {"sbatch": sbatch, "squeue": squeue, "scancel": 'echo "$*" > ended'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "jobs").touch()
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = submit(tmp_path, "--gpus-per-node", "0", **path)
    assert done.returncode == 1 and "these jobs are submitted" in done.stdout and "sbatch: exit code 1" in done.stderr
    assert (tmp_path / "ended").read_text() == "102 101\n"
    first, second, third = (tmp_path / "jobs").read_text().splitlines()
    assert f"--comment=distill:{tmp_path}/run" in first and second.endswith(" 101 101") and third.endswith(" 102 101")
    done = submit(tmp_path, "--gpus-per-node", "0", **path)
    assert done.returncode == 1 and "are queued or running (101, 102, 103)" in done.stderr
    assert len((tmp_path / "jobs").read_text().splitlines()) == 3


def test_what_does_not_come_out_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    done = submit(tmp_path, "--nodes", "64", "--gpus-per-node", "8", PATH=str(tmp_path))
    assert done.returncode == 1 and "leave 480 of 512 processes without any" in done.stdout and not (tmp_path / "run").exists()


# The scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "--severity=warning", "-x", str(script)], cwd=ROOT).returncode == 0
    text = script.read_text()
    assert "\r" not in text
    if script.suffix == ".sbatch":
        assert "#SBATCH --open-mode=append" in text and "#SBATCH --signal=B:USR1@300" in text


def bash(script: str, *words: str, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A batch script as Slurm runs it: a copy somewhere else, in the folder that sbatch was called in."""
    copy = tmp_path / "spool"
    shutil.copy(SLURM / script, copy)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DISTILL_"))}
    own = {"HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "17", "DISTILL_PYTHON": sys.executable}
    return subprocess.Popen(
        ["bash", str(copy), *words],
        cwd=ROOT,
        env={**kept, **own, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_stage_by_hand_leaves_a_log_and_a_record(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = bash("stage.sbatch", "prompts", "recipes/quickstart.yaml", "--run_dir", str(run), tmp_path=tmp_path)
    said = process.communicate()[0]
    assert process.returncode == 0 and said == f"log: {run}/logs/prompts-17.log\n", said
    log = (run / "logs" / "prompts-17.log").read_text()
    for part in ("prompts-17, attempt 0", "host      ", "revision  ", "-m distill prompts recipes/quickstart.yaml", "2,400 in"):
        assert part in log
    assert "\r" not in log
    (task,) = tasks_of(run)
    assert (task.name, task.job, task.task, len(task.attempts)) == ("prompts", 17, None, 1)
    assert task.attempts[0].code == 0 and task.attempts[0].signal is None and task.attempts[0].ended_at is not None


def test_a_task_of_an_array_does_its_part_and_says_how_it_failed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    array = {"SLURM_ARRAY_JOB_ID": "20", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "2"}
    words = ("array.sbatch", "generate", "recipes/quickstart.yaml", "--run_dir", str(run))
    process = bash(*words, tmp_path=tmp_path, SLURM_ARRAY_TASK_COUNT="1", **array)
    assert "Set DISTILL_SHARDS" in process.communicate()[0] and process.returncode == 1
    named = {"DISTILL_SHARDS": "30", "DISTILL_SHARD_OFFSET": "10", "DISTILL_RUN": str(run), "DISTILL_NAME": "generate-2"}
    process = bash(*words, tmp_path=tmp_path, SLURM_ARRAY_TASK_COUNT="1", **array, **named)
    said = process.communicate()[0]
    assert process.returncode == 1 and "--shard 12/30" in said and "prompts" in said  # which are not there yet
    (task,) = tasks_of(run)
    assert (task.name, task.job, task.task) == ("generate-2", 20, 2) and task.attempts[0].code == 1


def test_a_signal_before_the_command_is_no_reason_to_begin(tmp_path: Path) -> None:
    """In a site's setup, say, which can take long on a cold file system."""
    (tmp_path / "site.env").write_text("SITE_SETUP='kill -USR1 $$'\n")
    words = ("stage.sbatch", "prompts", "recipes/quickstart.yaml", "--run_dir", str(tmp_path / "run"))
    process = bash(*words, tmp_path=tmp_path, DISTILL_SITE=str(tmp_path / "site.env"))
    process.communicate()
    assert process.returncode == EARLY and not (tmp_path / "run" / "prompts").exists()
    (task,) = tasks_of(tmp_path / "run")
    assert (task.attempts[0].code, task.attempts[0].signal) == (EARLY, "USR1")


def test_a_follow_up_asks_by_the_site_s_limit_and_of_its_own_chain_alone(tmp_path: Path) -> None:
    (tmp_path / "site.env").write_text("SITE_MAX_IDLE_RESTARTS=1\n")
    run = tmp_path / "run"
    (run / "jobs" / "tasks").mkdir(parents=True)
    for job, code in ((15, 1), (16, EARLY)):
        begun = {"event": "started", "at": "", "attempt": 0, "host": ""}
        lines = [json.dumps(begun), json.dumps(begun | {"event": "ended", "code": code})]
        (run / "jobs" / "tasks" / f"prompts-{job}.jsonl").write_text("\n".join(lines) + "\n")
    words = ("stage.sbatch", "prompts", "recipes/quickstart.yaml", "--run_dir", str(run))
    for first, said in (("15", "prompts-15 failed"), ("16", "1 attempts in a row came no further (SITE_MAX_IDLE_RESTARTS=1)")):
        more = {"DISTILL_SITE": str(tmp_path / "site.env"), "DISTILL_FORERUNNER": "16" if first == "16" else "15", "DISTILL_FIRST": first}
        process = bash(*words, tmp_path=tmp_path, **more, SLURM_JOB_ID="16" if first == "15" else "17")
        process.communicate()
        logs = "".join(log.read_text() for log in (run / "logs").glob("*.log"))
        assert process.returncode == 1 and f"given up: {said}" in logs, logs
        shutil.rmtree(run / "logs")


# A command that ends early as a stage does, or before it could listen; and one that fails.
LISTENS = "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: os._exit(75)); print('ready', flush=True); signal.pause()"
DEAF = "import signal; print('ready', flush=True); signal.pause()"


def task(tmp_path: Path, program: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "distill.cluster.task", str(tmp_path / "t-1.jsonl"), *options, "--", sys.executable, "-c", program]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE)


def ended(tmp_path: Path) -> dict[str, object]:
    begun, last = map(json.loads, (tmp_path / "t-1.jsonl").read_text().splitlines())
    assert begun["event"] == "started" and last["event"] == "ended" and begun["host"] == last["host"]
    return dict(last)


@pytest.mark.parametrize(
    ("program", "options", "sent", "name"),
    [(LISTENS, [], signal.SIGUSR1, "USR1"), (LISTENS, ["--as", "USR1"], signal.SIGTERM, "TERM"), (DEAF, [], signal.SIGTERM, "TERM")],
)
def test_signals_reach_the_command_and_are_written_down(
    program: str, options: list[str], sent: signal.Signals, name: str, tmp_path: Path
) -> None:
    process = task(tmp_path, program, *options)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    said = process.communicate()[0]
    assert process.returncode == EARLY and f"ended with exit code 75 after SIG{name}" in said
    assert (ended(tmp_path)["code"], ended(tmp_path)["signal"]) == (EARLY, name)


def test_what_fails_or_is_killed_is_told_from_what_ended_early(tmp_path: Path) -> None:
    for program, code in (("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)):
        process = task(tmp_path, program, SLURM_RESTART_COUNT="2", SLURMD_NODENAME="n7")
        process.communicate()
        assert process.returncode == code and ended(tmp_path) | {"code": code, "signal": None, "attempt": 2, "host": "n7"} == ended(
            tmp_path
        )
        (tmp_path / "t-1.jsonl").unlink()


def test_a_task_that_ended_early_is_queued_again_by_both_its_numbers(tmp_path: Path) -> None:
    """With programs in the place of scontrol, which says what it was told, and of squeue, which knows how the job stands."""
    for name, said in {"scontrol": "scontrol $*", "squeue": "$STATE"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{said}"\n')
        (tmp_path / name).chmod(0o755)
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "17"}  # of the last task $SLURM_JOB_ID is the array's
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = task(tmp_path, "raise SystemExit(75)", "--requeue", PATH=path, STATE="RUNNING", **array)
    assert "scontrol requeue 17_4\n" in process.communicate()[0] and process.returncode == EARLY
    process = task(tmp_path, "raise SystemExit(75)", "--requeue", PATH=path, STATE="COMPLETING", **array)  # after scancel
    assert "scontrol" not in process.communicate()[0] and process.returncode == EARLY
    process = task(tmp_path, "raise SystemExit(75)", "--requeue", PATH=path, STATE="", **array)  # a scheduler that says nothing
    assert "scontrol requeue 17_4\n" in process.communicate()[0]
    process = task(tmp_path, "", "--requeue", PATH=path, STATE="RUNNING", **array)
    assert "scontrol" not in process.communicate()[0] and process.returncode == 0
