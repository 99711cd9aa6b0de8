"""One vocabulary for two models: by what tokens write, with real tokenizers and with tiny ones of other kinds."""

from __future__ import annotations

import contextlib
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATML
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.errors import ModelError
from distill.models.chat import IGNORE, ChatFormat, chat_format
from distill.models.vocabulary import AlignedRow, VocabularyMap, align, vocabulary_map

R1, QWEN25, QWEN3 = "deepseek-r1-distill-qwen", "qwen2.5-instruct", "qwen3"
PAIRS = [(teacher, student) for teacher in (R1, QWEN25, QWEN3) for student in (R1, QWEN25, QWEN3)]
ENDS = ["<|im_end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
TEXT = "<think>\nLet me see: 12 + 345 = 357, 😀 naïve 中文句子 e\u0301.\n</think>\n\nThe answer is \\boxed{357} 👩\u200d🚀."

_loaded: dict[str, Any] = {}


def load(shared: Path, name: str) -> ChatFormat:
    if name not in _loaded:
        _loaded[name] = chat_format(AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / name))
    return _loaded[name]


def pair(shared: Path, teacher: str, student: str) -> tuple[ChatFormat, ChatFormat, VocabularyMap]:
    both = load(shared, teacher), load(shared, student)
    name = f"{teacher} {student}"
    if name not in _loaded:
        _loaded[name] = vocabulary_map(*both)
    return (*both, _loaded[name])


def trace(completion: str, **more: Any) -> dict[str, Any]:
    row = {"prompt_id": "p", "sample_index": 3, "author": "teacher", "messages": [{"role": "user", "content": "How much?"}]}
    return {**row, "completion": completion, "finish_reason": "stop", **more}


def rollout(student: ChatFormat, ids: list[int], *, finished: bool = True) -> dict[str, Any]:
    """What the student drew: these ids after its prompt, with the end of the turn if it came to it."""
    messages = [{"role": "user", "content": "How much?"}]
    drawn = [*ids, student.end_of_turn_id] if finished else ids
    return trace(
        student.text_of(drawn, student.opening(messages)),
        author="student",
        prompt_ids=student.prompt_ids(messages),
        completion_ids=drawn,
        finish_reason="stop" if finished else "length",
    )


def check(row: AlignedRow, teacher: ChatFormat, student: ChatFormat, vocabulary: VocabularyMap) -> float:
    """What holds for every aligned row; returns the share of tokens with a counterpart."""
    prompt = teacher.prompt_ids([{"role": "user", "content": "How much?"}])
    there = row.positions >= 0
    assert (row.positions[there] >= len(prompt)).all()
    assert (np.diff(row.positions[there]) > 0).all()
    assert row.teacher_ids[: len(prompt)].tolist() == prompt[: len(row.teacher_ids)]
    read = row.teacher_ids[row.positions[there]]
    assert vocabulary.student_ids[read].tolist() == row.written[there].tolist()
    for theirs, ours in zip(read.tolist(), row.written[there].tolist(), strict=True):
        if ours != student.end_of_turn_id:
            assert vocabulary.teacher.texts[theirs] == vocabulary.student.texts[ours]
            assert token_bytes(teacher, theirs) == vocabulary.teacher.texts[theirs]
        else:
            assert theirs == teacher.end_of_turn_id
    assert row.labels[row.labels != IGNORE].tolist() == row.input_ids[row.labels != IGNORE].tolist()
    return float(there.mean())


def token_bytes(chat: ChatFormat, index: int) -> bytes:
    """What a token writes, as the tokenizer itself decodes it; of a part of a letter only that it is one."""
    text = chat.tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        return text.encode()
    return chat_bytes(chat, index)


def chat_bytes(chat: ChatFormat, index: int) -> bytes:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(byte_of[letter] for letter in chat.tokenizer.convert_ids_to_tokens(index))


# Real tokenizers


