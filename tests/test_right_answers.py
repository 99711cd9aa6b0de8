"""What is a right answer and what is not, kind by kind: what was once kept though wrong, and dropped though right."""

from __future__ import annotations

import pytest

from distill.checks.answers import compare


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


# Each line: a reference; answers that say the same; answers that do not. All are put into a box.
BOXED: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "spelling": [
        ("5", ["5.", "{\\bf 5}", "\\color{red}{5}", "=5", "\\approx 5", "05", "+5", "5\u200b", "\uff15", "(5)", "$5$"], ["-5", "5!"]),
        ("\u0668", ["8"], ["9", "\u0667"]),
        ("-5", ["\u20135", "\u22125", "- 5", "\\left(-5\\right)"], ["5", "+5"]),
        ("x^2", ["x\u00b2", "x^{2}", "x \\cdot x"], ["x\u00b3", "X^2", "2x"]),
        ("\\sqrt{3}", ["\u221a3", "\\sqrt3", "3^{1/2}"], ["\\sqrt{5}", "3"]),
        ("0.5", ["\u00bd", "1/2", "\\frac12", ".5", "0,5", "0.50"], ["0.05", "5"]),
        ("\\emptyset", ["\\varnothing", "\u2205", "\\{\\}"], ["0"]),
        ("\\( \\mathbb{Z}_3 \\)", ["\\mathbb{Z}_3", "\\mathbb Z_{3}"], ["\\mathbb{Z}_4"]),
        ("10\u207b\u00b3", ["0.001", "10^{-3}"], ["10^{-4}"]),
    ],
    "number": [
        ("6.6\\times10^{-34}", ["6.6e-34", "6.6 \u00d7 10^-34"], ["6.7\\times10^{-34}", "6.6\\times10^{-31}", "0"]),
        ("5e-05", ["0.00005", "5 \\cdot 10^{-5}"], ["5e-06", "5"]),
        ("3.141592653", ["3.1415926530"], ["3.141592654", "3.14"]),
        ("2 1/3", ["7/3", "2\\frac{1}{3}"], ["2/3", "21/3"]),
        ("\\frac{1}{3}", ["0.3333333333", "0.\\overline{3}", "2/6"], ["0.333", "0.3333334"]),
        ("\\frac{2^{1999}+1}{3\\cdot 2^{2000}}", ["\\frac{1+2^{1999}}{3\\cdot 2^{2000}}"], ["\\frac{2^{1999}+2}{3\\cdot 2^{2000}}"]),
        ("1234567.5", ["1,234,567.5", "1 234 567.5", "1.234.567,5", "12,34,567.5"], ["1,234,567.6"]),
        ("1e999999999999", ["1e999999999999"], ["1e999999999998"]),
        ("7" * 5000, ["7" * 5000], ["7" * 4999 + "8"]),
        ("twelve", ["12"], ["13", "twelfth"]),
        ("3 million", ["3,000,000", "3000000"], ["3"]),
    ],
    "percent": [
        ("12.5%", ["12.5", "0.125", "1/8", "12.5 percent", "12.5\\%"], ["1.25", "125", "0.125%"]),
        ("0.125", ["12.5%"], ["12.5"]),
    ],
    "unit": [
        ("10 m", ["10", "1000 cm", "0.01 km", "10\\text{ m}", "10m", "10 meters", "10 metres"], ["10 km", "10 s", "10 m^2", "11 m"]),
        ("20 m/s", ["20", "72 km/h", "20 \\frac{m}{s}", "20 \\mathrm{m\\,s^{-1}}"], ["20 m", "20 m/s^2", "20 km/h"]),
        ("4 cm^2", ["4 \\text{ cm}^2", "4 square centimeters", "400 mm\u00b2"], ["4 cm^3", "4 m^2"]),
        ("5 mW", ["0.005 W"], ["5 MW", "5 kW"]),
        ("15 marbles", ["15", "15 Marbles", "15 red marbles", "\\text{15 marbles}"], ["16 marbles", "15 stones"]),
        ("100 dollars", ["\\$100", "100", "$100.00", "10000 cents"], ["\u20ac100", "100 euros"]),
        ("15", ["15\u20ac", "\u00a315", "15\u00b0", "15 \\text{ people}", "15\u4e2a", "15%"], ["16\u20ac", "-15\u00b0"]),
        ("45\u00b0", ["45", "45^\\circ", "45 degrees"], ["46\u00b0", "45 \u00b0C"]),
        ("20 \u00b0C", ["68 \u00b0F", "293.15 K", "20^\\circ\\text{C}"], ["20 \u00b0F", "20 K"]),
        ("5 ft 3 in", ["63 inches"], ["5 ft 4 in", "6 ft 3 in"]),
        ("2x", ["x+x"], ["2", "2 x^2"]),
        ("36\\pi\\text{ cm}^2", ["36\\pi"], ["36\\pi\\text{ cm}^3", "36"]),
    ],
    "list": [
        ("125,216,343", ["125, 216, 343", "343, 125, 216"], ["125, 216", "125,216,344"]),
        ("2, 3", ["3, 2", "2 and 3", "2 or 3", "x=2, x=3", "\\{3, 2\\}", "(2, 3)"], ["2", "3", "2, 4", "(3, 2)", "2, 3, 3"]),
        ("(1,2)", ["(1, 2)", "\\left(1,\\frac{4}{2}\\right)", "1<x<2"], ["(2,1)", "[1,2]", "\\{1,2\\}", "(1,2,3)"]),
        ("\\{1,2\\}", ["\\{2,1\\}", "2, 1", "\\{1,1,2\\}"], ["\\{1,3\\}", "1", "(1,2)"]),
        ("3, -3", ["\\pm 3", "-3, 3", "x=\\pm3"], ["3", "\\pm 4"]),
        ("n=12, x=9", ["x=9, n=12"], ["x=12, n=9", "n=12"]),
        ("red or blue", ["blue or red"], ["red and blue", "red"]),
        (
            "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
            ["\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}"],
            ["\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"],
        ),
    ],
    "interval": [
        ("(-\\infty,4)", ["x<4", "4>x", "(-\\infty, 4.0)", "x \\in (-\\infty,4)"], ["x\\le4", "(-\\infty,5)", "x>4"]),
        ("[2,5)", ["2\\le x<5"], ["[2,5]", "(2,5)"]),
        ("(-\\infty,1)\\cup(2,\\infty)", ["x<1 \\text{ or } x>2", "(2,\\infty) \\cup (-\\infty,1)"], ["1<x<2"]),
        ("x\\ne0", ["(-\\infty,0)\\cup(0,\\infty)"], ["x=0", "x\\ne1"]),
        ("x<4", ["(-\\infty,4)"], ["y<4"]),
    ],
    "text": [
        ("no", ["No", "NO.", "\\text{no}", "**no**"], ["on", "yes", "not"]),
        ("listen", ["Listen"], ["silent", "tinsel"]),
        ("DCBA", ["dcba"], ["ABCD"]),
        ("SKU-12", ["sku-12"], ["SKU-21", "SKU 13"]),
        ("refund 3", ["Refund  3"], ["refund 4", "3", "refund"]),
        ("192.168.0.1", ["192.168.0.1"], ["192.168.0.7"]),
        ("555-1234", ["555-1234"], ["-679", "555-1235"]),
        ("f(2)=7", ["f(2) = 7", "7"], ["f(2)=4", "f(3)=7"]),
        ('book(city="Rome", days=3)', ['book(city="Rome", days=3)'], ['book(city="Oslo", days=3)', 'book(city="Rome", days=4)']),
        ('{"a": 1, "b": "x"}', ['{"b": "x", "a": 1}'], ['{"a": 2, "b": "x"}', '{"a": "1", "b": "x"}']),
        ("\u0627\u0644\u0645\u062f\u064a\u0646\u0629 3", ["\u0627\u0644\u0645\u062f\u064a\u0646\u0629 \u0663"], ["\u0642\u0637\u0631 3"]),
        ("No solution.", ["no solution"], ["one solution"]),
    ],
    "date": [
        ("2024-03-05", ["March 5, 2024", "5 Mar 2024", "2024/3/5", "05.03.2024", "2024\u5e743\u67085\u65e5"], ["2024-05-03", "2016"]),
        ("July 4th", ["4 July"], ["July 5", "4 June", "July 4, 1776"]),
    ],
    "time": [
        ("14:30", ["2:30 PM", "2:30 p.m.", "14:30:00"], ["2:30 AM", "2:30", "14:31", "14.5", "28:60"]),
        ("10:05", ["10:05 AM"], ["2", "10:50"]),
        ("2:30", ["2:30"], ["4:60", "5:00"]),
    ],
    "ratio": [("3:2", ["6:4", "3/2", "1.5", "3 : 2"], ["2:3", "3"]), ("1:2:3", ["2:4:6"], ["1:2:4"])],
    "base": [
        ("1011_2", ["11", "1011_{2}", "(1011)_2", "0b1011", "13_8"], ["1011", "1011_3", "1010_2"]),
        ("1A_{16}", ["26", "0x1a"], ["1B_{16}", "1A_{17}"]),
    ],
    "choice": [
        ("C", ["c", "(C)", "C.", "\\textbf{(C)}\\ 5", "C. 5", "\\text{C}", "Option C"], ["B", "(B)", "B. C5", "D. 5"]),
        ("C. Paris", ["C", "Paris", "(C) Paris"], ["B", "B. Paris", "C. London"]),
    ],
    "expression": [
        ("2\\sqrt{3}", ["\\sqrt{12}", "2*sqrt(3)", "3.46410161514"], ["2", "3\\sqrt{2}", "3.464"]),
        ("(x+1)^2", ["x^2+2x+1", "(1+x)(x+1)"], ["x^2+1", "(y+1)^2"]),
        ("y=2x+3", ["2x+3", "2x-y+3=0", "y = 3+2x"], ["y=2x-3", "z=2x+3"]),
        ("120", ["5!", "2^3\\cdot 15", "3 \\times 40 = 120"], ["5", "2^3\\cdot 14"]),
        ("2+3i", ["3i+2"], ["2-3i", "5i"]),
    ],
}  # fmt: skip

