"""The way through a large vocabulary that GPUs take, against torch's own: on a GPU, or interpreted in a process of its own."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_score import load, traces
from test_targets import SPECS, random_logits, spec_id, targets_of
from torch import Tensor
from transformers import AutoTokenizer

from distill.engines.scoring import TeacherScorer
from distill.errors import ModelError
from distill.models.chat import chat_format
from distill.models.vocabulary import align, vocabulary_map
from distill.targets import blocks
from distill.targets.blocks import WIDTH, best, members, statistics
from distill.targets.compare import Verification
from distill.targets.kinds import mass_profile
from distill.targets.spec import Sampled, TargetSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
SIZES = [WIDTH, WIDTH + 1, 5 * WIDTH - 1, 4 * WIDTH, 33 * WIDTH, 70 * WIDTH + 57]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Takes the way on any device and any vocabulary, or nowhere."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(blocks, "pay", lambda logits_nV: on and logits_nV.shape[1] >= WIDTH)

    switch(True)
    return switch


def hard_logits(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Few distinct values, many tokens of probability 0, one token alone, all alike, and one that outweighs all others."""
    logits_nV = random_logits(6, vocab_size, seed=vocab_size)
    logits_nV[0] = logits_nV[0].round()
    logits_nV[1, ::2] = -INF
    logits_nV[2] = -INF
    logits_nV[2, -1] = 3.0
    logits_nV[3] = 1.5
    logits_nV[4, 0] = 60.0
    return logits_nV.to(DEVICE, dtype)


