"""One vocabulary for two models: which of the teacher's tokens the student has, and where both read the same token.

Decided by what a token writes, never by the size of a vocabulary: Qwen2.5 comes with 151,936 and 152,064 rows of one
tokenizer, and R1-Distill and Qwen3 have `<think>` at different ids. Byte-level tokens (GPT-2's alphabet) and those of
sentencepiece (`▁`, `<0xE2>`) are compared as the bytes they stand for, added tokens by their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill.models.calls import same_parts
from distill.models.chat import IGNORE, ChatFormat
from distill.run.calls import parted
from distill.run.schema import THINK_OPEN, trace_key

NONE = -1
"""In place of an id or an index: there is no counterpart."""

Ids = NDArray[np.int32]

_LETTERS: dict[int, str] = {ord(letter): chr(byte) for byte, letter in bytes_to_unicode().items()}
_SPACE = "\u2581"  # sentencepiece's
_BETWEEN = "\u241f"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a tokenizer write."""

    texts: list[bytes]
    """By id; added tokens as their name, ids without a token as nothing."""
    added: dict[int, str]
    """Tokens that stand for themselves whatever is around them, such as `<think>`."""
    special: frozenset[int]
    """Those among them that are control tokens: their name in a text is not what they mean."""
    fallback: frozenset[int]
    """Single bytes for what a vocabulary of letters can't write."""
    on_bytes: bool
    """Whether every token that is not added stands for bytes, as in GPT-2's alphabet; those of sentencepiece stand for letters."""


@dataclass(frozen=True)
class VocabularyMap:
    """The teacher's tokens as the student's. Make it with `vocabulary_map`."""

    student_ids: Ids
    """(V of the teacher,) the student's id of the same token, or -1. No two tokens share one."""
    teacher_ids: Ids
    """(V of the student,) its inverse."""
    identical: bool
    """Whether both have the same tokenizer and end a turn with the same token: ids are exchanged as they are."""
    same_words: bool
    """Whether all tokens but the added ones have a counterpart, on both sides."""
    teacher: Tokens
    student: Tokens

    @property
    def advice(self) -> str:
        """What can be done where too few tokens of the two are the same."""
        return (
            f"Take a teacher with the student's tokenizer, or {self.other_method}; or lower score.min_aligned, and the rest is learned "
            "without targets."
        )

    @property
    def other_method(self) -> str:
        """The method that such a pair can be trained by."""
        both = self.teacher.on_bytes and self.student.on_bytes
        return "train.method cross_tokenizer" if both else "train.method sft, which needs the teacher's text alone"

    @property
    def teacher_size(self) -> int:
        """Number of the teacher's token ids; rows of its head behind them are padding."""
        return len(self.student_ids)

    @property
    def student_size(self) -> int:
        """Number of the student's token ids."""
        return len(self.teacher_ids)


@dataclass(frozen=True)
class AlignedRow:
    """A trace as the student learns it and as the teacher reads it. Make it with `align`."""

    key: str
    """Names the trace: `prompt_id/sample_index`."""
    input_ids: Ids
    """The student's training row."""
    labels: Ids
    """Not shifted; `IGNORE` where a token is not supervised."""
    teacher_ids: Ids
    """What the teacher reads, up to the last token that is needed."""
    positions: Ids
    """(supervised tokens,) index in `teacher_ids` of the same written token, or -1. The teacher predicts the token at
    index j >= 1 from its hidden state at j - 1; so L tokens have L - 1 predictions."""

    def __post_init__(self) -> None:
        assert len(self.positions) == int((self.labels != IGNORE).sum())
        assert not (self.positions == 0).any(), "the first token is predicted from nothing"
        assert self.positions.max(initial=NONE) < max(len(self.teacher_ids), 1)

    @property
    def written(self) -> Ids:
        """(supervised tokens,) the student's ids of them."""
        chosen: Ids = self.labels[self.labels != IGNORE]
        return chosen

    def cut(self, max_length: int) -> AlignedRow:
        """The first `max_length` tokens of the student's row, and what the teacher must read for them."""
        labels = self.labels[:max_length]
        positions = self.positions[: int((labels != IGNORE).sum())]
        return replace(
            self,
            input_ids=self.input_ids[:max_length],
            labels=labels,
            teacher_ids=self.teacher_ids[: int(positions.max(initial=NONE)) + 1],
            positions=positions,
        )