# Reference, whole answer, whether it is right.
WHOLE = [
    ("42", "\\fbox{42}", True),
    ("42", "\\boxed {42}", True),
    ("42", "<answer>42</answer>", True),
    ("42", "\u7b54\u6848\u662f\uff1a42", True),
    ("42", "Die Antwort lautet 42.", True),
    ("42", "\u041e\u0442\u0432\u0435\u0442: 42", True),
    ("42", "\u0627\u0644\u062c\u0648\u0627\u0628 \u0647\u0648 \u0664\u0662", True),
    ("42", "**42**", True),
    ("42", "**Final Answer**\n\n\\[ 42 \\]", True),
    ("42", "She has 50 - 8 = 42 apples.", True),
    ("42", "The answer is 42 or 43.", False),
    ("42", "42 or 43", False),
    ("42", "\\boxed{42} or \\boxed{43}", False),
    ("42", "I had \\boxed{42}. Wait, no: \\boxed{43}", False),
    ("43", "I had \\boxed{42}. Wait, no: \\boxed{43}", True),
    ("2, 3", "First: \\boxed{2}\n\nSecond: \\boxed{3}", True),
    ("The answer is 12", "\\boxed{12}", True),
    ("$\\boxed{12}$", "12", True),
    ("C", "The answer is (C).", True),
    ("C", "**Answer:** C", True),
    ("B", "The answer is (C).", False),
    ("B", "Both A and B fit; I choose A.", False),
    ("A", "Both A and B fit; I choose A.", True),
    ("Paris", "paris", True),
    ("Paris", "The capital is **Paris**.", True),
    ("Paris", "The capital of France is Paris.", True),
    ("Paris", "It is not Paris.", False),
    ("14:30", "The answer is 2:30 PM.", True),
    ("D", "The correct answer is option D: Paris", True),
    ("D", "D\n\nBecause it is so.", True),
    ("D", "A\n\nBecause D is not.", False),
    ("St. Louis", "The answer is St. Louis.", True),
    ("1/3", "The answer is 1/3 of the cake.", True),
    ("10 m", "The answer is 10 km.", False),
    ("1234.56", "Die Antwort lautet 1.234,56 \u20ac.", True),
    ("a}b", "\\boxed{a}b}", True),
]


