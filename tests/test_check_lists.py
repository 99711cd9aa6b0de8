"""A recipe's list of checks: names and sections, what they are called, what old recipes say, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import recipe_for

from distill.errors import RecipeError
from distill.recipe.checks import KINDS, answer_checks
from distill.recipe.reading import load_recipe, recipe_text
from distill.recipe.traces import Curate

PLAIN = """
name: test
student: {model: none}
prompts: {source: p.jsonl, fields: [options, tools]}
traces: {source: p.jsonl}
evaluate: null
curate:
  checks:
    - CHECK
"""


def listed(*checks: Any) -> Curate:
    return Curate.model_validate({"checks": list(checks)})


def test_a_name_alone_and_a_section_without_settings_are_one() -> None:
    curate = listed("finish", {"think": {}}, {"number": {"tolerance": 0.0}}, {"json": None})
    assert curate.identity()["checks"] == ["finish", "think", "number", "json"]
    assert listed("finish", "think", "math") == Curate()
    assert Curate().identity() == {"checks": ["finish", "think", "math"], "keep_unjudged": False, "max_per_prompt": 4, "prefer": "first"}


def test_settings_decide_the_rows_and_are_written_as_they_were_given(tmp_path: Path) -> None:
    check = {"label": {"choices": ["yes", "no"]}}
    curate = listed("finish", check, {"text": {"pattern": "^x"}, "name": "begins"}, {"think": "none"})
    assert curate.identity()["checks"] == ["finish", check, {"text": {"pattern": "^x"}, "name": "begins"}, {"think": {"reasoning": "none"}}]
    assert [check.called for check in curate.checks] == ["finish", "label", "begins", "think"]
    recipe = recipe_for(tmp_path, curate={"checks": curate.identity()["checks"]})
    (tmp_path / "r.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_where_a_function_lies_decides_nothing(tmp_path: Path) -> None:
    one, other = (listed({"python": {"file": str(tmp_path / place / "mine.py")}}).identity() for place in "ab")
    assert one == other and one["checks"] == [{"python": {"file": "mine.py"}}]


def test_evaluate_takes_what_curate_says_of_answers(tmp_path: Path) -> None:
    def kinds(curate: list[Any], evaluate: dict[str, Any]) -> list[str]:
        return [check.kind for check in recipe_for(tmp_path, curate={"checks": curate}, evaluate=evaluate).checks_of_answers]

    assert kinds(["finish", "think", "math"], {}) == kinds(["finish"], {}) == ["math"]
    assert kinds(["finish", "degenerate", "number", "json"], {}) == ["number", "json"]
    assert kinds(["finish", "math"], {"checks": ["number", "finish"]}) == ["number", "finish"]
    assert [check.kind for check in answer_checks(listed({"label": {"choices": ["a", "b"]}}, "agreement").checks)] == ["label"]


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("maths", "r.yaml:8: curate.checks.0: there is no check 'maths'. Did you mean math?"),
        ("quality", "there is no check 'quality'. There are finish"),
        ("{label: {chioces: [a, b]}}", "curate.checks.0.label.chioces: unknown key"),
        ("label", "give exactly one of choices"),
        ("{label: {choices: [a, b], column: options}}", "give exactly one of choices"),
        ("{label: {choices: [a]}}", "two labels or more"),
        ("{label: {choices: [a, b], numbered_from: 2}}", "curate.checks.0.label.numbered_from"),
        ("{label: {column: choices}}", "Add it: fields: [options, tools, choices], or give the check the name that it has in your data."),
        ("{text: {reference: ignore}}", "nothing is asked"),
        ("{text: {pattern: '('}}", "not a regular expression"),
        ("{json: {reference: ignore, fields: [a]}}", "fields would be ignored"),
        ("{json: {json_schema: {}, schema_column: options}}", "exclude each other"),
        ("{number: {tolerance: -1}}", "curate.checks.0.number.tolerance"),
        ("{language: {language: German}}", "curate.checks.0.language.language"),
        ("length", "nothing is asked"),
        ("{length: {min_tokens: 5, max_tokens: 4}}", "every trace would fail"),
        ("python", "curate.checks.0.python.file: missing"),
        ("{finish: {}, think: {}}", "an entry of the list is one check"),
        ("{finish: {strict: true}}", "curate.checks.0.finish.strict: unknown key"),
        ("{name: x}", "an entry of the list is one check"),
        ("5", "curate.checks.0"),
        ("number\n    - {number: {tolerance: 0.1}}", "number is there twice"),
        ("{number: {}, name: 'a:b'}", "curate.checks.0.name"),
    ],
)
def test_what_is_wrong_with_a_check_is_said_with_its_line(tmp_path: Path, check: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(PLAIN.replace("CHECK", check))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert says in str(caught.value) and str(tmp_path / "r.yaml") in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_has_its_place(kind: str) -> None:
    """Whatever a recipe may name, something judges: `agreement` all samples together, `code` in a sandbox, `judge` by a model."""
    from distill.checks.judging import _APART, _HERE

    assert (kind in _HERE) + (kind in _APART) + (kind in ("math", "agreement", "code", "judge")) == 1


def test_evaluate_refuses_what_says_nothing_of_an_answer(tmp_path: Path) -> None:
    for checks, says in (([], "every answer would be right"), (["agreement"], "nothing of a single answer")):
        with pytest.raises(ValueError, match=says):
            recipe_for(tmp_path, evaluate={"checks": checks})


def test_answer_is_another_name_of_math(tmp_path: Path) -> None:
    """Of a recipe that is the same but for this name nothing is made anew."""
    old, new = (recipe_for(tmp_path, curate={"checks": ["finish", name]}) for name in ("math", "answer"))
    assert old == new and new.curate.identity()["checks"] == ["finish", "math"]
    assert recipe_for(tmp_path, curate={"checks": [{"answer": {}, "name": "mine"}]}).curate.checks[0].math is not None
    with pytest.raises(ValueError, match="math is there twice"):
        recipe_for(tmp_path, curate={"checks": ["math", "answer"]})
    with pytest.raises(ValueError, match="an entry of the list is one check"):
        recipe_for(tmp_path, curate={"checks": [{"math": {}, "answer": {}}]})


def test_one_sample_agrees_with_nobody(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"agreement, and there is one sample.*generate\.samples_per_prompt"):
        recipe_for(tmp_path, curate={"checks": ["agreement"]})
    recipe_for(tmp_path, curate={"checks": ["agreement"]}, generate={"samples_per_prompt": 4})


def test_what_an_earlier_kit_did_not_know_changes_no_settings(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    assert not {"fields", "json_reference"} & recipe.prompts.identity().keys()
    assert recipe.evaluate is not None and "checks" not in recipe.evaluate.identity()
    with pytest.raises(ValueError, match="json_reference would be ignored"):
        recipe_for(tmp_path, prompts={"source": "p.jsonl", "json_reference": True, "columns": {"prompt": "q"}})
