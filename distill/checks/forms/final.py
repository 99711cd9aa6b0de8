r"""Which part of a text is its final answer: the last box, else what follows "the answer is" in some language, else bold, else the text.

Boxes close to each other are one answer of several parts, so a row of guesses is not right because one of them is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from distill.checks.forms.plain import as_words, closing_brace, unified

_BOX = re.compile(r"\\(?:boxed|fbox|framebox|bbox)\s*(?:\{|(?=[^\s{]))")
_BETWEEN = 70  # characters between boxes that a comma, an "and" or a line of their own joins
_MOST = 64  # boxes that are looked at
_JOINING = re.compile(r"\band\b|\bor\b|,|;|\n")
_REJECTING = re.compile(r"\b(?:wrong|wait|no|not|but|actually|instead|mistake|correct(?:ion|ed)?|should)\b", re.IGNORECASE)
TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_IS = r"(?:\s*(?:is|are|would be|must be|=|:|equals)(?:\s+(?:that|therefore|thus|simply|just))?\s*:?|\s*[*_]*\s*:?[*_]*\s*\n)"
_PHRASES = (
    rf"(?:final |correct |right |best |closest )*(?:answer|choice|option|result|solution)(?:\s+(?:to|for|of)\s[^.:\n]{{1,80}}?)?{_IS}",
    r"\bI\s+(?:choose|pick|select|would choose|will choose)\s+(?:option |choice |answer )?",
    r"####",
    r"(?:정답|답)\s*(?:은|는|:)\s*:?|정답",
    r"(?:الجواب|الإجابة|الاجابة|الحل|الناتج)(?:\s+(?:النهائي|النهائية|الصحيح|الصحيحة))?\s*(?:هو|هي|:)\s*:?",
    r"(?:Antwort|Lösung|Ergebnis|(?:richtige|korrekte) (?:Option|Auswahl))\s*(?:lautet|ist|:|=)\s*(?:also|somit|daher)?\s*:?",
    r"(?:réponse|respuesta|resposta|risposta|solución|solution|résultat|resultado|risultato)(?:\s+(?:finale?|correcta?|correcte|corretta|correta|est[áa]))?"
    r"\s*(?:est|es|é|è|:|=)\s*:?(?:\s*(?:donc|alors|entonces|portanto|quindi)\b)?"
    r"(?:\s*(?:la |a |l')?(?:opci[óo]n|opção|option|opzione|letra|lettre|lettera|alternativa)\b)?",
    r"(?:ответ|відповідь)\s*[:=-]*",
    r"jawaban(?:nya)?\s*(?:adalah|ialah|:)\s*:?",
    r"đáp\s+án\s*(?:là|:)\s*:?",
    r"उत्तर\s*(?:(?:है|:)\s*:?|(?=\S+\s+है))",
    r"(?:cevap|yan\u0131t)\s*:",
    r"odpowied(?:ź|zią)\s*(?:to|jest|:)\s*:?",
    r"(?:antwoord|svaret|svar|vastaus)\s*(?:is|är|er|on|:)\s*:?",
    r"απάντηση\s*(?:είναι|:)\s*:?",
)
_RUNNING = (
    r"(?:答案|结果|結果|選択肢|正解|答え)\s*(?:应该|應該)?(?:是|为|為|は|选|選)?\s*[:=]?\s*(?:选项|選項)?",
    r"(?:故|应|應|本题)(?:选|選)\s*:?",
)
"""Of scripts that leave no space between words."""
PHRASE = re.compile(rf"(?<![^\W_])(?:{'|'.join(_PHRASES)})|{'|'.join(_RUNNING)}", re.IGNORECASE)
_LEAD = re.compile(r"(?:(?:so|thus|hence|therefore|and|the|my|our|la|die|der)[\s,]*)*", re.IGNORECASE)
_CLAUSE_END = re.compile(r"(?<!\.\.)[.!?](?=\s+[^\W\d_]|\s*$)|,?\s+(?:because|since|which|as in|so that)\b|\n")
_DISPLAY = re.compile(r"\s*(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$|\\\((.*?)\\\)|(?<!\\)\$([^$\n]+)\$)", re.DOTALL)
_BOLD = re.compile(r"\*\*(?!\s)([^*\n]+?)(?<!\s)\*\*|(?<![\w`])`([^`\n]+)`(?![\w`])|<b>(.*?)</b>")
_BOLD_END = re.compile(rf"(?:{_BOLD.pattern})[.!:]?\s*\Z")
_NAMED = re.compile(r"(?<![\w+*/^-])([A-Za-z](?:_\{?\w+\}?)?(?:\([^()\s]*\))?|[A-Za-z]{3,})\s*=\s*$")
_PART = re.compile(r"(-?\d+(?:[./]\d+)?|-?\\frac\{\d+\}\{\d+\}) of\b")
_COPULA = re.compile(r"(?:です|でした|である|입니다|이다|\s+है)\s*$")
_CHOSEN = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s*)?(?:option|choice|answer)?\s*\(?([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b[^,;]*",
    re.IGNORECASE,
)
"""`B is correct`, where the answer comes before what says so."""
_YES_OR_NO = re.compile(
    r"(yes|no|true|false|oui|non|sí|ja|nein|sim|não|да|нет|是|否|对|不是|はい|いいえ|네|아니요|نعم|لا|हाँ|नहीं)(?:\s*[,.!;:]|\s+-+\s|\s+because\b)",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"(?:([^\W\d_]{1,20}\.? )(?:the )?)?"
    r"((?<![-\d])\d{1,2}(?:st|nd|rd|th|\.)?,? (?:(?:de|of) )?(?:[^\W\d_]{1,20}\.?,? )?(?:de )?\d{4})(?!\d)",
    re.IGNORECASE,
)
_UNSAID = re.compile(
    r"(?:\bor|\bnot|n't(?: be)?|\bcannot be|\bthan|\b(?:over|under|below|above)|(?<![=-])[<>]=?|\\(?:le|ge|ne|lt|gt)"
    r"|\bbetween\b[^.]{1,30}\band|\d\s?(?:[-+*/^x]|\\times|\\cdot|to)|\beither\b[^.]{1,30}\bor)\s*\$?\s*(?:[A-Za-z](?:_\w+)?\s*=\s*)?$",
    re.IGNORECASE,
)
"""What stands before a number that is not said to be the answer."""
_MONEY = re.compile(r"(-?[$€£¥₹]\s?\S*\d)\s?(?!thousand|million|billion|trillion|bn?\b|[mk]\b)[^\W\d_]+$", re.IGNORECASE)
_LABELLED = re.compile(r"\(?[A-Z][).:]+\s+\S")
_LABEL = re.compile(r"\(?[A-Z][).:]?|\*\*\(?[A-Z]\)?\.?\*\*")
_NEAR = 80  # characters before a number that say what it is
_FEW = 4  # words that may be an answer and nothing else
_HEADING = re.compile(r"[^\W\d_][^:=]*:")
_STATES = re.compile(
    r"(?:(?:so|thus|hence|therefore|and)?,?\s*)?(?:the|its|this|that|our|your|my|it)\s+(?:[^\W\d_][\w'-]*\s+){0,4}(?:is|are|was|were|equals)\s+(?!not\b)(.+)",
    re.IGNORECASE,
)
_MATH = re.compile(r"\\\[(.*?)\\\]|\$\$(.*?)\$\$|\\\((.*?)\\\)|(?<![\\\d])\$([^$\n]+)(?<!\\)\$", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w.,/^_{])(?:[-+]|[$€£¥₹]\s?|-[$€£])?\d+(?:[.,'/:]\d+|(?<!\d)\s\d+/\d+)*(?:[eE][-+]?\d+)?(?:\s?(?:%|°[CF]?|[€£¥₹]|[^\W\d_]+(?:/[^\W\d_]+)?))?"
)


class Final(NamedTuple):
    """What a text answers."""

    texts: list[str]
    """The ways to take it, the likeliest first."""
    is_marked: bool
    """Whether it is marked as the answer by a box, a tag or a phrase, so that nothing else in the text is."""


def final_answer(text: str) -> Final:
    """The final answer of a text that a model wrote after its reasoning."""
    text = unified(text).strip()
    marked = _marked(text)
    if marked is not None:
        return Final(marked, True)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    texts = [text, last]
    ending = last.rsplit(". ", 1)[-1]
    if found := _CHOSEN.fullmatch(ending.rstrip(".!")):
        return Final([found[1]], True)
    if code := _code_at_end(text):
        texts = [code, text]
    elif (bold := bold_of(last)) is not None:
        texts = [bold, text]
    elif _LABEL.fullmatch(lines[0]) or (len(lines) > 1 and _is_answer_before_reasons(lines)):
        texts.append(lines[0])
    elif found := _STATES.fullmatch(_until_clause_end(ending)) or _YES_OR_NO.match(text):
        texts.append(found[1])
    return Final(list(dict.fromkeys(part for part in texts if part)), False)


def _code_at_end(text: str) -> str:
    """What is in the fence that a text ends with; empty where it ends with none."""
    start = text.rfind("```", 0, -3) if text.endswith("```") else -1
    return text[start:-3].partition("\n")[2].strip() if start >= 0 else ""


def _is_answer_before_reasons(lines: list[str]) -> bool:
    """Whether a few words come first, and then sentences that do not take them back."""
    first, rest = lines[0], lines[1:]
    if len(first.split()) > _FEW or first[-1] == ":" or any(_REJECTING.search(line) for line in rest):
        return False
    return rest[-1][-1] in ".!" and len(rest[-1].split()) >= _FEW - 1


def is_final(text: str) -> bool:
    """Whether a text puts its answer forward as final: boxed, tagged, after a phrase, bold or as code at its end, or it is nothing else."""
    text = unified(text).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return False
    if _boxes(text) is not None or TAG.search(text) or _BOLD_END.search(lines[-1]) or lines[-1].endswith("```"):
        return True
    if len(lines) == 1 and (len(text.split()) <= _FEW or text[0] + text[-1] in ("{}", "[]") or _MATH.fullmatch(text) is not None):
        return True
    end = "\n".join(lines[-2:])
    rests = [end[found.end() :].strip() for found in PHRASE.finditer(end)]
    return any(rest and (len(rest.split()) <= _FEW or rest[-1] in ".!?)]}$*") for rest in rests)


def loose_numbers(text: str) -> list[str]:
    """The last formula, number or date in a text that marks no answer: what a sentence ends in is often what it finds."""
    text = unified(text).replace("**", "")
    dates = list(_DATE.finditer(text))[-1:]
    said = [part for found in dates for part in (found.group(), found[2])]
    formulas, numbers = list(_MATH.finditer(text)), list(_NUMBER.finditer(text))
    last = max((found.end() for found in formulas), default=0)
    is_formula = bool(formulas) and not any(found.start() > last for found in numbers)
    if not (formulas if is_formula else numbers):
        return said
    found = formulas[-1] if is_formula else numbers[-1]
    before = text[: found.start()]
    if _UNSAID.search(before[-_NEAR:]):
        return said
    if is_formula:
        return [*said, next(part for part in found.groups() if part is not None)]
    named = _NAMED.search(before[-_NEAR:])
    number = found.group().strip() + ("..." if text.startswith("...", found.end()) else "")
    money = _MONEY.fullmatch(number)
    return [*said, (f"{named[1]} = " if named else "") + (money[1] if money else number)]


def reference_answer(text: str) -> Final:
    """The answer that a reference names: in a box, after a phrase that begins it, else all of it."""
    text = unified(text).strip()
    boxes = _boxes(text)
    if boxes is not None:
        return Final([boxes], True)
    words = as_words(text)
    begun = PHRASE.search(words[:120])
    if begun is not None and _LEAD.fullmatch(words[: begun.start()]):
        rest = _after_phrase(words[begun.end() :])
        if rest:
            return Final([text, *rest], True)
    return Final([text], True)


def _marked(text: str) -> list[str] | None:
    boxes = _boxes(text)
    if boxes is not None:
        return [boxes, *reference_answer(as_words(boxes)).texts[1:]] if "\\boxed" not in boxes else [boxes]
    if tags := TAG.findall(text):
        return _marked(tags[-1]) or [tags[-1].strip()]
    for found in reversed(list(PHRASE.finditer(text))):
        if rest := _after_phrase(text[found.end() :]):
            return rest
    return None


def _boxes(text: str) -> str | None:
    """What is in the last box, and in those before it that belong to it; null where there is none."""
    found = list(_BOX.finditer(text))[-_MOST:]
    if not found:
        return None
    insides: list[str] = []
    until = len(text)
    for box in reversed(found):
        if box.end() > until:
            continue
        inside, end = _inside(text, box)
        if insides and not _belongs(text[end:until], inside, insides[0]):
            break
        if not insides or inside != insides[0]:
            insides.insert(0, inside)
        until = box.start()
    return ", ".join(insides)


def _inside(text: str, box: re.Match[str]) -> tuple[str, int]:
    if not box.group().endswith("{"):  # \boxed5 and \boxed\pi
        found = re.match(r"\\[A-Za-z]+|-?[\d.]*\d|.", text[box.end() :])
        length = found.end() if found else 0
        return text[box.end() : box.end() + length], box.end() + length
    end = closing_brace(text, box.end() - 1)
    if end < 0:
        line = text[box.end() :].split("\n")[0]
        end = box.end() + max(line.rfind("}"), 0)
    return text[box.end() : end].strip(), end + 1


def _belongs(between: str, inside: str, following: str) -> bool:
    """Whether a box and the next are one answer, by what stands between them."""
    if len(between) < 10 and not _REJECTING.search(between):
        return True
    return inside != following and len(between) < _BETWEEN and bool(_JOINING.search(between)) and not _REJECTING.search(between)


def _after_phrase(rest: str) -> list[str]:
    """The ways to take what follows a phrase: its clause, and what is bold or a formula at its beginning."""
    rest = re.sub(
        r"^(?:[\s*_:>]|#(?=[\s#*]))+(?=\S)",
        lambda found: "**" if found.group().endswith("**") and "**" in rest[found.end() :] else "",
        rest,
    )
    if (bold := _BOLD.match(rest)) is not None:
        return [next(part for part in bold.groups() if part is not None)]
    clause = _until_clause_end(rest)
    if (display := _DISPLAY.match(rest)) is not None:
        inside = next(part for part in display.groups() if part is not None)
        return [inside] if len(rest[display.end() :].strip()) < 2 or display.end() >= len(clause) else [clause, inside]
    if not clause:
        return []
    line = rest.split("\n")[0].strip()
    if _LABELLED.match(line):
        return [line]
    if of_what := _PART.match(clause):
        return [of_what[1], clause]
    found = _NUMBER.match(clause)
    if found is not None and re.match(r"\s|\.(?!\.\.)", clause[found.end() :]) and not re.search(r"\bor\b|\band\b|[,;=]", clause):
        return [clause, found.group().strip(), line]
    return list(dict.fromkeys([clause, line, _COPULA.sub("", clause)]))


def _until_clause_end(text: str) -> str:
    found = _CLAUSE_END.search(text.strip())
    return (text.strip()[: found.start()] if found else text).strip().strip("*").strip()


def bold_of(line: str) -> str | None:
    """The last bold or quoted code of a line, or what follows a bold heading."""
    found = list(_BOLD.finditer(line))
    if not found:
        return None
    inside = next(part for part in found[-1].groups() if part is not None).strip()
    if _HEADING.fullmatch(inside):
        return line[found[-1].end() :].strip() or None
    return inside
