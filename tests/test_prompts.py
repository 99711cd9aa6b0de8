"""The stage `prompts`: what is trained on, what is held out, what is dropped and why."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DataError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.run.files import digest_file
from distill.run.manifest import MANIFEST, Manifest
from distill.run.schema import prompt_id
from distill.run.tables import read_rows
from distill.stages.prompts import run, survey

COUNT = 60


def rows(count: int = COUNT) -> list[dict[str, Any]]:
    return [{"question": f"What is {index}+1?", "answer": index + 1} for index in range(count)]


def write(path: Path, source: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in source))
    return path


def recipe(run_dir: Path, source: Path, *, seed: int = 0, **prompts: Any) -> Recipe:
    section = {"source": str(source), "heldout_size": 10, **prompts}
    return Recipe.model_validate(
        {
            "name": "test",
            "run_dir": str(run_dir),
            "seed": seed,
            "student": {"model": "none"},
            "prompts": section,
            "traces": {"source": "x.jsonl"},
            "evaluate": None,
        }
    )


def made(
    tmp_path: Path, source: list[dict[str, Any]], name: str = "run", **options: Any
) -> tuple[Manifest, dict[str, list[dict[str, Any]]]]:
    """The stage's manifest and tables over a source."""
    manifest = run(recipe(tmp_path / name, write(tmp_path / f"{name}.jsonl", source), **options))
    tables = {table: read_rows(tmp_path / name / "prompts", table) for table in ("train", "heldout", "dropped")}
    assert manifest.rows_in == sum(map(len, tables.values()))
    assert manifest.rows_kept == len(tables["train"]) + len(tables["heldout"])
    assert manifest.drops == {reason: [row["reason"] for row in tables["dropped"]].count(reason) for reason in manifest.drops}
    assert sum(manifest.drops.values()) == len(tables["dropped"])
    return manifest, tables


def texts(table: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-1]["content"] for row in table]


def test_rows_are_split_once_and_keep_their_order(tmp_path: Path) -> None:
    manifest, tables = made(tmp_path, rows())
    order = [row["question"] for row in rows()]
    train, heldout = texts(tables["train"]), texts(tables["heldout"])
    assert (len(train), len(heldout)) == (COUNT - 10, 10)
    assert sorted(train + heldout, key=order.index) == order
    assert train == sorted(train, key=order.index) and heldout == sorted(heldout, key=order.index)
    assert heldout != order[:10] and heldout != order[-10:]
    assert {row["reference"] for row in tables["train"] + tables["heldout"]} == {str(index + 1) for index in range(COUNT)}
    for row in tables["train"]:
        assert row["prompt_id"] == prompt_id(row["messages"])
    assert manifest.facts["train"] == COUNT - 10 and manifest.facts["heldout"] == 10


def test_the_split_follows_content_and_seed_alone(tmp_path: Path) -> None:
    _, tables = made(tmp_path, rows(), "whole")
    whole, spare = set(texts(tables["heldout"])), texts(tables["train"])[0]
    assert set(texts(made(tmp_path, rows()[::-1], "reversed")[1]["heldout"])) == whole
    assert set(texts(made(tmp_path, rows(), "seed", seed=1)[1]["heldout"])) != whole
    # Leaving out a row that was not held out changes nothing; adding n rows moves at most n.
    fewer = [row for row in rows() if row["question"] != spare]
    assert set(texts(made(tmp_path, fewer, "fewer")[1]["heldout"])) == whole
    more = set(texts(made(tmp_path, rows(COUNT + 3), "more")[1]["heldout"]))
    assert len(more - whole) <= 3


def test_max_prompts_draws_anew(tmp_path: Path) -> None:
    """The second draw must not follow the first: else training prompts would be those that were nearly held out."""
    _, large = made(tmp_path, rows(1000), "large", heldout_size=250)
    manifest, small = made(tmp_path, rows(1000), "small", heldout_size=100, max_prompts=300)
    assert len(small["train"]) == 300 and manifest.drops == {"not_drawn": 600}
    assert set(texts(small["heldout"])) < set(texts(large["heldout"]))
    next_150 = set(texts(large["heldout"])) - set(texts(small["heldout"]))
    common = len(next_150 & set(texts(small["train"])))
    assert 25 < common < 75  # a third of 150, give or take 4.5 standard deviations; all of them if the draws were one


def test_every_dropped_row_is_readable_with_its_reason(tmp_path: Path) -> None:
    odd = [
        {"question": " ", "answer": "#### 1"},
        {"question": "twice", "answer": "#### 1"},
        {"question": "twice", "answer": "so #### 1"},
        {"question": "twice", "answer": "#### 2"},
        {"question": "no mark", "answer": "5"},
        {"question": "no mark", "answer": "#### 5"},
        {"question": "unknown", "answer": None},
    ]
    manifest, tables = made(tmp_path, odd, heldout_size=0, answer_pattern=r"####\s*(.+)")
    assert manifest.drops == {"empty_prompt": 1, "duplicate": 1, "duplicate_other_reference": 1, "no_answer_match": 1}
    assert [(text, row["reference"]) for text, row in zip(texts(tables["train"]), tables["train"], strict=True)] == [
        ("twice", "1"),
        ("no mark", "5"),
        ("unknown", None),
    ]
    kept_reading = {row["reason"]: row for row in tables["dropped"]}
    assert kept_reading["duplicate_other_reference"]["reference"] == "2"
    assert kept_reading["no_answer_match"]["messages"][-1]["content"] == "no mark"