@pytest.mark.parametrize("kind", BOXED)
def test_a_boxed_answer_is_right_where_it_says_the_same(kind: str) -> None:
    for reference, same, other in BOXED[kind]:
        asked = {answer: True for answer in [reference, *same]} | {answer: False for answer in other}
        found = {answer: compare(boxed(answer), reference)[0] for answer in asked}
        assert found == asked, reference


@pytest.mark.parametrize(("reference", "answer", "right"), WHOLE)
def test_the_answer_is_found_in_what_is_said_around_it(reference: str, answer: str, right: bool) -> None:
    assert compare(answer, reference)[0] is right


def test_only_a_missing_reference_leaves_an_answer_unjudged() -> None:
    assert compare(boxed("3"), " \u200b") == (None, "no_reference")
    for strange in ("#", "}{", "\\frac{", "\\boxed{", "$$", "{}", "\\", "(", "x" * 5000, "1" * 3000 + "/0", "[" * 500, "\ud83d\ude00"):
        assert compare(boxed("3"), strange)[0] is False
        assert compare(strange, "3")[0] is False
        assert compare(f"\\boxed{{{strange}}}", strange)[0] is True


@pytest.mark.parametrize("part", ["\\boxed{", "\\boxed{1}, ", "\\text{", "{", "(", "1,", "**", "answer: ", "a=", "\n", "\\frac{"])
def test_thousands_of_open_ends_do_not_take_minutes(part: str) -> None:
    """Each once took time by the square of its length."""
    for text in (part * 20_000, f"\\boxed{{{part * 600}}}", f"The answer is {part * 300}"):
        assert compare(text, "5")[0] is False
        assert compare("5", text)[0] in (False, None)
