"""Rows mapped to prompts, values found by their names inside a row; whatever can't be used says where and why."""

from __future__ import annotations

from typing import Any

import pytest

from distill.data.mapping import PromptMapping
from distill.data.names import text_at, top_levels, value_at
from distill.errors import DataError
from distill.recipe.prompts import Columns, Prompts
from distill.run.schema import prompt_id


def prompt_row(row: dict[str, Any], columns: Columns | None = None, **prompts: Any) -> tuple[dict[str, Any], str | None]:
    section = Prompts(source="x.jsonl", **prompts)
    [found] = PromptMapping(section, columns or section.columns, "x.jsonl").prompt_rows(row, "x.jsonl: row 3")
    return found


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


def test_a_list_of_one_answer_is_that_answer() -> None:
    for value, reference in ((["4"], "4"), ([4.0], "4"), ([None], None), ([True], "True")):
        assert prompt_row({"question": "?", "answer": value})[0]["reference"] == reference
    assert prompt_row({"question": "?", "answer": ["4"]}, json_reference=True)[0]["reference"] == '["4"]'
    with pytest.raises(DataError, match=r"answer must be text or a number, got list: .* set prompts\.json_reference"):
        prompt_row({"question": "?", "answer": ["4", "5"]})


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


@pytest.mark.parametrize("turns", ["text", [{"content": "x"}], ["x"], {"role": "user"}, None])
def test_what_is_no_conversation_is_an_error(turns: Any) -> None:
    with pytest.raises(DataError, match="row 3: turns must be a list of"):
        prompt_row({"turns": turns}, Columns(messages="turns"))


NESTED: dict[str, Any] = {
    "reward_model": {"ground_truth": "7", "style": "rule"},
    "reward_model.style": "of its own",
    "a.b": {"c.d": [1, {"e": 2}]},
    "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
    "nothing": None,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward_model.ground_truth", "7"),
        ("reward_model.style", "of its own"),
        ("a.b.c.d.0", 1),
        ("a.b.c.d.-1.e", 2),
        ("messages.-1.content", "!"),
        ("messages.0.content", "?"),
        ("messages.-2.role", "user"),
        ("nothing", None),
        ("nothing.inside", None),
    ],
)
def test_a_name_goes_inside_and_a_key_with_the_dot_wins(name: str, value: Any) -> None:
    assert value_at(NESTED, name, "x.jsonl:3") == value


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reward_modl.ground_truth", r"no column 'reward_modl', only 'reward_model', .*Did you mean 'reward_model'\?"),
        (
            "reward_model.ground_truht",
            r"no column 'ground_truht' in 'reward_model', only 'ground_truth', 'style'\. Did you",
        ),
        ("messages.2.content", r"no place '2' in 'messages', which has 2 entries"),
        ("messages.-3.content", r"no place '-3' in 'messages', which has 2 entries"),
        ("messages.last.content", r"no place 'last' in 'messages'"),
        ("messages.-1.text", r"no column 'text' in 'messages\.-1', only 'role', 'content'"),
        ("reward_model.ground_truth.x", r"nothing in 'reward_model\.ground_truth' to look for 'x' in: it is str '7'"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(DataError, match=r"^x\.jsonl:3: there is " + message):
        value_at(NESTED, name, "x.jsonl:3")


def test_only_the_columns_of_the_names_are_needed() -> None:
    assert top_levels(["reward_model.ground_truth", "reward_model.style", "messages.-1.content"], list(NESTED)) == [
        "reward_model",
        "reward_model.style",
        "messages",
    ]
    assert top_levels(["messages", "absent"], list(NESTED)) is None


def test_half_a_surrogate_pair_is_no_text() -> None:
    for row, columns in (
        ({"question": "a \ud83d b"}, Columns(prompt="question")),
        ({"question": [{"role": "user", "content": "a \ud83d b"}]}, Columns(messages="question")),
        ({"question": "?", "tag": ["\udc00"]}, Columns(prompt="question", tags="tag")),
    ):
        with pytest.raises(DataError, match=r"row 3: (question\.0: content|question|tag) holds half of a surrogate pair \('\\ud"):
            prompt_row(row, columns)
    assert text_at({"a": "whole \U0001f600 \u0627"}, "a", "x") == "whole \U0001f600 \u0627"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{context}\n\n{prompt}", "Lamps: {prompt}\n\nHow many?"),
        ("{prompt}{context}", "How many?Lamps: {prompt}"),
        ("{prompt}\n{choices}", "How many?\none\n2\n[3, 4]"),
        ("{prompt} {example.tests.-1} {example.size}", "How many? b 5"),
        ("{prompt} {example}", 'How many? {"tests": ["a", "b"], "size": 5.0}'),
        ("{prompt} {empty}.", "How many? ."),
        ("{prompt}{\u0627\u0644\u0633\u0651\u064a\u0627\u0642}", "How many?\u0645"),
        ("{prompt} {right}", "How many? true"),
        ("{prompt} {{context}} {{}}", "How many? {context} {{}}"),
        ("{prompt} \\boxed{answer} \\frac{a_{max}}{context} x_{context} x^{context}", None),
        ("{prompt} \\boxed{{answer}}", "How many? \\boxed{answer}"),
        ('{prompt} {"context": 1} {x} {1, 2} {the context}', None),
        ("\\text{Solve {prompt}}", "\\text{Solve How many?}"),
    ],
)
def test_a_template_takes_any_column(template: str, text: str | None) -> None:
    row = {
        "question": "How many?",
        "answer": "1",
        "context": "Lamps: {prompt}",
        "choices": ["one", 2.0, [3, 4]],
        "example": {"tests": ["a", "b"], "size": 5.0},
        "empty": None,
        "\u0627\u0644\u0633\u0651\u064a\u0627\u0642": "\u0645",
        "right": True,
    }
    [turn] = prompt_row(row, template=template)[0]["messages"]
    assert turn["content"] == (template.replace("{prompt}", "How many?") if text is None else text)


def test_a_template_that_names_no_column_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"row 3: there is no column 'contxt', only .*'context'.*Did you mean 'context'\? .*written \{\{con"
    ):
        prompt_row({"question": "?", "answer": "1", "context": "c"}, template="{contxt} {prompt}")
    mapping = PromptMapping(Prompts(source="x", template="{a.b} {prompt}"), Columns(prompt="question"), "x", with_fields=False)
    assert mapping.columns == ["question", "a.b"]
