"""Damaged files of prompts and of brought traces, of many kinds, from a seed; see `damage`."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from damage import Case

RECIPE = """\
name: damaged
run_dir: run
student: {model: embedded:student}
prompts:
  source: SOURCE
  heldout_size: 2
  columns: {prompt: question, reference: answer}
traces:
  source: TRACES
  columns: {prompt: question}
evaluate: {models: [base, student]}
"""
PROBLEMS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(30)]
TRACES = [{"question": f"What is {n} + {n}?", "completion": f"<think>\n{n}\n</think>\n\n\\boxed{{{2 * n}}}"} for n in range(30)]
HALF = '"\\ud83d"'

Maker = Callable[[random.Random], Case]
_MAKERS: dict[str, Maker] = {}


def data_cases(rng: random.Random, count: int) -> list[Case]:
    """So many cases, of every kind equally many but for one."""
    makers = list(_MAKERS.items())
    return [make(rng)._replace(kind=name) for name, make in (makers[number % len(makers)] for number in range(count))]


def kind(maker: Maker) -> Maker:
    """A maker of cases under its name."""
    _MAKERS[maker.__name__] = maker
    return maker


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), made, **options)
    return made.getvalue()


def of(rng: random.Random, name: str, content: bytes, **about: Any) -> Case:
    """A case of problems in a file, or of the same bytes as traces, where they can be either."""
    recipe = RECIPE.replace("SOURCE", name).replace("TRACES", "traces.jsonl").encode()
    files = {"recipe.yaml": recipe, name: content, "traces.jsonl": lines(TRACES)}
    return Case("", files, ["prompts", "recipe.yaml"], **about)


def of_traces(name: str, content: bytes, **about: Any) -> Case:
    """A case of brought traces."""
    recipe = RECIPE.replace("SOURCE", "problems.jsonl").replace("TRACES", name).encode()
    files = {"recipe.yaml": recipe, "problems.jsonl": lines(PROBLEMS), name: content}
    return Case("", files, ["run", "recipe.yaml", "--until", "generate"], **about)


def spoilt(rng: random.Random, content: bytes, line: bytes) -> tuple[bytes, int]:
    """Lines with one put in, and its number."""
    all_lines = content.splitlines(keepends=True)
    place = rng.randrange(1, len(all_lines))
    return b"".join([*all_lines[:place], line + b"\n", *all_lines[place:]]), place + 1


def flipped(rng: random.Random, content: bytes, bits: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(bits):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


for _name, _line in {
    "torn_line": b'{"question": "What',
    "no_json": b"question: what, answer: 5",
    "a_list": b'["What?", 5]',
    "a_word": b'"What?"',
    "null": b"null",
    "two_on_a_line": b'{"question": "a", "answer": 1} {"question": "b", "answer": 2}',
    "half_a_pair": b'{"question": ' + HALF.encode() + b', "answer": "1"}',
    "half_a_pair_in_the_reference": b'{"question": "a", "answer": ' + HALF.encode() + b"}",
    "deep_lists": b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b', "answer": 1}',
    "deep_objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "thousands_of_digits": b'{"question": "a", "answer": ' + b"7" * 5000 + b"}",
    "no_utf8": b'{"question": "a\xff\xfe", "answer": 1}',
    "raw_nul": b'{"question": "a\x00b", "answer": 1}',
    "raw_escape": b'{"question": "a\x1b[2Jb", "answer": 1}',
    "no_column": b'{"query": "a", "answer": 1}',
    "controls_in_a_column": b'{"\\u001b]0;x\\u0007": "a", "answer": 1}',
    "many_columns": b"{" + b", ".join(b'"c%d": 1' % number for number in range(3000)) + b"}",
    "a_list_as_prompt": b'{"question": ["a", "b"], "answer": 1}',
    "an_object_as_reference": b'{"question": "a", "answer": {"value": 1}}',
    "a_long_object": b'{"question": {"x": "' + b"x" * 300_000 + b'"}, "answer": 1}',
}.items():

    def _in_jsonl(rng: random.Random, line: bytes = _line) -> Case:
        content, number = spoilt(rng, lines(PROBLEMS), line)
        return of(rng, "data.jsonl", content, says=(f"data.jsonl:{number}",))

    _MAKERS[f"jsonl_{_name}"] = _in_jsonl


@kind
def jsonl_flipped(rng: random.Random) -> Case:
    return of(rng, "data.jsonl", flipped(rng, lines(PROBLEMS), rng.randrange(1, 5)), says=("data.jsonl",), valid=None)


@kind
def jsonl_truncated(rng: random.Random) -> Case:
    content = lines(PROBLEMS)
    return of(rng, "data.jsonl", content[: rng.randrange(len(content) - 2)], says=("data.jsonl",), valid=None)


@kind
def jsonl_all_empty(rng: random.Random) -> Case:
    return of(rng, "data.jsonl", lines([{"question": rng.choice(["", " ", None]), "answer": 1}] * 9), says=("data.jsonl",))


@kind
def jsonl_of_nothing(rng: random.Random) -> Case:
    return of(rng, "data.jsonl", rng.choice([b"", b"\n\n\n", b"  \n"]), says=("data.jsonl", "no rows"))


@kind
def utf16(rng: random.Random) -> Case:
    return of(rng, "data.jsonl", lines(PROBLEMS).decode().encode("utf-16"), says=("data.jsonl",))


@kind
def marks_and_carriage_returns(rng: random.Random) -> Case:
    return of(rng, "data.jsonl", b"\xef\xbb\xbf" + lines(PROBLEMS).replace(b"\n", b"\r\n"), valid=True)


for _name, _content in {
    "torn": json.dumps(PROBLEMS)[:200],
    "of_words": '["a", "b"]',
    "of_two_lists": '{"a": [{"question": "x"}], "b": [{"question": "y"}]}',
    "without_a_list": '{"a": 5}',
    "a_number": "5",
    "deep": "[" * 100_000,
    "of_lines": lines(PROBLEMS).decode(),
    "empty": "",
    "half_a_pair": f'[{{"question": {HALF}, "answer": 1}}]',
}.items():
    _MAKERS[f"json_{_name}"] = lambda rng, content=_content: of(rng, "data.json", content.encode(), says=("data.json",))  # type: ignore[misc]

for _name, _content in {
    "unclosed": b'question,answer\n"What,5\n',
    "fields_too_many": b"question,answer\na,1\nb,2,3\n",
    "fields_too_few": b"question,answer\na,1\nb\n",
    "same_names": b"question,question\na,b\n",
    "nul": b"question,answer\na\x00b,1\n\x00\x00\n",
    "latin1": "question,answer\nwär,1\n".encode("latin-1"),
    "header_alone": b"question,answer\n",
    "empty": b"",
    "other_columns": b"query;answer\na;1\n",
}.items():
    _MAKERS[f"csv_{_name}"] = lambda rng, content=_content: of(
        rng, "data.csv", content, says=("data.csv",), valid=None if b"\x00" in content else False
    )  # type: ignore[misc]


@kind
def parquet_flipped(rng: random.Random) -> Case:
    return of(rng, "data.parquet", flipped(rng, parquet(PROBLEMS), rng.randrange(1, 6)), says=("data.parquet",), valid=None)


@kind
def parquet_flipped_with_checksums(rng: random.Random) -> Case:
    content = bytearray(parquet(PROBLEMS, compression="none", write_page_checksum=True, use_dictionary=False))
    place = bytes(content).index(b"What is 7")
    content[place + rng.randrange(8)] ^= 1
    return of(rng, "data.parquet", bytes(content), says=("data.parquet",))


@kind
def parquet_truncated(rng: random.Random) -> Case:
    content = parquet(PROBLEMS)
    return of(rng, "data.parquet", content[: rng.randrange(len(content))], says=("data.parquet",))


@kind
def parquet_that_is_none(rng: random.Random) -> Case:
    return of(rng, "data.parquet", rng.choice([b"", b"PAR1", b"PAR1PAR1", lines(PROBLEMS), rng.randbytes(3000)]), says=("data.parquet",))


@kind
def parquet_of_other_types(rng: random.Random) -> Case:
    column = rng.choice(
        [
            pa.array([2**62], pa.timestamp("s")),
            pa.array([-(2**31)], pa.date32()),
            pa.array([2**62], pa.duration("s")),
            pa.array([b"\xff\xfe"], pa.binary()),
            pa.array([Decimal("1.5")], pa.decimal128(5, 2)),
            pa.array([[1]], pa.list_(pa.int64())),
            pa.array([{"a": 1}], pa.struct([("a", pa.int64())])),
        ]
    )
    table = pa.table({"question": column, "answer": pa.array(["1"])})
    return of(rng, "data.parquet", parquet(table), says=("data.parquet",))


@kind
def parquet_without_rows(rng: random.Random) -> Case:
    return of(
        rng, "data.parquet", parquet(rng.choice([pa.table({"question": pa.array([], pa.string())}), pa.table({})])), says=("data.parquet",)
    )


@kind
def packed_and_spoilt(rng: random.Random) -> Case:
    content = gzip.compress(lines(PROBLEMS), mtime=0)
    made = rng.choice([content[:-20], content[:40], b"", lines(PROBLEMS), content[:10] + flipped(rng, content[10:], 9)])
    return of(rng, "data.jsonl.gz", made, says=("data.jsonl.gz",))


@kind
def zstd_and_spoilt(rng: random.Random) -> Case:
    content = pa.compress(lines(PROBLEMS), "zstd", asbytes=True)
    return of(rng, "data.jsonl.zst", rng.choice([content[:-20], b"", lines(PROBLEMS)]), says=("data.jsonl.zst",))


@kind
def of_another_kind(rng: random.Random) -> Case:
    name, content = rng.choice(
        [
            ("data.txt", lines(PROBLEMS)),
            ("data.jsonl", parquet(PROBLEMS)),
            ("data.csv", parquet(PROBLEMS)),
            ("data.jsonl", gzip.compress(b"x")),
        ]
    )
    return of(rng, name, content, says=(name,))


@kind
def random_bytes(rng: random.Random) -> Case:
    name = rng.choice(["data.jsonl", "data.json", "data.csv", "data.parquet", "data.csv.gz"])
    return of(rng, name, rng.randbytes(rng.randrange(1, 3000)), says=(name,))


def _folder(make: Callable[[Path], object], **about: Any) -> Maker:
    def case(rng: random.Random) -> Case:
        made = of(rng, "data", b"", prepare=make, says=about.get("says", ("data",)), valid=about.get("valid", False))
        return made._replace(files={"recipe.yaml": made.files["recipe.yaml"], "data/a.jsonl": lines(PROBLEMS)})

    return case


def _literal(folder: Path) -> None:
    """A folder whose name is a pattern, beside one that the pattern matches."""
    for name, rows in (("exp[1]", PROBLEMS), ("exp1", [{"nothing": 1}])):
        (folder / name).mkdir()
        (folder / name / "a.jsonl").write_bytes(lines(rows))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("source: data", "source: 'exp[1]/*.jsonl'"))


_MAKERS |= {
    "folder_with_a_pipe": _folder(lambda folder: os.mkfifo(folder / "data" / "b.jsonl")),
    "folder_with_a_link_to_nothing": _folder(lambda folder: (folder / "data" / "b.jsonl").symlink_to("absent")),
    "folder_with_another_file": _folder(lambda folder: (folder / "data" / "b.txt").write_text("x")),
    "folder_with_bytes_in_a_name": _folder(lambda folder: (folder / "data" / "b\udcff.jsonl").write_bytes(lines(PROBLEMS))),
    "folder_with_a_folder": _folder(lambda folder: (folder / "data" / "more").mkdir()),
    "folder_called_like_a_pattern": _folder(_literal, valid=True, says=()),
    "a_pipe": lambda rng: of(rng, "x", b"", prepare=lambda folder: os.mkfifo(folder / "data.jsonl"), says=("data.jsonl", "pipe"))._replace(
        files={"recipe.yaml": RECIPE.replace("SOURCE", "data.jsonl").replace("TRACES", "traces.jsonl").encode()}
    ),
}

for _name, _line, _says in [
    ("half_a_pair", b'{"question": "What is 3 + 3?", "completion": ' + HALF.encode() + b"}", "half of a surrogate pair"),
    ("no_completion", b'{"question": "What is 3 + 3?"}', "completion"),
    ("a_list_in_a_list_as_completion", b'{"question": "What is 3 + 3?", "completion": [["a"]]}', "completion"),
    ("a_question_as_completion", b'{"question": "What is 3 + 3?", "completion": {"role": "user", "content": "a"}}', "a turn of user"),
    ("a_turn_without_content", b'{"question": "What is 3 + 3?", "completion": {"role": "assistant"}}', "has no content"),
    ("an_object_in_a_list_as_completion", b'{"question": "What is 3 + 3?", "completion": [{"a": 1}]}', "completion"),
    ("torn", b'{"question": "What', "not valid JSON"),
    ("deep", b'{"completion": ' + b"[" * 50_000, "nested"),
]:

    def _in_traces(rng: random.Random, line: bytes = _line, says: str = _says) -> Case:
        content, number = spoilt(rng, lines(TRACES), line)
        return of_traces("brought.jsonl", content, says=(f"brought.jsonl:{number}", says))

    _MAKERS[f"traces_{_name}"] = _in_traces


@kind
def traces_of_other_prompts(rng: random.Random) -> Case:
    return of_traces("brought.jsonl", lines([{"question": "Who?", "completion": "x"}] * 3), says=("brought.jsonl", "none of 3 traces"))


@kind
def traces_flipped(rng: random.Random) -> Case:
    return of_traces("brought.jsonl", flipped(rng, lines(TRACES), rng.randrange(1, 5)), says=("brought.jsonl",), valid=None)
