"""Prompts in other spellings: what the normal form is, and that no twin of a held-out prompt is trained on, however a run came about."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from test_prompts import made, recipe, rows, texts, write

from distill.data.normal import normal_form, normal_numbers
from distill.data.sets import in_normal_form, read_set, trained_on
from distill.recipe.experiment import Recipe
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.stages.prompts import run, survey


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is  2?\n", "what IS 2 ?"),
        ("Combien font 2\u202f?", "combien font 2?"),
        ("na\u0131\u0308ve", "na\u0131\u0308VE"),
        ("caf\u00e9", "cafe\u0301"),
        ("Stra\u00dfe", "STRASSE"),
        ("\u0663\u0664 + \u096b", "34 + 5"),
        ("\uff21\uff22\u3000\uff11", "ab 1"),
        ("\ufeffWhat\u200b is 2\ufe0f?", "what is 2?"),
        ("\ufb01ve\u00a0boxes", "five boxes"),
    ],
)
def test_what_is_only_spelling_has_one_normal_form(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other)
    assert normal_form("\u092f\u0939 \u0915\u0940  \u092c\u093e\u0924 \u0964").count(" ") == 2  # marks are parts of words
    for different in ("whatis 2?", "what is 3?", "what is 2", "cafe", "3 4 + 5"):
        assert normal_form(one) != different


def test_a_normal_form_is_that_of_itself() -> None:
    """Over every letter that Unicode changes in some way, in random company."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    moving = [one for one in every if unicodedata.combining(one) or unicodedata.normalize("NFKC", one).casefold() != one]
    draw = random.Random(0)
    moving += list(" .?$") * 200
    for text in [*moving, *("".join(draw.choices(moving, k=5)) for _ in range(20_000))]:
        assert normal_form(normal_form(text)) == normal_form(text), ascii(text)


def test_conversations_are_told_apart_by_roles_order_and_what_else_a_turn_has() -> None:
    turns: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "a b"}],
        [{"role": "system", "content": "a b"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "b"}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "a b", "name": "x"}],
        [{"role": "user", "content": "a b", "tool_call_id": "x"}],
    ]
    assert len(set(normal_numbers(turns).tolist())) == len(turns)
    same = [[{"role": "user", "content": " A  B", "name": None}], turns[0]]
    assert len(set(normal_numbers(same).tolist())) == 1


def twin(text: str, draw: random.Random) -> str:
    return draw.choice([text + " ", text.upper(), text.replace(" ", "\u00a0"), text.translate({48 + n: 0x660 + n for n in range(10)})])


def test_no_twin_of_a_heldout_prompt_is_trained_on(tmp_path: Path) -> None:
    draw = random.Random(1)
    source = rows() + [row | {"question": twin(row["question"], draw)} for row in rows(30)]
    draw.shuffle(source)
    manifest, tables = made(tmp_path, source)
    heldout = {normal_form(text) for text in texts(tables["heldout"])}
    assert not heldout & {normal_form(text) for text in texts(tables["train"])}
    gone = [row for row in tables["dropped"] if row["reason"] == "twin_of_heldout"]
    assert gone and all(normal_form(text) in heldout for text in texts(gone)) and manifest.drops == {"twin_of_heldout": len(gone)}
    # Which are held out is another question, as it always was; twins of one another stay.
    assert len(tables["heldout"]) == 10 and len(tables["train"]) == len(source) - 10 - len(gone)
    assert set(texts(made(tmp_path, source[::-1], "reversed")[1]["heldout"])) == set(texts(tables["heldout"]))
    found = survey(recipe(tmp_path / "run", tmp_path / "run.jsonl").prompts, 0, 5)
    assert (found.train, found.drops) == (len(tables["train"]), manifest.drops)


