"""The marks that families put around reasoning, as the kit's. Only at the start of an answer; what stands inside one stays text."""

from __future__ import annotations

import re

from distill.data.calls import UnusableError, calls_of, in_hermes_form
from distill.run.schema import THINK_CLOSE, THINK_OPEN

_PAIRS = {
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<thoughts>": "</thoughts>",
    "<reasoning>": "</reasoning>",
    "<reason>": "</reason>",
    "<seed:think>": "</seed:think>",
    "<|think|>": "<|/think|>",
    "<|thinking|>": "<|/thinking|>",
    "<|start_thinking|>": "<|end_thinking|>",
    "<|begin_thinking|>": "<|end_thinking|>",
    "<|begin_of_thinking|>": "<|end_of_thinking|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
    "[think]": "[/think]",
    "<|inner_prefix|>": "<|inner_suffix|>",
}
"""Opening and closing marks, in small letters."""
_OPENING = re.compile(rf"\s*({'|'.join(map(re.escape, _PAIRS))})", re.IGNORECASE)
_ANSWERS = {"<|begin_of_solution|>": "<|end_of_solution|>", "<|start_response|>": "<|end_response|>"}
"""Marks around what follows the reasoning."""
_SEGMENT = re.compile(
    r"(?:<\|start\|>assistant)?(?:\s*to=(?P<to>[\w.]+))?\s*<\|channel\|>(?P<channel>\w+)(?:\s*to=(?P<too>[\w.]+))?[^<]*"
    r"(?:<\|constrain\|>\w*)?\s*<\|message\|>(?P<text>.*?)(?:<\|(?:end|call|return)\|>|(?=<\|start\|>assistant|<\|channel\|>(?:analysis|commentary|final)\b)|\Z)",
    re.DOTALL,
)
_CHANNELS = re.compile(r"\s*(?:<\|start\|>assistant)?(?:\s*to=[\w.]+)?\s*<\|channel\|>\w")


def with_think(text: str) -> str:
    """An answer whose reasoning stands between `<think>` and `</think>`; the text itself where it has them, or no marks."""
    if _CHANNELS.match(text):
        return _of_channels(text)
    found = _OPENING.match(text)
    if found is None:
        return text
    closing = re.compile(re.escape(_PAIRS[found[1].lower()]), re.IGNORECASE)
    reasoning, *rest = closing.split(text[found.end() :], maxsplit=1)
    if not rest:  # cut, which the checks will say
        return f"{THINK_OPEN}\n{reasoning.replace(THINK_CLOSE, '').strip()}"
    return thought(reasoning, _without_answer_marks(rest[0].strip()))


def thought(reasoning: str, answer: str) -> str:
    """Reasoning and answer in the kit's form; whatever marks the reasoning holds itself are no others."""
    reasoning = reasoning.replace(THINK_OPEN, "").replace(THINK_CLOSE, "")
    return f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{answer.strip()}"


def _without_answer_marks(answer: str) -> str:
    for opening, closing in _ANSWERS.items():
        if answer.lower().startswith(opening):
            answer = answer[len(opening) :].strip()
            return answer[: -len(closing)].rstrip() if answer.lower().endswith(closing) else answer
    return answer


def _of_channels(text: str) -> str:
    """An answer of gpt-oss: its analysis is the reasoning, what it says to functions are calls, all else is the answer."""
    reasoning, said, place = [], [], 0
    while (found := _SEGMENT.match(text, place)) is not None and found.end() > place:
        place = found.end() + len(text[found.end() :]) - len(text[found.end() :].lstrip())
        to, content = (found["to"] or found["too"] or "").removeprefix("functions."), found["text"].strip()
        if to:
            try:
                said.append(in_hermes_form(calls_of({"name": to, "arguments": content})))
            except UnusableError:
                return text
        elif found["channel"] == "analysis":
            reasoning.append(content)
        else:
            said.append(content)
    if text[place:].strip():  # not to be understood
        return text
    if not said:  # cut
        return f"{THINK_OPEN}\n" + "\n\n".join(reasoning)
    return thought("\n\n".join(reasoning), "\n".join(said)) if any(reasoning) else "\n".join(said)