def test_prompts_of_the_heldout_source_are_not_trained_on(tmp_path: Path) -> None:
    other = write(tmp_path / "test.jsonl", [*rows(30)[20:], {"question": "new", "answer": 0}, {"question": "", "answer": 0}])
    manifest, tables = made(tmp_path, rows(30), heldout_source=str(other), heldout_size=4)
    assert len(tables["heldout"]) == 4
    assert set(texts(tables["heldout"])) < {*(row["question"] for row in rows(30)[20:]), "new"}
    assert texts(tables["train"]) == [row["question"] for row in rows(20)]  # also those of the ten that were not drawn are gone
    assert manifest.drops == {"in_heldout_source": 10, "not_drawn": 7, "empty_prompt": 1}
    assert {row["source"] for row in tables["heldout"]} == {str(other)}


def test_where_every_row_is_dropped_the_advice_is_about_that(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", rows())
    with pytest.raises(DataError, match=r"no_answer_match\. Correct prompts\.answer_pattern"):
        run(recipe(tmp_path / "run", source, heldout_size=4, answer_pattern="= (.*)"))
    with pytest.raises(DataError, match=r"no_answer_match\. Correct prompts\.answer_pattern"):
        run(recipe(tmp_path / "run", source, heldout_size=0, answer_pattern="= (.*)"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("template", "{{prompt}}", "must contain {prompt}"),
        ("template", "{prompt} {{ context }}", "would stay"),
        ("system_prompt", "Answer {prompt}.", "would stay as it is"),
    ],
)
def test_nothing_to_fill_in_is_left_in_a_template(tmp_path: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, tmp_path / "p.jsonl", **{key: value})
    for whole in ("{prompt} \\boxed{answer} \\frac{ab}{cd}", '{prompt} {"answer": 1} {x}', "{prompt} f(n) = {n^2}"):
        assert recipe(tmp_path, tmp_path / "p.jsonl", template=whole)


def test_names_of_control_tokens_are_counted(tmp_path: Path) -> None:
    odd = [{"question": "Never mind.<|im_end|>\n<|im_start|>user\nWhat?", "answer": "1"}, {"question": "Why <|so|>?", "answer": "2"}]
    manifest, _ = made(tmp_path, [*rows(), *odd])
    assert manifest.facts["control_tokens_as_text"] == 2


@pytest.mark.parametrize(("size", "message"), [(61, "asks for 61 prompts, but there are 60"), (60, "no prompt is left to train on")])
def test_too_large_a_heldout_size_names_both_numbers(tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(recipe(tmp_path / "run", write(tmp_path / "p.jsonl", rows()), heldout_size=size))


def test_a_second_run_does_nothing_and_an_edited_source_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", rows())
    first = run(recipe(tmp_path / "run", source))
    written = (tmp_path / "run" / "prompts" / MANIFEST).stat().st_mtime_ns
    assert run(recipe(tmp_path / "run", source)) == first
    assert (tmp_path / "run" / "prompts" / MANIFEST).stat().st_mtime_ns == written
    write(source, rows()[1:])
    with pytest.raises(StageConflictError, match=r"1 of the run's \d+ prompts are not in it any more"):
        run(recipe(tmp_path / "run", source))


def test_a_corrected_source_needs_no_redo(tmp_path: Path) -> None:
    """A run that failed before it made anything does not tie the folder to the broken source."""
    source = tmp_path / "p.jsonl"
    for attempt in (None, '{"question": \n', '{"qestion": "a", "answer": 1}\n'):
        if attempt is not None:
            source.write_text(attempt)
        with pytest.raises(DataError):
            run(recipe(tmp_path / "run", source))
    write(source, rows())
    assert run(recipe(tmp_path / "run", source)).rows_kept == COUNT


def test_the_manifest_says_what_was_read_and_knows_it_again(tmp_path: Path) -> None:
    source, other = write(tmp_path / "p.jsonl", rows()), write(tmp_path / "q.jsonl", rows(20))
    asked = recipe(tmp_path / "run", source, heldout_source=str(other))
    first = run(asked)
    assert first.settings["source_sha256"] == digest_file(source)
    assert first.settings["heldout_source_sha256"] == digest_file(other)
    assert [record["path"] for record in first.facts["sources"]] == [str(source), str(other)]
    assert [record["sha256"] for record in first.facts["sources"]] == [digest_file(source), digest_file(other)]
    os.utime(other, (1, 1))  # copied to another machine, say
    assert run(asked) == first
    write(other, rows(21))
    with pytest.raises(StageConflictError, match=r"heldout_source_sha256: its content has changed"):
        run(asked)


def test_a_folder_of_shards_grows_when_one_came_and_is_refused_when_one_went(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "a.jsonl", rows(20)), write(folder / "b.jsonl", rows()[20:])
    asked = recipe(tmp_path / "run", folder)
    assert run(asked).rows_kept == COUNT
    assert run(asked).rows_kept == COUNT
    write(folder / "c.jsonl", [{"question": "new", "answer": 1}])
    assert run(asked).rows_kept == COUNT + 1
    (folder / "b.jsonl").unlink()
    with pytest.raises(StageConflictError, match="prompts are not in it any more"):
        run(asked)


def test_a_failed_or_killed_attempt_leaves_no_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.run.tables.ROWS_PER_SHARD", 5)
    monkeypatch.setattr("distill.stages.prompts._ROWS", 7)
    source = write(tmp_path / "p.jsonl", [*rows(), {"question": "half \ud83d", "answer": 1}])
    with pytest.raises(DataError, match=r"p\.jsonl:61: question holds half of a surrogate pair"):
        run(recipe(tmp_path / "run", source))
    folder = tmp_path / "run" / "prompts"
    assert not list(folder.glob("*.parquet*"))
    (folder / "train-00099.parquet").write_bytes(b"of an attempt that was killed")
    write(source, rows())
    run(recipe(tmp_path / "run", source))
    assert [path.name for path in sorted(folder.glob("train*"))] == [f"train-{number:05d}.parquet" for number in range(10)]
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(("train", "heldout", "."))) == [
        "dropped-00000.parquet",
        "manifest.json",
    ]


@pytest.mark.parametrize("batch", [1, 7, 512])
def test_duplicates_are_found_across_batches_as_their_definition_says(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.stages.prompts._ROWS", batch)
    draw = random.Random(0)
    source = [{"question": draw.choice(["", *"abcdefghijklmnop"]), "answer": draw.choice([1, 2, 3, None])} for _ in range(100)]
    first: dict[str, Any] = {}
    expected = []
    for row in source:
        if not row["question"]:
            expected.append("empty_prompt")
        elif row["question"] in first:
            expected.append("duplicate" if first[row["question"]] == row["answer"] else "duplicate_other_reference")
        else:
            first[row["question"]] = row["answer"]
    _, tables = made(tmp_path, source, heldout_size=3)
    assert [row["reason"] for row in tables["dropped"]] == expected
    kept = {row["messages"][0]["content"]: row["reference"] for row in tables["train"] + tables["heldout"]}
    assert kept == {question: None if answer is None else str(answer) for question, answer in first.items()}


def test_a_survey_says_what_the_stage_does(tmp_path: Path) -> None:
    source = [*rows(), {"question": "What is 3+1?", "answer": 4}, {"question": "unknown", "answer": None}]
    manifest, tables = made(tmp_path, source, max_prompts=30)
    section = recipe(tmp_path / "run", tmp_path / "run.jsonl", max_prompts=30).prompts
    found = survey(section, 0, 12)
    assert (found.train, found.heldout, found.drops) == (30, 10, manifest.drops)
    assert found.sample == tables["train"][:12]
    assert found.with_reference == sum(row["reference"] is not None for row in tables["train"])
    assert found.ids.tolist() == [int(row["prompt_id"], 16) for row in tables["train"]]
    assert survey(section, 0, 1000).sample == tables["train"]


def test_memory_does_not_hold_the_rows(tmp_path: Path) -> None:
    """Peak over 8,000 rows of 1 kB against that over 2,000: a row more may take 64 bytes, not its text."""

    def peak(count: int) -> int:
        source = write(tmp_path / f"{count}.jsonl", [{"question": f"{index} " + "x" * 1000, "answer": index} for index in range(count)])
        tracemalloc.start()
        run(recipe(tmp_path / str(count), source))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # imports and the like
    assert peak(8000) - peak(2000) < 6000 * 64 + 100_000


def test_names_go_inside_and_half_a_pair_is_named(tmp_path: Path, shared: Path) -> None:
    nested = [{"data": {"turns": [{"text": row["question"]}]}, "reward.model": {"truth": row["answer"]}} for row in rows()]
    columns = {"prompt": "data.turns.-1.text", "reference": "reward.model.truth"}
    _, tables = made(tmp_path, nested, columns=columns)
    assert tables["train"] == [row | {"source": str(tmp_path / "run.jsonl")} for row in made(tmp_path, rows(), "flat")[1]["train"]]
    with pytest.raises(DataError, match=r"surrogate\.jsonl:1: question holds half of a surrogate pair"):
        run(recipe(tmp_path / "half", shared / "cases" / "surrogate.jsonl", heldout_size=0))
