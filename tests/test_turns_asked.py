"""Which answers of a conversation are asked for and learned, and that what is held out is no part of what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.data.completions import traces_of
from distill.data.mapping import PromptMapping
from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.prompts import Columns, Prompts
from distill.recipe.sets import HeldOutSet
from distill.recipe.traces import Traces
from distill.run.tables import iter_rows
from distill.stages import import_traces, prompts

CALLS = [{"id": "c1", "type": "function", "function": {"name": "get_order", "arguments": '{"id": "7"}'}}]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You sell books."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "<think>Greet.</think>Hello! How can I help?"},
    {"role": "user", "content": "Where is order 7?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "content": "sent", "tool_call_id": "c1"},
    {"role": "assistant", "content": "It was sent."},
]
PLACES = [2, 4, 6]  # of the assistant's turns


def rows_of(talk: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    columns = Columns(messages="messages", reference=settings.pop("reference", None))
    section = Prompts(source="x.jsonl", columns=columns, **settings)
    return [
        row for row, reason in PromptMapping(section, columns, "x").prompt_rows({"messages": talk, "answer": "right"}, "x:1") if not reason
    ]


def test_all_are_asked_for_each_behind_what_stands_before_it() -> None:
    found = rows_of(TALK, turns="all", reference="answer")
    assert [len(row["messages"]) for row in found] == PLACES
    for row, place in zip(found, PLACES, strict=True):
        assert [turn["role"] for turn in row["messages"]] == [turn["role"] for turn in TALK[:place]]
    assert [row["reference"] for row in found] == [None, None, "right"], "it is of the whole conversation"
    assert len({row["beginning"] for row in found}) == 1
    [last] = rows_of(TALK, reference="answer")
    assert last == {name: value for name, value in found[-1].items() if name != "beginning"}, "nothing changes for who asks for one"
    unanswered = rows_of(TALK[:4], turns="all")
    assert [len(row["messages"]) for row in unanswered] == [2, 4], "what nobody has answered is asked, too"


@pytest.mark.parametrize(
    ("marks", "places"),
    [
        ([{"weight": 1}, {"weight": 0}, {"weight": 1}], [2, 6]),
        ([{"weight": 0}, {}, {}], [4, 6]),
        ([{}, {"train": True}, {}], [4]),
        ([{"supervised": False}, {"supervised": True}, {"supervised": False}], [4]),
        ([{"weight": 0.0}, {"weight": 1.0}, {"weight": None}], [4]),
        ([{"train": False}] * 3, []),
    ],
)
def test_those_that_the_source_marks(marks: list[dict[str, Any]], places: list[int]) -> None:
    talk = [dict(turn) for turn in TALK]
    for place, mark in zip(PLACES, marks, strict=True):
        talk[place] |= mark
    found = rows_of(talk, turns="teacher")
    assert [len(row["messages"]) for row in found] == places
    plain = {len(row["messages"]): row for row in rows_of(TALK, turns="all")}
    assert all(row == plain[len(row["messages"])] for row in found), "a mark is no part of a prompt"
    assert rows_of(talk) == rows_of(TALK)


def test_what_can_not_be_meant_is_refused() -> None:
    with pytest.raises(DataError, match=r"x:1: no turn of an assistant says whether it is to be learned"):
        rows_of(TALK, turns="teacher")
    with pytest.raises(DataError, match=r"messages\.2: weight, train, supervised must be true, false, 1 or 0, got 0\.5"):
        rows_of([*TALK[:2], TALK[2] | {"weight": 0.5}], turns="teacher")
    with pytest.raises(ValueError, match="asks for several answers of a conversation"):
        Prompts(source="x", columns=Columns(prompt="q"), turns="all")
    for columns in (Columns(prompt="q"), Columns(messages="m", reference="r")):
        with pytest.raises(ValueError, match="answer_as_reference takes the references"):
            Prompts(source="x", columns=columns, answer_as_reference=True)
    plain = Prompts(source="x", columns=Columns(messages="m"))
    assert not {"turns", "answer_as_reference"} & plain.identity().keys()
    assert plain.model_copy(update={"turns": "all"}).identity()["turns"] == "all"


def test_the_answers_that_stand_there_are_the_references() -> None:
    found = rows_of(TALK, turns="all", answer_as_reference=True)
    calls = json.dumps([{"name": "get_order", "arguments": {"id": "7"}}])
    assert [row["reference"] for row in found] == ["Hello! How can I help?", calls, "It was sent."]
    assert [row["reference"] for row in rows_of(TALK, answer_as_reference=True)] == ["It was sent."]
    assert rows_of(TALK[:4], answer_as_reference=True)[0]["reference"] is None
    assert rows_of(TALK, answer_as_reference=True, answer_pattern=r"was (\w+)")[0]["reference"] == "sent"


def talks(count: int) -> list[dict[str, Any]]:
    """Conversations of one to four answers; every fifth begins as another does, though in another spelling."""
    found = []
    for number in range(count):
        first = f"hello,  shop {number - 1}" if number % 5 == 4 else f"Hello, shop {number}"
        turns = [{"role": "user", "content": first}]
        for answer in range(1 + number % 4):
            turns += [{"role": "assistant", "content": f"Answer {answer} of {number}"}, {"role": "user", "content": f"More {answer}?"}]
        found.append({"messages": turns[:-1]})
    return found


def recipe_of(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"messages": "messages"}
    return Recipe.model_validate(
        {
            "name": "talks",
            "run_dir": str(folder / "run"),
            "student": {"model": "x"},
            "prompts": {"source": str(folder / "talks.jsonl"), "columns": columns, "turns": "all", "heldout_size": 20, **settings},
            "traces": {"source": str(folder / "talks.jsonl"), "columns": columns, "author_model": "y"},
            "evaluate": None,
        }
    )


def contents(row: dict[str, Any]) -> list[str]:
    return [" ".join(turn["content"].lower().split()) for turn in row["messages"]]


def begins_alike(left: list[str], right: list[str]) -> bool:
    return left[: len(right)] == right[: len(left)]


@pytest.mark.parametrize("own_source", [False, True])
def test_no_part_of_a_held_out_conversation_is_trained_on(tmp_path: Path, own_source: bool) -> None:
    rows = talks(60)
    more: dict[str, Any] = {}
    if own_source:
        (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[44:]))
        more = {"heldout_source": str(tmp_path / "held.jsonl")}
    recipe = recipe_of(tmp_path, rows, **more)
    manifest = prompts.run(recipe)
    train, heldout = ([contents(row) for row in iter_rows(tmp_path / "run" / "prompts", table)] for table in ("train", "heldout"))
    assert not [(ours, theirs) for ours in train for theirs in heldout if begins_alike(ours, theirs)]
    assert 20 <= len(heldout) <= 24 and len(train) > 60
    whole = {len(talk) for talk in heldout}
    assert len(whole) > 1, "conversations are held out with all their parts"
    if own_source:
        assert manifest.drops["in_heldout_source"] and manifest.drops["part_of_heldout"]
    else:
        assert len(train) + len(heldout) + manifest.drops.get("duplicate", 0) == sum(len(row["messages"]) // 2 for row in rows)


def test_rows_that_can_not_be_used_stand_among_the_others(tmp_path: Path) -> None:
    rows, image = talks(40), [{"type": "image_url", "image_url": {"url": "x"}}]
    for row in rows[1::4]:
        row["messages"] = [{"role": "user", "content": image}, *row["messages"][1:]]
    manifest = prompts.run(recipe_of(tmp_path, rows))
    train, heldout = ([contents(row) for row in iter_rows(tmp_path / "run" / "prompts", table)] for table in ("train", "heldout"))
    assert manifest.drops["not_text"] == 10 and len(heldout) >= 20
    assert not [(ours, theirs) for ours in train for theirs in heldout if begins_alike(ours, theirs)]


def test_a_greeting_that_is_marked_otherwise_begins_as_others_do() -> None:
    greeting = {"role": "assistant", "content": "Welcome!"}
    talks = [[{**greeting, "weight": weight}, *TALK[1:4], {**TALK[6], "weight": 1}] for weight in (0, 1)]
    assert len({row["beginning"] for talk in talks for row in rows_of(talk, turns="teacher")}) == 1


def test_a_call_in_a_turn_of_its_own_has_its_own_mark() -> None:
    call = {"role": "function_call", "content": '{"name": "get_order", "arguments": {}}'}
    said = {"role": "assistant", "content": "I look.", "train": False}
    talk = [*TALK[:2], said, {**call, "train": True}, *TALK[5:]]
    assert [len(row["messages"]) for row in rows_of(talk, turns="teacher")] == [3]
    assert [len(row["messages"]) for row in rows_of([*TALK[:2], {**said, "train": True}, call, *TALK[5:]], turns="teacher")] == [2]


def test_conversations_that_all_begin_alike_can_not_be_parted(tmp_path: Path) -> None:
    rows = [{"messages": [*TALK[:3], {"role": "user", "content": f"Order {number}?"}, TALK[6]]} for number in range(9)]
    with pytest.raises(DataError, match=r"begin with the same turn of the user's.*Give a prompts\.heldout_source, or 0"):
        prompts.run(recipe_of(tmp_path, rows, heldout_size=2))


def test_an_answer_beside_a_conversation_is_one_of_several() -> None:
    section = Prompts(source="x", columns=Columns(messages="messages"), turns="all")
    row = {"messages": [*TALK, {"role": "user", "content": "Thanks!"}], "completion": "Welcome."}
    found = traces_of(Traces(source="x", columns=section.columns), PromptMapping(section, section.columns, "x"), row, "x:1")
    assert [len(asked.messages) for asked, _ in found] == [*PLACES, 8]
    assert [brought.text for _, brought in found][2:] == ["It was sent.", "Welcome."]


def test_a_run_that_grows_keeps_them_apart(tmp_path: Path) -> None:
    rows = talks(40)
    prompts.run(recipe_of(tmp_path, rows))
    place = tmp_path / "run" / "prompts"
    before = {table: [contents(row) for row in iter_rows(place, table)] for table in ("train", "heldout")}
    longer = max(before["heldout"], key=len)
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate([*longer, "Yes.", "And?", "No."])]
    manifest = prompts.run(recipe_of(tmp_path, [*rows, {"messages": turns}, *talks(45)[40:]]))
    after = {table: [contents(row) for row in iter_rows(place, table)] for table in ("train", "heldout")}
    assert after["heldout"] == before["heldout"] and len(after["train"]) > len(before["train"])
    assert not [ours for ours in after["train"] for theirs in after["heldout"] if begins_alike(ours, theirs)]
    assert manifest.drops["part_of_heldout"] >= 1


def test_every_answer_of_a_brought_conversation_is_a_trace(tmp_path: Path) -> None:
    rows = talks(60)
    recipe = recipe_of(tmp_path, rows)
    prompts.run(recipe)
    manifest = import_traces.run(recipe)
    train = {row["prompt_id"]: row["messages"] for row in iter_rows(tmp_path / "run" / "prompts", "train")}
    found = list(iter_rows(tmp_path / "run" / "traces", "traces"))
    assert {row["prompt_id"] for row in found} == set(train)
    assert all(row["messages"] == train[row["prompt_id"]] for row in found)
    said = {row["completion"] for row in found}
    assert said < {turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "assistant"}
    assert manifest.drops["in_heldout"] == len(list(iter_rows(tmp_path / "run" / "prompts", "heldout")))


def test_a_set_with_columns_of_its_own_has_references_of_its_own() -> None:
    """It is asked as the run's conversations are only where its columns are theirs."""
    main = Prompts(source="x", columns=Columns(messages="messages"), turns="all", answer_as_reference=True)
    own = HeldOutSet(source="y", columns=Columns(prompt="q", reference="a")).as_prompts(main, [])
    same = HeldOutSet(source="y").as_prompts(main, [])
    assert (own.turns, own.answer_as_reference, own.has_references) == ("last", False, True)
    assert (same.turns, same.answer_as_reference, same.has_references) == ("all", True, True)
