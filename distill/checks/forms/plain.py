r"""One spelling for what is written in many: Unicode as ASCII and LaTeX where that means the same, LaTeX without its dress.

Knows nothing of what a text means. Case stays: it tells mW from MW.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

LONGEST = 5000
"""Characters of a text that is read; what is longer is only compared as it stands."""

_SCRIPTS = {"<super>": "^", "<sub>": "_"}
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2018\u2019\u201b\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
        "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u2219": "\\cdot ", "\u00f7": "/", "\u2215": "/", "\u2044": "/",
        "\u2264": "\\le ", "\u2265": "\\ge ", "\u2a7d": "\\le ", "\u2a7e": "\\ge ", "\u2260": "\\ne ", "\u2248": "\\approx ",
        "\u221e": "\\infty ", "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2205": "\\emptyset ", "\u2208": "\\in ", "\u00b1": "\\pm ",
        "\u2213": "\\mp ", "\u211d": "\\mathbb{R}", "\u066b": ".", "\u066c": ",", "\u066a": "%", "\u060c": ",", "\u061b": ";",
        "\u3001": ",", "\u3002": ".", "\u0964": ".", "\u00b0": "°", "\u00ba": "°", "\u2236": ":", "\u2192": "\\to ",
        "\u27e8": "(", "\u27e9": ")", "\u2228": " or ", "\u2227": " and ", "\u2216": "\\setminus ",
    }
)  # fmt: skip
_ROOT = re.compile(r"([\u221a\u221b\u221c])\s*(\d+(?:\.\d+)?|[A-Za-z]|\{[^{}]*\}|\([^()]*\))")
_OVERLINED = re.compile(r"(?:\d\u0305)+")
_ROOTS = {"\u221a": "\\sqrt", "\u221b": "\\sqrt[3]", "\u221c": "\\sqrt[4]"}
_LETTERS = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "pi", "phi", "omega")
_GREEK = {unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}"): name for name in _LETTERS}
_LONE_GREEK = re.compile(rf"(?<![^\W\d_A-Za-z])[{''.join(_GREEK)}](?![^\W\d_A-Za-z])")
_SAME = {
    r"\\[dtc]frac(?![a-zA-Z])": r"\\frac",
    r"\\[dt]binom(?![a-zA-Z])": r"\\binom",
    r"\{([^{}]*)\\over(?![a-zA-Z])\s*([^{}]*)\}|^([^{}\\]*)\\over(?![a-zA-Z])\s*([^{}\\]*)$": r"\\frac{\1\3}{\2\4}",
    r"\{([^{}]*)\\choose(?![a-zA-Z])\s*([^{}]*)\}": r"\\binom{\1}{\2}",
    r"\\(?:long)?rightarrow(?![a-zA-Z])|->": r"\\to ",
    r"\\langle(?![a-zA-Z])": "(",
    r"\\rangle(?![a-zA-Z])": ")",
    r"\\(?:lor|vee)(?![a-zA-Z])": " or ",
    r"\\(?:land|wedge)(?![a-zA-Z])": " and ",
    r"\\(?:backslash|smallsetminus)(?![a-zA-Z])": r"\\setminus ",
    r"(?<=[\w)}\]])\s*\\(?:approx|simeq)(?![a-zA-Z])\s*(?=\S)": " = ",
    r"\\equiv(?=.*\\pmod)": "=",
    r"\\mathrm\s*\{\s*([ied])\s*\}": r" \1",
    r"\\(?:[lc]|text)?dots[bcm]?(?![a-zA-Z])": "...",
    r"\\checkmark(?![a-zA-Z])|\\\\\s*$": "",
    r"\\(?:begin|end)\s*\{(?:aligned|align\*?|gathered|gather\*?|split|equation\*?)\}": "",
    r"^\s*\\begin\s*\{cases\}([^&]*)\\end\s*\{cases\}\s*$": lambda found: found[1].replace("\\\\", ", "),
    r"\{:\}": ":",
    r"\\(?:leq|leqslant|lte)(?![a-zA-Z])": r"\\le",
    r"\\(?:geq|geqslant|gte)(?![a-zA-Z])": r"\\ge",
    r"\\neq(?![a-zA-Z])": r"\\ne",
    r"\\lt(?![a-zA-Z])": "<",
    r"\\gt(?![a-zA-Z])": ">",
    r"\\div(?![a-zA-Z])": "/",
    r"\\(?:colon|ratio)(?![a-zA-Z])": ":",
    r"\\(?:varnothing|O)(?![a-zA-Z])": r"\\emptyset",
    r"\\(?:infin|inf)(?![a-zA-Z])": r"\\infty",
    r"\\(?:l|r)brace(?![a-zA-Z])": lambda found: "\\{" if found.group()[1] == "l" else "\\}",
    r"\\(?:R|reals)(?![a-zA-Z])": r"\\mathbb{R}",
    r"\\varphi(?![a-zA-Z])": r"\\phi",
    r"\\var(?=epsilon)": r"\\",
    r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|\\textdegree(?![a-zA-Z])": "°",
    r"(?<!\\)\\[()]|(?<!\\)\\[\[\]]|\$\$": " ",
    r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?": "",
    r"\\(?:displaystyle|textstyle|bf|rm|it|sf|tt|bfseries|large|Large|huge|limits|nolimits|phantom\{[^{}]*\})(?![a-zA-Z])": "",
    r"\\color\s*\{[^{}]*\}|\\textcolor\s*\{[^{}]*\}": "",
    r"(?<!\\)\\!": "",
    r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace|space|hspace\*?\{[^{}]*\}|hfill)(?![a-zA-Z]))|(?<!\\)~": " ",
    r"(?<!\\)\\([%&#_])": r"\1",
    r"\{,\}": ",",
    r"\\(?:sqrt)\s*(\d|[A-Za-z])": r"\\sqrt{\1}",
    r"\\frac\s*(\d)\s*(\d)": r"\\frac{\1}{\2}",
    r"\\frac\s*(\d)\s*\{": r"\\frac{\1}{",
    r"\\frac\s*(\{[^{}]*\})\s*(\d)": r"\\frac\1{\2}",
}
_STEPS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [(re.compile(old), new) for old, new in _SAME.items()]  # type: ignore[misc]
_DRESS = re.compile(
    r"\\(?:textbf|mathbf|textit|mathit|emph|underline|uline|boldsymbol|bm|pmb|boxed|fbox|ce|mathcal|ensuremath|mathds|textsc)\s*(?=\{)"
)
_WORDS = re.compile(r"\\(?:text|textrm|textsf|texttt|textnormal|mathrm|mathsf|mathtt|mbox|hbox|operatorname\*?)\s*(?=\{)")
_EDGES = re.compile(
    r"^(?:=|\\approx(?![a-z])|\\simeq|\\sim(?![a-z]))\s*|\s*(?:[,;]|(?<!\.)\.{1,2}|(?<=\.{3})\.|\\text\s*\{\s*[.,;]?\s*\})$"
)
"""What stands before and behind an answer; three full stops say that it goes on, and stay."""
_ABOUT = r"(?:approximately|approx\.?|about|around|roughly|circa|ca\.)"
_HEDGE = r"(?:approx(?:imately|\.)?|rounded[^(){}]*|exact(?:ly)?|estimated)"
_HEDGED = re.compile(
    rf"^(?:\\text\s*\{{\s*{_ABOUT}\s*\}}|{_ABOUT}\s)\s*(?=\\?[-$€£¥\d.(])"
    rf"|(?<=[\w%)}}])\s*(?:\\text\s*\{{\s*\(?{_HEDGE}\)?\s*\}}|\({_HEDGE}\)|\s{_HEDGE})$",
    re.IGNORECASE,
)
"""What says that a number is rounded, before or behind it."""
_VALUE = re.compile(rf"\\?[-+$€£¥]*\s*(?:[\d.(]|\\(?:frac|sqrt|pi|text\s*\{{\s*{_ABOUT}))|{_ABOUT}\s", re.IGNORECASE)
_GOES_ON = re.compile(r"(?<![\d.])(\d*\.\d{0,3}?)(\d{1,12}?)(\2+)(?:\.\.\.|\s*\\[lc]?dots(?![a-zA-Z]))")
_PAIRS = [("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'), ("'", "'"), ("\u00ab", "\u00bb"), ("\u300c", "\u300d"), ("\u300a", "\u300b")]
_FOLDED = re.compile(r"(\\[A-Za-z]+)|([^\\]+|\\)")
"""A command of LaTeX, whose case counts (`\\Gamma` is not `\\gamma`), and what stands between two."""
_TEXT = re.compile(r"\\text\s*(?=\{)")


def unified(text: str) -> str:
    """The text in one spelling of Unicode: digits of every script as ASCII, signs and fractions as LaTeX; nobody's LaTeX is touched."""
    if text.isascii():
        return text
    text = _OVERLINED.sub(lambda found: "\\overline{" + found.group().replace("\u0305", "") + "}", text)
    text = _ROOT.sub(lambda found: f"{_ROOTS[found[1]]}{{{found[2].strip('{}()')}}}", text)
    pieces: list[str] = []
    script = ""
    for letter in text:
        kind, _, _ = unicodedata.decomposition(letter).partition(" ")
        mark = _SCRIPTS.get(kind, "") if not letter.isalpha() or letter in "\u207f\u2071" else ""
        if mark != script:
            pieces.append(("}" if script else "") + (f"{mark}{{" if mark else ""))
            script = mark
        if kind == "<fraction>":
            above, _, below = unicodedata.normalize("NFKC", letter).partition("\u2044")
            pieces.append(f" \\frac{{{above}}}{{{below}}}" if below else letter)
        elif unicodedata.category(letter) == "Cf":
            continue
        else:
            digit = unicodedata.decimal(letter, None)
            pieces.append(letter if digit is None else str(digit))
    whole = "".join(pieces) + ("}" if script else "")
    whole = unicodedata.normalize("NFKC", whole.translate(_SIGNS)).translate(_SIGNS)
    return _LONE_GREEK.sub(lambda found: f"\\{_GREEK[found.group()]} ", whole)


