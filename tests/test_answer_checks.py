"""The checks label, text and number: what is right in whatever form it comes, and what is wrong however near."""

from __future__ import annotations

import random
from typing import Any

import pytest

from distill.checks import Given
from distill.checks.final import boxed, final_answer
from distill.checks.label import check_label
from distill.checks.number import check_number
from distill.checks.text import check_text
from distill.recipe.kinds import Label, Number, Text

INTENTS = ["refund", "delivery_status", "change_address", "cancel_order", "Refund status"]
FORMS = [
    "{}",
    "\\boxed{{{}}}",
    "**{}**",
    "The intent is {}.",
    "\\boxed{{\\text{{{}}}}}",
    "`{}`",
    "<answer>{}</answer>",
    "Label: {}\n",
    '"{}"',
]
CITIES = ["London", "Paris", "New York", "I am not sure"]
THOUGHT = "<think>\nNot refund, nor cancel_order; A or B.\n</think>\n\n"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("right", INTENTS)
def test_a_label_is_right_in_every_form_and_no_other_one_is(form: str, right: str) -> None:
    settings = Label(choices=INTENTS)
    for label in INTENTS:
        for written in (label, label.upper(), label.replace("_", " "), label.replace("_", "\\_"), label.replace("_", "-")):
            found = check_label(Given(THOUGHT + form.format(written), right), settings)
            assert found == ((True, "right") if label == right else (False, "wrong_label")), written


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("refund or cancel_order", "refund", (False, "several_labels")),
        ("It is no refund: delivery status", "delivery_status", (False, "several_labels")),
        ("It is no cancel_order, so \\boxed{refund}", "refund", (True, "right")),  # the box is the answer
        ("refunds", "refund", (False, "no_label")),
        ("refund status", "refund", (False, "wrong_label")),  # the longer label, not both
        ("something else", "refund", (False, "no_label")),
        ("", "refund", (False, "no_answer")),
        ("refund", "refnd", (None, "reference_is_no_choice")),
        ("refund", None, (None, "no_reference")),
        ("ｒｅｆｕｎｄ", "refund", (True, "right")),  # noqa: RUF001
        ("This is not a refund.", "refund", (False, "no_label")),
        ("It isn't **refund**", "refund", (False, "no_label")),
        ("这不是refund。", "refund", (False, "no_label")),
        ("Is it cancelled? No. refund", "refund", (True, "right")),
    ],
)
def test_labels_beside_each_other(answer: str, reference: str | None, expected: Any) -> None:
    assert check_label(Given(answer, reference), Label(choices=INTENTS)) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("B", "B", (True, "right")),
        ("b", "Paris", (True, "right")),
        ("(B)", "B", (True, "right")),
        ("**B) Paris**", "B", (True, "right")),
        ("B. Paris", "paris", (True, "right")),
        ("The answer is (C).", "New York", (True, "right")),
        ("Answer: A", "A", (True, "right")),
        ("Option A is right.", "A", (True, "right")),
        ("A city: B", "B", (True, "right")),  # an article
        ("I think it is B", "B", (True, "right")),  # the speaker
        ("答案是B。", "B", (True, "right")),
        ("\\boxed{\\text{(C) New York}}", "C", (True, "right")),
        ("Paris.", "B", (True, "right")),
        ("B) London", "B", (False, "several_labels")),
        ("Not A. B", "B", (False, "several_labels")),
        ("C", "B", (False, "wrong_label")),
        ("E", "B", (False, "no_label")),
        ("B", "E", (None, "reference_is_no_choice")),
        ("B", "B) Paris", (True, "right")),
        ("答案：Ｂ", "B", (True, "right")),  # noqa: RUF001
        ("It is not Paris", "B", (False, "no_label")),
    ],
)
def test_choices_of_a_prompt_by_letter_text_or_both(answer: str, reference: str, expected: Any) -> None:
    assert check_label(Given(THOUGHT + answer, reference, {"options": CITIES}), Label(column="options")) == expected


