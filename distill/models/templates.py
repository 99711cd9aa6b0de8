r"""What a chat template makes of a conversation, and what is refused of it: the rendered text decides, not what was meant.

Templates raise on turns they don't know, drop others without a word, ignore arguments that are misspelt, and write today's date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from distill.errors import ModelError, visible
from distill.models.rendering import render
from distill.run.schema import THINK_CLOSE, THINK_OPEN, Message, extras_of

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_PROBE = "\u2042probe\u2042"
_USER: Message = {"role": "user", "content": "?"}
_CONVERSATIONS: tuple[list[Message], ...] = (
    [_USER],
    [{"role": "system", "content": "!"}, _USER],
    [_USER, {"role": "assistant", "content": f"{THINK_OPEN}\n.\n{THINK_CLOSE}\n\n{_PROBE}"}, _USER],
    [_USER, {"role": "assistant", "content": _PROBE}],
)
_TOOL = {"type": "function", "function": {"name": "f", "description": "?", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {}}}
_OF_TOOLS: list[Message] = [
    {**_USER, "tools": json.dumps([_TOOL])},
    {"role": "assistant", "content": "", "tool_calls": json.dumps([_CALL])},
    {"role": "tool", "content": "!", "tool_call_id": "123456789", "name": "f"},
]
_MARK = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|<(?:start|end)_of_turn>|\[/?INST\]")
"""Control tokens by their look."""
_OF_ANSWERS = re.compile(r"think|thought|reason|tool|function|python_tag", re.IGNORECASE)
_OF_RESULTS = re.compile(r"response|result|output|available", re.IGNORECASE)
_TAGS = re.compile(rf"{THINK_OPEN}|{THINK_CLOSE}|\s")


def refuse_dropped_turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: dict[str, Any], prompt: str) -> None:
    """Looks whether what system and user said is in the prompt; of earlier answers templates take the reasoning out.

    As it stands, or else in what it does: `/no_think` may be taken out, and change the rest.

    Raises:
        ModelError: a turn is missing.
    """
    for place, message in enumerate(messages):
        said = message["content"].strip()
        if message["role"] != "assistant" and said not in prompt and not _is_read(tokenizer, messages, place, kwargs, prompt):
            raise ModelError(
                f"{tokenizer.name_or_path}: the chat template leaves a turn of {visible(message['role'], 20)} out: "
                f"{visible(message['content'].strip(), 60)!r}. Put its text into prompts.template, or give another template with the key "
                "chat_template of this model."
            )
    if any(extras_of(message) or message["role"] == "tool" for message in messages):
        _refuse_dropped_calls(tokenizer, messages, kwargs)


def _refuse_dropped_calls(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: dict[str, Any]) -> None:
    """Looks whether the template writes each tool, call and result, by giving it others with names that stand nowhere else."""
    shadows: list[Message] = []
    names: dict[str, str] = {}  # what is looked for, and what it stands for
    for message in messages:
        shadow = dict(message)
        for key, what in (("tools", "the tool"), ("tool_calls", "the call of")):
            if key in shadow:
                listed = json.loads(shadow[key])
                for entry in listed:
                    function = entry.get("function", entry)
                    probe = f"probed{len(names)}"
                    names[probe] = f"{what} {visible(str(function['name']), 40)!r}"
                    function["name"] = probe
                shadow[key] = json.dumps(listed)
        if message["role"] == "tool":
            shadow["content"] = f"probed{len(names)}"
            names[shadow["content"]] = f"a tool's result, {visible(message['content'], 40)!r},"
        shadows.append(shadow)
    text = render(tokenizer, shadows, kwargs)
    lost = next((what for probe, what in names.items() if re.search(rf"{probe}(?!\d)", text) is None), None)
    if lost is not None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template leaves {lost} out. Give one that writes tools, calls and results, with the key "
            "chat_template of this model; or write them into the turns of system, user and assistant as text."
        )


def _is_read(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: int, kwargs: dict[str, Any], prompt: str) -> bool:
    """Whether another text in a turn would make another prompt."""
    other: list[Message] = [*messages[:place], {**messages[place], "content": _PROBE}, *messages[place + 1 :]]
    return _written(tokenizer, kwargs, other) != prompt


def check_template(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    """Looks whether every argument has an effect, and whether a prompt ends where an answer begins.

    Raises:
        ModelError: not so.
    """
    name = tokenizer.name_or_path
    prompt, without = (render(tokenizer, [_USER], kwargs, prompt=prompt) for prompt in (True, False))
    template = tokenizer.get_chat_template()
    found = _compile_jinja_template(template)
    read = meta.find_undeclared_variables(found.environment.parse(template))
    known = sorted(read - set(found.globals) - {"messages", "add_generation_prompt", *tokenizer.special_tokens_map})
    for key, value in kwargs.items():
        if key not in read or not _has_effect(tokenizer, kwargs, key):
            raise ModelError(
                f"{name}: chat_template_kwargs.{visible(key, 40)} ({visible(repr(value), 40)}) changes nothing that the chat template "
                f"writes. It reads {', '.join(known) or 'no argument'}. Correct it, or leave it out."
            )
    whole = render(tokenizer, [_USER, {"role": "assistant", "content": _PROBE}], kwargs, prompt=False)
    head = whole.rpartition(_PROBE)[0]
    if prompt == without and head.startswith(prompt) and (left := _TAGS.sub("", head[len(prompt) :])):
        raise ModelError(
            f"{name}: the chat template writes {visible(left, 60)!r} before an answer, but not at the end of a prompt: it knows no "
            "add_generation_prompt. Give one that does with the key chat_template of this model."
        )


def _has_effect(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], key: str) -> bool:
    """Whether some other value of an argument would write another text: it may be set to what a template takes by itself."""
    rest = {name: value for name, value in kwargs.items() if name != key}
    value = kwargs[key]
    others = [rest, *(rest | {key: other} for other in ([not value] if isinstance(value, bool) else [_PROBE, None]))]
    return any(
        _written(tokenizer, kwargs, talk) != _written(tokenizer, other, talk)
        for other in others
        for talk in (*_CONVERSATIONS, _OF_TOOLS[:1], _OF_TOOLS)
    )


def _written(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], messages: list[Message]) -> str | None:
    """Null where the template refuses: it may know no system turn, or want a value of certain ones."""
    try:
        return render(tokenizer, messages, kwargs)
    except ModelError:
        return None


def end_of_turn(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], *, must: bool = False) -> int:
    """Id of the first token the template writes after an assistant's answer, else the tokenizer's own end.

    Args:
        tokenizer: With a template.
        kwargs: Of the template.
        must: Whether the template has to write one.

    Raises:
        ModelError: there is none.
    """
    text = render(tokenizer, [_USER, {"role": "assistant", "content": _PROBE}], kwargs, prompt=False)
    _, found, after = text.rpartition(_PROBE)
    name = tokenizer.name_or_path
    if not found:
        raise ModelError(f"{name}: the chat template does not write the assistant's answer out.")
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        return int(ids[0])
    if must or tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: behind an answer the chat template writes {visible(after, 40)!r}, no token that ends a turn.")
    return int(tokenizer.eos_token_id)


def set_template(tokenizer: PreTrainedTokenizerBase, given: str) -> None:
    """Gives a tokenizer another template, by name (`chatml`) or from a file, and proves its tokens.

    Raises:
        ModelError: the file can't be read, or the template writes tokens that the vocabulary does not have.
    """
    name = tokenizer.name_or_path
    if given == "chatml":
        begins = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{- bos_token }}" if begins else "") + CHATML
    else:
        try:
            tokenizer.chat_template = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{visible(given, 200)}: this chat_template can't be read: {error}. Give a file, or chatml.") from None
    written = "".join(filter(None, (_written(tokenizer, {}, talk) for talk in _CONVERSATIONS)))
    own = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = sorted(set(_MARK.findall(written)) - own)
    if missing:
        has = ", ".join(sorted(own & set(_MARK.findall(" ".join(own))))[:8])
        raise ModelError(
            f"{name}: chat_template {visible(given, 200)} writes {', '.join(missing)}, which this vocabulary spells in pieces. Give a "
            f"template of its own tokens ({has or 'it has none of this kind'}), as a file."
        )
    end_of_turn(tokenizer, {}, must=True)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that steer a conversation, with their ids: no text from data may become one of them.

    Flags don't decide it: R1's token of a user's turn is not marked special. What the template writes is one, and what looks like
    one; but not tags of thoughts and calls, which are a part of answers, nor white space.
    """
    template = tokenizer.get_chat_template()
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if (token.special or token.content in template or _MARK.fullmatch(token.content))
        and not token.content.isspace()
        and (not _OF_ANSWERS.search(token.content) or _OF_RESULTS.search(token.content))
    }


def answer_tags(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tags of thoughts and tools that are single tokens, with their ids."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if _OF_ANSWERS.search(token.content)}
