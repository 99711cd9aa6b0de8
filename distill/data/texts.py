"""What texts from elsewhere carry that is no part of them: ends of turns, names of control tokens, what nobody sees."""

from __future__ import annotations

import re
import unicodedata

_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|eos|>",
    "<|EOT|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|END_RESPONSE|>",
    "<|end_of_sentence|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "</s>",
    "[|endofturn|]",
)
"""What families of models write where a turn ends."""
_AT_THE_END = re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, _ENDS))}))+\s*\Z")
_CONTROLS = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,60}[|\uff5c]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>|\[/?INST\]")
_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs", "Mn"})
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that are drawn as nothing
_LOOP = re.compile(r"(.{1,20}?)\1+\Z", re.DOTALL)
_LOOP_CHARS = 120  # at the end of a text, from which it is no ending any more
_TAIL = 400


def without_end(text: str) -> str:
    """The text without marks of any family that its turn has ended, and the white space around them; else the text as it is."""
    return _AT_THE_END.sub("", text) if text.rstrip().endswith(_ENDS) else text  # the pattern alone looks at every blank of a text


def mentions_controls(text: str) -> bool:
    """Whether a text holds the name of a control token of some family."""
    return _CONTROLS.search(text) is not None


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, characters of no width, and others that are drawn as nothing."""
    return all(letter.isspace() or letter in _FILLERS or unicodedata.category(letter) in _UNSEEN for letter in text)


def loops(text: str) -> bool:
    """Whether a text ends in a few characters over and over, as a model writes that has lost its way."""
    tail = text.rstrip()[-_TAIL:]
    found = _LOOP.search(tail) if len(tail) >= _LOOP_CHARS else None
    return found is not None and len(found.group()) >= _LOOP_CHARS
