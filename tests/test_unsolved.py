"""More samples of prompts without a right answer yet: which are written, at which temperature, after a kill and in parts."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import commands
import pytest
from pydantic import ValidationError

from distill.before.expected import Lengths, expected, jobs_of
from distill.before.outlook import outlook
from distill.cluster.chain import Wanted
from distill.cluster.site import Site
from distill.cluster.submit import prepare
from distill.errors import ClusterError
from distill.pipeline import run_pipeline, run_shard, run_stage
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Generate
from distill.run.early import EndedEarly
from distill.run.journal import Journal
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.stages import Step

MOST, FIRST, LATER = 7, 2.0, [0.7, 0.2]  # of a prompt two at 2.0, two at 0.7, and up to three at 0.2


@pytest.fixture(scope="module", autouse=True)
def model(tiny_model_dir: Path) -> Path:
    """Its answers are noise, of which about every eighth ends by itself: that is right."""
    MODELS["model"] = str(tiny_model_dir)
    return tiny_model_dir


MODELS = {"dtype": "float32"}


def recipe_of(run_dir: Path, prompts: int = 10, **generate: Any) -> Recipe:
    asked = {"samples_per_prompt": 2, "max_new_tokens": 32, "temperature": FIRST, "top_p": 1.0, "batch_size": 16}
    more = {"unsolved": {"max_samples": MOST, "temperatures": LATER}} | generate
    return Recipe.model_validate(
        {
            "name": "test",
            "run_dir": str(run_dir),
            "teacher": MODELS,
            "student": MODELS,
            "prompts": {"source": "embedded:arithmetic", "max_prompts": prompts, "heldout_size": 4},
            "generate": asked | more,
            "curate": {"checks": ["finish"], "workers": 1, "max_per_prompt": 9},
            "evaluate": None,
            "export": None,
        }
    )


def traces(run: Path) -> dict[tuple[str, int], str]:
    return {(row["prompt_id"], row["sample_index"]): row["completion"] for row in read_rows(run / "traces", "traces")}


def passing(run: Path) -> dict[tuple[str, int], bool]:
    """Whether a trace has passed every check, and no token that steers a conversation was drawn inside."""
    rows = [*read_rows(run / "curated", "curated"), *read_rows(run / "curated", "dropped")]
    return {(row["prompt_id"], row["sample_index"]): row.get("reason") in (None, "duplicate") for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, through the command line."""
    place = tmp_path_factory.mktemp("unsolved")
    (place / "recipe.yaml").write_text(json.dumps(recipe_of(place / "run").model_dump(mode="json")))
    done = commands.run(["-m", "distill", "run", place / "recipe.yaml", "--no-check", "--until", "curate"])
    assert done.returncode == 0 and "have no right answer yet" in done.stdout, done.stderr[-2000:]
    return place / "run"


