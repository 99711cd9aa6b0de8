"""The pair that is shipped: small, as recorded, and as good and as bad as it is said to be."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from distill import embedded
from distill.engines import requests_for
from distill.engines.hf import HFEngine
from distill.errors import DataError
from distill.models.loading import load_chat_format, load_model
from distill.recipe.base import Sampling
from distill.recipe.models import ModelSpec
from distill.run.schema import prompt_id

FOLDER = Path(embedded.__file__).parent
RECORD = json.loads((FOLDER / "RECORD.json").read_text())
PROBLEMS = [json.loads(line) for line in (FOLDER / "problems.jsonl").read_text().splitlines()]


def test_it_is_small_and_as_recorded() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 4_000_000
    assert {"teacher/model.safetensors", "student/model.safetensors", "problems.jsonl"} <= RECORD["sha256"].keys()
    for name, digest in RECORD["sha256"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_every_problem_is_distinct_and_its_answer_right() -> None:
    assert len({problem["question"] for problem in PROBLEMS}) == len(PROBLEMS) >= 2_000
    bare = [problem for problem in PROBLEMS if re.search(r"\d[-+*]", problem["question"])]
    assert len(bare) > len(PROBLEMS) / 2
    for problem in bare:
        [expression] = re.findall(r"[\d(][-+*()\d]*", problem["question"])
        assert eval(expression) == int(problem["answer"]), problem


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_its_tokenizer_reads_any_text_and_knows_the_reasoning_tags(name: str) -> None:
    chat = load_chat_format(ModelSpec(model=f"embedded:{name}"))
    for text in ("Ann has 12 pens.", "naïve ünïcode 漢字 \t\n  spaces", "<think>\n1+2=3.\n</think>\n\n\\boxed{3}"):
        assert chat.text_of(chat.completion_ids(text)) == text
    assert len(chat.completion_ids("<think>", finished=False)) == 1
    assert chat.pad_id not in chat.stop_ids


@pytest.mark.parametrize(("name", "least", "most"), [("teacher", 0.95, 1.0), ("student", 0.15, 0.40)])
def test_it_is_as_good_as_it_should_be(name: str, least: float, most: float) -> None:
    """Greedy on 200 of the shipped problems: within what 200 can tell (two standard errors) of the bounds, and of the record."""
    spec = ModelSpec(model=f"embedded:{name}")
    rows = []
    for problem in PROBLEMS[:200]:
        messages = [{"role": "user", "content": problem["question"]}]
        rows.append({"prompt_id": prompt_id(messages), "messages": messages, "reference": problem["answer"]})
    engine = HFEngine(load_model(spec, torch.device("cpu")), load_chat_format(spec), Sampling(temperature=0.0, max_new_tokens=192))
    requests = requests_for(rows, 1, 0)
    right = sum(c.text.endswith(f"\\boxed{{{r.reference}}}") for r, c in zip(requests, engine.complete(requests), strict=True)) / 200
    recorded = RECORD["measured"][name]["greedy"]["accuracy"]
    assert least <= recorded <= most
    assert abs(right - recorded) <= 2 * (recorded * (1 - recorded) / 200) ** 0.5 + 0.01


def test_an_unknown_name_lists_those_there_are() -> None:
    assert embedded.resolve("some/model") == "some/model"
    with pytest.raises(DataError, match="embedded:teacher"):
        embedded.resolve("embedded:tutor")
