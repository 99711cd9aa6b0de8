r"""How a prompt is put to a model, and which tokens it learns; what templates do is in `templates`.

A training row is `prompt_ids + completion_ids`, where the prompt is rendered with its generation prompt, exactly as at
inference, and the completion is tokenised as it stands, with the token that ends a turn after it. The assistant's turn
is never rendered by the template, because templates change it: R1-Distill's deletes the reasoning, Qwen3's adds an
empty one. A template that opens the reasoning itself (`...<think>\n` at the end of the prompt) keeps that in the prompt.
Text from data never becomes a token that steers a conversation: `<|im_end|>` in a question is read in pieces, as it stands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from distill.errors import ModelError, visible
from distill.models.calls import CallForm, call_form, pattern_of
from distill.models.rendering import render
from distill.models.templates import answer_tags, check_template, control_tokens, end_of_turn, refuse_dropped_turns, set_template
from distill.models.thoughts import after, opening_of, rest_of
from distill.run.calls import parted
from distill.run.schema import THINK_OPEN, Message

IGNORE = -100  # label of a position without loss, as in torch and transformers

# Tokens that exist in common vocabularies for padding, or that a text model never reads or writes.
_PAD_CANDIDATES = (
    "<|endoftext|>",
    "<pad>",
    "[PAD]",
    "<|PAD_TOKEN|>",
    "<|finetune_right_pad_id|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<unk>",
)
_MARKS = ("\U000f0000", "\U000f0001")  # the library's, around what must stay text
_TAIL = 8  # tokens that are looked at before all are


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with its template, and what the two imply. Make it with `chat_format`."""

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: dict[str, Any]
    end_of_turn_id: int
    """Token that the template writes after an assistant's text; the last supervised token of a row, but for some that call tools."""
    stop_ids: tuple[int, ...]
    """Tokens at which generation stops: the end of a turn and the tokenizer's own EOS."""
    pad_id: int
    controls: re.Pattern[str]
    """Matches the tokens that steer a conversation, where they stand in a text."""
    control_ids: frozenset[int]
    """Ids of those that don't end an answer: inside of one they are nothing to learn from."""
    tags: dict[str, int]
    """Tags of thoughts and tools that are single tokens."""
    calls: CallForm
    """How the template writes the calls of an answer."""

    def prompt_text(self, messages: list[Message]) -> str:
        """The conversation as text up to where the assistant begins to write.

        Raises:
            ModelError: the template refuses it, or leaves a turn out.
        """
        prompt = render(self.tokenizer, messages, self.template_kwargs)
        refuse_dropped_turns(self.tokenizer, messages, self.template_kwargs, prompt)
        return prompt

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """`prompt_text` as token ids; the template has already written any beginning-of-sequence token."""
        return self._ids(self._marked_prompt(messages))

    def mentions_controls(self, text: str) -> bool:
        """Whether a text holds the name of a token that steers a conversation; it is read and learned in pieces."""
        return self.controls.search(text) is not None

    def opening(self, messages: list[Message]) -> str:
        r"""What the template has already written of the assistant's answer: `<think>\n` for some families, else ``."""
        return opening_of(self.prompt_text(messages))

    def completion_ids(self, completion: str, opening: str = "", *, finished: bool = True) -> list[int]:
        """A completion as the token ids the model has to write.

        Args:
            completion: Whole text of the answer, reasoning included.
            opening: What the prompt has already written of it; see `opening`.
            finished: Whether to add the token that ends the turn.
        """
        text, calls = self._spelled(after(opening, completion))
        ids = self._ids(text + calls)
        return [*ids, self.end_of(completion)] if finished else ids

    def row(self, messages: list[Message], completion: str, *, finished: bool = True) -> tuple[list[int], list[int]]:
        """One training row: `input_ids` and `labels` of equal length, not shifted; `IGNORE` on the whole prompt."""
        return self.trace_row({"messages": messages, "completion": completion, "finish_reason": None if finished else "length"})

    def trace_row(self, trace: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The training row of a trace.

        What the student wrote itself is taken as the ids it drew: its text, tokenised anew, may be other ids, and a
        cut-off text other letters. So is what a teacher drew, where its ids write the same text in this vocabulary. All
        others are read as text. A trace that did not end gets no end of turn.

        Raises:
            ModelError: the template and the completion don't fit: a thought is opened twice, or never closed.
        """
        return self.trace_rows([trace])[0]

    def trace_rows(self, traces: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        """`trace_row` of each, tokenised together: on several cores where the tokenizer may use them."""
        texts: list[str] = []
        written: list[list[int] | None] = []  # completions whose ids are known
        ends: list[list[int]] = []
        for trace in traces:
            if _own(trace):
                written.append(list(trace["completion_ids"]))
                ends.append([])
                continue
            prompt = self._marked_prompt(trace["messages"])
            text, calls = self._spelled(rest_of(prompt, trace))
            drawn = None if calls else self._drawn(trace, opening_of(prompt))
            written.append(drawn)
            texts += [prompt] if drawn is not None else [prompt, text + calls]
            cut_off = trace.get("finish_reason") == "length"
            end = self.end_of(trace["completion"]) if drawn is None else self._drawn_end(trace["completion_ids"])
            ends.append([] if cut_off else [end])
        ids = iter(self._all_ids(texts))
        rows = []
        for trace, completion, last in zip(traces, written, ends, strict=True):
            prompt_ids = list(trace["prompt_ids"]) if _own(trace) else next(ids)
            rows.append(_labelled(prompt_ids, [*(next(ids) if completion is None else completion), *last]))
        return rows

    def _spelled(self, completion: str) -> tuple[str, str]:
        """The text of a completion, and the calls behind it if the template has a form of its own; control tokens from data marked."""
        text, calls = self.calls.spelled(completion)
        return self._marked(text), calls

    def end_of(self, completion: str) -> int:
        """The token that ends a turn of this text: behind calls it may be another than behind text."""
        other = self.calls.end_id != self.end_of_turn_id and bool(parted(completion)[1])
        return self.calls.end_id if other else self.end_of_turn_id

    def _drawn_end(self, ids: Sequence[int]) -> int:
        """The token that ended what was drawn, if it is one that the template writes."""
        return self.calls.end_id if ids and ids[-1] == self.calls.end_id else self.end_of_turn_id

    def _drawn(self, trace: dict[str, Any], opening: str) -> list[int] | None:
        """The ids that a teacher drew, as far as they are to be written behind the prompt, without an end of turn.

        None where there are none, or where they are not this text in this vocabulary, or hold a control token.
        """
        ids = trace.get("completion_ids")
        if ids is None:
            return None
        kept, text = self._without_end(ids), trace["completion"]
        # Another vocabulary shows at the end already; ids behind it have no text at all.
        if max(kept, default=0) >= len(self.tokenizer) or not text.endswith(self._text(kept[-_TAIL:]).lstrip("\ufffd")):
            return None
        lead = text.removesuffix(self._text(kept))
        if (kept and lead == text) or lead.strip() not in ("", THINK_OPEN) or not self.control_ids.isdisjoint(kept):
            return None
        if any(text.count(tag, len(lead)) != kept.count(index) for tag, index in self.tags.items()):
            return None  # the author had no token for it, and drew it in pieces
        if lead == opening:
            return kept
        before = self._ids(opening or lead)
        if lead:  # the author's template wrote it, this one does not
            return None if opening else [*before, *kept]
        return kept[len(before) :] if kept[: len(before)] == before else None

    def text_of(self, completion_ids: list[int], opening: str = "") -> str:
        """Generated ids as the whole text of the answer: without the end of the turn, with what the prompt opened."""
        return opening + self._text(self._without_end(completion_ids))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        kept, ends = list(ids), {*self.stop_ids, self.pad_id}
        while kept and kept[-1] in ends:
            kept.pop()
        return kept

    def _marked_prompt(self, messages: list[Message]) -> str:
        """`prompt_text`, with marks around the control tokens that come from data."""
        prompt = self.prompt_text(messages)
        texts = (text for message in messages for text in message.values())
        if not any(self.controls.search(text) or "\\" in text for text in texts):  # in JSON a token may be escaped
            return prompt
        return render(self.tokenizer, messages, self.template_kwargs, controls=self.controls)

    def _marked(self, text: str) -> str:
        return mark_control_tokens(text, self.controls) if self.controls.search(text) else text

    def _ids(self, text: str) -> list[int]:
        if _MARKS[0] in text or _MARKS[1] in text:
            return self._marked_ids(text)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _marked_ids(self, text: str) -> list[int]:
        try:
            return list(encode_marked_chat(self.tokenizer, text))
        except ValueError as error:
            raise ModelError(f"{self.tokenizer.name_or_path}: {visible(str(error), 200)}. Take the row out of the data.") from None

    def _all_ids(self, texts: list[str]) -> list[list[int]]:
        if len(texts) <= 2:  # not worth the threads, behind which a process had better not fork
            return [self._ids(text) for text in texts]
        ids = list(self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        for place, text in enumerate(texts):
            if _MARKS[0] in text or _MARKS[1] in text:
                ids[place] = self._marked_ids(text)
        return ids

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 over every token and its id: equal digests mean ids can be exchanged."""
        pairs = sorted(self.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        return hashlib.sha256("\n".join(f"{index} {token}" for token, index in pairs).encode()).hexdigest()

    @property
    def template_digest(self) -> str:
        """SHA-256 of the chat template and the arguments it is rendered with."""
        return hashlib.sha256(f"{self.tokenizer.chat_template}{sorted(self.template_kwargs.items())}".encode()).hexdigest()


def chat_format(
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any] | None = None,
    pad_token: str | None = None,
    chat_template: str | None = None,
) -> ChatFormat:
    """Works out how a tokenizer's template ends a turn and which token can pad.

    The tokenizer's `pad_token` is set to the padding found, so that what is saved later carries it; so is a template given.

    Args:
        tokenizer: With a chat template, unless one is given.
        template_kwargs: Passed to the template at every rendering.
        pad_token: Padding to use; null finds one that ends no turn.
        chat_template: `chatml` or a file, in place of the tokenizer's own.

    Raises:
        ModelError: no template, no token that ends a turn, or no padding apart from it; or the template does not do what it is asked.
    """
    kwargs = dict(template_kwargs or {})
    name = tokenizer.name_or_path
    if chat_template is not None:
        set_template(tokenizer, chat_template)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name}: the tokenizer has no chat template, as is usual of a base model. Set the key chat_template in this model's section "
            "of the recipe: chatml, if its vocabulary has <|im_start|> and <|im_end|>, else a file with a Jinja template of its own tokens."
        )
    check_template(tokenizer, kwargs)
    end, controls = end_of_turn(tokenizer, kwargs), control_tokens(tokenizer)
    calls = call_form(tokenizer, kwargs, controls, end)
    stop_ids = tuple(dict.fromkeys(i for i in (end, tokenizer.eos_token_id, calls.end_id) if i is not None))
    pad_id = _padding(tokenizer, stop_ids, pad_token)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    inside = frozenset(controls.values()) - set(stop_ids)
    return ChatFormat(tokenizer, kwargs, end, stop_ids, pad_id, pattern_of(controls), inside, answer_tags(tokenizer), calls)


def _own(trace: dict[str, Any]) -> bool:
    """Whether a trace counts as the ids that the student drew."""
    return trace.get("author") == "student" and trace.get("completion_ids") is not None


def _labelled(prompt_ids: list[int], completion_ids: list[int]) -> tuple[list[int], list[int]]:
    return prompt_ids + completion_ids, [IGNORE] * len(prompt_ids) + completion_ids


def _padding(tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], asked: str | None) -> int:
    vocabulary = tokenizer.get_vocab()
    if asked is not None:
        if asked not in vocabulary:
            raise ModelError(f"{tokenizer.name_or_path}: pad_token {asked!r} is not in the vocabulary.")
        if vocabulary[asked] in stop_ids:
            raise ModelError(f"{tokenizer.name_or_path}: pad_token {asked!r} also ends a turn, so the model would never learn to stop.")
        return int(vocabulary[asked])
    for token in (tokenizer.pad_token, *_PAD_CANDIDATES):
        if token in vocabulary and vocabulary[token] not in stop_ids:
            return int(vocabulary[token])
    raise ModelError(
        f"{tokenizer.name_or_path}: no token for padding that does not also end a turn. "
        "Name an unused one with pad_token, in the recipe's section of this model."
    )
