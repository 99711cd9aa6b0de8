"""What a right answer is: its text says what the reference says, whatever the two are.

Both are read alike, as `forms` has it: brought into one spelling, then as a number, a date, a list, words and so on. Equal text is always
right, and different text that no form relates is wrong, not unjudged. Numbers and words are compared without sympy.
"""

from __future__ import annotations

from distill.checks.forms import expressions, units
from distill.checks.forms.equality import same
from distill.checks.forms.final import final_answer, loose_numbers, reference_answer
from distill.checks.forms.plain import plain
from distill.checks.forms.reading import read
from distill.checks.forms.shapes import Text
from distill.data.texts import is_blank

_LOOKED_AT = 20_000
"""Characters at the end of an answer, among which its final part is."""


def compare(answer: str, reference: str) -> tuple[bool | None, str]:
    """Whether the answer is equal to the reference, or null, and the reason. May never return: see `MathJudge`."""
    if is_blank(reference):
        return None, "no_reference"
    answer = answer[-_LOOKED_AT:]
    if is_blank(answer):
        return False, "no_answer"
    wanted = [plain(text) for text in reference_answer(reference).texts]
    if plain(answer) == wanted[0] or answer.split() == f"\\boxed{{{reference}}}".split():  # whatever its braces
        return True, "right"
    found = final_answer(answer)
    given = [plain(text) for text in found.texts]
    if any(same(one, other) for one in given for other in wanted):
        return True, "right"
    if found.is_marked or all(isinstance(form, Text) for text in wanted for form in read(text)):
        return False, "wrong_answer"
    loose = [plain(text) for text in loose_numbers(answer)]
    if not loose and not any(letter.isdigit() for letter in given[0]):
        return False, "no_answer"
    right = any(same(one, other) for one in loose for other in wanted)
    return right, "right" if right else "wrong_answer"


def prepare() -> None:
    """Does in a new worker what takes a second the first time: imports, patterns, the grammar. No pair's limit pays for it."""
    expressions.prepare()
    units.prepare()
