"""Traces that several processes write, each a part: in the end the folder is that of one process."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import commands
import pytest
from faulty import Faulty
from filelock import FileLock

from distill.errors import BudgetError, RecipeError, ServerError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.reading import recipe_text
from distill.run.manifest import MANIFEST, PARTS, Manifest, read_manifest
from distill.run.parts import Part, part_of
from distill.run.tables import read_rows
from distill.stages import evaluate, generate, prompts


def recipe(place: Path, model: Path, url: str, *, count: int = 30, **server: Any) -> Recipe:
    """A recipe whose teacher and student stand behind a server; `count` prompts, of which 9 are held out."""
    served = {"kind": "vllm", "url": url, "model": "stub"} | server
    rows = "".join(f'{{"question": "How much is {number} and 1?", "answer": "{number + 1}"}}\n' for number in range(count))
    place.mkdir(parents=True, exist_ok=True)
    (place / "p.jsonl").write_text(rows)
    return Recipe.model_validate(
        {
            "name": "test",
            "run_dir": str(place / "run"),
            "teacher": {"model": str(model), "server": served},
            "student": {"model": str(model)},
            "prompts": {"source": str(place / "p.jsonl"), "heldout_size": 9},
            "generate": {"samples_per_prompt": 2, "max_new_tokens": 32},
            "evaluate": {"models": ["teacher"], "max_new_tokens": 32},
        }
    )


def test_parts_make_the_folder_that_one_process_makes(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Faulty() as server:
        whole, parts = (recipe(tmp_path / name, tiny_model_dir, server.url) for name in ("whole", "parts"))
        for each in (whole, parts):
            prompts.run(each)
        made = generate.run(whole)
        assert generate.run_shard(parts, Part(1, 3)) is None and generate.run_shard(parts, Part(0, 3)) is None
        with pytest.raises(StageConflictError, match="3 parts"):
            generate.run_shard(parts, Part(0, 2))
        found = generate.run_shard(parts, Part(2, 3))
        asked = sum(server.asked.values())
    place = tmp_path / "parts/run/traces"
    assert isinstance(found, Manifest) and found.digest == made.digest and not (place / PARTS).exists()
    assert asked == 2 * made.rows("traces") and found.facts["server"]["requests"] == made.facts["server"]["requests"]


def test_a_stage_that_was_begun_in_parts_is_finished_by_one_process(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Faulty() as server:
        whole, parts = (recipe(tmp_path / name, tiny_model_dir, server.url) for name in ("whole", "parts"))
        for each in (whole, parts):
            prompts.run(each)
        assert evaluate.run_shard(parts, Part(1, 2)) is None
        made = [evaluate.run(each) for each in (whole, parts)]
    assert made[0].digest == made[1].digest and made[0].rows("answers") == 9


def test_what_fails_ends_the_stage_with_its_causes_and_is_asked_again(tmp_path: Path, tiny_model_dir: Path) -> None:
    refusal = (400, '{"error": {"message": "content_filter: not this one", "code": "content_filter"}}')
    with Faulty(never=refusal) as server:
        asked = recipe(tmp_path, tiny_model_dir, server.url)
        prompts.run(asked)
        with pytest.raises(ServerError, match=r"failed for good|refus"):
            generate.run(asked)
        assert not (tmp_path / "run/traces" / MANIFEST).exists()
        server.never = None
        made = generate.run(asked)
    assert made.rows_kept == len(read_rows(tmp_path / "run/traces", "traces")) and "dropped" not in made.tables
    assert read_manifest(tmp_path / "run/traces").facts["device"].startswith("server (vllm")


def test_parts_that_made_nothing_bind_nobody(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A server that refused all, by other settings; while somebody works by these they count."""
    with Faulty(never=(401, '{"error": {"message": "no such key"}}')) as server:
        wrong, asked = (recipe(tmp_path, tiny_model_dir, server.url, body={"tag": name}) for name in ("wrong", "stub"))
        prompts.run(asked)
        with pytest.raises(ServerError, match="401"):
            generate.run_shard(wrong, Part(0, 2))
        server.never = None
        place = tmp_path / "run/traces"
        with FileLock(place / ".lock-00002-of-00002"), pytest.raises(StageConflictError, match="'wrong' there and 'stub' here"):
            generate.run_shard(asked, Part(0, 2))
        assert generate.run_shard(asked, Part(0, 2)) is None
        with pytest.raises(StageConflictError, match="'stub' there and 'wrong' here"):
            generate.run_shard(wrong, Part(1, 2))
        assert isinstance(generate.run_shard(asked, Part(1, 2)), Manifest)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_a_part_that_there_is_not_is_refused(shard: str) -> None:
    with pytest.raises(RecipeError, match="--shard"):
        part_of(shard)


@pytest.mark.parametrize(
    ("kills", "count"), [pytest.param(2, 30, marks=pytest.mark.slow), pytest.param(50, 460, marks=pytest.mark.nightly)]
)
def test_parts_on_the_command_line_survive_kills(kills: int, count: int, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Two processes share the stage; one is killed again and again while it writes; nothing answered is asked for again."""
    with Faulty() as server:
        whole = recipe(tmp_path / "whole", tiny_model_dir, server.url, count=count, concurrency=2)
        prompts.run(whole)
        made = generate.run(whole)
    with Faulty(delay_s=0.4) as server:
        asked = recipe(tmp_path / "parts", tiny_model_dir, server.url, count=count, concurrency=2)
        prompts.run(asked)
        (tmp_path / "parts/recipe.yaml").write_text(recipe_text(asked))
        words = ["-m", "distill", "generate", tmp_path / "parts/recipe.yaml", "--shard"]
        journal = Part(0, 2).folder(tmp_path / "parts/run/traces") / "journal.jsonl"
        for kill in range(kills):
            with commands.Command([*words, "1/2"]) as process:
                # By what is on disk: when the server has answered, the answer may be on its way there.
                process.until(lambda lines=4 * (kill + 1): journal.exists() and journal.read_bytes().count(b"\n") >= lines)
                code = process.kill()
            assert code == -signal.SIGKILL and len(server.asked) < count - 9, "it was to be killed while it writes"
        server.delay_s = 0.0
        ended = [commands.run([*words, part]) for part in ("2/2", "1/2")]
        assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
        again = sum(count - 1 for count in server.asked.values())
    found = read_manifest(tmp_path / "parts/run/traces")
    assert found.digest == made.digest and again <= 4 * kills  # two in flight, two answered and not yet on disk
    assert "nothing to do" in commands.run(words[:-1]).stdout


def test_parts_of_a_stage_that_was_begun_as_a_whole_are_refused_before_its_first_shard(tmp_path: Path, tiny_model_dir: Path) -> None:
    """What it wrote is in its journal only, and would be there twice beside the parts."""
    with Faulty() as server:
        low, whole = (recipe(tmp_path, tiny_model_dir, server.url, concurrency=2, max_tokens=most) for most in (400, None))
        prompts.run(low)
        with pytest.raises(BudgetError):
            generate.run(low)
        assert not list((tmp_path / "run/traces").glob("*.parquet"))
        with pytest.raises(StageConflictError, match="as a whole"):
            generate.run_shard(whole, Part(0, 2))
        assert generate.run(whole).rows_kept == 42 and max(server.asked.values()) == 1