def test_ids_are_matched_by_what_they_write(shared: Path) -> None:
    teacher, _, vocabulary = pair(shared, R1, QWEN3)
    assert vocabulary.student_ids[:151643].tolist() == list(range(151643))
    assert vocabulary.student_ids[[151648, 151649]].tolist() == [151667, 151668]
    assert vocabulary.student_ids[teacher.end_of_turn_id] == 151645 and teacher.end_of_turn_id == 151643
    assert vocabulary.teacher_ids[151643] == -1, "<|endoftext|> is not R1's end of a turn"
    for index in (151644, 151645, 151646):
        assert vocabulary.student_ids[index] == -1  # user, assistant and begin of sentence are tokens of R1 alone
    assert not vocabulary.identical and vocabulary.same_words
    assert (vocabulary.teacher_size, vocabulary.student_size) == (151665, 151669)
    _, _, plain = pair(shared, QWEN3, QWEN25)
    assert np.flatnonzero(plain.student_ids < 0).tolist() == [151665, 151666, 151667, 151668]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_map_is_its_inverse(teacher: str, student: str, shared: Path) -> None:
    *_, vocabulary = pair(shared, teacher, student)
    assert vocabulary.identical == (teacher == student)
    there = vocabulary.student_ids >= 0
    assert (vocabulary.teacher_ids[vocabulary.student_ids[there]] == np.flatnonzero(there)).all()
    assert there.sum() == (vocabulary.teacher_ids >= 0).sum() == len(np.unique(vocabulary.student_ids[there]))


def test_a_map_is_cheap(shared: Path) -> None:
    both = load(shared, R1), load(shared, QWEN3)
    start = time.process_time()
    vocabulary_map(*both)
    assert time.process_time() - start < 20  # about one second; this is against a loop in a loop


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize("finished", [True, False])
def test_texts_align(teacher: str, student: str, finished: bool, shared: Path) -> None:
    both = pair(shared, teacher, student)
    for text in (TEXT, TEXT.removeprefix("<think>\n"), "", "\n\n" + TEXT, "<think>" + TEXT[8:], TEXT + "\n"):
        if not text and finished and student == R1:
            continue  # its template opens a thought, which is refused where nothing closes it
        row = align(trace(text, finish_reason="stop" if finished else "length"), *both)
        share = check(row, *both)
        assert share > 0.75 or len(text) == 0
        if finished:
            assert row.written[-1] == both[1].end_of_turn_id and row.teacher_ids[row.positions[-1]] == both[0].end_of_turn_id
        else:
            assert both[1].end_of_turn_id not in row.written
            assert not len(row.written) or both[0].end_of_turn_id not in row.teacher_ids[row.positions[row.positions >= 0]]


def lost(row: AlignedRow, student: ChatFormat) -> list[str]:
    return [student.tokenizer.decode([index]) for index in row.written[row.positions < 0]]


def test_r1_reads_a_reasoning_that_qwen_writes_as_text(shared: Path) -> None:
    """R1's prompt has opened `<think>\\n` already; `</think>` is one token there and several here."""
    both = pair(shared, R1, QWEN25)
    row = align(trace(TEXT), *both)
    assert lost(row, both[1]) == ["<th", "ink", ">\n", "</", "think", ">\n\n"]
    opened = both[0].tokenizer.decode(row.teacher_ids[: int(row.positions[row.positions >= 0][0])])
    assert opened.endswith("<think>\n") and opened.count("<think>") == 1


def test_r1_reads_a_reasoning_that_qwen3_opens_itself(shared: Path) -> None:
    both = pair(shared, R1, QWEN3)
    row = align(trace(TEXT), *both)
    assert lost(row, both[1]) == ["<think>", "\n"]
    close = int(np.flatnonzero(row.written == 151668)[0])
    assert row.teacher_ids[row.positions[close]] == 151649


def test_a_teacher_reads_the_opening_that_the_students_prompt_holds(shared: Path) -> None:
    both = pair(shared, QWEN3, R1)
    row = align(trace(TEXT), *both)
    assert (row.positions >= 0).all()
    before = both[0].tokenizer.decode(row.teacher_ids[: int(row.positions[0])])
    assert before.endswith("assistant\n<think>\n")


def test_what_only_the_student_has_as_a_token_has_no_counterpart(shared: Path) -> None:
    both = pair(shared, QWEN25, QWEN3)
    assert lost(align(trace(TEXT), *both), both[1]) == ["<think>", "\n", "</think>", "\n\n"]


