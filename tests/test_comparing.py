"""A model that reads beside its teacher, against definitions in float64 on the embedded pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill.engines.answers import final, sums
from distill.engines.comparing import Comparer, Opinion, Row
from distill.engines.remembered import packed, unpacked
from distill.engines.scored import spread, without
from distill.engines.scoring import score_rows
from distill.models.chat import IGNORE
from distill.models.loading import load_chat_format, load_model
from distill.models.vocabulary import align, vocabulary_map
from distill.recipe.models import ModelSpec
from distill.servers import likeness
from distill.targets.codec import Targets
from distill.targets.spec import TopK

CPU = torch.device("cpu")


def traces() -> list[dict[str, Any]]:
    questions = [f"What is {number} + {number}?" for number in (2, 30, 451)]
    texts = ["<think>\nTwo and two.\n</think>\n\nIt is 4.", "60", "<think>\n451 + 451 = 902, so\n</think>\n\nIt is \\boxed{902}."]
    return [
        {
            "prompt_id": str(place),
            "sample_index": 0,
            "author": "teacher",
            "messages": [{"role": "user", "content": question}],
            "completion": text,
            "finish_reason": "stop",
        }
        for place, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {role: load_model(ModelSpec(model=f"embedded:{role}", dtype="float32"), CPU) for role in ("teacher", "student")}


@pytest.mark.parametrize("k", [4, 403])
def test_divergence_and_agreement_are_those_of_their_definitions(models: dict[str, Any], k: int) -> None:
    """Each row alone, through the whole vocabulary, in float64; the reader pads them together and takes them in chunks."""
    chat = load_chat_format(ModelSpec(model="embedded:student"))
    own = vocabulary_map(chat, chat)
    aligned = [align(trace, chat, chat, own) for trace in traces()]
    thoughts = [row.targets for row in score_rows(models["teacher"], aligned, TopK(k=k), own)]
    rows = [Row(row.input_ids, row.labels, told) for row, told in zip(aligned, thoughts, strict=True)]
    opinions = Comparer(models["student"], own.student_size, buffer=7 * own.student_size).read(rows, 2)
    for row, opinion in zip(rows, opinions, strict=True):
        places = np.flatnonzero(row.labels != IGNORE)
        log_p, log_q = (_log_probs(models[role], row.input_ids, places, own.student_size) for role in ("teacher", "student"))
        written = torch.from_numpy(row.labels[places].astype(np.int64))
        assert np.allclose(opinion.log_probs, log_q.gather(1, written[:, None])[:, 0], atol=1e-4)
        assert (opinion.best == log_q.argmax(-1).numpy()).all()
        assert np.allclose(opinion.kl_nats, _coarse_kl(log_p, log_q, k), atol=1e-4)


def _log_probs(model: Any, ids: Any, places: Any, size: int) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, places - 1, :size]
    return logits.double().log_softmax(-1)


def _coarse_kl(log_p: torch.Tensor, log_q: torch.Tensor, k: int) -> np.ndarray:
    """KL over the k most probable tokens of p and one outcome for all others."""
    order = log_p.argsort(-1, descending=True)
    p, q = (log.exp().gather(1, order) for log in (log_p, log_q))
    p, q = (torch.cat([each[:, :k], each[:, k:].sum(1, keepdim=True)], 1) for each in (p, q))
    return torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0).sum(1).numpy()


def test_a_student_that_is_its_teacher_is_no_nat_away(models: dict[str, Any]) -> None:
    """Also behind the table that the thoughts are kept in."""
    chat = load_chat_format(ModelSpec(model="embedded:teacher"))
    own = vocabulary_map(chat, chat)
    aligned = [align(trace, chat, chat, own) for trace in traces()]
    thoughts = [row.targets for row in score_rows(models["teacher"], aligned, TopK(k=8), own)]
    kept = unpacked(packed([*traces(), traces()[0]], [*thoughts, None]))
    assert kept.pop() is None
    for one, other in zip(thoughts, kept, strict=True):
        assert other is not None
        assert all((a == b).all() for a, b in ((one.ids, other.ids), (one.log_probs, other.log_probs), (one.log_rest, other.log_rest)))
    rows = [Row(row.input_ids, row.labels, told) for row, told in zip(aligned, kept, strict=True)]
    for row, opinion in zip(rows, Comparer(models["teacher"], own.student_size).read(rows), strict=True):
        assert row.teacher is not None
        assert np.abs(opinion.kl_nats).max() < 1e-5 and (opinion.best == row.teacher.ids[:, 0]).all()


def test_what_is_looked_at_of_an_own_answer_stands_behind_its_reasoning() -> None:
    chat = load_chat_format(ModelSpec(model="embedded:student"))
    for trace, text in zip(traces(), ("It is 4.", "60", "It is \\boxed{902}."), strict=True):
        row = final(chat, trace)
        assert row is not None
        assert chat.text_of(row.labels[row.labels != IGNORE].tolist()).strip() == text


@pytest.mark.parametrize("completion", ["<think>\nTwo and two", "<think>\nTwo and two.\n</think>\n\n", " "])
def test_an_answer_that_is_not_there_is_not_looked_at(completion: str) -> None:
    """Else reasoning that was cut would count as the answer."""
    chat = load_chat_format(ModelSpec(model="embedded:student"))
    assert likeness._final(chat, traces()[0] | {"completion": completion, "finish_reason": "length"}) is None


def test_who_picks_the_teachers_second_best_does_not_agree_with_it() -> None:
    """Of two positions, the student lacks the teacher's most probable token at the first."""
    ids, probs = np.array([[-1, 7, 8], [7, 8, -1]], np.int32), np.array([[0.45, 0.3, 0.2], [0.45, 0.3, 0.2]], np.float32)
    told = without(Targets(ids, np.log(probs), np.log(np.full(2, 0.05, np.float32))), ids < 0)
    assert told.ids.tolist() == [[7, 8, -1], [7, 8, -1]]
    kept = unpacked(packed([traces()[0]], [spread(told, np.array([0, 2]), 3, TopK(k=3))]))[0]
    assert kept is not None
    row = Row(np.array([1, 7, 7, 7], np.int32), np.array([IGNORE, 7, 7, 7], np.int32), kept)
    found = sums(row, Opinion(np.full(3, -0.1), np.full(3, 7, np.int32), np.ones(3, np.int32), np.array([0.2, np.nan, 0.2])))
    assert found["compared"] == 2 and found["agreed"] == 1
