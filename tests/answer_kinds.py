"""Makes references of every kind and changes of them, for properties that hold whatever the reference is."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator

WORDS = "refund delivery cancel Paris London banana winter table orange guitar Berlin yellow account transfer".split()  # noqa: SIM905
UNITS = "m km kg m/s km/h cm^2 m^3 mW MW s hours J kJ Hz marbles people apples mL N Pa eV".split()  # noqa: SIM905
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[a-z]*matrix\})?")

SAME_ELSEWHERE = [
    {"March", "Marca"},  # in Polish
    {"Mai", "Maj"},  # in Swedish
    {"de", "di"},  # in Italian, between the parts of a date
    {"minutes", "minuten"},  # in German
    {"euros", "euroa"},  # in Finnish
    {"米", "م"},  # metre, in Arabic
]
"""Words one letter apart that say the same in two languages, so that one is right for the other."""


def _kinds(draw: random.Random) -> dict[str, Callable[[], str]]:
    def whole(most: int = 5) -> str:
        return str(draw.randint(1, 10 ** draw.randint(1, most)))

    def signed(most: int = 3) -> str:
        return draw.choice(["", "-"]) + whole(most)

    def decimal() -> str:
        return f"{draw.randint(0, 999)}.{whole(6)}"

    def in_other_digits(zero: int) -> str:
        return "".join(chr(zero + int(digit)) for digit in whole())

    return {
        "integer": lambda: signed(12),
        "decimal": lambda: draw.choice(["", "-"]) + decimal(),
        "thousands": lambda: f"{draw.randint(1000, 10**9):,}",
        "scientific": lambda: f"{draw.randint(1, 9)}.{whole(2)}" + draw.choice(["e{}", "\\times10^{{{}}}"]).format(draw.randint(-40, 40)),
        "a float of JSON": lambda: str(draw.random() * 10 ** draw.randint(-12, 20)),
        "fraction": lambda: draw.choice(["{}/{}", "\\frac{{{}}}{{{}}}"]).format(draw.randint(1, 200), draw.randint(2, 99)),
        "mixed number": lambda: f"{draw.randint(1, 9)} {draw.randint(1, 4)}/{draw.randint(5, 9)}",
        "repeating": lambda: f"0.\\overline{{{draw.randint(1, 98)}}}",
        "power": lambda: f"{draw.randint(2, 9)}^{{{draw.randint(2, 40)}}}",
        "percent": lambda: draw.choice([decimal(), whole(2)]) + draw.choice(["%", "\\%", " percent"]),
        "money": lambda: draw.choice("$€£") + draw.choice([whole(4), f"{draw.randint(1, 99)}.{draw.randint(10, 99)}"]),
        "unit": lambda: draw.choice([whole(3), decimal()]) + f" {draw.choice(UNITS)}",
        "degrees": lambda: whole(2) + draw.choice(["°", "^\\circ", " degrees"]),
        "a unit of its script": lambda: whole(3) + draw.choice("个元米人"),
        "list": lambda: ", ".join(signed() for _ in range(draw.randint(2, 5))),
        "list of three-digit numbers": lambda: ",".join(str(draw.randint(100, 999)) for _ in range(draw.randint(2, 4))),
        "tuple": lambda: f"({', '.join(signed(2) for _ in range(draw.randint(2, 4)))})",
        "set": lambda: f"\\{{{', '.join(map(str, draw.sample(range(-50, 99), draw.randint(2, 4))))}\\}}",
        "interval": lambda: f"{draw.choice('([')}{draw.randint(-20, -1)}, {draw.randint(1, 30)}{draw.choice(')]')}",
        "ray": lambda: draw.choice(["(-\\infty, {})", "[{}, \\infty)", "x < {}", "x \\ge {}"]).format(whole(2)),
        "union": lambda: f"(-\\infty,{draw.randint(-9, -1)})\\cup({draw.randint(1, 9)},\\infty)",
        "date": lambda: draw.choice(["{2}-{1:02}-{0:02}", "{0} March {2}", "June {0}, {2}", "{0:02}.{1:02}.{2}"]).format(
            draw.randint(1, 28), draw.randint(1, 12), draw.randint(1900, 2030)
        ),
        "date in another language": lambda: draw.choice(
            ["{} de marzo de {}", "{}. Mai {}", "{} августа {}", "{} mars {}", "{} يونيو {}"]
        ).format(draw.randint(1, 28), draw.randint(1900, 2030)),
        "date in signs": lambda: f"{draw.randint(1900, 2030)}年{draw.randint(1, 12)}月{draw.randint(1, 28)}日",
        "time in signs": lambda: draw.choice(["{}点{:02}分", "下午{}点{:02}分", "오전 {}시 {:02}분"]).format(
            draw.randint(1, 12), draw.randint(10, 59)
        ),
        "unit of another language": lambda: f"{whole(3)} {draw.choice(['Stunden', 'kilómetros', 'литров', 'minutes', '公里', '小时'])}",
        "number in words": lambda: draw.choice(["forty-two", "seven hundred", "two thirds", "minus nine", "twelve"]),
        "formula": lambda: draw.choice(["C_{}H_{{1{}}}O_6", "Fe_{}O_{}", "C{}H{}", "2H_{} + O_{} \\to 2H_2O"]).format(
            draw.randint(2, 9), draw.randint(2, 9)
        ),
        "ion": lambda: f"Fe^{{{draw.randint(2, 9)}+}}",
        "version": lambda: f"v{draw.randint(1, 9)}.{draw.randint(1, 20)}.{draw.randint(1, 20)}",
        "colour": lambda: f"#{draw.randint(0x100000, 0xFFFFFF):06X}",
        "address of another kind": lambda: f"2001:db8::{draw.randint(1, 9)}:{draw.randint(11, 99)}",
        "two signs": lambda: draw.choice(["\\pm {}", "{} \\pm \\sqrt{{7}}", "x = \\pm {}"]).format(draw.randint(2, 40)),
        "set of what": lambda: f"\\{{x \\mid x > {draw.randint(2, 40)}\\}}",
        "size": lambda: f"|x| < {draw.randint(2, 40)}",
        "all but one": lambda: f"\\mathbb{{R}} \\setminus \\{{{draw.randint(2, 40)}\\}}",
        "logarithm": lambda: draw.choice(["\\log_{} {}", "\\ln {}{}", "{}\\ln {}"]).format(draw.randint(2, 3), draw.choice([5, 7, 11])),
        "money in words": lambda: f"{whole(3)} {draw.choice(['dollars', 'euros', '元', '円', 'rupees'])}",
        "time": lambda: draw.choice(["{}:{:02} AM", "{}:{:02} PM", "{}:{:02}"]).format(draw.randint(1, 12), draw.randint(0, 59)),
        "ratio": lambda: f"{draw.randint(1, 20)}:{draw.randint(1, 9)}",
        "base": lambda: draw.choice(["{:b}_2", "{:o}_8", "{:X}_{{16}}"]).format(draw.randint(300, 5000)),
        "word": lambda: draw.choice(WORDS),
        "words": lambda: " ".join(draw.sample(WORDS, draw.randint(2, 4))),
        "word of another script": lambda: draw.choice(["北京", "قطر", "नमस्ते", "москва"]),
        "word and number": lambda: f"{draw.choice(WORDS)} {whole(2)}",
        "code": lambda: draw.choice(["SKU-", "AB", "x", "LH-"]) + whole(4) + draw.choice(["", "-A", "b", "X9"]),
        "address": lambda: ".".join(str(draw.randint(1, 255)) for _ in range(4)),
        "label": lambda: draw.choice("ABCDE"),
        "label and text": lambda: f"{draw.choice('ABCDE')}. {draw.choice(WORDS)}",
        "assignment": lambda: draw.choice(["x = ", "y=", "a_2 = ", "f(2) = ", "Area = "]) + signed(),
        "assignments": lambda: f"x={whole(2)}, y={whole(2)}",
        "equation": lambda: f"y = {draw.randint(2, 9)}x + {draw.randint(1, 20)}",
        "root": lambda: f"{draw.randint(2, 9)}\\sqrt{{{draw.choice([2, 3, 5, 7, 11])}}}",
        "polynomial": lambda: f"{draw.randint(2, 9)}x^2 - {draw.randint(2, 9)}x + {draw.randint(2, 9)}",
        "expression": lambda: f"\\frac{{{draw.randint(2, 9)}a}}{{b+{draw.randint(2, 9)}}}",
        "multiple of pi": lambda: f"{draw.randint(2, 30)}\\pi",
        "complex": lambda: f"{draw.randint(2, 9)} + {draw.randint(2, 9)}i",
        "matrix": lambda: f"\\begin{{pmatrix}}{signed(1)} & {signed(1)} \\\\ {signed(1)} & {signed(1)}\\end{{pmatrix}}",
        "symbol": lambda: f"\\mathbb{{Z}}_{draw.randint(2, 9)}",
        "JSON": lambda: f'{{"item": "{draw.choice(WORDS)}", "n": {whole(2)}}}',
        "call": lambda: f'book(city="{draw.choice(WORDS)}", days={whole(1)})',
        "full-width": lambda: in_other_digits(0xFF10),
        "Arabic-Indic": lambda: in_other_digits(0x0660),
    }


KINDS = list(_kinds(random.Random()))


def references(kind: str, count: int, seed: int) -> Iterator[str]:
    """References of a kind, the same for the same seed."""
    draw = random.Random(f"{kind} {seed}")
    make = _kinds(draw)[kind]
    for _ in range(count):
        yield make()


def says_the_same(one: str, other: str) -> bool:
    """Whether two texts differ in one word only, which is another language's word for the same."""
    pairs = list(zip(*(re.findall(r"[^\W\d_]+|\d+|\S", text) for text in (one, other)), strict=False))
    return [{left, right} for left, right in pairs if left != right] in [[each] for each in SAME_ELSEWHERE]


