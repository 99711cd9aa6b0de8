"""One conversation of a source, in whatever form people have it, as the kit's turns. Knows nothing of prompts and completions.

Read are the forms of OpenAI (`role`, `content`), ShareGPT (`from`, `value`) and Anthropic (parts for calls and results), as values or
as JSON. A turn that can't be read is an error that names row and turn; what only another kind of model could read is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from distill.data.calls import UnusableError, calls_of, in_hermes_form, tools_of, without_calls
from distill.data.marks import thought, with_think
from distill.data.names import json_text, whole_text
from distill.data.texts import is_blank, without_end
from distill.errors import DataError, shown
from distill.run.calls import with_calls
from distill.run.schema import THINK_CLOSE, THINK_OPEN, Message

_CALLING = "calling"  # a turn of its own for calls, as ShareGPT has
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "llm", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "function_result", "tool_result", "tool_output"), "tool"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), _CALLING),
}
_WHO, _WHAT = ("role", "from"), ("content", "value", "text", "refusal")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_TEXTS = frozenset({"text", "input_text", "output_text", "summary_text", "reasoning_text"})
_PARTS = _TEXTS | {"image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file", "tool_use"}
_MARKS = ("weight", "train", "supervised")  # by which a source says whether an assistant's turn is to be learned
MARKED = "marked"
"""What it says, `yes` or `no`, until a conversation is parted; no part of a prompt."""
_RESPONSE = re.compile(r"<tool_response>((?:(?!</?tool_response>).)*)</tool_response>", re.DOTALL)


def turns_of(value: Any, name: str, where: str) -> list[Message]:
    """The turns of a conversation, with what there is of `tool_calls`, `tool_call_id`, `name` and, on the first one, `tools`.

    Args:
        value: Of a row.
        name: Of the value.
        where: The row stands, for errors.

    Raises:
        DataError: it is no conversation.
        UnusableError: it holds an image, a sound or the like, or a call that nobody can read.
    """
    found: list[Message] = []
    tools: str | None = None
    for place, turn in enumerate(_listed(value, name, where)):
        here = f"{where}: {name}.{place}"
        who = _first(turn, _WHO) if isinstance(turn, dict) else None
        if not isinstance(turn, dict) or not isinstance(who, str):
            raise DataError(
                f"{where}: {name} must be a list of turns, each with role and content, or from and value, got {shown(turn)} at {place}."
            )
        role = _ROLES.get(re.sub(r"[\s-]+", "_", who.strip().lower()))
        if role is None:
            raise DataError(
                f"{here}: has the role {shown(who)}. It must be system, user, assistant or tool, or ShareGPT's name for one (human, gpt, "
                "function_call, observation)."
            )
        tools = tools or tools_of(_first(turn, ("tools", "functions")), f"{here}: tools")
        for message in _messages(role, turn, here):
            message |= _mark(turn, here) if message["role"] == "assistant" else {}
            follows = role == _CALLING and bool(found) and found[-1]["role"] == "assistant"
            if follows and message.get(MARKED) in (None, found[-1].get(MARKED)):  # what it says before it calls is of the same turn
                calls = json.loads(found[-1].get("tool_calls", "[]")) + json.loads(message["tool_calls"])
                found[-1]["tool_calls"] = json.dumps(calls, ensure_ascii=False)
            else:
                found.append(message)
    return with_tools(found, tools)


def with_tools(turns: list[Message], tools: str | None) -> list[Message]:
    """The turns, of which the first names the tools; as they are where there are none, or it names some."""
    return turns if tools is None or not turns or "tools" in turns[0] else [turns[0] | {"tools": tools}, *turns[1:]]


def settled(turn: Message) -> Message:
    """A turn as it stands in a prompt: an assistant's reasoning between the kit's marks, its calls apart, no mark of its end."""
    if turn["role"] != "assistant":
        return turn
    text = with_think(without_end(turn["content"]))
    return calls_apart(turn, f"{THINK_OPEN}\n{text}" if THINK_CLOSE in text and THINK_OPEN not in text else text)


def calls_apart(turn: Message, text: str) -> Message:
    """A turn with another text, of which the calls at its end become calls of the turn."""
    text, calls = without_calls(text)
    if not calls:
        return turn | {"content": text}
    known = json.loads(turn.get("tool_calls", "[]"))
    return turn | {"content": text.rstrip(), "tool_calls": json.dumps(known + calls, ensure_ascii=False)}


def completion_of(turn: Message) -> str:
    """An assistant's turn as a completion: its text, then its calls, a block each."""
    calls = json.loads(turn["tool_calls"]) if "tool_calls" in turn else []
    return with_calls(turn["content"].strip(), [in_hermes_form(calls)] if calls else [])


