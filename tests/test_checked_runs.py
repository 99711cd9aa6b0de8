"""Curate, evaluate and check with checks of other tasks than mathematics, as a user runs them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import commands
import pytest
from ruamel.yaml import YAML

from distill.recipe.experiment import Recipe
from distill.run.folder import StageFolder
from distill.run.manifest import JOURNAL, read_manifest
from distill.run.tables import read_rows
from distill.stages import curate, import_traces, prompts, run_dir

Rows = list[dict[str, Any]]
LABELS = ["refund", "delivery_status", "change_address", "cancel_order"]
MINE = """
def check(answer, reference, row):
    while row["kind"] == "endless":
        pass
    if row["kind"] == "broken":
        raise ValueError
    return answer.strip().endswith(reference), "ends with it"
"""


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def recipe_file(tmp_path: Path, rows: Rows, checks: list[Any], **sections: Any) -> Path:
    """A recipe whose prompts and brought traces are these rows: `q`, `a`, `trace`, and further columns."""
    source = str(write(tmp_path / "rows.jsonl", rows))
    content: dict[str, Any] = {
        "name": "test",
        "run_dir": str(tmp_path / "run"),
        "student": {"model": "embedded:student"},
        "prompts": {"source": source, "columns": {"prompt": "q", "reference": "a"}, "heldout_size": 0} | sections.pop("prompts", {}),
        "traces": {"source": source, "columns": {"prompt": "q"}, "completion": "trace"},
        "curate": {"checks": checks, "workers": 1, "max_per_prompt": 9} | sections.pop("curate", {}),
        "evaluate": None,
    }
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML().dump(content | sections, file)
    return tmp_path / "recipe.yaml"


def ok(*words: str | Path) -> str:
    result = commands.run(["-m", "distill", *words])
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def verdicts(tmp_path: Path) -> Counter[tuple[str, bool | None, str]]:
    return Counter((row["check"], row["passed"], row["reason"]) for row in read_rows(tmp_path / "run" / "curated", "verdicts"))


def curated(tmp_path: Path, rows: Rows, checks: list[Any], **sections: Any) -> Counter[tuple[str, bool | None, str]]:
    """What the checks of a list found of brought traces, run in this process."""
    from distill.recipe.reading import load_recipe

    recipe = load_recipe(recipe_file(tmp_path, rows, checks, **sections))
    for stage in (prompts, import_traces, curate):
        stage.run(recipe)
    return verdicts(tmp_path)


def thought(answer: str) -> str:
    return f"<think>\nThe customer speaks.\n</think>\n\n{answer}"


def test_labels_through_the_commands(tmp_path: Path) -> None:
    """Seven forms of the right label, and a wrong one in every eighth trace."""
    forms = ["{}", "\\boxed{{{}}}", "**{}**", "The intent is {}.", "\\boxed{{\\text{{{}}}}}", "`{}`"]
    rows: Rows = []
    for number, label in enumerate(LABELS * 8):
        round_ = number // len(LABELS)
        written = LABELS[(number + 1) % 4] if round_ == 7 else label.upper() if round_ == 6 else forms[round_].format(label)
        rows.append({"q": f"Request {number}", "a": label, "trace": thought(written)})
    recipe = recipe_file(tmp_path, rows, ["finish", "think", {"label": {"choices": LABELS}}, "degenerate"])
    for command in ("prompts", "generate"):
        ok(command, recipe)
    assert "28 traces kept · 4 dropped (4 label:wrong_label)" in ok("curate", recipe)
    assert verdicts(tmp_path) == {
        ("finish", True, "brought"): 32,
        ("think", True, "well_formed"): 32,
        ("label", True, "right"): 28,
        ("label", False, "wrong_label"): 4,
        ("degenerate", True, "varied"): 32,
    }
    refused = commands.run(["-m", "distill", "curate", recipe, "--curate.checks", "[finish, {label: {choices: [refund, other]}}]"])
    assert refused.returncode == 1 and "curate.checks" in refused.stderr


def test_a_function_that_never_returns_is_killed_and_the_others_are_judged(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    kinds = ["plain", "endless", "broken", "plain"]
    rows: Rows = [{"q": f"{place}?", "a": "5", "kind": kind, "trace": thought("5" if place else "6")} for place, kind in enumerate(kinds)]
    own = {"python": {"file": str(tmp_path / "mine.py")}, "name": "mine"}
    found = curated(tmp_path, rows, [own, "math"], prompts={"fields": ["kind"]}, curate={"check_timeout_s": 1.0})
    assert found == {
        ("mine", False, "ends with it"): 1,
        ("mine", None, "checker_timed_out"): 1,
        ("mine", None, "checker_failed"): 1,
        ("mine", True, "ends with it"): 1,
        ("math", True, "right"): 3,
        ("math", False, "wrong_answer"): 1,
    }
    manifest = read_manifest(tmp_path / "run" / "curated")
    assert len(manifest.settings["python_sha256"]) == 64 and set(manifest.inputs) == {"traces", "prompts"}
    (tmp_path / "mine.py").write_text(MINE + "\n")
    result = commands.run(["-m", "distill", "curate", tmp_path / "recipe.yaml"])
    assert result.returncode == 1 and "python_sha256: its content has changed" in result.stderr


def test_a_pattern_that_never_ends_is_killed(tmp_path: Path) -> None:
    rows: Rows = [{"q": "1?", "a": "x", "trace": "a" * 60 + "!"}, {"q": "2?", "a": "x", "trace": "aa"}]
    checks = [{"text": {"pattern": "^(a+)+$", "reference": "ignore"}}]
    found = curated(tmp_path, rows, checks, curate={"check_timeout_s": 1.0})
    assert found == {("text", None, "checker_timed_out"): 1, ("text", True, "fits"): 1}


def test_choices_and_calls_are_those_of_each_prompt(tmp_path: Path) -> None:
    """Traces come in another order than their prompts, several of one, and one of none."""
    rows: Rows = [{"q": f"{place}?", "a": "B", "options": [f"x{place}", f"y{place}"]} for place in range(5)]
    traces = [{"q": f"{place}?", "trace": f"y{right}"} for place, right in ((3, 3), (0, 0), (3, 0), (4, 4), (1, 1), (7, 7), (0, 1))]
    sections = {"traces": {"source": str(write(tmp_path / "traces.jsonl", traces)), "columns": {"prompt": "q"}, "completion": "trace"}}
    found = curated(tmp_path, rows, [{"label": {"column": "options"}}], prompts={"fields": ["options"]}, **sections)
    assert found == {("label", True, "right"): 4, ("label", False, "no_label"): 2}


def test_calls_of_conversations_with_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "get_order", "parameters": {"properties": {"id": {"type": "string"}}}}}]
    rows: Rows = []
    for number in range(4):
        call = {"id": f"call_{number}", "function": {"name": "get_order", "arguments": {"id": str(number)}}}
        turns = [
            {"role": "system", "content": "You work for a shop."},
            {"role": "user", "content": f"Where is order {number}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "{}"},
        ]
        written = {"name": "get_order", "arguments": {"id": str(number if number else 9)}}
        rows.append({"messages": turns, "tools": tools, "trace": f"<tool_call>{json.dumps(written)}</tool_call>"})
    columns = {"messages": "messages", "reference": "messages.2.tool_calls"}
    found = curated(
        tmp_path,
        rows,
        [{"tool_calls": {"reference": "equal", "form": "hermes"}}],
        prompts={"columns": columns, "json_reference": True, "fields": ["tools"]},
        traces={"source": str(tmp_path / "rows.jsonl"), "columns": {"messages": "messages"}, "completion": "trace"},
    )
    assert found == {("tool_calls", True, "right"): 3, ("tool_calls", False, "other_calls"): 1}


def test_samples_that_agree_are_kept_without_a_reference(tmp_path: Path) -> None:
    answers = {"1?": ["5", "**5**", "6"], "2?": ["7", "8"], "3?": ["9"]}
    rows: Rows = [{"q": prompt, "trace": answer} for prompt, given in answers.items() for answer in given]
    problems = {"columns": {"prompt": "q"}, "source": str(write(tmp_path / "p.jsonl", [{"q": prompt} for prompt in answers]))}
    found = curated(tmp_path, rows, ["agreement"], prompts=problems)
    assert found == {
        ("agreement", True, "agrees"): 2,
        ("agreement", False, "disagrees"): 1,
        ("agreement", None, "no_agreement"): 2,
        ("agreement", None, "one_sample"): 1,
    }


def test_tokens_of_brought_traces_are_counted_by_the_student(tmp_path: Path) -> None:
    rows: Rows = [{"q": f"{place}?", "a": "1", "trace": thought("+".join("1" * place))} for place in (1, 20, 60)]
    found = curated(tmp_path, rows, [{"length": {"max_tokens": 75}}])
    assert found == {("length", True, "within_bounds"): 2, ("length", False, "too_long"): 1}
    assert "student" in read_manifest(tmp_path / "run" / "curated").settings


def test_a_verdict_that_is_brought_stands_in_place_of_the_checks_of_answers(tmp_path: Path) -> None:
    """Neither the right box of the second nor the missing reference of the third counts; checks of form look as always."""
    told = ["correct", "wrong", 1, None, True]
    texts = ["\\boxed{9}", "\\boxed{5}", "no box, cut behi", "\\boxed{5}", "\\boxed{5}"]
    rows: Rows = [{"q": f"{place}?", "a": "5", "told": verdict, "trace": thought(texts[place])} for place, verdict in enumerate(told)]
    rows[2]["a"] = None
    rows[4]["trace"] = "\\boxed{5}"
    brought = {"source": str(tmp_path / "rows.jsonl"), "columns": {"prompt": "q"}, "completion": "trace", "verdict": "told"}
    recipe = recipe_file(tmp_path, rows, ["finish", "think", "math", "number"], traces=brought)
    assert "curate: 40% of 5 traces looked at would be kept" in ok("check", recipe)
    for command in ("prompts", "generate"):
        ok(command, recipe)
    said = ok("curate", recipe)
    assert "the verdicts of math, number are those of the column told" in said and "2 traces kept · 3 dropped" in said
    found = verdicts(tmp_path)
    for check in ("math", "number"):
        assert {key[1:]: count for key, count in found.items() if key[0] == check} == {
            (True, "brought_right"): 3,
            (False, "brought_wrong"): 1,
            (None, "brought_unknown"): 1,
        }
    assert found["think", False, "no_reasoning"] == 1


def test_a_verdict_that_stands_for_nothing_is_refused(tmp_path: Path) -> None:
    brought = {"source": "x.jsonl", "columns": {"prompt": "q"}, "verdict": "told"}
    recipe = recipe_file(tmp_path, [{"q": "1?"}], ["finish"], traces=brought)
    result = commands.run(["-m", "distill", "curate", recipe])
    assert result.returncode == 1 and "traces.verdict would be ignored" in result.stderr


def interrupted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A curation that ends when everything was judged, and before anything is written."""
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("distill.stages.curate._write", lambda *_: 1 // 0)
        curate.run(recipe)
    return run_dir(recipe) / "curated" / JOURNAL


def test_what_slow_checks_have_found_is_not_found_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.recipe.reading import load_recipe

    rows: Rows = [{"q": f"{place}?", "a": str(place), "trace": thought(str(place))} for place in range(5)]
    checks = ["finish", "math", "number", {"json": {"reference": "ignore"}}]
    recipe = load_recipe(recipe_file(tmp_path, rows, checks))
    prompts.run(recipe)
    import_traces.run(recipe)
    journal = interrupted(recipe, monkeypatch)
    noted = journal.read_text().count('"check"')
    assert noted == 10  # of each trace math and json, which run apart
    with monkeypatch.context() as patched:
        patched.setattr("distill.checks.pool._Worker.__init__", lambda *_: 1 // 0)  # nothing is judged again
        assert curate.run(recipe).rows_kept == 5
    assert set(verdicts(tmp_path)) == {
        ("finish", True, "brought"), ("math", True, "right"), ("number", True, "right"), ("json", True, "fits"),
    }  # fmt: skip


def test_a_journal_that_names_no_check_is_of_math(tmp_path: Path) -> None:
    from distill.recipe.reading import load_recipe

    rows: Rows = [{"q": f"{place}?", "a": str(place), "trace": thought(str(place))} for place in range(3)]
    recipe = load_recipe(recipe_file(tmp_path, rows, ["finish", "think", "math"]))
    prompts.run(recipe)
    import_traces.run(recipe)
    with StageFolder(*curate.plan(recipe)) as out:
        out.journal().append([{"row": 1, "passed": False, "reason": "wrong_answer"}])
    assert curate.run(recipe).drops == {"math:wrong_answer": 1}


CHECKED = {"prompts": {"heldout_size": 2}, "evaluate": {"models": ["base"], "max_new_tokens": 8}}


def claims(tmp_path: Path, rows: Rows, checks: list[Any], **sections: Any) -> str:
    result = commands.run(["-m", "distill", "check", recipe_file(tmp_path, rows, checks, **sections)])
    return result.stdout + result.stderr


def labelled(count: int, strange: int) -> Rows:
    return [{"q": f"{place}+1?", "a": "refnd" if place < strange else "refund", "trace": thought("refund")} for place in range(count)]


def test_check_says_which_rows_a_check_cannot_judge(tmp_path: Path) -> None:
    checks = ["finish", {"label": {"choices": LABELS}}]
    said = claims(tmp_path, labelled(30, 3), checks, **CHECKED)
    assert "label can't judge" in said and "reference_is_no_choice, reference 'refnd'" in said and "FAIL  references" not in said
    said = claims(tmp_path, labelled(30, 28), checks, **CHECKED)
    assert "FAIL  references: label can't judge" in said and "but curate.checks has label" in said


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ({"python": {"file": "nowhere.py"}}, "there is no such Python file"),
        ({"json": {"reference": "ignore", "json_schema": {"type": "nonsense"}}}, "json_schema is no JSON schema"),
        ({"language": {"language": "xx"}}, "the language 'xx' is not known"),
    ],
)
def test_check_refuses_settings_that_judge_nothing(tmp_path: Path, check: Any, says: str) -> None:
    from distill.before.findings import Findings
    from distill.before.judging import check_judging
    from distill.recipe.reading import load_recipe
    from distill.stages.prompts import survey

    recipe = load_recipe(recipe_file(tmp_path, labelled(10, 0), [check]))
    found = Findings()
    check_judging(recipe, survey(recipe.prompts, 0, 10), found)
    assert len(found.refuted) == 1 and says in found.refuted[0]