def test_unsolved_prompts_get_more_until_one_passes_or_they_have_their_most(whole: Path) -> None:
    passed, samples = passing(whole), defaultdict(set)
    for prompt, sample in traces(whole):
        samples[prompt].add(sample)
    assert {len(mine) for mine in samples.values()} >= {2, MOST}
    for prompt, mine in samples.items():
        assert mine == set(range(len(mine))) and len(mine) in (2, 4, 6, MOST)
        before = [sample for sample in mine if sample < (len(mine) - 1) // 2 * 2]
        assert not any(passed[prompt, sample] for sample in before)  # else no more would have been asked for
        assert len(mine) == MOST or any(passed[prompt, sample] for sample in mine)
    digests = [read_manifest(whole / stage).digest for stage in ("traces", "curated")]
    run_pipeline(recipe_of(whole), last="curate")  # nothing is left to do
    assert [read_manifest(whole / stage).digest for stage in ("traces", "curated")] == digests
    facts = read_manifest(whole / "curated").facts["unsolved"]
    never = [prompt for prompt, mine in samples.items() if not any(passed[prompt, sample] for sample in mine)]
    assert sum(facts.values()) == len(never) == len(read_rows(whole / "curated", "unsolved"))


@pytest.mark.slow
def test_each_sample_is_what_would_be_written_at_its_temperature(whole: Path, tmp_path: Path) -> None:
    """By its number alone: the same as where all prompts are given seven at that temperature."""
    written = traces(whole)
    for place, (temperature, numbers) in enumerate(((FIRST, (0, 1)), (LATER[0], (2, 3)), (LATER[1], (4, 5, 6)))):
        plain = recipe_of(tmp_path / str(place), samples_per_prompt=MOST, temperature=temperature, unsolved=None)
        run_pipeline(plain, last="generate")
        alone = traces(tmp_path / str(place))
        assert {key: text for key, text in written.items() if key[1] in numbers} == {
            key: text for key, text in alone.items() if key[1] in numbers and key in written
        }


@pytest.mark.slow
def test_a_kill_in_a_pass_changes_no_row(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, passes = Journal.append, []

    def killed(journal: Journal, batch: list[dict[str, Any]]) -> None:
        append(journal, batch)
        if batch and batch[0].get("sample_index", 0) >= 2:
            passes.append(batch)
            raise EndedEarly("SIGTERM")

    monkeypatch.setattr(Journal, "append", killed)
    for _ in range(3):
        with pytest.raises(EndedEarly):
            run_pipeline(recipe_of(tmp_path), last="curate")
    assert len(passes) == 3
    [generate] = outlook(recipe_of(tmp_path), [Step("generate")])
    assert generate.action in ("go on", "grow")
    monkeypatch.setattr(Journal, "append", append)
    run_pipeline(recipe_of(tmp_path), last="curate")
    for stage, table in (("traces", "traces"), ("curated", "curated"), ("curated", "unsolved")):
        assert read_rows(tmp_path / stage, table) == read_rows(whole / stage, table)


@pytest.mark.slow
def test_parts_write_the_same_and_more_prompts_begin_as_the_first_did(whole: Path, tmp_path: Path) -> None:
    """Prompts that come later get their first two, and then what they need, beside prompts that have more already."""
    for prompts in (6, 10):
        recipe, written = recipe_of(tmp_path, prompts), [""]
        run_stage("prompts", recipe)
        while len(written) < 9:
            for part in ("1/2", "2/2"):
                run_shard("generate", recipe, part)
            if read_manifest(tmp_path / "traces").digest == written[-1]:
                break
            written.append(read_manifest(tmp_path / "traces").digest)
            run_stage("curate", recipe)
        assert 3 <= len(written) < 9
    assert read_rows(tmp_path / "traces", "traces") == read_rows(whole / "traces", "traces")


def test_chains_of_jobs_are_refused_and_costs_are_up_to(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(ClusterError, match=r"generate\.unsolved.*--until curate"):
        prepare(recipe, Wanted(), Site())
    first, more = jobs_of(recipe, "teacher", 100, 0)
    assert (first.answers, more.answers, first.at_most, more.at_most) == (200, 500, False, True)
    assert expected(more, 10, Lengths(5, 5), 100, None)[0].startswith("generate.unsolved: up to 500 answers")


@pytest.mark.parametrize(
    ("generate", "says"),
    [
        ({"samples_per_prompt": 7}, "is not above samples_per_prompt"),
        ({"unsolved": {"max_samples": 4, "temperatures": [0.8, 0.9]}}, "there are 1 times samples_per_prompt more"),
        ({"samples_per_prompt": 1, "temperature": 0.0, "top_p": 0.95, "unsolved": {"max_samples": 3}}, "give unsolved.temperatures"),
    ],
)
def test_what_would_write_nothing_new_is_refused(tmp_path: Path, generate: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        recipe_of(tmp_path, **generate)


def test_a_bound_that_drops_all_that_is_written_more_is_refused(tmp_path: Path) -> None:
    """Behind two wrong answers, two right ones are half of all."""
    asked = recipe_of(tmp_path).model_dump(mode="json")
    for rate, refused in ((0.5, False), (0.6, True)):
        with pytest.raises(ValidationError, match="would drop all that generate") if refused else nullcontext():
            Recipe.model_validate(asked | {"curate": asked["curate"] | {"min_pass_rate": rate}})


def test_it_is_no_other_recipe_for_the_first_samples() -> None:
    plain = Generate(samples_per_prompt=2, temperature=0.7)
    more = Generate.model_validate({**plain.model_dump(), "unsolved": {"max_samples": 8, "temperatures": [0.8, 1.0]}})
    assert more.identity() == plain.identity() and "unsolved" not in plain.identity()
    assert [more.further(samples).temperature for samples in (0, 2, 4, 6)] == [0.7, 0.8, 1.0, 1.0]