def answered(turns: list[Message]) -> Iterator[tuple[list[Message], Message]]:
    """Each assistant's turn behind all that stands before it, in their order."""
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield turns[:place], turn


def reference_of(turn: Message) -> str | None:
    """What an assistant's turn gives as a reference: its calls as JSON, else its text without reasoning; null for nothing."""
    turn = settled(turn)
    if "tool_calls" in turn:
        calls = [call["function"] for call in json.loads(turn["tool_calls"])]
        return json.dumps([{name: call[name] for name in ("name", "arguments")} for call in calls], ensure_ascii=False)
    return turn["content"].rpartition(THINK_CLOSE)[2].strip() or None


def marked(turns: list[Message]) -> list[bool] | None:
    """Of each assistant's turn whether the source wants it learned; null where it says so of none.

    A turn without a mark is learned where marks only take others out, and is not where they name those that are.
    """
    marks = [turn.get(MARKED) for turn in turns if turn["role"] == "assistant"]
    if not any(marks):
        return None
    return [mark == "yes" or (mark is None and "yes" not in marks) for mark in marks]


def unmarked(turns: list[Message]) -> list[Message]:
    """The turns as prompts have them."""
    return [{name: value for name, value in turn.items() if name != MARKED} for turn in turns]


def _mark(turn: dict[str, Any], here: str) -> dict[str, str]:
    value = _first(turn, _MARKS)
    if value is None:
        return {}
    if value not in (True, False):  # 1 and 0 are these
        raise DataError(f"{here}: {', '.join(_MARKS)} must be true, false, 1 or 0, got {shown(value)}. Correct or remove the row.")
    return {MARKED: "yes" if value else "no"}


def is_turn(value: Any) -> bool:
    """Whether a value looks like a turn."""
    return isinstance(value, dict) and isinstance(_first(value, _WHO), str)


def is_parts(value: Any) -> bool:
    """Whether a value is the content of a turn in parts, each of a type."""
    kinds = [part.get("type") if isinstance(part, dict) else None for part in value] if isinstance(value, list) else []
    return all(isinstance(kind, str) for kind in kinds) and not _PARTS.isdisjoint(kinds)


def text_of(parts: list[Any], name: str, where: str) -> str:
    """The text of parts; raises as `turns_of` does."""
    return _joined([item for kind, item in _parts(parts, "user", f"{where}: {name}") if kind == "text"])


def _listed(value: Any, name: str, where: str) -> list[Any]:
    """The turns of a list, of JSON, or of an object of lists, as `datasets` keeps a list of objects."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: {name} holds text that is no JSON, got {shown(value)}. Correct or remove the row.") from None
    if isinstance(value, dict) and all(isinstance(item, list) for item in value.values()) and len(set(map(len, value.values()))) == 1:
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} must be a list of turns, each with role and content, or from and value, got {shown(value)}.")
    return value


def _messages(role: str, turn: dict[str, Any], here: str) -> Iterator[Message]:
    """A turn, and before it those of results that it holds, as Anthropic has them."""
    content = _first(turn, _WHAT)
    if role == _CALLING:
        calls = _called(content)
        yield {"role": "assistant", "content": "", "tool_calls": json.dumps(calls, ensure_ascii=False)}
        return
    held: dict[str, list[Any]] = {"text": [], "thought": [], "call": [], "result": []}
    for kind, item in _parts(content, role, here):
        held[kind].append(item)
    results = _responses(_joined(held["text"])) if role == "tool" else []
    if len(results) > 1:  # of several calls at once
        yield from ({"role": "tool", "content": result} for result in results)
        return
    for result in held["result"]:
        answers = {"tool_call_id": result["tool_use_id"]} if isinstance(result.get("tool_use_id"), str) else {}
        yield {"role": "tool", "content": _text(result.get("content"), "tool", here), **answers}
    calls = [call for given in (turn.get("tool_calls"), turn.get("function_call"), held["call"]) for call in calls_of(given)]
    if content is None and turn.get("audio") is not None:
        raise UnusableError("not_text")
    if not calls and not any(name in turn for name in (*_WHAT, *_THOUGHTS)):
        raise DataError(f"{here}: has no content, only {', '.join(map(shown, turn))}. Correct or remove the row.")
    if not held["result"] or len(held["result"]) < sum(map(len, held.values())):
        yield {"role": role, "content": _content(role, turn, held, here), **_extras(turn, calls, here)}


def _content(role: str, turn: dict[str, Any], held: dict[str, list[Any]], here: str) -> str:
    text = _joined(held["text"])
    if role == "tool" and len(results := _responses(text)) == 1:
        return results[0]
    return _with_thought(text, _thought_beside(turn, here) or "\n\n".join(held["thought"]), here) if role == "assistant" else text


def _responses(text: str) -> list[str]:
    """What stands between marks of results, if all of a text does."""
    return [] if _RESPONSE.sub("", text).strip() else [found.strip() for found in _RESPONSE.findall(text)]


def _extras(turn: dict[str, Any], calls: list[Any], here: str) -> Message:
    extras = {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str) and turn[key]}
    if calls:
        extras["tool_calls"] = json.dumps(calls, ensure_ascii=False)
    return {key: whole_text(value, key, here) for key, value in extras.items()}


def _called(content: Any) -> list[dict[str, Any]]:
    """The calls of a turn that holds nothing else: as data, as JSON, or in Hermes' form."""
    if isinstance(content, str) and "<tool_call>" in content:
        rest, calls = without_calls(content)
        if calls and not rest.strip():
            return calls
    calls = calls_of(content)
    if not calls:
        raise UnusableError("call_not_readable")
    return calls


