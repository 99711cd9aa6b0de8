"""A vLLM that is installed: DISTILL_VLLM names the Python of its environment. On a machine without a GPU a build for CPUs does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import embedded
from distill.engines import Completion, requests_for
from distill.engines.hf import HFEngine
from distill.engines.scoring import score_rows
from distill.models.chat import ChatFormat
from distill.models.loading import load_chat_format, load_model
from distill.models.vocabulary import align, vocabulary_map
from distill.recipe.base import Sampling
from distill.recipe.models import ModelSpec
from distill.recipe.servers import Server
from distill.servers.client import Client
from distill.servers.needs import ServerNeeds
from distill.servers.protocols import protocol_of
from distill.servers.reading import ServerScorer
from distill.servers.serving import Served, serving
from distill.servers.writing import ServerEngine
from distill.targets.spec import TopK

PYTHON = os.environ.get("DISTILL_VLLM", "")
TARGET = TopK(k=20)
Here = tuple[Any, ChatFormat, list[Completion]]

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not PYTHON, reason="DISTILL_VLLM names no Python that has vLLM")]


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    server = {"kind": "vllm", "python": PYTHON, "args": ["--enforce-eager"], "start_timeout_s": 900}
    return ModelSpec(model="embedded:teacher", dtype="float32", server=Server.model_validate(server))


@pytest.fixture(scope="module")
def served(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("vllm")
    with serving(spec, "teacher", place, place, needs=ServerNeeds(512, TARGET.k)) as found:
        yield found


@pytest.fixture(scope="module")
def here(spec: ModelSpec) -> Here:
    """The teacher in this process, and what it writes where nothing is drawn."""
    chat, model = load_chat_format(spec), load_model(spec, torch.device("cpu"))
    return model, chat, HFEngine(model, chat, Sampling(temperature=0.0, max_new_tokens=192)).complete(requests_for(problems(), 1, 0))


def problems() -> list[dict[str, Any]]:
    lines = Path(embedded.resolve("embedded:arithmetic")).read_text().splitlines()[:24]
    return [
        {"prompt_id": str(number), "messages": [{"role": "user", "content": json.loads(line)["question"]}], "reference": None}
        for number, line in enumerate(lines)
    ]


def test_its_greedy_answers_are_those_of_this_process(spec: ModelSpec, served: Served, here: Here) -> None:
    _, chat, expected = here
    assert spec.server is not None
    with Client(spec.server, served.urls) as client:
        engine = ServerEngine(client, protocol_of(spec.server, served.model), chat, Sampling(temperature=0.0, max_new_tokens=192))
        found = dict(pair for group in engine.write(requests_for(problems(), 1, 0)) for pair in group)
    told = [found[place] for place in range(len(expected))]
    assert [(row.text, row.completion_ids, row.finish_reason) for row in told if isinstance(row, Completion)] == [
        (row.text, row.completion_ids, row.finish_reason) for row in expected
    ]


def test_what_it_thinks_is_what_the_teacher_thinks_here(spec: ModelSpec, served: Served, here: Here) -> None:
    model, chat, answers = here
    assert spec.server is not None
    vocabulary = vocabulary_map(chat, chat)
    written = [
        {**problem, "sample_index": 0, "author": "teacher", "completion": answer.text, "finish_reason": answer.finish_reason}
        | {"prompt_ids": answer.prompt_ids, "completion_ids": answer.completion_ids}
        for problem, answer in zip(problems(), answers, strict=True)
    ]
    rows = [align(trace, chat, chat, vocabulary) for trace in written]
    expected = score_rows(model, rows, TARGET, vocabulary)
    with Client(spec.server, served.urls) as client:
        found = ServerScorer(client, protocol_of(spec.server, served.model), TARGET, vocabulary).score(rows)
    for theirs, ours in zip(found, expected, strict=True):
        likely = ours.targets.log_probs > np.log(1e-4)
        assert np.array_equal(theirs.targets.ids[likely], ours.targets.ids[likely])
        assert np.allclose(theirs.targets.log_probs[likely], ours.targets.log_probs[likely], atol=1e-3)
        assert np.allclose(np.exp(theirs.targets.log_rest), np.exp(ours.targets.log_rest), atol=1e-3)