def vocabulary_map(teacher: ChatFormat, student: ChatFormat) -> VocabularyMap:
    """The student's id for every token of the teacher, or -1 where it has none.

    The token that ends a turn becomes the token that ends a turn, whatever the two are called; R1-Distill's is 151643,
    which in Qwen's vocabulary is `<|endoftext|>` and must not be taken for it.
    """
    entries: list[dict[str, int]] = [chat.tokenizer.get_vocab() for chat in (teacher, student)]
    theirs = _tokens(teacher, entries[0])
    if entries[0] == entries[1] and teacher.end_of_turn_id == student.end_of_turn_id:
        ids = np.arange(len(theirs.texts), dtype=np.int32)
        return VocabularyMap(ids, ids, True, True, theirs, theirs)
    ours = _tokens(student, entries[1])
    plain, named = _lookups(ours, student.end_of_turn_id)
    own, _ = _lookups(theirs, teacher.end_of_turn_id)
    student_ids = np.full(len(theirs.texts), NONE, np.int32)
    for index, text in enumerate(theirs.texts):
        name = theirs.added.get(index)
        if name in named:
            student_ids[index] = named[name]
        elif own.get(text) == index:
            student_ids[index] = plain.get(text, NONE)
    student_ids[teacher.end_of_turn_id] = student.end_of_turn_id
    # Should two tokens of the teacher still write the same, the first is it.
    found, first = np.unique(student_ids, return_index=True)
    only = np.full_like(student_ids, NONE)
    only[first] = found
    teacher_ids = np.full(len(ours.texts), NONE, np.int32)
    teacher_ids[only[only >= 0]] = np.flatnonzero(only >= 0)
    same_words = all(_words(ids, tokens) for ids, tokens in ((only, theirs), (teacher_ids, ours)))
    return VocabularyMap(only, teacher_ids, False, same_words, theirs, ours)


def align(trace: dict[str, Any], teacher: ChatFormat, student: ChatFormat, vocabulary: VocabularyMap) -> AlignedRow:
    """A trace as the student's training row and the teacher's reading of it, with the tokens that both write.

    The teacher reads the prompt in its own template. With one tokenizer it reads the student's very ids, which for a
    text that the student wrote may be others than tokenising would give; else its own tokens of the text. Then a token
    has a counterpart where both have a boundary before it and after it.

    Args:
        trace: A row of schema `TRACE`.
        teacher: Its tokenizer and template.
        student: Its tokenizer and template.
        vocabulary: Of the two.
    """
    input_ids, labels = student.trace_row(trace)
    written = [label for label in labels if label != IGNORE]
    thinks = trace["completion"].lstrip().startswith(THINK_OPEN)
    leads = [chat.opening(trace["messages"]) if thinks else "" for chat in (teacher, student)]
    prompt = teacher.prompt_ids(trace["messages"])
    # What the student wrote itself is read as it stands; a call that was brought each reads as its own template writes it.
    same_form = teacher.calls.spelled(trace["completion"]) == student.calls.spelled(trace["completion"])
    read = _token_by_token(written, teacher, leads, vocabulary) if same_form else None
    if read is None:
        completion, places = _by_bytes(trace["completion"], written, (teacher, student), leads, vocabulary)
    else:
        completion, places = read
    positions = np.where(places >= 0, places + len(prompt), NONE).astype(np.int32)
    needed = int(positions.max(initial=NONE)) + 1
    return AlignedRow(
        trace_key(trace),
        np.array(input_ids, np.int32),
        np.array(labels, np.int32),
        np.array([*prompt, *completion][:needed], np.int32),
        positions,
    )