def _parts(content: Any, role: str, here: str) -> Iterator[tuple[str, Any]]:
    """What a turn holds, each with its kind: text, thought, call or result."""
    if content is None:
        return
    parts = content if isinstance(content, list) else [content]
    if role == "tool" and not isinstance(content, str) and not all(_kind(part) in _TEXTS for part in parts):
        yield "text", json_text(content, "content", here)
        return
    for part in parts:
        kind, text = _kind(part), part if isinstance(part, str) else _said(part)
        if text is not None:
            yield "text", whole_text(text, "content", here)
        elif kind in ("thinking", "reasoning"):
            yield "thought", _text(_first(part, (kind, "text", "content", "summary")), "assistant", here)
        elif kind == "tool_use":
            yield "call", part
        elif kind == "tool_result":
            yield "result", part
        elif kind is not None and kind not in _TEXTS:
            raise UnusableError("not_text")
        else:
            raise DataError(f"{here}: content must be text, or a list of parts of a type, got {shown(part)}. Correct or remove the row.")


def _kind(part: Any) -> str | None:
    if not isinstance(part, dict):
        return None
    kind = part.get("type")
    return kind if isinstance(kind, str) else "text" if isinstance(part.get("text"), str) else None


def _said(part: Any) -> str | None:
    """The text of a part that is one."""
    text = _first(part, ("refusal",) if part.get("type") == "refusal" else ("text",)) if isinstance(part, dict) else None
    return text if isinstance(text, str) and _kind(part) in (*_TEXTS, "refusal") else None


def _text(value: Any, role: str, here: str) -> str:
    return _joined([item for kind, item in _parts(value, role, here) if kind == "text"])


def _joined(texts: list[str]) -> str:
    """Parts as one text; on a line of their own, unless they bring white space."""
    whole = ""
    for text in texts:
        whole += ("\n" if whole and text and not whole[-1].isspace() and not text[0].isspace() else "") + text
    return whole


def _thought_beside(turn: dict[str, Any], here: str) -> str:
    value = _first(turn, _THOUGHTS)
    return _text(value, "assistant", here) if isinstance(value, str | list) else ""


def _with_thought(text: str, reasoning: str, here: str) -> str:
    """The text behind its reasoning; as it is where it holds that itself."""
    reasoning = with_think(reasoning).replace(THINK_OPEN, "").replace(THINK_CLOSE, "").strip()
    if is_blank(reasoning):
        return text
    own = with_think(text)
    if own.lstrip().startswith(THINK_OPEN):
        if reasoning in own:
            return text
        raise DataError(f"{here}: has a reasoning in its text and another beside it, got {shown(reasoning)}. Correct or remove the row.")
    return thought(reasoning, text)


def _first(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of some values that is there."""
    return next((values[name] for name in names if values.get(name) is not None), None)
