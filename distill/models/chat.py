r"""The only place that touches chat templates: how a prompt is put to a model, and which tokens it learns.

A training row is `prompt_ids + completion_ids`, where the prompt is rendered with its generation prompt, exactly as at
inference, and the completion is tokenised as it stands, with the token that ends a turn after it. The assistant's turn
is never rendered by the template, because templates change it: R1-Distill's deletes the reasoning, Qwen3's adds an
empty one. A template that opens the reasoning itself (`...<think>\n` at the end of the prompt) keeps that in the prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.errors import ModelError
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
_PROBE = "\u2042probe\u2042"


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with its template, and what the two imply. Make it with `chat_format`."""

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: dict[str, Any]
    end_of_turn_id: int
    """Token that the template writes after an assistant's answer; the last supervised token of a row."""
    stop_ids: tuple[int, ...]
    """Tokens at which generation stops: the end of a turn and the tokenizer's own EOS."""
    pad_id: int

    def prompt_text(self, messages: list[Message]) -> str:
        """The conversation as text up to where the assistant begins to write."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs))

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """`prompt_text` as token ids; the template has already written any beginning-of-sequence token."""
        return self._ids(self.prompt_text(messages))

    def opening(self, messages: list[Message]) -> str:
        r"""What the template has already written of the assistant's answer: `<think>\n` for some families, else ``."""
        return _opening(self.prompt_text(messages))

    def completion_ids(self, completion: str, opening: str = "", *, finished: bool = True) -> list[int]:
        """A completion as the token ids the model has to write.

        Args:
            completion: Whole text of the answer, reasoning included.
            opening: What the prompt has already written of it; see `opening`.
            finished: Whether to add the token that ends the turn.
        """
        ids = self._ids(_after(opening, completion))
        return [*ids, self.end_of_turn_id] if finished else ids

    def row(self, messages: list[Message], completion: str, *, finished: bool = True) -> tuple[list[int], list[int]]:
        """One training row: `input_ids` and `labels` of equal length, not shifted; `IGNORE` on the whole prompt."""
        return self.trace_row({"messages": messages, "completion": completion, "finish_reason": None if finished else "length"})

    def trace_row(self, trace: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The training row of a trace.

        What the student wrote itself is taken as the ids it drew: its text, tokenised anew, may be other ids, and a
        cut-off text other letters. All others are read as text. A trace that did not end gets no end of turn.
        """
        return self.trace_rows([trace])[0]

    def trace_rows(self, traces: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        """`trace_row` of each, tokenised together: on several cores where the tokenizer may use them."""
        texts: list[str] = []
        for trace in traces:
            if not _drawn(trace):
                prompt = self.prompt_text(trace["messages"])
                texts += [prompt, _after(_opening(prompt), trace["completion"])]
        ids = iter(self._all_ids(texts))
        rows = []
        for trace in traces:
            if _drawn(trace):
                rows.append(_labelled(list(trace["prompt_ids"]), list(trace["completion_ids"])))
            else:
                end = [] if trace.get("finish_reason") == "length" else [self.end_of_turn_id]
                rows.append(_labelled(next(ids), [*next(ids), *end]))
        return rows

    def text_of(self, completion_ids: list[int], opening: str = "") -> str:
        """Generated ids as the whole text of the answer: without the end of the turn, with what the prompt opened."""
        stop = set(self.stop_ids) | {self.pad_id}
        kept = list(completion_ids)
        while kept and kept[-1] in stop:
            kept.pop()
        return opening + str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _all_ids(self, texts: list[str]) -> list[list[int]]:
        if len(texts) <= 2:  # not worth the threads, behind which a process had better not fork
            return [self._ids(text) for text in texts]
        return list(self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])

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
    tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None, pad_token: str | None = None
) -> ChatFormat:
    """Works out how a tokenizer's template ends a turn and which token can pad.

    The tokenizer's `pad_token` is set to the padding found, so that what is saved later carries it.

    Args:
        tokenizer: With a chat template.
        template_kwargs: Passed to the template at every rendering.
        pad_token: Padding to use; null finds one that ends no turn.

    Raises:
        ModelError: no template, no token that ends a turn, or no padding apart from it.
    """
    kwargs = dict(template_kwargs or {})
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ModelError(f"{name}: the tokenizer has no chat template. Use an instruct model's tokenizer through student.tokenizer.")
    end_of_turn = _end_of_turn(tokenizer, kwargs)
    stop_ids = tuple(dict.fromkeys(i for i in (end_of_turn, tokenizer.eos_token_id) if i is not None))
    pad_id = _padding(tokenizer, stop_ids, pad_token)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return ChatFormat(tokenizer, kwargs, end_of_turn, stop_ids, pad_id)


def _drawn(trace: dict[str, Any]) -> bool:
    """Whether a trace counts as the ids that the student drew."""
    return trace.get("author") == "student" and trace.get("completion_ids") is not None


def _opening(prompt: str) -> str:
    match = re.search(rf"{THINK_OPEN}\s*\Z", prompt)
    return match.group() if match else ""


def _after(opening: str, completion: str) -> str:
    """What is left of a completion to be written behind what the template has opened."""
    return completion.removeprefix(THINK_OPEN).lstrip("\n") if opening and completion.startswith(THINK_OPEN) else completion


def _labelled(prompt_ids: list[int], completion_ids: list[int]) -> tuple[list[int], list[int]]:
    return prompt_ids + completion_ids, [IGNORE] * len(prompt_ids) + completion_ids


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> int:
    """Id of the first token the template writes after an assistant's answer."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, **kwargs))
    _, found, after = text.rpartition(_PROBE)
    if not found:
        raise ModelError(f"{tokenizer.name_or_path}: the chat template does not write the assistant's answer out.")
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if ids and ids[0] in tokenizer.added_tokens_decoder:
        return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer has a token that ends a turn.")
    return int(tokenizer.eos_token_id)


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
