"""Rows from files of every kind, from folders and the Hub, streamed; whatever can't be read says where and why."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.data.files import DataFile
from distill.data.sources import Source, brought_traces, heldout_problems, problems, read_source
from distill.errors import DataError
from distill.recipe.prompts import Prompts
from distill.recipe.traces import Traces
from distill.run.files import digest_file
from distill.run.folder import StageFolder
from distill.run.owned import EARLIER

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


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return bytes(sink.getvalue())


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows_and_its_digest_on_the_way(kind: str, packed: str, tmp_path: Path) -> None:
    name, write = KINDS[kind]
    path = tmp_path / name
    write(path, ROWS)
    if packed:
        plain, path = path.read_bytes(), path.with_name(name + packed)
        path.write_bytes(PACKERS[packed](plain))
    if packed and kind == "parquet":
        with pytest.raises(DataError, match="its kind is not known by its name"):
            read_source(str(path))
        return
    file = DataFile(path, "given")
    passed: list[int] = []
    assert [row for _, row in file.rows(on_bytes=passed.append)] == ROWS
    state = path.stat()
    assert sum(passed) == state.st_size  # each byte once: the digest needs no pass of its own
    assert file.record() == {"path": "given", "size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": digest_file(path)}
    assert all(where.startswith(str(path)) for where, _ in file.rows())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.csv", "rows.parquet"])
def test_a_row_comes_before_the_file_was_read(name: str, tmp_path: Path) -> None:
    """Memory does not follow the number of rows: what is read ahead of a row is bounded."""
    path = tmp_path / name
    rows = [{"a": random.Random(index).randbytes(3000).hex()} for index in range(2000)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    else:
        (comma_separated if ".csv" in name else jsonl)(path, rows)
        path.write_bytes(PACKERS["".join(path.suffixes[1:])](path.read_bytes()))
    passed: list[int] = []
    stream = DataFile(path, name).rows(["a"], passed.append)
    assert next(stream)[1] == rows[0]
    assert sum(passed) < 2_100_000 < path.stat().st_size
    assert sum(1 for _ in stream) == 1999 and sum(passed) == path.stat().st_size


def test_of_parquet_only_the_named_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet(path, [{"a": {"x": 1, "y": 2}, "b": "long", "c.d": 3}])
    assert [row for _, row in DataFile(path, "").rows(["a.x", "c.d"])] == [{"a": {"x": 1, "y": 2}, "c.d": 3}]
    assert [row.keys() for _, row in DataFile(path, "").rows(["a.x", "absent"])] == [{"a", "b", "c.d"}]  # so that the error shows all


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jsonl(path, ROWS)
    stream = DataFile(path, "").rows()
    next(stream)
    jsonl(path, ROWS + ROWS)
    with pytest.raises(DataError, match=r"rows\.jsonl: was changed while it was read"):
        list(stream)


def test_blank_lines_are_no_rows_and_long_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"a": "x"}\n\n  \n{"a": "\u2028y"}')
    assert read_source(str(tmp_path / "rows.jsonl")) == [{"a": "x"}, {"a": "\u2028y"}]
    comma_separated(tmp_path / "rows.csv", [{"a": "long " * 100_000}])
    assert read_source(str(tmp_path / "rows.csv")) == [{"a": "long " * 100_000}]


def test_a_large_json_file_is_read_with_a_word_of_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    json_list(tmp_path / "rows.json", ROWS)
    assert read_source(str(tmp_path / "rows.json")) == ROWS and capsys.readouterr().out == ""
    monkeypatch.setattr("distill.data.files._LARGE_JSON", 10)
    assert read_source(str(tmp_path / "rows.json")) == ROWS and "in a .jsonl file takes no memory" in capsys.readouterr().out


GOOD = b'{"a": 1}\n'
BROKEN = {
    "no such file": ("absent.jsonl", None, "there is no such file"),
    "empty": ("rows.jsonl", b"", "holds no rows"),
    "header alone": ("rows.csv", b"a,b\n", "holds no rows"),
    "torn line": ("rows.jsonl", GOOD + b"\n" + b'{"a": \n' + GOOD, r"rows\.jsonl:3: not valid JSON"),
    "not an object": ("rows.jsonl", GOOD + b"[1]\n", r"rows\.jsonl:2: holds list, not an object"),
    "not UTF-8": ("rows.jsonl", GOOD + b'{"a": "\xff"}\n', r"rows\.jsonl:2: is not UTF-8 text .*0xff"),
    "a table that is not UTF-8": ("rows.csv", b"a\n\xff\n", "not UTF-8 text .*0xff"),
    "json lines named json": ("rows.json", GOOD + GOOD, r"not valid JSON.*\.jsonl"),
    "two lists": ("rows.json", b'{"a": [], "b": []}', "one such list"),
    "list of numbers": ("rows.json", b"[1, 2]", "list of objects"),
    "number": ("rows.json", b"7", "list of objects"),
    "too many fields": ("rows.csv", b"a,b\n1,2\n1,2,3\n", r"rows\.csv:3: has not as many fields as there are columns \(2\)"),
    "too few fields": ("rows.csv", b"a,b\n1\n", r"rows\.csv:2: has not as many fields"),
    "open quote": ("rows.csv", b'a,b\n0,0\n1,"2\n3,4\n', r"rows\.csv:3: not valid CSV"),
    "two columns of a name": ("rows.csv", b"a,a\n1,2\n", "two columns have the same name"),
    "not parquet": ("rows.parquet", b"PAR1 not really", "can't be read as parquet"),
    "not gzip": ("rows.jsonl.gz", GOOD, "can't be read"),
    "not zstd": ("rows.jsonl.zst", GOOD, "can't be read"),
    "torn gzip": ("rows.jsonl.gz", gzip.compress(GOOD * 1000)[:-20], "can't be read"),
    "torn zstd": ("rows.jsonl.zst", zstd(GOOD * 1000)[:-5], "can't be read"),
    "packed nothing": ("rows.jsonl.gz", b"", "can't be read: it is empty"),
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


def test_a_folder_and_a_glob_are_their_files_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    jsonl(folder / "b.jsonl", [{"a": 2}])
    parquet(folder / "a.parquet", [{"a": 1}])
    (folder / "c.jsonl").write_text("")  # a shard that got no rows
    (folder / "d.csv.gz").write_bytes(gzip.compress(b"a\n3\n"))
    for aside in ("README.md", "LICENSE", ".gitattributes", "_SUCCESS"):
        (folder / aside).write_text("no data")
    assert read_source(str(folder)) == [{"a": 1}, {"a": 2}, {"a": "3"}]
    assert read_source(str(folder / "*.jsonl")) == [{"a": 2}]
    assert read_source(str(tmp_path / "**" / "[ab].*")) == [{"a": 1}, {"a": 2}]
    source = Source(str(folder))
    list(source.rows())
    digests = [digest_file(folder / name) for name in ("a.parquet", "b.jsonl", "c.jsonl", "d.csv.gz")]
    assert source.sha256 == hashlib.sha256(" ".join(digests).encode()).hexdigest()
    assert [record["path"] for record in source.records()][:2] == [f"{folder}/a.parquet", f"{folder}/b.jsonl"]
    (folder / "b.jsonl").write_text('{"a": 2}\n\n{"a"\n')
    with pytest.raises(DataError, match=r"shards/b\.jsonl:3: not valid JSON"):
        read_source(str(folder))


def test_a_folder_that_is_not_data_alone_says_what_else_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data, nothing"):
        Source(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"holds no data, only 'data/', 'notes\.txt'"):
        Source(str(tmp_path))
    jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no data beside 1 that are: 'data/', 'notes\.txt'\. .*with a glob"):
        Source(str(tmp_path))
    with pytest.raises(DataError, match=r"\*\.csv: holds no data, nothing"):
        Source(str(tmp_path / "*.csv"))
    with pytest.raises(DataError, match=r"no data beside 1 that are: 'notes\.txt'"):
        Source(str(tmp_path / "*s.*"))


@pytest.mark.parametrize("name", ["exp:1/rows.parquet", "exp[1]/rows.jsonl", "exp[1]/*.jsonl", "a*/rows.csv"])
def test_a_folder_is_what_it_is_called(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name.replace("*.", "rows.")
    for folder in (path.parent, tmp_path / "exp1", tmp_path / "ab"):
        folder.mkdir()
        (folder / path.name).write_text("of another folder, which the name would match as a pattern")
    dict(KINDS.values())[path.name](path, ROWS)
    assert read_source(name) == ROWS


def test_other_names_that_hold_nothing_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing of that name is embedded"):
        read_source("embedded:algebra")
    with pytest.raises(DataError, match=r"is no file here, and can't be loaded from the Hub \(subset 'main', split 'test'\)"):
        read_source("no-such-owner/no-such-data", "main", "test")


def test_keys_for_the_hub_are_refused_with_files(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    jsonl(Path(path), ROWS)
    for section, message in (
        (
            {"source": path, "subset": "main"},
            r"prompts\.subset: is for data sets of the Hub, .*rows\.jsonl is read from files, got 'main'",
        ),
        ({"source": path, "split": "test"}, r"prompts\.split: .*got 'test'"),
        ({"source": path, "heldout_source": path, "heldout_split": "train"}, r"prompts\.heldout_split: .*got 'train'"),
        ({"source": path, "heldout_source": path, "subset": "main"}, r"prompts\.subset: .*got 'main'"),
    ):
        with pytest.raises(DataError, match=message):
            problems(Prompts(**section)), heldout_problems(Prompts(**section))
    for key in ("subset", "split"):
        with pytest.raises(DataError, match=rf"traces\.{key}: .*got 'other'\. Leave it out"):
            brought_traces(Traces(source=path, **{key: "other"}))
    problems(Prompts(source="owner/data", subset="main", split="test", heldout_source=path))
    problems(Prompts(source=path, subset="main", heldout_source="owner/data", heldout_split="dev"))


def test_a_data_set_of_the_hub_is_streamed_from_what_was_downloaded(tmp_path: Path) -> None:
    """As an earlier download leaves it, read offline, with the columns that are asked for."""
    code = """