@pytest.mark.parametrize(("teacher", "student"), [(QWEN25, QWEN25), (R1, QWEN25), (QWEN3, QWEN25), (R1, QWEN3), (QWEN3, R1)])
def test_ids_that_the_student_drew_are_read_as_they_are(teacher: str, student: str, shared: Path) -> None:
    """Letter by letter, as no tokenizer would write it: one token of the teacher for each."""
    both = pair(shared, teacher, student)
    letters = [index for letter in "So 1 + 2 = 3 😀" for index in both[1].tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert letters != both[1].tokenizer("So 1 + 2 = 3 😀", add_special_tokens=False)["input_ids"]
    row = align(rollout(both[1], letters), *both)
    assert check(row, *both) == 1.0
    assert vocabulary_ids(both[2], row) == [*letters, both[1].end_of_turn_id]


def vocabulary_ids(vocabulary: VocabularyMap, row: AlignedRow) -> list[int]:
    return vocabulary.student_ids[row.teacher_ids[row.positions]].tolist()


def test_a_tag_that_the_student_drew_in_pieces_is_read_as_the_teachers_token(shared: Path) -> None:
    both = pair(shared, R1, QWEN3)
    pieces = [index for part in ("7", "</", "think", ">") for index in both[1].tokenizer(part, add_special_tokens=False)["input_ids"]]
    row = align(rollout(both[1], pieces), *both)
    check(row, *both)
    assert lost(row, both[1]) == ["</", "think", ">"]
    assert 151649 in row.teacher_ids


def test_a_letter_that_was_cut_off_has_no_counterpart(shared: Path) -> None:
    both = pair(shared, R1, QWEN25)
    ids = both[1].tokenizer("<think>\nFine 𓀀", add_special_tokens=False)["input_ids"]
    row = align(rollout(both[1], ids[:-1], finished=False), *both)
    check(row, *both)
    assert (row.positions[3] >= 0) and row.positions[-1] == -1


def test_a_student_that_stops_with_another_token(shared: Path) -> None:
    """`<|endoftext|>` is no token of R1; where the teacher has it, it is read."""
    for teacher, known in ((R1, False), (QWEN3, True)):
        both = pair(shared, teacher, QWEN25)
        row = align(rollout(both[1], [9707, 151643], finished=False), *both)
        check(row, *both)
        assert (row.positions >= 0).tolist() == [True, known]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_random_texts_and_ids_align(teacher: str, student: str, shared: Path) -> None:
    """Whatever the text: both read the same bytes at an aligned token; and rows can be cut anywhere."""
    both = pair(shared, teacher, student)
    rng = random.Random(f"{teacher} {student}")
    pieces = ["<think>", "</think>", "\n", "\n\n", " ", "中", "é", "😀", "12", "a b", *ENDS, "e\u0301", "\r\n"]
    aligned = 0
    for _ in range(40):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        with contextlib.suppress(ModelError):  # a thought that is opened twice, or never closed
            check(align(trace(text), *both), *both)
            aligned += 1
        ids = [rng.randrange(151643) for _ in range(rng.randrange(20))]
        row = align(rollout(both[1], ids, finished=rng.random() < 0.5), *both)
        check(row, *both)
        for length in (1, len(row.input_ids) - 2, len(row.input_ids)):
            part = row.cut(length)
            assert part.positions.tolist() == row.positions[: len(part.positions)].tolist()
            assert len(part.teacher_ids) == part.positions.max(initial=-1) + 1
            assert part.teacher_ids.tolist() == row.teacher_ids[: len(part.teacher_ids)].tolist()
    assert aligned > 10


# Other kinds of vocabularies


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def finish(tokenizer: Tokenizer, tmp_path: Path) -> ChatFormat:
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path)
    return chat_format(AutoTokenizer.from_pretrained(tmp_path))