def plain(text: str) -> str:
    r"""The text in one spelling, on one line: no delimiters, sizes, colours or thin spaces; every kind of upright text is `\text{...}`."""
    text = unified(text)
    if len(text) > LONGEST:
        return re.sub(r"\s+", " ", text).strip()
    text = text.replace("\\$", "\ue000")
    if text.count("$") % 2 == 0:
        text = text.replace("$", " ")
    elif text.count("$") > 2 and text.strip().startswith("$$") and text.rstrip().endswith("$"):  # money inside of a formula
        text = text.strip()[1:-1]
    text = text.replace("\ue000", "$")
    text = _GOES_ON.sub(lambda found: found.group() if len(found[2] + found[3]) < 2 else f"{found[1]}\\overline{{{found[2]}}}", text)
    if "\\" in text or "~" in text or "{" in text or "->" in text:
        for pattern, new in _STEPS:
            text = pattern.sub(new, text)
        text = _WORDS.sub(lambda _: "\\text", _without(_DRESS, text))
    return trimmed(re.sub(r"\s+", " ", text))


def trimmed(text: str) -> str:
    """The text without what stands around an answer: spaces, one full stop, quotes, bold, braces, a sign of equality before it."""
    while True:
        before = text
        text = _EDGES.sub("", text.strip())
        if _VALUE.match(text):
            text = _HEDGED.sub("", text)
        for opening, closing in _PAIRS:
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and inner and opening not in inner:
                text = inner
        for opening in ("{", "\\text{"):
            if text.startswith(opening) and closing_brace(text, len(opening) - 1) == len(text) - 1 and not text.startswith(('{"', "{'")):
                text = text[len(opening) : -1]
        if text == before:
            return text


