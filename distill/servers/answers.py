"""One reader of answers for all kinds: the thought and the text, why it ended, what it used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill.errors import visible
from distill.run.calls import CALL_CLOSE, written_raw
from distill.run.schema import THINK_CLOSE, THINK_OPEN
from distill.servers import Usage
from distill.servers.faults import fault_of, words_of

_STOP = frozenset(
    {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "word", "tool_calls", "function_call", "tool_use"}
)
_LENGTH = frozenset({"length", "limit", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length"})
_BROKEN = frozenset({"abort", "aborted", "cancelled", "error", "timeout", "load", "unload", "insufficient_system_resource"})
"""Ends that the server had, and the answer had not."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SAME_MODEL = re.compile(r"|(?:@|:|-\d{4}|\.gguf|-(?:fp\d|nf4|awq|gptq|int\d|q\d)).*")
"""What may follow a model's name in another name of the same model."""
_EDGES = re.compile(rf"\A\s*{THINK_OPEN}|{THINK_CLOSE}\s*\Z")


class BrokenAnswerError(Exception):
    """What came is no whole answer; sent again, the request may have one.

    Args:
        reason: In one word, for counting.
        detail: The server's own words, cut.
        final: Whether sending it again can change nothing (a refused prompt): the row has failed.
    """

    def __init__(self, reason: str, detail: str = "", *, final: bool = False) -> None:
        self.reason = reason
        self.detail = visible(str(detail), 300)
        self.final = final
        super().__init__(f"{reason}: {self.detail}" if detail else reason)