import sys
from pathlib import Path
from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
from datasets.arrow_writer import ArrowWriter
from distill.data.sources import Source

folder = Path(sys.argv[1], "owner___data", "default", "0.0.0", "abc")
folder.mkdir(parents=True)
rows = Dataset.from_list([{"question": f"{n}?", "answer": {"value": n}, "long": "x"} for n in range(3)])
writer = ArrowWriter(path=str(folder / "data-train.arrow"), features=rows.features)
for row in rows:
    writer.write(row)
writer.finalize()
splits = SplitDict({"train": SplitInfo("train", num_examples=3, dataset_name="data")}, dataset_name="data")
names = {"builder_name": "data", "dataset_name": "data", "config_name": "default", "version": "0.0.0"}
DatasetInfo(features=rows.features, splits=splits, **names).write_to_directory(str(folder))
source = Source("owner/data")
print(list(source.rows(["question", "answer.value"])), source.sha256, source.records())
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, env=environment)
    rows = [(f"owner/data: row {number + 1}", {"question": f"{number}?", "answer": {"value": number}}) for number in range(3)]
    assert result.stdout.splitlines()[-1] == f"{rows} None []"


def test_a_digest_is_recalled_where_the_file_is_the_same(tmp_path: Path) -> None:
    path, finished = tmp_path / "rows.jsonl", tmp_path / "stage"
    jsonl(path, ROWS)
    assert Source(str(path)).recall(finished) is None  # nothing to compare with, so it need not be read now
    source = Source(str(path))
    list(source.rows())
    with StageFolder(finished, "x", {}) as out:
        out.finish(facts={"sources": source.records()})
    assert Source(str(path)).recall(finished) == source.sha256 == digest_file(path)
    earlier = finished / EARLIER  # where a stage puts what is there when it grows
    finished.rename(tmp_path / "aside"), finished.mkdir(), (tmp_path / "aside").rename(earlier)
    assert Source(str(path)).recall(finished) == source.sha256
    finished = earlier
    state = path.stat()
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    assert Source(str(path)).recall(finished) == digest_file(path) != source.sha256
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Source(str(path)).recall(finished) == source.sha256  # not read again: size and time say that it is the same


def test_reading_a_file_imports_no_torch(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    code = "import sys; from distill.data.sources import read_source; print(len(read_source(sys.argv[1])), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "False"]
