"""Traces from elsewhere: matched to the run's prompts, brought into one form, never on held-out prompts."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from distill.data.completions import Brought, brought
from distill.errors import DataError, StageConflictError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Traces
from distill.run.files import digest_file
from distill.run.manifest import Manifest, read_manifest
from distill.run.tables import read_rows
from distill.stages import import_traces, prompts


def write(path: Path, source: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in source))
    return path


def recipe(tmp_path: Path, **traces: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "run_dir": str(tmp_path / "run"),
            "student": {"model": "none"},
            "prompts": {
                "source": str(tmp_path / "prompts.jsonl"),
                "heldout_size": 5,
                "system_prompt": "Think {hard}.",
                "template": "Q: {prompt}",
            },
            "traces": {"source": str(tmp_path / "traces.jsonl"), "columns": {"prompt": "problem"}, **traces},
        }
        | {"evaluate": None}
    )


@pytest.fixture
def split(tmp_path: Path) -> tuple[list[str], list[str]]:
    """Texts of twenty prompts: those to train on and the five held out, already written by the stage `prompts`."""
    write(tmp_path / "prompts.jsonl", [{"question": f"{index}+{index}?", "answer": 2.0 * index} for index in range(20)])
    prompts.run(recipe(tmp_path))
    train, heldout = (
        [row["messages"][-1]["content"].removeprefix("Q: ") for row in read_rows(tmp_path / "run" / "prompts", table)]
        for table in ("train", "heldout")
    )
    assert (len(train), len(heldout)) == (15, 5)
    return train, heldout


def imported(tmp_path: Path, source: list[dict[str, Any]], **traces: Any) -> tuple[Manifest, list[dict[str, Any]], list[dict[str, Any]]]:
    write(tmp_path / "traces.jsonl", source)
    manifest = import_traces.run(recipe(tmp_path, **traces))
    kept, dropped = (read_rows(tmp_path / "run" / "traces", table) for table in ("traces", "dropped"))
    assert manifest.rows_in == len(source) == len(kept) + len(dropped) == (manifest.rows_kept or 0) + sum(manifest.drops.values())
    return manifest, kept, dropped


def test_traces_find_their_prompts(tmp_path: Path, split: tuple[list[str], list[str]]) -> None:
    train, _ = split
    source = [{"problem": text, "completion": f"{text} a"} for text in train] + [{"problem": train[0], "completion": "again"}]
    manifest, kept, dropped = imported(tmp_path, source, author_model="deepseek-ai/DeepSeek-R1", licence=None)
    assert dropped == [] and manifest.stage == "generate"
    by_id = {row["prompt_id"]: row for row in read_rows(tmp_path / "run" / "prompts", "train")}
    for row, given in zip(kept, source, strict=True):
        prompt = by_id[row["prompt_id"]]
        assert (
            row["messages"]
            == prompt["messages"]
            == [
                {"role": "system", "content": "Think {hard}."},
                {"role": "user", "content": f"Q: {given['problem']}"},
            ]
        )
        assert row["reference"] == prompt["reference"] == str(2 * int(given["problem"].partition("+")[0]))
        assert (row["author"], row["completion"]) == ("teacher", given["completion"])
        assert [row[name] for name in ("prompt_ids", "completion_ids", "finish_reason", "seed")] == [None] * 4
    assert [row["sample_index"] for row in kept] == [0] * 15 + [1]
    assert manifest.facts["author"]["model"] == "deepseek-ai/DeepSeek-R1" and manifest.facts["licence"] == "MIT"
    assert manifest.settings["source_sha256"] == digest_file(tmp_path / "traces.jsonl")


def test_a_trace_of_a_heldout_prompt_never_gets_in(tmp_path: Path, split: tuple[list[str], list[str]]) -> None:
    train, heldout = split
    source = [{"problem": text, "completion": "a"} for text in [train[0], *heldout, "unheard of", " "]]
    source.append({"problem": heldout[0], "completion": ""})
    manifest, kept, dropped = imported(tmp_path, source)
    assert manifest.drops == {"in_heldout": 6, "no_such_prompt": 1, "empty_prompt": 1}
    assert len(kept) == 1
    assert sorted({row["messages"][-1]["content"] for row in dropped if row["reason"] == "in_heldout"}) == sorted(
        f"Q: {t}" for t in heldout
    )
    heldout_ids = {row["prompt_id"] for row in read_rows(tmp_path / "run" / "prompts", "heldout")}
    assert not heldout_ids & {row["prompt_id"] for row in kept}


def completed(row: dict[str, Any], **keys: Any) -> tuple[str, str | None]:
    return found_in(row, **keys)[:2]


def found_in(row: dict[str, Any], **keys: Any) -> Brought:
    [found] = brought(Traces(source="t.jsonl", **keys), row, "t.jsonl:2")
    return found


def test_the_reasoning_of_a_column_goes_between_the_tags() -> None:
    for reasoning in ("1+1\nis 2", " <think>\n1+1\nis 2\n</think>\n", "1+1\nis 2</think>"):
        assert completed({"completion": " It is 2. ", "thoughts": reasoning}, reasoning="thoughts") == (
            "<think>\n1+1\nis 2\n</think>\n\nIt is 2.",
            None,
        )
    assert completed({"completion": "2", "thoughts": None}, reasoning="thoughts")[1] == "empty_reasoning"
    assert completed({"completion": "<think>a</think>2", "thoughts": "b"}, reasoning="thoughts")[1] == "reasoning_in_completion"


def test_the_answer_after_the_last_separator_goes_into_a_box() -> None:
    keys = {"completion": "answer", "answer_separator": "####"}
    assert completed({"answer": "a #### b\n#### 1,000\n"}, **keys) == ("<think>\na #### b\n</think>\n\n\\boxed{1,000}", None)
    assert completed({"answer": "a #### \\boxed{7}"}, **keys) == ("<think>\na\n</think>\n\n\\boxed{7}", None)
    assert completed({"answer": "<think>a</think> so #### 7"}, **keys) == ("<think>\na so\n</think>\n\n\\boxed{7}", None)
    for text, reason in (
        ("no mark", "no_answer_separator"),
        ("a ####", "empty_answer"),
        ("#### 7", "empty_reasoning"),
        ("", "empty_completion"),
    ):
        assert completed({"answer": text}, **keys)[1] == reason


@pytest.mark.parametrize(
    ("separator", "text", "answer"),
    [
        ("\\boxed{", "so we add \\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{2}}"),
        ("\\boxed{", "so we add \\boxed{7}.", "\\boxed{7}."),
        ("$\\boxed{", "so we add $\\boxed{7}$", "$\\boxed{7}$"),
        ("\\text{answer", "so we add \\text{answer 7}", "\\boxed{\\text{answer 7}}"),
        ("{", 'so {"a": 7}', '\\boxed{{"a": 7}}'),
    ],
)
def test_a_separator_that_opens_a_brace_leaves_none_astray(separator: str, text: str, answer: str) -> None:
    found, reason = completed({"completion": text}, answer_separator=separator)
    assert reason is None and found.startswith("<think>\nso") and found.endswith(f"</think>\n\n{answer}")


def test_a_completion_with_its_reasoning_inside_stays_as_it_is() -> None:
    text = "<think>\na\n</think>\n\n\\boxed{7}"
    assert completed({"completion": text}) == (text, None)


def test_a_reasoning_that_r1s_template_opened_is_opened() -> None:
    assert found_in({"completion": "Okay.\n</think>\n\n4"}) == Brought("<think>\nOkay.\n</think>\n\n4", opened=True)
    assert not found_in({"completion": "<think>a</think>b"}).opened and not found_in({"completion": "4"}).opened


ENDS = ["<|im_end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "\n<end_of_turn>\n", "<|eot_id|><|end_of_text|>", "</s> "]


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_turn_is_no_part_of_an_answer(end: str) -> None:
    text = "<think>\nthe text <|im_end|> ends\n</think>\n\n\\boxed{60}"
    assert found_in({"completion": text + end}) == Brought(text, end_removed=True)
    assert found_in({"completion": end})[:2] == ("", "empty_completion")
    boxed = found_in({"completion": f"so #### 7{end}"}, answer_separator="####")
    assert boxed.text == "<think>\nso\n</think>\n\n\\boxed{7}" and boxed.end_removed


def test_what_nobody_sees_is_nothing() -> None:
    nothing = "\u200b\u2060 \ufeff\u3164"
    assert found_in({"completion": nothing}).reason == "empty_completion"
    assert found_in({"completion": "2", "thoughts": nothing}, reasoning="thoughts").reason == "empty_reasoning"
    for text in ("\u0645", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u2212", "!"):
        assert found_in({"completion": text}) == Brought(text)


HOW_IT_ENDED = {
    "stop": "stop",
    "STOP": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    None: None,
    "nan": None,
    "null": None,
    "None": None,
    "tool_calls": "stop",
    "function_call": "stop",
    "tool_use": "stop",
    "FinishReason.STOP": "stop",
    "FinishReason.MAX_TOKENS": "length",
    "<|im_end|>": "stop",
    "<|eot_id|>": "stop",
    "abort": "error",
    "content_filter": "error",
}


@pytest.mark.parametrize(("value", "reason"), HOW_IT_ENDED.items())
def test_how_a_trace_ended_is_told_by_its_column(value: str | None, reason: str | None) -> None:
    assert found_in({"completion": "a", "finish": value}, finish_reason="finish").finish_reason == reason


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0.0, False),
        ("Correct", True),
        (" failed ", False),
        (None, None),
        ("", None),
        ("n/a", None),
        ("nan", None),
        ("NULL", None),
        ("None", None),
    ],
)
def test_whether_a_trace_is_right_is_told_by_its_column(value: Any, verdict: bool | None) -> None:
    assert found_in({"completion": "a", "right": value}, verdict="right").verdict is verdict


@pytest.mark.parametrize("value", [0.7, "maybe", 2])
def test_a_score_is_no_verdict(value: Any) -> None:
    with pytest.raises(DataError, match="right should say whether the answer is right, as true or false, got"):
        found_in({"completion": "a", "right": value}, verdict="right")


def test_what_was_mended_is_counted(tmp_path: Path, split: tuple[list[str], list[str]]) -> None:
    train, _ = split
    texts = ["a</think>b", "a</think>b<|im_end|>", "the <|im_end|> of <|im_end|>", "a"]
    manifest, kept, _ = imported(tmp_path, [{"problem": train[0], "completion": text} for text in texts])
    assert [row["completion"] for row in kept] == ["<think>\na</think>b", "<think>\na</think>b", "the <|im_end|> of", "a"]
    counted = {name: manifest.facts.get(name) for name in ("thoughts_opened", "ends_removed", "control_tokens_as_text")}
    assert counted == {"thoughts_opened": 2, "ends_removed": 2, "control_tokens_as_text": 1}


def test_dropped_traces_say_why_and_none_left_is_an_error(tmp_path: Path, split: tuple[list[str], list[str]]) -> None:
    train, heldout = split
    source = [{"problem": train[0], "completion": "7"}, {"problem": heldout[0], "completion": "a #### 7"}]
    with pytest.raises(DataError, match=r"none of 2 traces can be used: 1 in_heldout, 1 no_answer_separator.*check traces\.columns"):
        imported(tmp_path, source, answer_separator="####")
    source.append({"problem": train[1], "completion": "a #### 7"})  # another file now, and no --redo is needed
    assert imported(tmp_path, source, answer_separator="####")[0].drops == {"no_answer_separator": 1, "in_heldout": 1}
    assert read_manifest(tmp_path / "run" / "traces").stage == "generate"


def test_an_absent_column_is_named(tmp_path: Path, split: tuple[list[str], list[str]]) -> None:
    with pytest.raises(DataError, match=r"traces\.jsonl:1: there is no column 'completion', only 'problem', 'completions'. Did you mean"):
        imported(tmp_path, [{"problem": split[0][0], "completions": "7"}])
    with pytest.raises(DataError, match=r"traces\.jsonl:1: completion must be text or a number, got dict"):
        imported(tmp_path, [{"problem": split[0][0], "completion": {"text": "7"}}])


@pytest.mark.parametrize("batch", [1, 4, 512])
def test_samples_are_counted_across_batches_and_stay_apart(
    tmp_path: Path, split: tuple[list[str], list[str]], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.stages.import_traces._ROWS", batch)
    train, heldout = split
    texts = [train[0], "unheard of", heldout[0], train[1], train[0], " ", "unheard of", heldout[0], train[0], " ", train[1]]
    _, kept, dropped = imported(tmp_path, [{"problem": text, "completion": str(place)} for place, text in enumerate(texts)])
    assert [(row["completion"], row["sample_index"]) for row in kept] == [("0", 0), ("3", 0), ("4", 1), ("8", 2), ("10", 1)]
    assert [row["reason"] for row in dropped] == [
        "no_such_prompt",
        "in_heldout",
        "empty_prompt",
        "no_such_prompt",
        "in_heldout",
        "empty_prompt",
    ]
    names = [(row["prompt_id"], row["sample_index"]) for row in kept + dropped]
    assert len(set(names)) == len(names)


def test_references_come_back_whatever_they_are(tmp_path: Path) -> None:
    answers = ["", "5", None, "\u0663\u0664 \U0001f600", "long " * 20_000, "x"]
    write(tmp_path / "prompts.jsonl", [{"question": f"{index}?", "answer": answer} for index, answer in enumerate(answers * 3)])
    questions = [f"{index}?" for index in range(3 * len(answers))]
    prompts.run(recipe(tmp_path))
    _, kept, _ = imported(tmp_path, [{"problem": question, "completion": question} for question in reversed(questions)])
    assert len(kept) == 13
    for row in kept:
        answer = answers[questions.index(row["completion"]) % len(answers)]
        assert row["reference"] == ((answer or "").strip() or None)


def test_a_finished_import_knows_its_source_again(tmp_path: Path, split: tuple[list[str], list[str]]) -> None:
    first, _, _ = imported(tmp_path, [{"problem": split[0][0], "completion": "7"}])
    source = tmp_path / "traces.jsonl"
    assert first.facts["sources"][0]["sha256"] == first.settings["source_sha256"] == digest_file(source)
    os.utime(source, (1, 1))
    assert import_traces.run(recipe(tmp_path)) == first
    with pytest.raises(StageConflictError, match="1 of the run's 1 traces are not in it any more"):
        imported(tmp_path, [{"problem": split[0][0], "completion": "8"}])


def test_memory_does_not_hold_the_traces(tmp_path: Path) -> None:
    """Peak over 6,000 prompts and traces against that over 1,500: a row more may take 64 bytes, not its text."""

    def peak(count: int) -> int:
        run_dir = tmp_path / str(count)
        run_dir.mkdir()
        write(run_dir / "prompts.jsonl", [{"question": f"{index}?", "answer": "y" * 500} for index in range(count)])
        write(run_dir / "traces.jsonl", [{"problem": f"{index}?", "completion": "x" * 2000} for index in range(count)])
        prompts.run(recipe(run_dir))
        tracemalloc.start()
        import_traces.run(recipe(run_dir))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # imports and the like
    assert peak(6000) - peak(1500) < 4500 * 64 + 100_000


def test_an_answer_is_found_inside_a_conversation(tmp_path: Path, split: tuple[list[str], list[str]], shared: Path) -> None:
    talk = [{"role": "user", "content": f"Q: {split[0][0]}"}, {"role": "assistant", "content": "It is 7."}]
    asked = recipe(tmp_path, columns={"messages": "talk.turns"}, completion="talk.turns.-1.content")
    asked = asked.model_copy(update={"prompts": asked.prompts.model_copy(update={"template": "{prompt}"})})
    write(tmp_path / "traces.jsonl", [{"talk": {"turns": talk}}])
    import_traces.run(asked)
    assert [row["completion"] for row in read_rows(tmp_path / "run" / "traces", "traces")] == ["It is 7."]
    asked = recipe(tmp_path / "half", source=str(shared / "cases" / "surrogate.jsonl"), columns={"prompt": "question"})
    write(tmp_path / "half" / "prompts.jsonl", [{"question": f"{index}?", "answer": 1} for index in range(9)])
    prompts.run(asked)
    with pytest.raises(DataError, match=r"surrogate\.jsonl:1: question holds half of a surrogate pair"):
        import_traces.run(asked)