def assert_statistics(logits_nV: Tensor, found: blocks.Blocks) -> None:
    for number, part in enumerate(logits_nV.double().split(WIDTH, dim=1)):
        peak_n = part.amax(1)
        expected_n = (part - peak_n.nan_to_num(neginf=0)[:, None]).exp().sum(1)
        assert found.peaks_nB[:, number].double().equal(peak_n)
        torch.testing.assert_close(found.sums_nB[:, number].double(), expected_n, rtol=2e-5, atol=0)
    assert found.peaks_nB.shape == found.sums_nB.shape == (len(logits_nV), -(-logits_nV.shape[1] // WIDTH))
    assert found.peaks_nB.dtype == found.sums_nB.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_statistics_and_members_are_those_of_the_blocks(vocab_size: int, dtype: torch.dtype) -> None:
    logits_nV = hard_logits(vocab_size, dtype)
    assert_statistics(logits_nV, statistics(logits_nV))
    number = -(-vocab_size // WIDTH)
    blocks_nb = torch.randint(number, (6, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    blocks_nb[:, 0] = number - 1
    found_nbW = members(logits_nV, blocks_nb)
    padded_nBW = torch.nn.functional.pad(logits_nV, (0, number * WIDTH - vocab_size), value=-INF).view(6, number, WIDTH)
    assert found_nbW.equal(padded_nBW[torch.arange(6, device=DEVICE)[:, None], blocks_nb])


def interpreted(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's statistics."""
    assert blocks.kernels.available(logits_nV.device)
    return tuple(statistics(logits_nV))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Callable[..., Any]]:
    """As in `test_kernels`: the interpreter must be chosen before Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which comes with torch for GPUs only")
    if DEVICE == "cuda":
        yield interpreted
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()
        yield lambda logits_nV: pool.submit(interpreted, logits_nV).result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_kernel_gives_the_statistics(kernel: Callable[..., Any], vocab_size: int, dtype: torch.dtype) -> None:
    logits_nV = hard_logits(vocab_size, dtype)
    padded_nV = torch.cat([logits_nV, torch.full((6, 39), 90.0, dtype=dtype, device=DEVICE)], 1)
    assert_statistics(logits_nV, blocks.Blocks(*kernel(padded_nV[:, :vocab_size])))
    assert [len(statistic_nB) for statistic_nB in kernel(logits_nV[:0])] == [0, 0]
    for value in (math.nan, INF):
        logits_nV[5, vocab_size // 2] = value
        _, sums_nB = kernel(logits_nV)
        assert sums_nB.isnan().sum(1).tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_best_are_the_largest_of_the_whole_row(vocab_size: int, k: int, dtype: torch.dtype) -> None:
    """Ties included: equal values, ids that are distinct and have them; and the rest is what the others hold."""
    logits_nV = hard_logits(vocab_size, dtype)
    found = best(logits_nV, statistics(logits_nV), k)
    assert found.logits_nk.equal(logits_nV.topk(k).values)
    real_nk = found.logits_nk > -INF
    assert logits_nV.gather(1, found.ids_nk.clamp(max=vocab_size - 1))[real_nk].equal(found.logits_nk[real_nk])
    assert all(len(set(ids[real].tolist())) == int(real.sum()) for ids, real in zip(found.ids_nk, real_nk, strict=True))
    wide_nV = logits_nV.double()
    others_nV = (wide_nV - wide_nV.amax(1, keepdim=True)).exp()
    for row, (ids, real) in enumerate(zip(found.ids_nk, real_nk, strict=True)):
        others_nV[row, ids[real]] = 0
    torch.testing.assert_close(found.others_n1.double(), others_nV.sum(1, keepdim=True), rtol=2e-5, atol=1e-30)


def test_a_row_gives_the_same_whatever_stands_beside_it() -> None:
    logits_nV = torch.cat([hard_logits(20 * WIDTH + 3, torch.bfloat16) for _ in range(3)])
    whole = best(logits_nV, statistics(logits_nV), 64)
    for start in range(0, len(logits_nV), 5):
        part_nV = logits_nV[start : start + 5]
        for one, other in zip(best(part_nV, statistics(part_nV), 64), whole, strict=True):
            assert one.equal(other[start : start + 5])


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("vocab_size", [WIDTH, 300, 20_000])
def test_every_kind_is_the_same_this_way(spec: TargetSpec, vocab_size: int, everywhere: Callable[[bool], None]) -> None:
    logits_nV = random_logits(40, vocab_size + 7)
    ours = targets_of(spec, logits_nV, vocab_size)
    profile = mass_profile(logits_nV, vocab_size, (1, 64), (50,))
    for value in (math.nan, INF):
        broken_nV = logits_nV.clone()
        broken_nV[3, 5] = value
        with pytest.raises(ModelError, match="1 of 40 positions"):
            targets_of(spec, broken_nV, vocab_size)
    everywhere(False)
    plain = targets_of(spec, logits_nV, vocab_size)
    np.testing.assert_allclose(profile, mass_profile(logits_nV, vocab_size, (1, 64), (50,)), rtol=2e-5)
    if isinstance(spec, Sampled):  # a quantile at the border of two tokens may fall to either
        assert (ours.ids == plain.ids).all(1).mean() > 0.9
    else:
        np.testing.assert_array_equal(ours.ids, plain.ids)
        np.testing.assert_allclose(ours.log_probs, plain.log_probs, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(np.exp(ours.log_rest), np.exp(plain.log_rest), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_teacher_is_read_the_same_this_way_and_a_batch_ahead(
    spec: TargetSpec, dtype: torch.dtype, tiny_model_dir: Path, everywhere: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chat = load(tiny_model_dir)
    vocabulary = vocabulary_map(chat, chat_format(AutoTokenizer.from_pretrained(tiny_model_dir)))
    rows = [align(trace, chat, chat, vocabulary) for trace in traces(7)]
    batches = [rows[start : start + 2] for start in range(0, 7, 2)]
    scorer = TeacherScorer(model.to(dtype), spec, vocabulary, buffer=50 * 264)
    monkeypatch.setattr(scorer, "_ahead", 1)
    ours = list(scorer.read(batches))
    assert [[row.key for row in part] for part in ours] == [[row.key for row in batch] for batch in batches]
    everywhere(False)
    comparison = Verification(spec, exact=dtype == torch.float32)
    for part, batch in zip(ours, batches, strict=True):
        for one, two in zip(part, scorer.score(batch), strict=True):
            comparison.add(one.targets, two.targets)
            assert one.statistics.profile == pytest.approx(two.statistics.profile, rel=1e-3)
    assert comparison.holds, str(comparison)


def test_what_does_not_fit_is_halved_and_comes_in_order(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = load(tiny_model_dir)
    vocabulary = vocabulary_map(chat, chat)
    rows = [align(trace, chat, chat, vocabulary) for trace in traces(9)]
    scorer = TeacherScorer(model, Sampled(), vocabulary)
    launch = scorer.launch

    def limited(part: Any) -> Any:
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return launch(part)

    monkeypatch.setattr(scorer, "launch", limited)
    for ahead in (0, 1):
        monkeypatch.setattr(scorer, "_ahead", ahead)
        found = list(scorer.read([rows[:6], rows[6:]]))
        assert all(len(part) <= 2 for part in found)
        assert [row.key for part in found for row in part] == [row.key for row in rows]