def changes(reference: str, seed: int) -> Iterator[str]:
    """The reference with one digit, letter, sign or unit changed, in every place."""
    draw = random.Random(f"{reference} {seed}")
    commands = {place for found in _COMMAND.finditer(reference) for place in range(*found.span())}
    for place, letter in enumerate(reference):
        if place not in commands:
            yield from (reference[:place] + other + reference[place + 1 :] for other in _instead_of(letter, draw))
    if reference[0].isdecimal() and set(reference) - set("0./, "):
        yield f"-{reference}"
    number, space, unit = reference.partition(" ")
    if unit in UNITS:
        yield number + space + draw.choice([other for other in UNITS if other != unit])
    if len(reference) > 3 and reference.isalpha() and reference.isascii():
        shuffled = "".join(draw.sample(reference, len(reference)))
        if shuffled.lower() != reference.lower():
            yield shuffled


def _instead_of(letter: str, draw: random.Random) -> Iterator[str]:
    """What may stand in place of a digit, a letter or a sign; nothing for others."""
    if letter.isdecimal():
        yield chr(ord(letter) + (draw.randint(1, 9) + int(letter)) % 10 - int(letter))
    elif letter in string.ascii_letters:
        alphabet = string.ascii_lowercase if letter.islower() else string.ascii_uppercase
        yield draw.choice([other for other in alphabet if other != letter])
    elif letter.isalpha():
        yield draw.choice([other for other in "قم京米नжя" if other != letter])
    elif letter == "+":
        yield "-"
    elif letter == "-":
        yield from ("", "+")
