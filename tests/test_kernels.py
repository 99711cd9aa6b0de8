"""The kernels of the loss against their definitions in float64: on a GPU, or interpreted in a process of their own."""

from __future__ import annotations

import importlib
import importlib.util
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which comes with torch for GPUs only", allow_module_level=True)

pytestmark = pytest.mark.gpu  # where there is none, they are interpreted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
# An exponential of d has the relative error of a few roundings and, since d itself is rounded, of |d| more.
ROUNDING = 2.0**-23
TILE = 4096
shapes = pytest.mark.parametrize(("rows", "vocab_size"), [(3, 1), (4, 3), (3, TILE), (5, TILE + 905), (3, 5 * TILE - 1)])


def call(name: str, *arguments: Any) -> Any:
    """A function of the module, or of this one."""
    return (globals().get(name) or getattr(importlib.import_module("distill.losses.kernels"), name))(*arguments)


@pytest.fixture(scope="module")
def kernels() -> Iterator[Callable[..., Any]]:
    """Calls by name. The interpreter must be chosen before Triton is imported, hence the process; tensors are shared with it."""
    if DEVICE == "cuda":
        yield call
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()  # starts the process, in this environment
        yield lambda *arguments: pool.submit(call, *arguments).result()


def make_logits(rows: int, vocab_size: int, *, spread: float = 5.0) -> Tensor:
    """Random ones with peaks about 80, -80 and 0, with -inf among them; of the second row's nothing else, nor of a tile of the third."""
    generator = torch.Generator().manual_seed(rows * vocab_size)
    logits_nV = spread * torch.randn((rows, vocab_size), generator=generator)
    logits_nV += torch.tensor([80.0, 0.0, -80.0]).repeat(rows)[:rows, None]
    logits_nV[:, 1::7] = -INF
    logits_nV[1] = -INF
    if vocab_size > TILE:
        logits_nV[2, :TILE] = -INF
    return logits_nV.to(DEVICE)


def distances_of(logits_nV: Tensor) -> Tensor:
    peak_n1 = logits_nV.double().amax(1, keepdim=True)
    return logits_nV.double() - peak_n1.masked_fill(peak_n1 == -INF, 0)


def assert_statistics(logits_nV: Tensor, statistics: tuple[Tensor, Tensor, Tensor]) -> None:
    peak_n, sum_n, gap_n = statistics
    distances_nV = distances_of(logits_nV)
    exponentials_nV = distances_nV.exp()
    mean_nV = exponentials_nV * distances_nV.masked_fill(distances_nV == -INF, 0)
    expected_sum_n, expected_gap_n = exponentials_nV.sum(1), mean_nV.sum(1)
    squares_n = (mean_nV * distances_nV.masked_fill(distances_nV == -INF, 0)).sum(1)
    assert peak_n.equal(logits_nV.amax(1).nan_to_num(neginf=0))
    assert ((sum_n - expected_sum_n).abs() <= ROUNDING * (8 * expected_sum_n - expected_gap_n)).all()
    assert ((gap_n - expected_gap_n).abs() <= ROUNDING * (squares_n - 8 * expected_gap_n)).all()


def assert_gradient(logits_nV: Tensor, factor_n: Tensor, out_nV: Tensor, softcap: float | None = None) -> None:
    """Within half a unit in the last place, beside the rounding of float32, whose subnormal numbers may be 0."""
    distances_nV = distances_of(logits_nV)
    expected_nV = distances_nV.exp() * factor_n.double()[:, None]
    slack_nV = ROUNDING * expected_nV.abs() * (4 - distances_nV.masked_fill(distances_nV == -INF, 0)) + 2.0**-126
    if softcap is not None:
        slope_nV = 1 - (logits_nV.double() / softcap).square()
        expected_nV = torch.where(logits_nV == -INF, 0.0, expected_nV * slope_nV)
    limits = torch.finfo(out_nV.dtype)
    unit_nV = limits.eps * expected_nV.abs().clamp(min=limits.smallest_normal).log2().floor().exp2()
    truncates = DEVICE == "cpu" and out_nV.dtype == torch.bfloat16  # the interpreter alone; GPUs round to the nearest
    assert ((out_nV.double() - expected_nV).abs() <= unit_nV * (1.0 if truncates else 0.5) + slack_nV).all()
    assert (out_nV[logits_nV == -INF] == 0).all() and (out_nV[factor_n == 0] == 0).all()


def factors(rows: int) -> Tensor:
    return torch.tensor([0.7, INF, -3.1e-3, 0.0, 255.0])[:rows].to(DEVICE)  # the second row's logits are all -inf


@shapes
@pytest.mark.parametrize("spread", [0.3, 5.0, 40.0])
def test_statistics_follow_their_definition(kernels: Callable[..., Any], rows: int, vocab_size: int, spread: float) -> None:
    logits_nV = make_logits(rows, vocab_size, spread=spread)
    before_nV = logits_nV.clone()
    statistics = kernels("statistics", logits_nV)
    assert_statistics(before_nV, statistics)
    assert logits_nV.equal(before_nV)
    assert [float(statistic_n[1]) for statistic_n in statistics] == [0, 0, 0]


@shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_follows_its_definition(kernels: Callable[..., Any], rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits_nV = make_logits(rows, vocab_size)
    peak_n = logits_nV.amax(1).nan_to_num(neginf=0)
    out_nV = torch.full_like(logits_nV, math.nan, dtype=dtype)
    kernels("gradient", logits_nV, peak_n, factors(rows), out_nV)
    finite_n = factors(rows).isfinite()
    assert_gradient(logits_nV[finite_n], factors(rows)[finite_n], out_nV[finite_n])
    assert (out_nV[~finite_n] == 0).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_gradient_is_written_over_the_logits(kernels: Callable[..., Any], softcap: float | None) -> None:
    logits_nV = make_logits(5, TILE + 904, spread=20.0)
    if softcap is not None:
        logits_nV = torch.where(logits_nV == -INF, -INF, softcap * (logits_nV / softcap).tanh())
    buffer_nV, peak_n, factor_n = logits_nV.clone(), logits_nV.amax(1).nan_to_num(neginf=0), factors(5).nan_to_num(posinf=1)
    kernels("gradient", buffer_nV, peak_n, factor_n, buffer_nV, softcap)
    assert_gradient(logits_nV, factor_n, buffer_nV, softcap)


def test_rows_of_a_larger_buffer_are_read_and_written_alone(kernels: Callable[..., Any]) -> None:
    logits_nV = make_logits(3, TILE + 37)
    buffer = torch.full((4, TILE + 50), math.nan, device=DEVICE)
    buffer[:3, 2 : TILE + 39] = logits_nV
    out = torch.full((4, TILE + 48), 7.0, device=DEVICE, dtype=torch.bfloat16)
    part_nV, out_nV, factor_n = buffer[:3, 2 : TILE + 39], out[:3, : TILE + 37], torch.ones(3, device=DEVICE)
    statistics = kernels("statistics", part_nV)
    assert_statistics(logits_nV, statistics)
    kernels("gradient", part_nV, statistics[0], factor_n, out_nV)
    assert_gradient(logits_nV, factor_n, out_nV)
    assert (out[3] == 7).all() and (out[:, TILE + 37 :] == 7).all()


def test_extreme_logits_stay_numbers_and_no_number_stays_visible(kernels: Callable[..., Any]) -> None:
    logits_nV = torch.zeros((3, 2 * TILE), device=DEVICE)
    logits_nV[0, TILE:] = torch.finfo(torch.float32).min
    logits_nV[1, 5] = math.nan
    logits_nV[2] = torch.finfo(torch.float32).min
    _, sum_n, gap_n = kernels("statistics", logits_nV)
    assert sum_n[[0, 2]].tolist() == [TILE, 2 * TILE] and gap_n[[0, 2]].tolist() == [0, 0]
    assert sum_n[1].isnan() and gap_n[1].isnan()


def test_no_positions_are_no_work(kernels: Callable[..., Any]) -> None:
    assert [len(statistic_n) for statistic_n in kernels("statistics", torch.empty((0, 5), device=DEVICE))] == [0, 0, 0]


def test_kernels_are_available_where_they_can_run(kernels: Callable[..., Any]) -> None:
    assert kernels("available", torch.device(DEVICE))
    assert not call("available", torch.device("meta"))
    assert os.environ.get("TRITON_INTERPRET") == "1" or not call("available", torch.device("cpu"))


def whole_loss(kind: str, dtype: torch.dtype, softcap: float | None, with_kernels: bool) -> list[Tensor]:
    """Every sum of the loss, and its gradients by hidden states, head and bias."""
    from distill.losses import kernels
    from distill.losses.distillation import StudentHead, distillation_loss, likelihood_loss
    from distill.losses.sparse import SparseTargets

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    vocab_size, positions = TILE + 300, 37
    hidden_NH, weight_VH, bias_V = random(positions, 16), random(vocab_size + 5, 16), random(vocab_size + 5)
    labels_N = torch.randint(vocab_size, (positions,), generator=generator).to(DEVICE)
    ids_NK = torch.stack([torch.randperm(vocab_size, generator=generator)[:6] for _ in range(positions)]).to(DEVICE)
    ids_NK[:9, 0], ids_NK[::4, 3] = labels_N[:9], -1
    log_p_NR = torch.randn(positions, 7, generator=generator).log_softmax(-1).to(DEVICE)
    log_p_NK = log_p_NR[:, :6].masked_fill(ids_NK < 0, -INF)
    targets = SparseTargets("top_k", ids_NK, log_p_NK, torch.logaddexp(log_p_NR[:, 6], log_p_NR[:, 3].masked_fill(ids_NK[:, 3] >= 0, -INF)))
    head = StudentHead(weight_VH.requires_grad_(), bias_V.requires_grad_(), vocab_size, 0.7, softcap)
    hidden_NH.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if not with_kernels:
            patch.setattr(kernels, "available", lambda device: False)
        if kind == "likelihood":
            found = likelihood_loss(hidden_NH, head, labels_N, chunk_size=16)
        else:
            found = distillation_loss(hidden_NH, head, labels_N, targets, nll_weight=0.3, chunk_size=16)
    sums = [value for value in vars(found).values() if isinstance(value, Tensor)]
    return [value.detach() for value in [*sums, *torch.autograd.grad(found.loss, (hidden_NH, weight_VH, bias_V))]]


@pytest.mark.parametrize("kind", ["top_k", "likelihood"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_same_with_them(kernels: Callable[..., Any], kind: str, softcap: float | None, dtype: torch.dtype) -> None:
    found, expected = (kernels("whole_loss", kind, dtype, softcap, with_kernels) for with_kernels in (True, False))
    # The interpreter cuts bfloat16 off where a GPU rounds it: 2^-8 of each factor of the products behind.
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    for ours, plain in zip(found, expected, strict=True):
        assert (ours.double() - plain.double()).norm() <= tolerance * plain.double().norm() + 1e-9