def test_numbered_references_other_scripts_and_choices_that_are_missing() -> None:
    for first, reference in ((0, "1"), (1, "2")):
        settings = Label(column="options", numbered_from=first)  # type: ignore[arg-type]
        assert check_label(Given("Paris", reference, {"options": CITIES}), settings) == (True, "right")
        assert check_label(Given("Paris", "9", {"options": CITIES}), settings) == (None, "reference_is_no_choice")
    assert check_label(Given("Refund.", "0"), Label(choices=INTENTS, numbered_from=0)) == (True, "right")
    assert check_label(Given("答案是退款。", "退款"), Label(choices=["退款", "取消订单"])) == (True, "right")
    assert check_label(Given("١", "1"), Label(choices=["0", "1"])) == (True, "right")  # noqa: RUF001
    assert check_label(Given("-", "+"), Label(choices=["+", "-"])) == (False, "wrong_label")
    assert check_label(Given("Paris", "B", {"options": None}), Label(column="options")) == (None, "no_choices")


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "expected"),
    [
        ("Paris.", "paris", {}, (True, "right")),
        ("The answer is **Paris**.", "Paris", {}, (True, "right")),
        ("First I thought of London.\n\nAnswer: Paris", "Paris", {}, (True, "right")),
        ("\\boxed{\\text{Paris}}", "Paris", {}, (True, "right")),
        ("الجواب هو باريس", "باريس", {}, (True, "right")),
        ("Cafe\u0301", "café", {}, (True, "right")),
        ("Paris, France", "Paris", {}, (False, "wrong_text")),
        ("Londres", '["London", "Londres"]', {}, (True, "right")),
        ("Rome", '["London", "Londres"]', {}, (False, "wrong_text")),
        ("It lies in Paris, of course.", "Paris", {"reference": "contains"}, (True, "right")),
        ("Parisian", "Paris", {"reference": "contains"}, (False, "wrong_text")),
        ("首都是北京市", "北京", {"reference": "contains"}, (True, "right")),
        ("اشتهر سكانها بالزراعة.", "الزراعة", {"reference": "contains"}, (True, "right")),  # in, as one word with the article
        ("خرجوا من الحقول وللزراعة عادوا", "الزراعة", {"reference": "contains"}, (True, "right")),  # and to, without its alif
        ("مالزراعة", "الزراعة", {"reference": "contains"}, (False, "wrong_text")),
        ("اشتهروا بصيد السمك", "صيد السمك", {"reference": "contains"}, (True, "right")),
        ("قصيد السمك", "صيد السمك", {"reference": "contains"}, (False, "wrong_text")),
        ("جاء ولد صغير", "لد", {"reference": "contains"}, (False, "wrong_text")),
        ("تأسست في عام ١٩٠٤م.", "1904", {"reference": "contains"}, (True, "right")),
        ("تأسست في عام 19045م.", "1904", {"reference": "contains"}, (False, "wrong_text")),
        ("تقعُ المَدِينةُ على النَّهر", "المدينة", {"reference": "contains"}, (True, "right")),
        ("المَدِينـــة", "المدينة", {}, (True, "right")),
        ("paris", "Paris", {"exact": True}, (False, "wrong_text")),
        ("Paris ", "Paris", {"exact": True}, (True, "right")),
        ("So.\nTotal: 5", "5", {"pattern": "^Total: {reference}$", "reference": "ignore"}, (True, "fits")),
        ("Total: 15", "5", {"pattern": "^Total: {reference}$", "reference": "ignore"}, (False, "pattern_not_found")),
        ("Total: x", "5", {"pattern": "^Total: {reference}$", "reference": "ignore"}, (False, "pattern_not_found")),
        ("", "5", {}, (False, "no_answer")),
        ("5", None, {}, (None, "no_reference")),
    ],
)
def test_text(answer: str, reference: str | None, settings: dict[str, Any], expected: Any) -> None:
    assert check_text(Given(THOUGHT + answer, reference), Text.model_validate(settings)) == expected


def test_a_piece_of_a_context() -> None:
    settings = Text(reference="ignore", context="article")
    fields = {"article": "He was seen in the\ngarden at ten."}
    assert check_text(Given("In the garden", None, fields), settings) == (True, "fits")
    assert check_text(Given("in the house", None, fields), settings) == (False, "not_in_context")
    assert check_text(Given("in the house", None, {"article": None}), settings) == (None, "no_context")