def text_in(content: Any) -> str | None:
    """The text of a message's content: a string, or a list of parts; null where there is none."""
    if isinstance(content, str) or content is None:
        return content
    if isinstance(content, Sequence):
        parts = [part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return None


def reasoning_in(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A message's thought apart from its text, and a note where what came is not the thought itself.

    Hosts name the same thought in up to three fields; the first that holds one counts.
    """
    details = [entry for entry in message.get("reasoning_details") or [] if isinstance(entry, Mapping)]
    told = "".join(text for entry in details if isinstance(text := entry.get("text"), str))
    if told:
        return told, {}
    for name in _REASONING:
        text = text_in(message.get(name))
        if text:
            summarised = any(entry.get("summary") == text for entry in details)
            return text, {"reasoning": "a summary came in its place"} if summarised else {}
    summary = "".join(text for entry in details if isinstance(text := entry.get("summary"), str))
    if summary:
        return summary, {"reasoning": "a summary came in its place"}
    return "", {"reasoning": "it came encrypted, and is lost"} if details else {}


def calls_told(message: Mapping[str, Any]) -> list[Any]:
    """What a message says that it calls, in the newer field or, one alone, in the older one."""
    told, older = message.get("tool_calls"), message.get("function_call")
    return list(told) if isinstance(told, list) and told else [told] if told else [{"function": older}] if older else []


def called(told: Sequence[Any], *, cut: bool = False) -> list[str]:
    """Calls in the kit's form; arguments that are no JSON as they were written, so that checks see it; what is no call is left out.

    Args:
        told: By a server.
        cut: Whether the answer was cut: then the last call stays open, if it is not whole.
    """
    found = []
    for place, call in enumerate(told, start=1):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            arguments = function.get("arguments")
            text = arguments.strip() if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            try:
                text = json.dumps(json.loads(text), ensure_ascii=False)
            except (ValueError, RecursionError):
                if cut and place == len(told):
                    found.append(written_raw(function["name"], text).removesuffix(f"}}\n{CALL_CLOSE}"))
                    continue
                text = text or "{}"
            found.append(written_raw(function["name"], text))
    return found


def whole_text(reasoning: str, content: str, finish_reason: str) -> str:
    """One text with the thought between think tags: opened once, and closed unless the answer was cut inside the thought.

    Args:
        reasoning: What came apart from the content; empty if nothing did.
        content: The answer's text, which may hold a thought itself.
        finish_reason: `length` with nothing behind the thought is a cut thought.
    """
    inside, closed, rest = _thought_in(content)
    apart = _EDGES.sub("", reasoning)
    if not apart.strip():
        opens = content.lstrip().startswith(THINK_OPEN)
        return content if opens or not closed else THINK_OPEN + content
    if inside is not None and inside.strip() and inside.strip() != apart.strip():
        apart = f"{apart}\n{inside}"
    open_still = not rest.strip() and not closed and finish_reason == "length"
    thought = f"{THINK_OPEN}\n{apart.strip(chr(10))}"
    return thought if open_still else f"{thought}\n{THINK_CLOSE}\n\n{rest.lstrip(chr(10))}"


def _thought_in(content: str) -> tuple[str | None, bool, str]:
    """A thought at the beginning of a text, whether it is closed, and what follows it."""
    opens = content.lstrip().startswith(THINK_OPEN)
    body = content.lstrip().removeprefix(THINK_OPEN) if opens else content
    before, close, after = body.partition(THINK_CLOSE)
    if close and (opens or THINK_OPEN not in before):
        return before, True, after
    return (body, False, "") if opens else (None, False, content)


def finish_of(told: Any, *, written: int | None = None, longest: int | None = None, stopped: bool = False) -> tuple[str, dict[str, Any]]:
    """Why an answer ended as the kit's `stop`, `length` or `error`, and a note where it is `error`.

    Args:
        told: The server's word, whatever its field is called; null where it says nothing.
        written: Tokens of the answer, where that is known.
        longest: Tokens that were allowed.
        stopped: Whether its last token is one that ends an answer.

    Raises:
        BrokenAnswerError: the server, not the model, ended it.
    """
    word = str(told).lower() if told is not None else None
    if word in _BROKEN:
        raise BrokenAnswerError(str(word), "the server ended it")
    if word is None:
        if stopped:
            return "stop", {}
        if written is not None and longest is not None and written >= longest:
            return "length", {}
        return "error", {"finish_reason": "none was told"}
    if word in _STOP:
        return "stop", {}
    return ("length", {}) if word in _LENGTH else ("error", {"finish_reason": visible(word, 40)})


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """What a request used, as servers of OpenAI's protocol tell it; null where they don't."""
    used = body.get("usage")
    if not isinstance(used, Mapping) or not _number(used.get("prompt_tokens"), used.get("completion_tokens")):
        return None
    read, wrote = _number(used.get("prompt_tokens")), _number(used.get("completion_tokens"))
    read_details, wrote_details = used.get("prompt_tokens_details") or {}, used.get("completion_tokens_details") or {}
    reasoning = _number(wrote_details.get("reasoning_tokens"), used.get("reasoning_tokens"))
    total = _number(used.get("total_tokens"))
    if total == read + wrote + reasoning:  # a host that counts reasoning beside what was written
        wrote += reasoning
    cached = _number(read_details.get("cached_tokens"), used.get("prompt_cache_hit_tokens"), used.get("cached_tokens"))
    return Usage(input_tokens=read, cached_tokens=cached, output_tokens=wrote, reasoning_tokens=reasoning, requests=1)


def spent_in_vain(body: Any) -> Usage:
    """What an answer that is of no use says it used: its tokens are paid for, too.

    Args:
        body: JSON, or the events of a stream, of any kind.
    """
    told = [event for event in (body if isinstance(body, list) else [body]) if isinstance(event, Mapping)]
    found = [usage_of({"usage": event.get("usage") or event.get("meta_info")}) for event in told]
    last = next((usage for usage in reversed(found) if usage is not None), Usage())
    return replace(last, requests=0)


def counted(usage: Usage | None, prompt_ids: Sequence[int] | None, completion_ids: Sequence[int] | None) -> tuple[Usage, dict[str, Any]]:
    """Usage as it was told, else as the ids count, else with a note, so that whoever has a tokenizer counts."""
    if usage is not None:
        return usage, {}
    if prompt_ids is not None and completion_ids is not None:
        return Usage(input_tokens=len(prompt_ids), output_tokens=len(completion_ids), requests=1), {}
    return Usage(requests=1), {"usage": "none was told"}


def first_choice(body: Mapping[str, Any]) -> dict[str, Any]:
    """The one choice of an answer.

    Raises:
        BrokenAnswerError: there is none, or an error in its place.
    """
    refused(body)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BrokenAnswerError("no_choice", f"the answer has no choice; it has {sorted(map(str, body))}")
    refused(choices[0])
    return choices[0]


def refused(body: Mapping[str, Any]) -> None:
    """Nothing, unless a body with a status of success holds an error.

    Raises:
        BrokenAnswerError: it does.
    """
    error = body.get("error")
    if error:
        code = error.get("code") if isinstance(error, Mapping) else None
        fault = fault_of(code, error) if isinstance(code, int) and code >= 400 else None
        final = fault is not None and fault.verdict != "retry"
        raise BrokenAnswerError(fault.reason if fault else "broken_answer", words_of(error), final=final)


def compared(name: Any, asked: str) -> dict[str, Any]:
    """A note where another model answered than was asked; a dated, quantised or pinned name of the same model is none."""
    if not isinstance(name, str) or not name:
        return {}
    short, long = sorted((_last_part(name), _last_part(asked)), key=len)
    same = long.startswith(short) and _SAME_MODEL.fullmatch(long.removeprefix(short)) is not None
    return {} if same else {"model": visible(f"asked for {asked}, {name} answered", 200)}


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def object_of(body: Any) -> dict[str, Any]:
    """A body that has to be an object.

    Raises:
        BrokenAnswerError: it is not.
    """
    if not isinstance(body, dict) or not body:
        raise BrokenAnswerError("broken_answer", f"expected an object, got {type(body).__name__}")
    return body


def drawn(value: Any) -> list[int] | None:
    """Ids of an answer, if it is a list of them."""
    return list(value) if isinstance(value, list) and all(isinstance(index, int) for index in value) else None


def _number(*values: Any) -> int:
    """The first of some values that is a count, else 0."""
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)
