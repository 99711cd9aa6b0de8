"""Data as people have it, through the commands: conversations in every form, lists of answers, columns in templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import commands
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_turns import COMPLETION, FORMS, PROMPT

from distill.data.completions import brought, traces_of
from distill.data.mapping import PromptMapping
from distill.errors import DataError
from distill.recipe.prompts import Columns, Prompts
from distill.recipe.traces import Traces
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows

Row = dict[str, Any]
QUESTION = "How many lamps?"


def numbered(row: Row, number: int) -> Row:
    """Another conversation in the same form."""
    written = json.dumps(row)
    assert QUESTION in written
    found: Row = json.loads(written.replace(QUESTION, f"How many lamps in room {number}?"))
    return found


def write(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ran(*words: str | Path) -> str:
    result = commands.run(["-m", "distill", *words])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


def test_conversations_of_all_forms_become_prompts_and_traces(tmp_path: Path) -> None:
    """The problems come in one form, the traces in all; a Parquet file gives objects the keys of others."""
    forms = [form for form, row in FORMS.items() if "messages" in row]
    source = write(tmp_path / "problems.jsonl", [numbered(FORMS["openai"], place) for place in range(len(forms) + 2)])
    write(tmp_path / "traces" / "a.jsonl", [numbered(FORMS[form], place) for place, form in enumerate(forms)])
    padded = [numbered(FORMS[form], len(forms) + place) for place, form in enumerate(("openai", "as parquet pads"))]
    pq.write_table(pa.Table.from_pylist(padded), tmp_path / "traces" / "b.parquet")
    recipe = tmp_path / "r.yaml"
    columns = "columns: {messages: messages}"
    recipe.write_text(
        f"name: forms\nrun_dir: {tmp_path / 'run'}\nstudent: {{model: none}}\nevaluate: null\n"
        f"prompts: {{source: {source}, heldout_size: 0, {columns}}}\n"
        f"traces: {{source: {tmp_path / 'traces'}, {columns}}}\ncurate: {{checks: [finish, think]}}\n"
    )
    ran("prompts", recipe)
    said = ran("generate", recipe)
    prompts = {row["prompt_id"]: row["messages"] for row in read_rows(tmp_path / "run" / "prompts", "train")}
    traces = read_rows(tmp_path / "run" / "traces", "traces")
    assert read_manifest(tmp_path / "run" / "traces").drops == {}
    assert len(prompts) == len(traces) == len(forms) + 2 and {row["prompt_id"] for row in traces} == set(prompts)
    for place, row in enumerate(traces):
        assert row["messages"] == prompts[row["prompt_id"]] == numbered({"messages": PROMPT}, place)["messages"]
        assert row["completion"] == COMPLETION
    assert "2 of them had their reasoning between the marks of another family" in said


def test_lists_of_answers_have_their_own_verdicts_and_templates_any_column(tmp_path: Path) -> None:
    rows = [
        {
            "\u0627\u0644\u0633\u0624\u0627\u0644": f"1 + {n}?",
            "info": {"unit": "lamps", "hints": ["count", "add"]},
            "answer": [str(n + 1)],
            "generations": [f"<thought>a</thought>\\boxed{{{n + 1}}}", "\\boxed{0}", None],
            "correctness": [True, None, False],
            "finish_reasons": None if n % 2 else ["stop", "length", "stop"],
        }
        for n in range(6)
    ]
    source, recipe = write(tmp_path / "rows.jsonl", rows), tmp_path / "r.yaml"
    recipe.write_text(
        f"name: lists\nrun_dir: {tmp_path / 'run'}\nstudent: {{model: none}}\nevaluate: null\n"
        f"prompts:\n  source: {source}\n  heldout_size: 2\n  columns: {{prompt: \u0627\u0644\u0633\u0624\u0627\u0644, reference: answer}}\n"
        '  template: "{prompt} In {info.unit}, {{so}}:\\n{info.hints}"\n'
        f"traces:\n  source: {source}\n  columns: {{prompt: \u0627\u0644\u0633\u0624\u0627\u0644}}\n  completion: generations\n"
        "  verdict: correctness\n  finish_reason: finish_reasons\n"
    )
    ran("prompts", recipe)
    ran("generate", recipe)
    train = read_rows(tmp_path / "run" / "prompts", "train")
    assert [row["messages"][-1]["content"] for row in train] == [
        f"1 + {int(row['reference']) - 1}? In lamps, {{so}}:\ncount\nadd" for row in train
    ]
    found = read_rows(tmp_path / "run" / "traces", "traces")
    assert read_manifest(tmp_path / "run" / "traces").drops == {"in_heldout": 6, "empty_completion": 4}
    assert [row["prompt_id"] for row in found] == [row["prompt_id"] for row in train for _ in range(2)]
    assert [(row["sample_index"], row["verdict"]) for row in found] == [(0, True), (1, None)] * 4
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["completion"] == f"<think>\na\n</think>\n\n\\boxed{{{first['reference']}}}" and second["completion"] == "\\boxed{0}"
        assert (first["finish_reason"], second["finish_reason"]) in {(None, None), ("stop", "length")}
    for key in ("--prompts.template", "{promt} {prompt}"), ("--traces.verdict", "info.hints"):
        result = commands.run(["-m", "distill", "check", "--quick", recipe, *key])
        wanted = "there is no column 'promt', only" if "promt" in key[1] else "info.hints has 2 entries, and generations has 3"
        assert result.returncode == 1 and wanted in (result.stdout + result.stderr).replace("\n", " ")


def found_in(row: Row, **keys: Any) -> list[tuple[str, str | None]]:
    return [each[:2] for each in brought(Traces(source="t.jsonl", **keys), row, "t.jsonl:2")]


def test_an_answer_may_be_a_list_of_texts_or_of_turns() -> None:
    turn = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    whole = ("<think>\nr\n</think>\n\na", None)
    for value in (turn, [turn], [[turn]], ["<thinking>r</thinking>a"]):
        assert found_in({"completion": value}) == [whole]
    assert found_in({"completion": [turn, {"from": "gpt", "value": "b"}]}) == [whole, ("b", None)]
    assert found_in({"completion": []}) == [("", "empty_completion")]
    assert found_in({"completion": ["a", "b"], "why": ["r", None]}, reasoning="why") == [whole, ("b", "empty_reasoning")]
    assert found_in({"completion": ["a", "a"], "why": "r"}, reasoning="why") == [whole, whole]
    assert found_in({"completion": [{"role": "assistant", "content": [{"type": "image"}]}]}) == [("", "not_text")]
    for value, message in (
        (
            [{"role": "user", "content": "q"}, turn],
            r"completion holds a conversation of 2 turns, not an answer\. Name it in traces\.columns\.m",
        ),
        ({"role": "user", "content": "q"}, "completion holds a turn of user, not an answer"),
        ([["a"]], r"completion\.0 must be text or a number, got list"),
    ):
        with pytest.raises(DataError, match=rf"^t\.jsonl:2: {message}"):
            found_in({"completion": value})
    with pytest.raises(DataError, match=r"^t\.jsonl:2: right has 1 entries, and completion has 2\. Give one for each answer"):
        found_in({"completion": ["a", "b"], "right": [True]}, verdict="right")


def test_prompt_and_completion_may_be_two_conversations() -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    columns = Columns(messages="prompt")
    mapping, traces = PromptMapping(Prompts(source="x", columns=columns), columns, "x"), Traces(source="x", columns=columns)
    [(asked, answer)] = traces_of(traces, mapping, row, "x:1")
    assert (asked.messages, answer.text) == (row["prompt"], "a")
    with pytest.raises(DataError, match=r"x:1: prompt is a conversation, not text\. Name it in columns\.messages"):
        PromptMapping(Prompts(source="x"), Columns(prompt="prompt"), "x").asked(row, "x:1")


def test_recipes_of_before_have_the_identity_they_had() -> None:
    columns = {"prompt": "question", "messages": None, "reference": "answer", "tags": None}
    assert Prompts(source="x").identity()["columns"] == columns
    brought_ones = Traces(source="x").identity()
    assert brought_ones["columns"] == columns | {"reference": None} and brought_ones["completion"] == "completion"
    assert Prompts(source="x", columns=Columns(prompt="q", tools="api")).identity()["columns"]["tools"] == "api"
