"""The final answer inside an answer, as text, and texts brought to one form, for checks that compare texts."""

from __future__ import annotations

import re
import unicodedata

from distill.checks.forms.final import PHRASE, TAG, bold_of

_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\[{}\\]|[{}]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|texttt|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_SEPARATORS = re.compile(r"(?<=\w)[\s_\-\u2010-\u2015]+(?=\w)|\s+")
_AROUND = " \t\n.,;:!?\"'`*_~()[]{}<>«»„“”‘’‚‹›。，；：！？、（）「」『』【】《》،؛؟।|$#"  # noqa: RUF001 (marks of many scripts)
_AS_ASCII = {0xFF1A: ":", 0x2013: "-", 0x2014: "-"}  # marks behind a phrase; no other length, so places stay
_UNSPOKEN = re.compile("[\u0640\u064b-\u0652\u0670]")
"""Signs of Arabic that are written or left out as one likes: vowels, doubling, and the stroke that draws a word out."""
_LONGEST = 10_000
"""Characters of an answer's last part in which a final answer is looked for."""


def boxed(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{...}` or `\fbox{...}`, the innermost; null where there is none. One pass, however many."""
    best: tuple[int, int] | None = None
    opened: list[int | None] = []  # where each brace that is open begins a box, else null
    for sign in _BRACES.finditer(text):
        if sign.group() == "}":
            start = opened.pop() if opened else None
            if start is not None and (best is None or start > best[0]):
                best = (start, sign.start())
        elif sign.group().endswith("{") and not sign.group().startswith("\\{"):
            opened.append(None if sign.group() == "{" else sign.end())
    return None if best is None else text[best[0] : best[1]]


def final_answer(answer: str) -> str:
    """The part of an answer that is put forward as final, by the marks that `forms.final` knows, as it is spelled: a box, `<answer>`, what
    follows an answer phrase, bold text at the end, a last line; all of it where nothing is.
    """
    tail = answer.strip()[-_LONGEST:]
    box = boxed(tail)
    if box is not None:
        return plain(box)
    tagged = TAG.findall(tail)
    if tagged:
        return plain(tagged[-1])
    phrases = list(PHRASE.finditer(tail.translate(_AS_ASCII)))
    if phrases:
        rest = tail[phrases[-1].end() :].strip().partition("\n")[0]
        if rest:
            return plain(rest)
    last = tail.rpartition("\n")[2].strip()
    return plain(bold_of(last) or last)


def plain(text: str) -> str:
    r"""The text without LaTeX's commands for text, and with `\_` and the like as they are read."""
    before = None
    while before != text:
        before, text = text, _WRAPPER.sub(r"\1", text)
    return re.sub(r"\\([_%&$#{}])", r"\1", text).strip()


def folded(text: str) -> str:
    """The text in one form: case, forms of Unicode, digits of any script, vowel signs of Arabic, and white space, `_` or `-` between words
    make no difference.
    """
    text = _UNSPOKEN.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(digit_of(sign) for sign in text if unicodedata.category(sign) != "Cf")
    return _SEPARATORS.sub(" ", unicodedata.normalize("NFC", text)).strip()


def digit_of(sign: str) -> str:
    """A decimal digit of any script as that of ASCII; any other character as it is."""
    value = unicodedata.decimal(sign, None) if not sign.isascii() else None
    return sign if value is None else str(value)


def bare(text: str) -> str:
    """The folded text without punctuation and marks around it; all of it where it is nothing else."""
    whole = folded(text)
    return whole.strip(_AROUND) or whole
