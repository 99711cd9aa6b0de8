"""How far a run is, looked at from outside: at work, killed, damaged, on a cluster and off one, and of thousands of parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import commands
import pytest
from fabricated import make_run, recipe_for
from faulty import Faulty
from filelock import FileLock
from test_shards_of_traces import recipe as served_recipe

from distill.cli import _run_folder
from distill.cluster.progress import progress_of
from distill.cluster.status import as_object, show, status_of
from distill.cluster.underway import LATELY_S
from distill.errors import MissingStageError, RecipeError
from distill.pipeline import delete_from, verify_run
from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.run import counted
from distill.run.files import write_json
from distill.run.folder import StageFolder, delete_stage
from distill.run.journal import Journal
from distill.run.manifest import CLOCK, LOCK, MANIFEST
from distill.run.schema import PROMPT, TRACE
from distill.stages import WRITES, Step, generate, prompts, report

ROOT = Path(__file__).resolve().parent.parent
GENERATE = {"temperature": 1.0, "samples_per_prompt": 2}


def started(run: Path, count: int = 40, **changes: Any) -> Recipe:
    """A run whose prompts are there, and whose traces are begun; no model wrote any of it."""
    recipe = recipe_for(run, **{"generate": GENERATE} | changes)
    messages = [{"role": "user", "content": "How much?"}]
    rows = [{"prompt_id": f"{number:016x}", "messages": messages, "reference": "1", "source": "p"} for number in range(count)]
    with StageFolder(run / "prompts", "prompts", {}) as out:
        out.write_table("train", rows, PROMPT)
        out.write_table("heldout", rows[:10], PROMPT)
        out.finish(rows_in=count, rows_kept=count, facts={"wall_s": 1.0})
    (run / "recipe.yaml").write_text(recipe_text(recipe))
    with StageFolder(run / "traces", "generate", {}, [run / "prompts"]):
        pass
    return recipe


def journal(place: Path, prompts: int, samples: int = 2, text: str = "", author: str = "teacher") -> None:
    for number in range(prompts):
        for sample in range(samples):
            row = {"prompt_id": f"{number:016x}", "sample_index": sample, "author": author, "completion": text, "reason": None}
            Journal(place / "journal.jsonl").append([row])


def clock(place: Path, done: int, seconds: float, **more: Any) -> None:
    doing = {"what": "generate", "done": done, "of": 1000, "unit": "traces", "begun_at": 0, "seconds": seconds}
    write_json(place / CLOCK, {"wall_s": seconds + 5, "doing": doing | more})


def step(run: Path, stage: str, number: int = 0, **options: Any) -> Any:
    return next(each for each in progress_of(run, **options).steps if each.step == Step(stage, number))


def everything(run: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.stat() for path in sorted(run.rglob("*"))}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def test_rows_of_a_stage_under_way_are_those_on_disk(tmp_path: Path) -> None:
    started(tmp_path)
    place = tmp_path / "traces"
    hostile = 'a text with {"prompt_id": "0", "sample_index": 0, "author": "teacher"} in it\n'
    journal(place, 5, text=hostile)
    journal(place, 2)  # as after a kill: the same rows again
    with (place / "journal.jsonl").open("a") as file:
        file.write('0123456789abcdef [{"prompt_id": "torn')
    clock(place, 10, 4.0)
    found = step(tmp_path, "generate")
    assert (found.work.rows, found.work.total, found.work.exact, found.state) == (10, 80, True, "begun")
    assert found.work.rate == 2.5 and found.left_s == 28 and found.work.reckoned == "clock"
    assert step(tmp_path, "generate", at=time.time() + LATELY_S + 60).state == "stopped"
    with FileLock(place / LOCK):
        assert step(tmp_path, "generate").state == "at work"
    assert [step(tmp_path, name).state for name in ("prompts", "curate", "export")] == ["done", "not begun", "not begun"]


def test_a_window_that_is_in_shards_is_not_counted_twice(tmp_path: Path) -> None:
    started(tmp_path)
    place = tmp_path / "traces"
    journal(place, 3)
    for name in ("traces-00000.parquet", "traces-00001.parquet"):
        (place / name).write_bytes(b"")
    noted = [{"file": f"traces-{number:05d}.parquet", "rows": 4, "sha256": ""} for number in range(3)]  # the third is not in its place yet
    Journal(place / "shards.jsonl").append(noted)
    os.utime(place / "journal.jsonl", (1, 1))
    assert step(tmp_path, "generate").work.rows == 8
    journal(place, 1)
    os.utime(place / "shards.jsonl", (1, 1))
    assert step(tmp_path, "generate").work.rows == 8 + 6


def test_long_journals_are_reckoned_by_their_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "_AT_MOST", 4000)
    monkeypatch.setattr(counted, "_LEAST", 4000)
    started(tmp_path, count=100)
    journal(tmp_path / "traces", 100, 1, text="x" * 300)
    found = step(tmp_path, "generate").work
    assert not found.exact and found.rows == pytest.approx(100, abs=2)


def test_a_run_of_two_thousand_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path, count=4000)
    parts = tmp_path / "traces" / "parts"
    for number in range(1, 909):
        place = parts / f"{number:05d}-of-02000"
        place.mkdir(parents=True)
        if number <= 900:
            (place / MANIFEST).write_text("{}")
        else:
            journal(place, 1)
            clock(place, 2, 4.0)
    before = everything(tmp_path)
    found = step(tmp_path, "generate")
    assert (found.work.rows, found.work.total, found.work.parts) == (900 * 4 + 8 * 2, 8000, (900, 8, 2000))
    assert found.work.rate == pytest.approx(8 * 0.5) and found.left_s == pytest.approx((8000 - 3616) / 4)
    assert show(tmp_path) and "900 of 2,000, 8 begun" in capsys.readouterr().out
    assert everything(tmp_path) == before


def test_parts_of_a_scoring_are_counted_by_their_shards_and_journals(tmp_path: Path) -> None:
    started(tmp_path, train={"method": "kd"}, score={"target": {"kind": "top_k", "k": 8}})
    with StageFolder(tmp_path / "curated", "curate", {}) as out:
        out.write_table("curated", [{"prompt_id": f"{number:016x}", "sample_index": 0} for number in range(4100)], TRACE)
        out.finish(rows_kept=4100)
    with StageFolder(tmp_path / "targets", "score", {}, [tmp_path / "curated"]) as out:
        for number in range(1500):
            (out.path / f"targets-{number:05d}-of-02000.targets").write_bytes(b"")
        scored = [{"key": f"{number:016x}/0", "tokens": 3} for number in range(2)]
        for rows in (scored[:1], scored):
            Journal(out.path / "journal-01990-of-02000.jsonl").append(rows)
    found = step(tmp_path, "score")
    assert (found.work.rows, found.work.total, found.work.parts) == (100 * 3 + 1400 * 2 + 2, 4100, (1500, 1, 2000))


def test_a_training_counts_steps_and_says_from_which_it_would_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path, train={"trainer_args": {"num_train_epochs": 4}})
    with StageFolder(tmp_path / "student", "train", {}) as out:
        assert step(tmp_path, "train").work.total is None
        lines = [{"step": 5, "epoch": 0.5, "loss": 1.0}, {"step": 10, "epoch": 1.0, "loss": 0.9}]
        (out.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 15, "epo')
        assert (step(tmp_path, "train").work.rows, step(tmp_path, "train").work.total) == (10, 40)
        (out.path / "checkpoints" / "checkpoint-8").mkdir(parents=True)
        (out.path / "checkpoints" / "checkpoint-8" / "whole").write_text("{}")
        (out.path / "checkpoints" / "checkpoint-10").mkdir()
        clock(out.path, 12, 6.0, what="train", of=41, unit="steps")
        found = step(tmp_path, "train")
        assert (found.state, found.work.rows, found.work.total, found.work.kept) == ("at work", 12, 41, 8)
        assert found.left_s == pytest.approx(29 / 2)
    assert show(tmp_path) and "a restart goes on from step 8" in capsys.readouterr().out


def test_what_is_damaged_or_outdated_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe_for(tmp_path, report={}, export=None)))
    assert [each.state for each in progress_of(tmp_path).steps] == ["done"] * 5 + ["not begun"]
    shutil.copytree(tmp_path, tmp_path / "whole")
    delete_stage(tmp_path / "student", WRITES["train"])
    assert step(tmp_path, "evaluate").why == "student is gone"
    with StageFolder(tmp_path / "student", "train", {"seed": 2}, [tmp_path / "curated"]) as out:
        assert step(tmp_path, "evaluate").why == "student is made anew" and step(tmp_path, "train").state == "at work"
        out.finish()
    assert step(tmp_path, "evaluate").why == "student was made anew since"
    (tmp_path / "curated" / "curated-00000.parquet").unlink()
    assert not show(tmp_path)
    said = capsys.readouterr().out
    assert "curated-00000.parquet: is gone" in said and "outdated" in said and "at work" not in said
    (tmp_path / "whole" / "prompts" / MANIFEST).write_text("{")
    found = status_of(tmp_path / "whole")
    assert [found.state(each) for each in found.steps] == ["damaged", "done", "done", "done", "done", "not begun"]
    (tmp_path / "whole" / "recipe.yaml").write_text("name: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):  # nothing else there says what was asked for
        status_of(tmp_path / "whole")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="holds no stage of a run"):
        status_of(tmp_path / "nothing")
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe_for(tmp_path / "elsewhere")))
    assert {each.state for each in status_of(tmp_path).steps} == {"not begun"}  # and it is this folder that counts
    started(tmp_path / "run")
    write_json(tmp_path / "run" / "prompts" / "plan.json", {"made_with": recipe_for(tmp_path).model_dump(mode="json")})
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert step(tmp_path / "run", "generate").state == "begun"


def test_an_error_that_was_not_foreseen_is_shown_until_the_stage_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path)
    log = tmp_path / "failed-20261127-043000-7.log"
    log.write_text("command: distill\n" + "".join(f"line {number}\n" for number in range(20)) + "ValueError: \x1b[31mred\n")
    os.utime(log, (time.time() + 5, time.time() + 5))
    assert not show(tmp_path)
    said = capsys.readouterr().out
    assert "generate failed-20261127-043000-7.log" in said and "line 13" in said and "line 12" not in said and "\x1b[31m" not in said
    with FileLock(tmp_path / "traces" / LOCK):
        assert not status_of(tmp_path).failures


def test_verify_knows_what_a_cluster_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    for name in ("jobs/submitted.jsonl", "jobs/tasks/train-7.jsonl", "logs/train-7.log", "jobs/recipe-1.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    verify_run(tmp_path)
    assert "extra" not in capsys.readouterr().out


def test_what_a_cluster_left_is_neither_published_nor_deleted(tmp_path: Path) -> None:
    make_run(tmp_path)
    recipe = recipe_for(tmp_path)
    for name in ("jobs/tasks/train-7.jsonl", "logs/train-7.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("node-of-mine")
    report.run(recipe)
    written = [path for path in (tmp_path / "report").iterdir() if path.is_file()]
    assert written and not any(b"node-of-mine" in path.read_bytes() for path in written)
    delete_from(recipe, "all")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(LOCK)}
    assert left == {"jobs/tasks/train-7.jsonl", "logs/train-7.log", "recipe.yaml"}


@pytest.mark.slow
def test_a_stage_is_watched_at_work_and_behind_a_kill(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Through the command line; what the command prints is what a process of its own finds, without torch."""
    price = {"input": 1.0, "output": 2.0}
    with Faulty(delay_s=0.3) as server:
        asked = served_recipe(tmp_path, tiny_model_dir, server.url, concurrency=2, price=price)
        prompts.run(asked)
        (tmp_path / "asked.yaml").write_text(recipe_text(asked))
        run = tmp_path / "run"
        with commands.Command(["-m", "distill", "generate", tmp_path / "asked.yaml"]) as process:
            process.until(lambda: sum(server.asked.values()) >= 12)
            found = step(run, "generate")
            process.kill()
            said = process.wait().stderr
        assert found.state == "at work" and 2 <= found.work.rows < found.work.total == 42 and "\r" not in said
        left = step(run, "generate")
        assert left.state == "begun" and found.work.rows <= left.work.rows < 42
        assert left.work.spent is None or left.work.spent["cost_usd"] > 0
        server.delay_s = 0.0
        made = generate.run(asked)
    assert (step(run, "generate").state, step(run, "generate").work.rows) == ("done", made.rows_kept)
    code = f"import sys; sys.argv = ['distill', 'status', {str(run)!r}, '--json']\nfrom distill.cli import main\n"
    code += "try: main()\nexcept SystemExit as end: print(end.code, {'torch', 'transformers', 'datasets'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    text, _, last = shown.stdout.rstrip().rpartition("\n")
    assert last == "0 set()" and json.loads(text)["steps"] == json.loads(json.dumps(as_object(status_of(run))))["steps"]


def test_a_run_is_named_by_its_folder_or_its_recipe(tmp_path: Path) -> None:
    assert _run_folder(tmp_path) == tmp_path and _run_folder(Path("quickstart")) == Path("runs/quickstart")
    assert _run_folder(tmp_path / "none") == tmp_path / "none"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_it_is_watched_on_a_terminal_until_ctrl_c(tmp_path: Path) -> None:
    started(tmp_path)
    words = [sys.executable, "-m", "distill", "status", str(tmp_path), "--watch"]
    once = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert once.returncode == 0 and "40 rows" in once.stdout and "printed once" in once.stderr
    ours, theirs = os.openpty()
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        shown = b""
        while b"generate" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    os.close(ours)
    assert b"Traceback" not in shown
