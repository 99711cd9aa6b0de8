"""Chat formats of the families a kit meets: what is supervised, where a turn ends, what pads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from distill.errors import ModelError
from distill.models.chat import IGNORE, ChatFormat, chat_format

FAMILIES = ["qwen2.5-instruct", "qwen3", "deepseek-r1-distill-qwen"]
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
ANSWER = "<think>\nTwo and two make four.\n</think>\n\n\\boxed{4}"


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, shared: Path) -> ChatFormat:
    return chat_format(AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / request.param))


@pytest.fixture
def tiny(tiny_model_dir: Path) -> ChatFormat:
    return chat_format(AutoTokenizer.from_pretrained(tiny_model_dir))


def load(shared: Path, name: str) -> Any:
    return AutoTokenizer.from_pretrained(shared / "data" / "tokenizers" / name)


def test_the_reasoning_and_the_end_of_turn_are_supervised(family: ChatFormat) -> None:
    input_ids, labels = family.row(QUESTION, ANSWER)
    assert len(input_ids) == len(labels)
    supervised = [token for token, label in zip(input_ids, labels, strict=True) if label != IGNORE]
    assert [label for label in labels if label != IGNORE] == supervised
    text = family.tokenizer.decode(supervised[:-1])
    assert "Two and two make four." in text and "</think>" in text and text.endswith("\\boxed{4}")
    assert supervised[-1] == family.end_of_turn_id
    assert "2+2" not in text and "Be brief" not in text


def test_the_prompt_is_the_one_of_inference(family: ChatFormat) -> None:
    """A row begins with exactly the ids that generation is started from, and goes on with the rest of the text."""
    input_ids, labels = family.row(QUESTION, ANSWER)
    prompt = family.prompt_ids(QUESTION)
    assert input_ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORE] * len(prompt) and IGNORE not in labels[len(prompt) :]
    whole = family.tokenizer.decode(input_ids)
    assert whole.count("<think>") == 1 and whole.count("</think>") == 1  # neither doubled nor stripped


def test_a_bos_is_written_once(shared: Path) -> None:
    r1 = chat_format(load(shared, "deepseek-r1-distill-qwen"))
    input_ids, _ = r1.row(QUESTION, ANSWER)
    assert input_ids.count(r1.tokenizer.bos_token_id) == 1 and input_ids[0] == r1.tokenizer.bos_token_id


def test_generated_ids_come_back_as_the_whole_answer(family: ChatFormat) -> None:
    opening = family.opening(QUESTION)
    ids = family.completion_ids(ANSWER, opening)
    assert family.text_of(ids, opening) == ANSWER
    assert family.text_of([*ids, family.pad_id, family.pad_id], opening) == ANSWER
    assert family.completion_ids(ANSWER, opening, finished=False) == ids[:-1]


def test_known_ids_of_the_three_families(shared: Path) -> None:
    """From the data's own README: end of turn, and where <think> is one token, several, or already in the prompt."""
    qwen25, qwen3, r1 = (chat_format(load(shared, name)) for name in FAMILIES)
    assert (qwen25.end_of_turn_id, qwen3.end_of_turn_id, r1.end_of_turn_id) == (151645, 151645, 151643)
    assert qwen3.completion_ids(ANSWER)[0] == 151667
    assert qwen25.completion_ids(ANSWER)[0] not in (151667, 151648)
    assert r1.opening(QUESTION) == "<think>\n" and qwen3.opening(QUESTION) == "" and qwen25.opening(QUESTION) == ""
    assert 151648 in r1.prompt_ids(QUESTION) and 151649 in r1.completion_ids(ANSWER, "<think>\n")


def test_padding_never_ends_a_turn(family: ChatFormat) -> None:
    assert family.pad_id not in family.stop_ids
    assert family.tokenizer.pad_token_id == family.pad_id  # what is saved with the student


def test_pad_equal_to_eos_is_replaced(shared: Path) -> None:
    tokenizer = load(shared, "deepseek-r1-distill-qwen")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the trap
    assert chat_format(tokenizer).pad_id != tokenizer.eos_token_id


def test_a_padding_token_asked_for_is_checked(shared: Path) -> None:
    tokenizer = load(shared, "qwen3")
    assert chat_format(tokenizer, pad_token="<|fim_pad|>").pad_id == tokenizer.convert_tokens_to_ids("<|fim_pad|>")
    with pytest.raises(ModelError, match="not in the vocabulary"):
        chat_format(tokenizer, pad_token="<|nope|>")
    with pytest.raises(ModelError, match="also ends a turn"):
        chat_format(tokenizer, pad_token="<|im_end|>")


def test_an_eos_that_the_template_does_not_write_is_not_what_ends_a_turn(tiny_model_dir: Path) -> None:
    """Base models: eos is <|endoftext|>, but the template ends turns with <|im_end|>."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|endoftext|>"
    with pytest.raises(ModelError, match="no token for padding"):
        chat_format(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    found = chat_format(tokenizer)
    assert found.end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(found.stop_ids) == {found.end_of_turn_id, tokenizer.eos_token_id}


def test_a_tokenizer_without_template_says_what_to_do(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        chat_format(tokenizer)


def test_template_arguments_reach_the_template_and_the_digest(shared: Path) -> None:
    plain = chat_format(load(shared, "qwen3"))
    off = chat_format(load(shared, "qwen3"), {"enable_thinking": False})
    assert "<think>\n\n</think>" in off.prompt_text(QUESTION) and "<think>" not in plain.prompt_text(QUESTION)
    assert plain.template_digest != off.template_digest and plain.tokenizer_digest == off.tokenizer_digest


def test_digests_tell_vocabularies_apart(shared: Path, tiny: ChatFormat) -> None:
    digests = {chat_format(load(shared, name)).tokenizer_digest for name in FAMILIES} | {tiny.tokenizer_digest}
    assert len(digests) == 4