def sentencepiece(tmp_path: Path, words: list[str]) -> ChatFormat:
    """Letters with `▁` for a space, and single bytes for what it has no letter for."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n", "é"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = []
    for word in words:
        for end in range(1, len(word)):
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
            merges.append((word[:end], word[end]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=None))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    return finish(tokenizer, tmp_path)


def byte_level(tmp_path: Path, merges: list[tuple[str, str]]) -> ChatFormat:
    vocabulary = {name: index for index, name in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finish(tokenizer, tmp_path)


def test_bytes_and_letters_are_compared_as_bytes(tmp_path: Path) -> None:
    teacher = sentencepiece(tmp_path / "letters", ["▁so", "▁the"])
    student = byte_level(tmp_path / "bytes", [("Ġ", "s"), ("Ġs", "o"), ("Ċ", "Ċ")])
    vocabulary = vocabulary_map(teacher, student)
    theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    for left, right in [("▁so", "Ġso"), ("A", "A"), ("▁", "Ġ"), ("\n", "Ċ"), ("<0xE2>", "â"), ("\n\n", "ĊĊ"), ("<|im_end|>", "<|im_end|>")]:
        assert vocabulary.student_ids[theirs[left]] == ours[right], left
    for lonely in ("▁the", "é", "<0x41>"):  # A is written as a letter
        assert vocabulary.student_ids[theirs[lonely]] == -1, lonely
    assert not vocabulary.same_words
    text = "so the end\n\nis é 好 so far"
    row = align(trace(text), teacher, student, vocabulary)
    there = row.positions >= 0
    for theirs_id, our_id in zip(row.teacher_ids[row.positions[there]][:-1], row.written[there][:-1], strict=True):
        assert vocabulary.teacher.texts[theirs_id] == vocabulary.student.texts[our_id]
    # Not: " the" and the two line feeds, one token there and several here; the two bytes of é.
    assert (~there).sum() == 4 + 2 + 2
    assert vocabulary.student.texts[int(row.written[0])] == b"s" and there[0]
    back = vocabulary_map(student, teacher)
    assert back.student_ids[ours["Ġso"]] == theirs["▁so"] and back.student_ids[ours["Ã"]] == theirs["<0xC3>"]


def test_a_vocabulary_with_holes(tmp_path: Path) -> None:
    chat = byte_level(tmp_path / "whole", [])
    raw = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())
    raw["model"]["vocab"]["Ā"] = 400
    (tmp_path / "whole" / "tokenizer.json").write_text(json.dumps(raw))
    holes = chat_format(AutoTokenizer.from_pretrained(tmp_path / "whole"))
    vocabulary = vocabulary_map(holes, chat)
    assert vocabulary.teacher_size == 401 and vocabulary.student_ids[400] == chat.tokenizer.get_vocab()["Ā"]
    assert (vocabulary.student_ids[len(chat.tokenizer) : 400] == -1).all()


def test_an_end_of_turn_of_one_tokenizer_but_another_template(tmp_path: Path) -> None:
    teacher, student = byte_level(tmp_path / "one", []), byte_level(tmp_path / "two", [])
    template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    student.tokenizer.chat_template = template
    other = replace(student, end_of_turn_id=0, stop_ids=(0, 2), pad_id=1)
    vocabulary = vocabulary_map(teacher, other)
    assert not vocabulary.identical
    assert vocabulary.student_ids[:3].tolist() == [-1, 1, 0]
    row = align(trace("Yes."), teacher, other, vocabulary)
    assert (row.positions >= 0).all() and row.written[-1] == 0 and row.teacher_ids[-1] == 2


def test_advice_does_not_lead_to_what_refuses_the_pair(tmp_path: Path) -> None:
    """cross_tokenizer aligns by bytes, and refuses a tokenizer of letters: nobody is sent there with one."""
    letters, some, other = (
        sentencepiece(tmp_path / "l", ["▁so"]),
        byte_level(tmp_path / "a", []),
        byte_level(tmp_path / "b", [("s", "o")]),
    )
    assert "train.method cross_tokenizer" in vocabulary_map(some, other).advice
    for teacher, student in ((letters, some), (some, letters)):
        found = vocabulary_map(teacher, student)
        assert not (found.teacher.on_bytes and found.student.on_bytes)
        assert "cross_tokenizer" not in found.advice and "train.method sft" in found.advice and "rounds" not in found.advice
