"""The checks think, language, length, degenerate, agreement and python: how a trace looks, and what the user's own function says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.checks import Found, Given
from distill.checks.agreement import NO_ANSWER, agreements, answer_number
from distill.checks.degenerate import check_degenerate
from distill.checks.functions import check_python
from distill.checks.language import check_language
from distill.checks.length import check_length
from distill.checks.thinking import check_thinking
from distill.errors import RecipeError
from distill.recipe.kinds import Degenerate, Language, Length, Python, Think

ENGLISH = "We read the question once more and see that nobody has asked for the price of the second lamp, only for that of the first."
GERMAN = "Wir lesen die Frage noch einmal und sehen, dass niemand nach dem Preis der zweiten Lampe gefragt hat, nur nach dem der ersten."
CHINESE = "我们再读一遍题目，发现没有人问第二盏灯的价格，只问了第一盏灯的价格，所以答案就是第一盏灯的价格。"  # noqa: RUF001
ARABIC = "نقرأ السؤال مرة أخرى ونرى أن أحدا لم يسأل عن ثمن المصباح الثاني بل عن ثمن المصباح الأول فقط."


@pytest.mark.parametrize(
    ("completion", "required", "optional", "none"),
    [
        ("<think>a</think>b", True, True, False),
        ("b", False, True, True),
        ("<think>a", False, False, False),
        ("a</think>b", False, False, False),
        ("<think>a</think>", False, False, False),
        (" ", False, False, False),
    ],
)
def test_reasoning_that_must_may_or_must_not_be(completion: str, required: bool, optional: bool, none: bool) -> None:
    found = [check_thinking(Given(completion), Think(reasoning=mode))[0] for mode in ("always", "optional", "none")]  # type: ignore[arg-type]
    assert found == [required, optional, none]


@pytest.mark.parametrize(
    ("text", "language", "passed"),
    [
        (ENGLISH, "en", True),
        (ENGLISH, "de", False),
        (GERMAN, "de", True),
        (GERMAN, "en", False),
        (CHINESE, "zh", True),
        (CHINESE, "ja", False),
        (ARABIC, "ar", True),
        (ARABIC, "en", False),
        (f"{GERMAN}\n\n{CHINESE}", "de", False),  # half of it
        (f"{GERMAN}\n{GERMAN}\n{GERMAN}\n{GERMAN}\n{GERMAN}\n{GERMAN}\n\n{ENGLISH}", "de", True),  # a quotation
        (f"{GERMAN}\n```python\n{'# read the question once more and see' * 9}\n```\n$\\text{{and so on}}$", "de", True),
        ("ok", "en", None),
        ("Paris", "fr", None),
        ("42", "en", None),
        ("\\boxed{x^2}", "en", None),
        ("", "en", None),
    ],
)
def test_language(text: str, language: str, passed: bool | None) -> None:
    assert check_language(Given(f"<think>\n{ENGLISH}\n</think>\n\n{text}"), Language(language=language))[0] is passed


def test_the_language_of_the_prompt_and_of_the_reasoning() -> None:
    assert check_language(Given(GERMAN, prompt=f"Was sagst du dazu? {GERMAN}"), Language()) == (True, "in_language")
    assert check_language(Given(ENGLISH, prompt=f"Was sagst du dazu? {GERMAN}"), Language()) == (False, "other_language")
    assert check_language(Given(ENGLISH, prompt="1+1?"), Language()) == (None, "prompt_unsure")
    mixed = Given(f"<think>\n{CHINESE}\n</think>\n\n{ENGLISH}")
    assert check_language(mixed, Language(language="en")) == (True, "in_language")
    assert check_language(mixed, Language(language="en", reasoning=True)) == (False, "other_language")


def test_length() -> None:
    found = [check_length(Given("x", num_tokens=count), Length(min_tokens=3, max_tokens=5)) for count in (None, 2, 3, 5, 6)]
    expected = [(None, "tokens_not_known"), (False, "too_short"), (True, "within_bounds"), (True, "within_bounds"), (False, "too_long")]
    assert found == expected


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(count))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>add</think>\n\n" + "!" * 400, (False, "loops")),
        ("<think>" + "so " * 200 + "</think>\n\n5", (False, "loops")),
        ("<think>" + "0" * 300 + " is long</think>\n\n5", (False, "one_character")),
        ("<think>" + (words(60) + ". ") * 10 + "</think>\n\n5", (False, "repeated_phrases")),
        ("<think>" + "我们再想一想这个问题到底怎么解决才好呢让我们看看。" * 20 + "就这样</think>\n\n5", (False, "repeated_phrases")),
        ("<think>" + words(2000) + "</think>\n\n5", (True, "varied")),
        ("| a | b |\n|" + "-" * 150 + "|\n", (True, "varied")),
        ("<think>" + words(300) + " Wait. " + words(40) + " Wait. " + words(300, 1) + "</think>\n\n5", (True, "varied")),
        ("5", (True, "varied")),
    ],
)
def test_what_goes_round_in_circles(completion: str, expected: Found) -> None:
    assert check_degenerate(Given(completion), Degenerate()) == expected


def agreed(answers: list[str], min_share: float = 0.5, prompts: list[int] | None = None) -> list[Found]:
    numbers = np.array([answer_number(f"<think>1</think>{answer}") for answer in answers], np.uint64)
    return list(agreements(np.array(prompts or [1] * len(answers), np.uint64), numbers, min_share))


def test_most_samples_of_a_prompt_agree() -> None:
    yes, no = (True, "agrees"), (False, "disagrees")
    assert agreed(["\\boxed{5}", "The answer is 5.", "**5**", "6"]) == [yes, yes, yes, no]
    assert agreed(["5", "5", "6", "6"]) == [(None, "no_agreement")] * 4  # a tie
    assert agreed(["5", "6", "7", "5"], 0.6) == [(None, "no_agreement")] * 4
    assert agreed(["5", "6", "7", "5"], 0.5) == [yes, no, no, yes]
    assert agreed(["5"]) == [(None, "one_sample")]
    assert agreed(["5", "", "5"]) == [yes, (False, "no_answer"), yes]
    assert agreed(["5", "", "", ""]) == [(None, "no_agreement")] * 4  # one answer in four samples
    assert agreed(["5", "6", "5", "6", "6"], prompts=[1, 2, 1, 1, 2]) == [yes, yes, yes, no, yes]
    assert answer_number("<think>5") == answer_number(" ") == NO_ANSWER


FUNCTIONS = """
def check(answer, reference, row):
    return row["says"]

def pair(answer, reference, row):
    return answer == reference, "compared\\nso"

number = 5
"""


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (True, (True, "right")),
        (False, (False, "wrong")),
        (None, (None, "unjudged")),
        ((None, "no idea"), (None, "no idea")),
        ((True, None), (True, "right")),
        (np.bool_(True), (True, "right")),
        ("yes", (None, "no_verdict")),
        (2, (None, "no_verdict")),
    ],
)
def test_a_function_of_ones_own(tmp_path: Path, says: Any, expected: Found) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    settings = Python(file=str(tmp_path / "mine.py"))
    assert check_python(Given("<think>x</think>a", "a", {"says": says}), settings) == expected
    passed, reason = check_python(Given("a", "a"), settings.model_copy(update={"function": "pair"}))
    assert passed is True and "\n" not in reason


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        (FUNCTIONS, "number", "has no function 'number'"),
        ("1 +", "check", "can't be run: SyntaxError"),
        (None, "check", "no such Python file"),
    ],
)
def test_a_function_that_is_not_there(tmp_path: Path, text: str | None, function: str, message: str) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RecipeError, match=message):
        check_python(Given("a"), Python(file=str(tmp_path / "mine.py"), function=function))
