"""Rows from files of every kind, mapped to prompts; whatever can't be read says where and why."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.data.sources import PromptMapping, read_source, source_digest
from distill.errors import DataError
from distill.recipe.prompts import Columns, Prompts
from distill.run.schema import prompt_id

ROWS = [{"question": "What is 1+1?", "answer": "2"}, {"question": 'He said: "a, b"\nand c {x}', "answer": "007"}]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def json_list(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows))


def json_object(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"version": 1, "data": rows}))


def comma_separated(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


KINDS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], None]]] = {
    "jsonl": ("rows.jsonl", jsonl),
    "json list": ("rows.json", json_list),
    "json object": ("rows.json", json_object),
    "csv": ("rows.csv", comma_separated),
    "parquet": ("rows.parquet", parquet),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    name, write = KINDS[kind]
    path = tmp_path / name
    write(path, ROWS)
    assert read_source(str(path)) == ROWS
    if kind != "parquet":
        packed = path.with_name(name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read_source(str(packed)) == ROWS


def test_blank_lines_are_no_rows_and_long_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"a": "x"}\n\n  \n{"a": "\u2028y"}')
    assert read_source(str(tmp_path / "rows.jsonl")) == [{"a": "x"}, {"a": "\u2028y"}]
    comma_separated(tmp_path / "rows.csv", [{"a": "long " * 100_000}])
    assert read_source(str(tmp_path / "rows.csv")) == [{"a": "long " * 100_000}]


GOOD = b'{"a": 1}\n'
BROKEN = {
    "no such file": ("absent.jsonl", None, "there is no such file"),
    "empty": ("rows.jsonl", b"", "holds no rows"),
    "header alone": ("rows.csv", b"a,b\n", "holds no rows"),
    "torn line": ("rows.jsonl", GOOD + b"\n" + b'{"a": \n' + GOOD, r"rows\.jsonl:3: not valid JSON"),
    "not an object": ("rows.jsonl", GOOD + b"[1]\n", r"rows\.jsonl:2: holds list, not an object"),
    "not UTF-8": ("rows.jsonl", GOOD + b'{"a": "\xff"}\n', "not UTF-8 text .*0xff"),
    "json lines named json": ("rows.json", GOOD + GOOD, r"not valid JSON.*\.jsonl"),
    "two lists": ("rows.json", b'{"a": [], "b": []}', "one such list"),
    "list of numbers": ("rows.json", b"[1, 2]", "list of objects"),
    "number": ("rows.json", b"7", "list of objects"),
    "too many fields": ("rows.csv", b"a,b\n1,2\n1,2,3\n", r"rows\.csv:3: has not as many fields as there are columns \(2\)"),
    "too few fields": ("rows.csv", b"a,b\n1\n", r"rows\.csv:2: has not as many fields"),
    "open quote": ("rows.csv", b'a,b\n0,0\n1,"2\n3,4\n', r"rows\.csv:3: not valid CSV"),
    "two columns of a name": ("rows.csv", b"a,a\n1,2\n", "two columns have the same name"),
    "not parquet": ("rows.parquet", b"PAR1 not really", "can't be read as parquet"),
    "not gzip": ("rows.jsonl.gz", GOOD, "can't be read: Not a gzipped file"),
    "torn gzip": ("rows.jsonl.gz", gzip.compress(GOOD * 1000)[:-20], "can't be read"),
    "unknown kind": ("rows.txt", GOOD, r"its kind is not known by its name. Use \.jsonl"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_says_where_and_why(case: str, tmp_path: Path) -> None:
    name, data, message = BROKEN[case]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_source(str(tmp_path / name))
    assert name in str(caught.value)


def test_other_names_that_hold_nothing_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder\. Name one file in it"):
        read_source(str(tmp_path))
    with pytest.raises(DataError, match="nothing of that name is embedded"):
        read_source("embedded:algebra")
    with pytest.raises(DataError, match=r"is no file here, and can't be loaded from the Hub \(subset 'main', split 'test'\)"):
        read_source("no-such-owner/no-such-data", "main", "test")


def test_the_digest_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jsonl(path, ROWS)
    before = source_digest(str(path))
    assert before == source_digest(str(path)) and before is not None and len(before) == 64
    jsonl(path, ROWS[:1])
    assert source_digest(str(path)) != before
    assert source_digest("owner/data") is None


def prompt_row(row: dict[str, Any], columns: Columns | None = None, **prompts: Any) -> tuple[dict[str, Any], str | None]:
    section = Prompts(source="x.jsonl", **prompts)
    return PromptMapping(section, columns or section.columns, "x.jsonl").prompt_row(row, 3)


def test_a_prompt_is_the_system_prompt_and_the_template_around_the_text() -> None:
    row, reason = prompt_row(
        {"question": "Solve {x} and {prompt}.", "answer": " 5 "}, system_prompt="Be {brief}.", template="Q {a}: {prompt} {{}}"
    )
    assert reason is None
    assert row["messages"] == [
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "Q {a}: Solve {x} and {prompt}. {{}}"},
    ]
    assert (row["reference"], row["source"], row["tags"]) == ("5", "x.jsonl", [])
    assert row["prompt_id"] == prompt_id(row["messages"])
    assert row["prompt_id"] != prompt_row({"question": "Solve {x} and {prompt}.", "answer": "5"})[0]["prompt_id"]


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        (42.0, "42"),
        (42, "42"),
        (4.25, "4.25"),
        (-3.0, "-3"),
        ("42.0", "42.0"),
        (" 7 ", "7"),
        ("", None),
        (None, None),
        (float("nan"), None),
    ],
)
def test_a_reference_becomes_text(value: Any, reference: str | None) -> None:
    assert prompt_row({"question": "?", "answer": value})[0]["reference"] == reference


def test_the_last_match_of_the_answer_pattern_is_the_reference() -> None:
    row, reason = prompt_row({"question": "?", "answer": "a #### 1\nb #### 2,000 \n"}, answer_pattern=r"####\s*(.+)")
    assert (row["reference"], reason) == ("2,000", None)
    assert prompt_row({"question": "?", "answer": "no mark"}, answer_pattern=r"####\s*(.+)")[1] == "no_answer_match"
    assert prompt_row({"question": "?", "answer": "#### "}, answer_pattern=r"####(.*)")[1] == "no_answer_match"
    assert prompt_row({"question": "?", "answer": None}, answer_pattern=r"####\s*(.+)")[1] is None  # unknown, not unmatched


@pytest.mark.parametrize("value", ["", "  \n", None])
def test_an_empty_prompt_is_a_reason(value: str | None) -> None:
    assert prompt_row({"question": value, "answer": "1"})[1] == "empty_prompt"


def test_an_absent_column_is_named_with_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"x\.jsonl: row 3: there is no column 'question', only 'questions', 'answer'. Did you mean 'questions'"
    ):
        prompt_row({"questions": "?", "answer": "1"})
    with pytest.raises(DataError, match=r"there is no column 'answer', only 'question'\."):
        prompt_row({"question": "?"})


@pytest.mark.parametrize(("column", "value"), [("question", ["a"]), ("question", {"text": "a"}), ("answer", [1, 2]), ("answer", b"5")])
def test_a_value_of_another_type_is_named_with_its_row(column: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"x\.jsonl: row 3: {column} must be text or a number, got {type(value).__name__}"):
        prompt_row({"question": "?", "answer": "1", column: value})


def test_tags_are_carried() -> None:
    columns = Columns(prompt="question", tags="level")
    for value, tags in (("easy", ["easy"]), (["a", "b"], ["a", "b"]), (None, []), ([], [])):
        assert prompt_row({"question": "?", "level": value}, columns)[0]["tags"] == tags
    with pytest.raises(DataError, match="row 3: level must be a string or a list of strings, got 5"):
        prompt_row({"question": "?", "level": 5}, columns)


TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]


def test_a_conversation_ends_with_its_last_question() -> None:
    columns = Columns(messages="turns")
    row, reason = prompt_row({"turns": TALK}, columns, system_prompt="S", template="Think. {prompt}")
    assert reason is None
    assert row["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Think. And 2+2?"},
    ]
    own = [{"role": "system", "content": "mine"}, *TALK]
    assert prompt_row({"turns": own}, columns)[0]["messages"][0] == {"role": "system", "content": "mine"}
    assert prompt_row({"turns": TALK[1:2]}, columns)[1] == "empty_prompt"
    with pytest.raises(DataError, match=r"row 3: turns has a system turn of its own, and prompts\.system_prompt is set"):
        prompt_row({"turns": own}, columns, system_prompt="S")


@pytest.mark.parametrize("turns", ["text", [{"from": "human", "value": "x"}], [{"role": "user", "content": [{"type": "text"}]}], None])
def test_what_is_no_conversation_is_an_error(turns: Any) -> None:
    with pytest.raises(DataError, match="row 3: turns must be a list of"):
        prompt_row({"turns": turns}, Columns(messages="turns"))


def test_reading_a_file_imports_no_torch(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    code = "import sys; from distill.data.sources import read_source; print(len(read_source(sys.argv[1])), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "False"]