def _tokens(chat: ChatFormat, entries: dict[str, int]) -> Tokens:
    """What the tokens of a tokenizer write, as bytes."""
    listed = chat.tokenizer.added_tokens_decoder
    added = {index: str(token.content) for index, token in listed.items()}
    ordinary = {token: index for token, index in entries.items() if index not in added}
    texts = [b""] * (max([*entries.values(), *added]) + 1)
    fallback = set()
    joined = _BETWEEN.join(ordinary)
    # A byte-level vocabulary is written in the 256 letters that stand for bytes, and in no others.
    on_bytes = set(joined) <= {_BETWEEN, *map(chr, _LETTERS)}
    if on_bytes:
        for index, token in zip(ordinary.values(), joined.translate(_LETTERS).split(_BETWEEN), strict=True):
            texts[index] = token.encode("latin-1")
    else:
        for token, index in ordinary.items():
            byte = _BYTE_TOKEN.fullmatch(token)
            texts[index] = bytes.fromhex(byte[1]) if byte else token.replace(_SPACE, " ").encode()
            if byte:
                fallback.add(index)
    for index, name in added.items():
        texts[index] = name.encode()
    special = frozenset(index for index, token in listed.items() if token.special)
    return Tokens(texts, added, special, frozenset(fallback), on_bytes)