def as_words(text: str) -> str:
    r"""A plain text with what `\text{...}` holds set free among spaces."""
    if "\\text" in text and len(text) <= LONGEST:
        text = _without(_TEXT, text, around=" ")
    return re.sub(r"\s+", " ", text).strip()


def exact_key(text: str) -> str:
    """What two plain texts have in common that differ only in spaces and braces, case kept."""
    text = re.sub(r"\s*\{(\w)\}", r" \1", as_words(text))
    return re.sub(r"\s*([^\w\s]|_)\s*", r"\1", text).strip()


def text_key(text: str) -> str:
    """What two texts in words have in common that differ only in case, spaces and punctuation at the ends."""
    key = unicodedata.normalize("NFC", _FOLDED.sub(lambda found: found[1] or found[2].casefold(), exact_key(text)))
    goes_on = "..." if key.endswith("...") else ""
    return key.strip(" .,;:!?*") + goes_on or key


def closing_brace(text: str, opening: int) -> int:
    """Where the brace closes that opens at a place; -1 where it does not."""
    depth, place = 0, opening
    while place < len(text):
        letter = text[place]
        if letter == "\\":
            place += 1
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if not depth:
                return place
        place += 1
    return -1


def _without(command: re.Pattern[str], text: str, around: str = "") -> str:
    """The text with what a command dresses up, without the command and its braces.

    Args:
        command: Up to the brace that opens.
        text: The text.
        around: What is put in place of the braces.
    """
    while found := command.search(text):
        end = closing_brace(text, found.end())
        if end < 0:
            text = text[: found.start()] + around + text[found.end() + 1 :]
        else:
            text = text[: found.start()] + around + text[found.end() + 1 : end] + around + text[end + 1 :]
    return text