RIGHT = [
    ("5", ["5", "5.", "5.0", "05", "\\boxed{5}", "**5**", "x is 5", "５", "٥", "$5", "€5"]),  # noqa: RUF001
    ("5.", ["5 apples are left", "There are 3 and 2, so 5 in all.", "1\n5"]),
    ("1234.5", ["1,234.5", "1 234.5", "1\u202f234.5", "1\\,234.5", "1{,}234.5", "1.2345e3", "1.2345 × 10^3", "1.2345\\times 10^{3}"]),  # noqa: RUF001
    ("-5", ["-5", "−5", "–5", "\\boxed{-5}"]),  # noqa: RUF001
    ("7/3", ["7/3", "2 1/3", "\\frac{7}{3}", "\\dfrac{7}{3}", "14/6", "2⅓"]),
    ("0.5", ["½", "1/2", "50%", "0.50", ".5"]),
    ("12.5%", ["12.5", "12.5%", "12.5 %", "12.5\\%", "0.125", "12.5 percent"]),
    ("10 km", ["10", "10 km", "10km", "\\boxed{10\\ \\text{km}}"]),
    ("5 m²", ["5 m²", "5 m^2"]),
]  # fmt: skip
WRONG = [
    ("5", ["6", "-5", "3 or 5", "\\boxed{3 or 5}", "5 or 3", "five", "", "1e99999999", "5.0000000001", "5x5", "9" * 2000]),
    ("12.5", ["12.5%", "0.125", "125"]),
    ("0.125", ["12.5"]),
    ("10 km", ["10 m", "10 miles", "10 KM"]),
    ("15 mW", ["15 MW"]),
    ("1e-19", ["1e-31", "0"]),
]


@pytest.mark.parametrize(("reference", "answers", "right"), [(*pair, True) for pair in RIGHT] + [(*pair, False) for pair in WRONG])
def test_number(reference: str, answers: list[str], right: bool) -> None:
    found = {answer: check_number(Given(THOUGHT + answer, reference), Number()) for answer in answers}
    assert {answer: verdict for answer, verdict in found.items() if verdict[0] is not right} == {}


def test_a_number_is_right_as_it_stands_and_wrong_with_one_digit_changed() -> None:
    draw = random.Random(0)
    for _ in range(500):
        number = f"{draw.choice(['', '-'])}{draw.randrange(10 ** draw.randint(1, 30))}{draw.choice(['', '.' + str(draw.randrange(10**6))])}"
        place = draw.choice([place for place, sign in enumerate(number) if sign.isdigit()])
        other = draw.choice([digit for digit in "0123456789" if digit != number[place]])
        changed = number[:place] + other + number[place + 1 :]
        assert check_number(Given(f"It is {number}.", number), Number()) == (True, "right")
        assert check_number(Given(f"It is {changed}.", number), Number()) == (False, "wrong_number"), (number, changed)


@pytest.mark.parametrize(
    ("answer", "reference", "settings", "passed"),
    [
        ("3.1416", "3.14159", {"tolerance": 1e-4}, True),
        ("3.15", "3.14159", {"tolerance": 1e-4}, False),
        ("3.2", "3", {"absolute_tolerance": 0.2}, True),
        ("3.21", "3", {"absolute_tolerance": 0.2}, False),
        ("10 kilometres", "10 km", {"units": ["km", "kilometres"]}, True),
        ("10 m", "10 km", {"units": ["km", "kilometres"]}, False),
        ("1.234,5", "1234,5", {"decimal": ","}, True),
        ("1,234", "1.234", {"decimal": ","}, False),
        ("5", "many", {}, None),
        ("5", "3 of 4", {}, None),
        ("5", None, {}, None),
    ],
)
def test_settings_of_number(answer: str, reference: str | None, settings: dict[str, Any], passed: bool | None) -> None:
    assert check_number(Given(answer, reference), Number.model_validate(settings))[0] is passed


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"first \boxed{1}, then \boxed{2} and \boxed{3", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox {\{1\}}", r"\{1\}"),
        (r"\boxed{\frac{1}{2}}}", r"\frac{1}{2}"),
        ("} {", None),
        (r"\boxed{" * 30_000, None),
    ],
)
def test_the_last_closed_box(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("So it goes.\n\nThe answer is Paris.\nGood bye.", "Paris."),
        ("<answer>\nParis\n</answer>\nGood bye.", "Paris"),
        ("It is **London**, no:\nit is **Paris**", "Paris"),
        ("Let me see.\nParis", "Paris"),
        (r"\boxed{\text{New\_York}}", "New_York"),
        ("", ""),
    ],
)
def test_what_is_put_forward_as_final(answer: str, final: str) -> None:
    assert final_answer(answer) == final