def _lookups(tokens: Tokens, end_of_turn: int) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ids by what tokens write, control tokens left out, and by the names of added ones; never the end of a turn."""
    left_out = {*tokens.special, *tokens.fallback, end_of_turn}
    # The first of several that write the same is the one.
    plain = {text: index for index, text in reversed(list(enumerate(tokens.texts))) if text and index not in left_out}
    for index in tokens.fallback:
        plain.setdefault(tokens.texts[index], index)
    return plain, {name: index for index, name in tokens.added.items() if index != end_of_turn}


def _words(counterparts: Ids, tokens: Tokens) -> bool:
    """Whether every token that is not added has a counterpart."""
    lost = np.flatnonzero(counterparts == NONE)
    return all(int(index) in tokens.added or not tokens.texts[index] for index in lost)


def _token_by_token(
    written: Sequence[int], teacher: ChatFormat, leads: list[str], vocabulary: VocabularyMap
) -> tuple[list[int], NDArray[np.int64]] | None:
    """The student's ids as the teacher's, with their places; None where the teacher would write the text otherwise."""
    ids = vocabulary.teacher_ids[np.array(written, np.int64)]
    if not vocabulary.same_words or (ids < 0).any() or (not vocabulary.identical and _hides_added(ids, vocabulary.teacher)):
        return None
    places = np.arange(len(ids))
    teacher_lead, student_lead = leads
    if teacher_lead == student_lead:
        return ids.tolist(), places
    if not teacher_lead:  # the student's prompt begins the answer, the teacher's does not
        before = teacher.completion_ids(student_lead, finished=False)
        return [*before, *ids.tolist()], places + len(before)
    if student_lead:
        return None
    skipped, rest = 0, teacher_lead.encode()
    while rest and skipped < len(ids):
        text = vocabulary.teacher.texts[ids[skipped]]
        if not text or not rest.startswith(text):
            return None
        rest, skipped = rest[len(text) :], skipped + 1
    places = places - skipped
    return None if rest else (ids[skipped:].tolist(), np.where(places >= 0, places, NONE))


def _hides_added(ids: Ids, tokens: Tokens) -> bool:
    """Whether the name of an added token is written in other tokens: the tokenizer would have put it in their place."""
    text = b"".join(b"\xff" if int(index) in tokens.added else tokens.texts[index] for index in ids)
    return any(name.encode() in text for name in tokens.added.values())


def _by_bytes(
    text: str, written: Sequence[int], chats: tuple[ChatFormat, ChatFormat], leads: list[str], vocabulary: VocabularyMap
) -> tuple[list[int], NDArray[np.int64]]:
    """The teacher's own tokens of a text, and for each of the student's where among them it stands, or -1."""
    teacher, student = chats
    ends = bool(written) and written[-1] in (student.end_of_turn_id, student.calls.end_id)
    ours = list(written[:-1] if ends else written)
    theirs = teacher.completion_ids(text, leads[0], finished=False)
    their_bytes, their_ends = _spans(leads[0], theirs, vocabulary.teacher.texts)
    our_bytes, our_ends = _spans(leads[1], ours, vocabulary.student.texts)
    places = np.full(len(written), NONE)
    calls = parted(text)[1] if their_bytes != our_bytes else []
    found = _matching(their_bytes, their_ends, our_bytes, our_ends, same_parts(their_bytes, our_bytes, calls))
    same = [place >= 0 and vocabulary.student_ids[theirs[place]] == index for place, index in zip(found.tolist(), ours, strict=True)]
    places[: len(ours)] = np.where(same, found, NONE)
    if ends:
        places[-1] = len(theirs)
        theirs = [*theirs, teacher.end_of(text)]
    return theirs, places


def matching(their_lead: bytes, theirs: Sequence[bytes], our_lead: bytes, ours: Sequence[bytes]) -> NDArray[np.int64]:
    """(ours,) which of their tokens begins and ends where each of ours does, in what both begin or end with; or -1.

    Args:
        their_lead: What stands before their first token.
        theirs: What each of their tokens writes.
        our_lead: What stands before our first.
        ours: What each of ours writes.
    """
    (their_bytes, their_ends), (our_bytes, our_ends) = _written(their_lead, theirs), _written(our_lead, ours)
    return _matching(their_bytes, their_ends, our_bytes, our_ends)


def ids_by_text(tokens: Tokens, end_of_turn: int) -> dict[bytes, int]:
    """The token that writes a text, added ones and the end of a turn by their names.

    Args:
        tokens: Of a tokenizer.
        end_of_turn: The token that ends a turn.
    """
    plain, named = _lookups(tokens, end_of_turn)
    ends = {tokens.added[end_of_turn].encode(): end_of_turn} if end_of_turn in tokens.added else {}
    return plain | {name.encode(): index for name, index in named.items()} | ends


def _matching(
    their_bytes: bytes, their_ends: list[int], our_bytes: bytes, our_ends: list[int], inside: Sequence[tuple[int, int, int]] = ()
) -> NDArray[np.int64]:
    same_start, same_end = _common(their_bytes, our_bytes)
    spans = {span: place for place, span in enumerate(pairwise(their_ends))}
    ends = (len(their_bytes) - same_end, len(our_bytes) - same_end, same_end)
    places = np.full(len(our_ends) - 1, NONE, np.int64)
    for theirs, ours, length in ((0, 0, same_start), *inside, ends):
        first, last = np.searchsorted(our_ends, [ours, ours + length + 1]).tolist()
        for index in range(first, last - 1):
            span = our_ends[index] - ours + theirs, our_ends[index + 1] - ours + theirs
            places[index] = spans.get(span, NONE)
    return places


def _spans(lead: str, ids: Sequence[int], texts: list[bytes]) -> tuple[bytes, list[int]]:
    """What is written, and where each token ends in it, counted from the end of the lead."""
    return _written(lead.encode(), [texts[index] for index in ids])


def _written(lead: bytes, pieces: Sequence[bytes]) -> tuple[bytes, list[int]]:
    return lead + b"".join(pieces), np.cumsum([len(lead), *map(len, pieces)]).tolist()


def _common(left: bytes, right: bytes) -> tuple[int, int]:
    """Bytes that both begin with, and bytes that both end with; they don't overlap."""
    shorter = min(len(left), len(right))
    if left == right:
        return shorter, 0
    a, b = np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)
    start = _agreeing(a[:shorter] == b[:shorter])
    rest = shorter - start
    return start, _agreeing(a[len(a) - rest :][::-1] == b[len(b) - rest :][::-1])


def _agreeing(equal: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(equal) if equal.all() else int(np.argmin(equal))