def test_prompts_that_are_not_drawn_from_the_heldout_source_have_twins_too(tmp_path: Path) -> None:
    other = write(tmp_path / "test.jsonl", rows(30)[20:])
    source = [*rows(20), {"question": "WHAT is 25+1?", "answer": 26}, {"question": "What is 26+1?", "answer": 27}]
    manifest, tables = made(tmp_path, source, heldout_source=str(other), heldout_size=1)
    assert manifest.drops == {"twin_of_heldout": 1, "in_heldout_source": 1, "not_drawn": 9}
    assert texts(tables["train"]) == [row["question"] for row in rows(20)]


def bare(text: str) -> str:
    return "".join(text.casefold().split())


def test_twins_that_people_have_are_found_through_the_command_line(tmp_path: Path, shared: Path) -> None:
    asked = {
        "name": "twins",
        "run_dir": str(tmp_path / "run"),
        "student": {"model": "embedded:student"},
        "prompts": {"source": str(shared / "cases" / "heldout_twins.jsonl"), "heldout_size": 20},
        "traces": {"source": "x.jsonl"},
        "evaluate": None,
    }
    (tmp_path / "r.yaml").write_text(json.dumps(asked))
    done = commands.run(["-m", "distill", "prompts", tmp_path / "r.yaml"])
    assert done.returncode == 0, done.stderr
    train, heldout = (read_rows(tmp_path / "run" / "prompts", table) for table in ("train", "heldout"))
    assert not {bare(text) for text in texts(train)} & {bare(text) for text in texts(heldout)}
    dropped = read_manifest(tmp_path / "run" / "prompts").drops["twin_of_heldout"]
    assert f"{dropped} twin_of_heldout" in done.stdout and len(train) + len(heldout) + dropped == 55


def test_a_run_that_grows_gets_no_twin(tmp_path: Path) -> None:
    _, before = made(tmp_path, rows())
    held, trained = texts(before["heldout"])[0], texts(before["train"])[0]
    more = [{"question": text + " ", "answer": 0} for text in (held, trained)]
    grown, after = made(tmp_path, [*rows(), *more])
    assert texts(after["heldout"]) == texts(before["heldout"]) and texts(after["train"]) == [*texts(before["train"]), trained + " "]
    assert grown.drops == {"twin_of_heldout": 1} and grown.grew_from and "twins_kept" not in grown.facts


def test_what_a_run_of_an_earlier_kit_trains_on_stays_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [*rows(), *(row | {"question": row["question"] + " "} for row in rows())]
    numbers = itertools.count()
    with monkeypatch.context() as patch:  # to which no two spellings were one
        patch.setattr("distill.data.split.normal_numbers", lambda talks: np.array([next(numbers) for _ in talks], np.uint64))
        _, before = made(tmp_path, both)
    held = {normal_form(text) for text in texts(before["heldout"])}
    twins = sum(normal_form(text) in held for text in texts(before["train"]))
    grown, after = made(tmp_path, [*both, {"question": "new", "answer": 1}])
    assert texts(after["train"]) == [*texts(before["train"]), "new"]
    assert grown.facts["twins_kept"] == twins > 0 and f"{twins} prompts that this run trains on are held-out" in capsys.readouterr().out


def test_a_further_set_loses_what_is_trained_on_in_another_spelling(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", rows())
    further = [{"question": f"WHAT is  {n}+1?", "answer": n + 1} for n in range(60)] + [{"question": "new", "answer": 0}]
    plain = recipe(tmp_path / "run", source, template="Q: {prompt}").model_dump(mode="json")
    each = {"source": str(write(tmp_path / "s.jsonl", further)), "template": "{prompt}"}
    asked = Recipe.model_validate(plain | {"evaluate": {"models": ["base"], "sets": {"more": each}}})
    run(asked)
    read = read_set(asked, "more", trained_on(tmp_path / "run" / "prompts"))
    assert read.drops == {"in_training": 50} and len(read.rows) == 11
    surveyed = survey(asked.prompts, 0, 5)
    assert read_set(asked, "more", in_normal_form(surveyed.normals)).drops == read.drops
