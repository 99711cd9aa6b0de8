"""The distillation loss against its definitions: values, gradients, invariances, and what it refuses."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import DataError, DistillError, ModelError, RecipeError
from distill.losses.distillation import DistillationLoss, StudentHead, distillation_loss
from distill.losses.sparse import SparseTargets, log_remainder

# Every way to ask for a loss: kind of targets, settings.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "forward_kl": ("top_k", {"divergence": "forward_kl"}),
    "reverse_kl": ("top_k", {"divergence": "reverse_kl"}),
    "jsd 0.1": ("top_k", {"divergence": "jsd", "jsd_beta": 0.1}),
    "jsd 0.7": ("top_k", {"divergence": "jsd", "jsd_beta": 0.7}),
    "sampled": ("sampled", {"divergence": "forward_kl"}),
    "policy_gradient": ("chosen_token", {"divergence": "policy_gradient"}),
    "nll alone": ("top_k", {"kd_weight": 0.0, "nll_weight": 1.0}),
    "forward_kl and nll": ("top_k", {"divergence": "forward_kl", "kd_weight": 0.7, "nll_weight": 0.4}),
    "policy_gradient and nll": ("chosen_token", {"divergence": "policy_gradient", "kd_weight": 0.7, "nll_weight": 0.4}),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)
VOCAB_SIZE, HIDDEN, POSITIONS = 23, 8, 11


@dataclass
class Case:
    """Inputs of one loss. The head has rows behind the vocabulary."""

    hidden: Tensor
    head: StudentHead
    labels: Tensor
    targets: SparseTargets

    def loss(self, **settings: Any) -> DistillationLoss:
        return distillation_loss(self.hidden, self.head, self.labels, self.targets, **settings)

    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.head.weight_VH] + ([] if self.head.bias_V is None else [self.head.bias_V])

    def gradients(self, **settings: Any) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(**settings).loss, self.parameters()))


def make_targets(kind: str, labels: Tensor, vocab_size: int, k: int, generator: torch.Generator) -> SparseTargets:
    """Candidates of a random teacher; ragged: every third position has one fewer, in the middle, and the third none."""
    log_p = (2 * torch.randn(len(labels), vocab_size, generator=generator, dtype=torch.float64)).log_softmax(-1)
    if kind == "chosen_token":
        written = log_p.gather(1, labels.clamp(min=0)[:, None])
        written[2] = -math.inf
        return SparseTargets(kind, torch.empty(len(labels), 0, dtype=torch.int32), written)
    if kind == "sampled":
        ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:k] for _ in labels])
        values = torch.rand(ids.shape, generator=generator, dtype=torch.float64).log()
    else:
        values, ids = log_p.topk(k)
    hole = torch.zeros(ids.shape, dtype=torch.bool)
    hole[::3, k // 2] = k < vocab_size
    hole[2] = k < vocab_size
    ids, values = ids.masked_fill(hole, -1), values.masked_fill(hole, -math.inf)
    rest = torch.full((len(labels),), -math.inf, dtype=torch.float64)
    if kind == "top_k":
        held = torch.zeros_like(log_p).scatter(1, ids.clamp(min=0), (ids >= 0).double()).bool()
        held |= torch.zeros_like(log_p).scatter_add(1, ids.clamp(min=0), (ids >= 0).double()).bool()
        rest = log_p.masked_fill(held, -math.inf).logsumexp(-1)
    return SparseTargets(kind, ids.to(torch.int32), values, rest)


def make_case(
    kind: str = "top_k",
    *,
    k: int = 5,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Written tokens are candidates at some positions and at others not; two positions are not supervised."""
    generator = torch.Generator().manual_seed(3)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB_SIZE, (POSITIONS,), generator=generator)
    labels[[1, POSITIONS - 1]] = -100
    targets = make_targets(kind, labels, VOCAB_SIZE, k, generator)
    if kind != "chosen_token":
        labels[3:6] = targets.ids_NK[3:6, 0]
    weight, offset = random(VOCAB_SIZE + 4, HIDDEN).to(dtype), random(VOCAB_SIZE + 4).to(dtype) if bias else None
    head = StudentHead(weight.requires_grad_(), None if offset is None else offset.requires_grad_(), VOCAB_SIZE, scale, softcap)
    return Case(random(POSITIONS, HIDDEN).to(dtype).requires_grad_(), head, labels, targets)


def reference(
    case: Case,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kd_weight: float = 1.0,
    nll_weight: float = 0.0,
    falls_back: Tensor | None = None,
) -> dict[str, Tensor]:
    """The definitions, position by position over the whole vocabulary in float64; gradients are left to autograd."""
    head, targets = case.head, case.targets
    zero = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(("loss", "kd", "nll", "entropy", "kl_lower_bound", "log_ratio", "agreements", "targets"), zero)
    for i, label in enumerate(case.labels.tolist()):
        if label == -100:
            continue
        logits = head.weight_VH[:VOCAB_SIZE].double() @ case.hidden[i].double()
        if head.bias_V is not None:
            logits = logits + head.bias_V[:VOCAB_SIZE].double()
        logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        q = torch.exp(logits) / torch.exp(logits).sum()
        nll = -torch.log(q[label])
        kept = [column for column, token in enumerate(targets.ids_NK[i].tolist()) if token >= 0]
        ids = targets.ids_NK[i, kept].tolist()
        kd = kl = ratio = zero
        if targets.kind == "chosen_token":
            if targets.log_probs_NK[i, 0] > -math.inf:
                ratio = torch.log(q[label]) - targets.log_probs_NK[i, 0]
                # A policy gradient: the advantage is a constant. Its value is not that of the loss.
                kd = ratio.detach() * torch.log(q[label])
        elif ids and targets.kind == "sampled":
            kd = sum((-targets.log_probs_NK[i, c].exp() * torch.log(q[targets.ids_NK[i, c]]) for c in kept), zero)
        elif ids:
            others = [token for token in range(VOCAB_SIZE) if token not in ids]
            p = torch.cat([targets.log_probs_NK[i, kept].exp(), targets.log_rest_N[i].exp()[None]][: 2 if others else 1])
            q_out = torch.cat([q[ids], q[others].sum()[None]][: 2 if others else 1])
            kl = (p * (p / q_out).log()).sum()
            mixture = jsd_beta * p + (1 - jsd_beta) * q_out
            kd = {
                "forward_kl": kl,
                "reverse_kl": (q_out * (q_out / p).log()).sum(),
                "jsd": jsd_beta * (p * (p / mixture).log()).sum() + (1 - jsd_beta) * (q_out * (q_out / mixture).log()).sum(),
            }[divergence]
        has_target = bool(ids) or bool((targets.log_probs_NK[i] > -math.inf).any())
        agrees = bool(ids) and int(q.argmax()) == ids[int(targets.log_probs_NK[i, kept].argmax())]
        fallback = nll if falls_back is not None and falls_back[i] and not has_target else zero
        terms = (kd_weight * (kd + fallback) + nll_weight * nll, kd, nll, -(q * q.log()).sum(), kl, ratio, zero + agrees, zero + has_target)
        sums = {name: total + term for (name, total), term in zip(sums.items(), terms, strict=True)}
    return sums


def close(found: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


# ---------------------------------------------------------------- against the definitions


@every_setting
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.7, 3.0)])
def test_matches_the_definitions(setting: str, bias: bool, scale: float, softcap: float | None) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind, bias=bias, scale=scale, softcap=softcap)
    found, expected = case.loss(**settings), reference(case, **settings)
    if kind != "chosen_token":  # there the reference has the gradient's value, which is not the loss's
        close(found.loss, expected["loss"])
        close(found.kd, expected["kd"].detach())
    close(found.nll, expected["nll"].detach())
    close(found.student_entropy, expected["entropy"].detach())
    close(found.num_targets, expected["targets"].detach())
    assert found.num_positions == POSITIONS - 2
    gradients = torch.autograd.grad(expected["loss"], case.parameters())
    close(case.gradients(**settings), list(gradients))
    assert gradients[1][:VOCAB_SIZE].abs().min() > 0, "the gradient must reach every token"


@every_setting
def test_a_position_without_a_target_may_fall_back_to_the_written_token(setting: str) -> None:
    """Only where it is asked for and there is no target; with weights, and in the loss alone, not in `kd`."""
    kind, settings = SETTINGS[setting]
    case = make_case(kind)
    case.targets.log_probs_NK[[4, 7]] = -math.inf  # two more without a target; position 7 shall not fall back
    if kind != "chosen_token":
        case.targets.ids_NK[[4, 7]] = -1
    falls_back = torch.arange(POSITIONS) != 7
    found, expected = case.loss(falls_back_N=falls_back, **settings), reference(case, falls_back=falls_back, **settings)
    without = case.loss(**settings)
    if kind != "chosen_token":
        close(found.loss, expected["loss"])
    close(found.kd, without.kd)
    close(found.num_targets, expected["targets"].detach())
    close(case.gradients(falls_back_N=falls_back, **settings), list(torch.autograd.grad(expected["loss"], case.parameters())))
    at = torch.tensor([2, 4])
    nll = Case(case.hidden[at], case.head, case.labels[at], case.targets.take(at)).loss(**settings).nll
    close(found.loss - without.loss, settings.get("kd_weight", 1.0) * nll)


def test_what_falls_back_is_a_bool_for_each_position() -> None:
    refused(make_case(), DataError, "falls_back_N is", falls_back_N=torch.ones(POSITIONS))
    refused(make_case(), DataError, "falls_back_N is", falls_back_N=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["top_k", "sampled", "chosen_token"])
def test_metrics(kind: str) -> None:
    case = make_case(kind)
    # A head near the teacher's first candidates, so that some positions agree.
    case.head.weight_VH.data[:VOCAB_SIZE] = 0
    case.head.bias_V.data[:VOCAB_SIZE] = 0
    case.head.bias_V.data[0 if kind == "chosen_token" else int(case.targets.ids_NK[0, 0])] = 3
    divergence = "policy_gradient" if kind == "chosen_token" else "forward_kl"
    found, expected = case.loss(divergence=divergence), reference(case, divergence)
    metrics = {"kl_lower_bound": found.kl_lower_bound, "log_ratio": found.log_ratio, "agreements": found.top1_agreements}
    known = {"top_k": {"kl_lower_bound", "agreements"}, "sampled": {"agreements"}, "chosen_token": {"log_ratio"}}[kind]
    for name, value in metrics.items():
        assert (value is not None) == (name in known)
        if value is not None:
            close(value, expected[name].detach())
            assert value > 0


def test_forward_kl_is_measured_whatever_the_divergence() -> None:
    case = make_case()
    expected = case.loss().kd
    for settings in ({"divergence": "reverse_kl"}, {"divergence": "jsd", "jsd_beta": 0.5}):
        close(case.loss(**settings).kl_lower_bound, expected)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_candidates_give_the_dense_divergence(divergence: str, temperature: float) -> None:
    case = make_case(k=VOCAB_SIZE)
    log_p = torch.zeros(POSITIONS, VOCAB_SIZE, dtype=torch.float64).scatter(1, case.targets.ids_NK.long(), case.targets.log_probs_NK)
    logits = (case.hidden @ case.head.weight_VH.T + case.head.bias_V)[:, :VOCAB_SIZE]
    log_p, log_q = ((x / temperature).log_softmax(-1)[case.labels != -100] for x in (log_p, logits))
    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    dense = partial(torch.nn.functional.kl_div, reduction="sum", log_target=True)
    expected = {
        "forward_kl": lambda: dense(log_q, log_p),
        "reverse_kl": lambda: dense(log_p, log_q),
        "jsd": lambda: 0.3 * dense(log_m, log_p) + 0.7 * dense(log_m, log_q),
    }[divergence]() * temperature**2
    settings = {"divergence": divergence, "jsd_beta": 0.3 if divergence == "jsd" else None, "temperature": temperature}
    close(case.loss(**settings).loss, expected)
    close(case.gradients(**settings), list(torch.autograd.grad(expected, case.parameters())))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_is_a_lower_bound_that_rises_with_k(divergence: str) -> None:
    beta = 0.5 if divergence == "jsd" else None
    full = make_case(k=VOCAB_SIZE)
    values = []
    for k in (*range(1, VOCAB_SIZE - 1), VOCAB_SIZE):  # at K = V - 1 the rest is one token, and the bound already exact
        rest = full.targets.log_probs_NK[:, k:].logsumexp(-1)
        targets = SparseTargets("top_k", full.targets.ids_NK[:, :k], full.targets.log_probs_NK[:, :k], rest)
        values.append(float(replace(full, targets=targets).loss(divergence=divergence, jsd_beta=beta).kd))
    assert values == sorted(values)
    assert values[0] > 0.1 * values[-1]


def test_jsd_tends_to_the_two_kls() -> None:
    case, small = make_case(), 1e-9
    close(case.loss(divergence="jsd", jsd_beta=small).kd / small, case.loss().kd, rtol=1e-3, atol=0)
    close(case.loss(divergence="jsd", jsd_beta=1 - small).kd / small, case.loss(divergence="reverse_kl").kd, rtol=1e-3, atol=0)


class Afresh(torch.autograd.Function):
    """Computes the loss anew for each backward, because gradcheck takes several of one forward."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            return (None, *torch.autograd.grad(ctx.function(*inputs), inputs, gradient))


@every_setting
def test_gradcheck(setting: str) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind, scale=1.3, softcap=4.0)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = replace(case.head, weight_VH=weight, bias_V=bias)
        return distillation_loss(hidden, head, case.labels, case.targets, chunk_size=4, **settings).loss

    assert torch.autograd.gradcheck(partial(Afresh.apply, loss), case.parameters(), fast_mode=True)


def test_the_policy_gradient_of_own_text_is_that_of_the_reverse_kl() -> None:
    """Averaged over the student's own distribution of the written token, exactly, by writing each token once."""
    case = make_case("chosen_token")
    log_p = torch.randn(VOCAB_SIZE, dtype=torch.float64).log_softmax(-1)
    logits = (case.head.weight_VH @ case.hidden[0] + case.head.bias_V)[:VOCAB_SIZE]
    log_q = logits.log_softmax(-1)
    expected = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), case.parameters())
    targets = SparseTargets("chosen_token", torch.empty(VOCAB_SIZE, 0, dtype=torch.long), log_p[:, None])
    loss = distillation_loss(
        case.hidden[:1].expand(VOCAB_SIZE, -1),
        case.head,
        torch.arange(VOCAB_SIZE),
        targets,
        divergence="policy_gradient",
        position_weights_N=log_q.detach().exp(),
    )
    close(list(torch.autograd.grad(loss.loss, case.parameters())), list(expected))
    assert loss.log_ratio is not None


def test_draws_are_unbiased() -> None:
    """The mean gradient over 400 samples of 50 draws lies within 5 standard errors of the dense one, for every element."""
    case = make_case(k=VOCAB_SIZE)
    full = case.targets
    dense = torch.cat([gradient.flatten() for gradient in case.gradients()])
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.zeros(POSITIONS, VOCAB_SIZE, dtype=torch.float64).scatter(1, full.ids_NK.long(), full.log_probs_NK.exp())
    proposal = probabilities.sqrt() / probabilities.sqrt().sum(-1, keepdim=True)
    for source in (probabilities, proposal):
        samples = []
        for _ in range(400):
            draws = torch.multinomial(source, 50, replacement=True, generator=generator)
            counts = torch.zeros_like(source).scatter_add(1, draws, torch.ones_like(draws, dtype=torch.float64))
            weights, ids = (counts / 50 * probabilities / source).topk(VOCAB_SIZE)
            sampled = SparseTargets("sampled", ids.masked_fill(weights == 0, -1), weights.log())
            samples.append(torch.cat([gradient.flatten() for gradient in replace(case, targets=sampled).gradients()]))
        stacked = torch.stack(samples)
        error = stacked.std(0) / math.sqrt(len(samples))
        assert ((stacked.mean(0) - dense).abs() <= 5 * error + 1e-12).all()
        # The test can fail: what normalising the weights or dropping the rest would do is larger than the errors.
        assert error.mean() < 0.02 * dense.abs().mean()


# ---------------------------------------------------------------- invariances


@every_setting
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 7, 1000])
def test_chunk_size_changes_nothing(setting: str, chunk_size: int) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind, softcap=5.0)
    close(case.loss(chunk_size=chunk_size, **settings).loss, case.loss(**settings).loss)
    close(case.gradients(chunk_size=chunk_size, **settings), case.gradients(**settings))


@every_setting
def test_padding_of_the_vocabulary_changes_nothing(setting: str) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind)
    bare = replace(
        case.head,
        weight_VH=case.head.weight_VH.detach()[:VOCAB_SIZE].requires_grad_(),
        bias_V=case.head.bias_V.detach()[:VOCAB_SIZE].requires_grad_(),
        vocab_size=None,
    )
    close(replace(case, head=bare).loss(**settings).loss, case.loss(**settings).loss)
    hidden, weight, bias = case.gradients(**settings)
    close([hidden, weight[:VOCAB_SIZE], bias[:VOCAB_SIZE]], replace(case, head=bare).gradients(**settings))
    assert not weight[VOCAB_SIZE:].any()
    assert not bias[VOCAB_SIZE:].any()


@every_setting
def test_padding_of_candidates_changes_nothing(setting: str) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind)
    if kind == "chosen_token":
        pytest.skip("chosen_token has no candidates")
    ids, log_probs = case.targets.ids_NK, case.targets.log_probs_NK
    ghost = (ids.max(1, keepdim=True).values + 1) % VOCAB_SIZE  # a valid id of probability 0
    while (clash := (ghost == ids).any(1, keepdim=True)).any():
        ghost = torch.where(clash, (ghost + 1) % VOCAB_SIZE, ghost)
    nothing = torch.full_like(log_probs[:, :1], -math.inf)
    padded = replace(
        case.targets,
        ids_NK=torch.cat([torch.full_like(ghost, -1), ids, ghost], 1).to(torch.int64),
        log_probs_NK=torch.cat([nothing, log_probs, nothing], 1),
    )
    close(replace(case, targets=padded).gradients(**settings), case.gradients(**settings))
    close(replace(case, targets=padded).loss(**settings).top1_agreements, case.loss(**settings).top1_agreements)


@every_setting
def test_a_batch_is_the_sum_of_its_parts(setting: str) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind)
    whole, weight = case.loss(**settings), case.gradients(**settings)[1]
    parts = [
        Case(case.hidden[part], case.head, case.labels[part], case.targets.take(part)) for part in torch.arange(POSITIONS).split([4, 1, 6])
    ]
    close(sum(part.loss(**settings).loss for part in parts), whole.loss)
    close(sum(part.gradients(**settings)[1] for part in parts), weight)
    assert sum(part.loss(**settings).num_positions for part in parts) == whole.num_positions


@every_setting
def test_positions_that_are_not_supervised_add_nothing(setting: str) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind)
    kept = (case.labels != -100).nonzero()[:, 0]
    only = Case(case.hidden.detach()[kept].requires_grad_(), case.head, case.labels[kept], case.targets.take(kept))
    nonsense = replace(case.targets, log_probs_NK=case.targets.log_probs_NK.clone())
    nonsense.log_probs_NK[1] = math.nan
    case.targets = nonsense
    close(case.loss(**settings).loss, only.loss(**settings).loss)
    found, expected = case.gradients(**settings), only.gradients(**settings)
    close(found[1:], expected[1:])
    close(found[0][kept], expected[0])
    assert not found[0][case.labels == -100].any()


@every_setting
@pytest.mark.parametrize("positions", [0, 3])
def test_nothing_supervised_gives_zero(setting: str, positions: int) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind)
    part = torch.arange(positions)
    case = Case(case.hidden.detach()[part].requires_grad_(), case.head, torch.full((positions,), -100), case.targets.take(part))
    loss = case.loss(**settings)
    assert loss.num_positions == 0
    for value in (loss.loss, loss.kd, loss.nll, loss.student_entropy, loss.num_targets, *case.gradients(**settings)):
        assert not value.any()


@every_setting
def test_position_weights(setting: str) -> None:
    kind, settings = SETTINGS[setting]
    case = make_case(kind)
    weights = torch.rand(POSITIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = [i for i in range(POSITIONS) if case.labels[i] != -100]
    alone = [Case(case.hidden[i : i + 1], case.head, case.labels[i : i + 1], case.targets.take(torch.tensor([i]))) for i in rows]
    close(
        case.loss(position_weights_N=weights, **settings).loss,
        sum(weights[i] * one.loss(**settings).loss for i, one in zip(rows, alone, strict=True)),
    )
    expected = sum(weights[i] * one.gradients(**settings)[1] for i, one in zip(rows, alone, strict=True))
    close(case.gradients(position_weights_N=weights, **settings)[1], expected)


# ---------------------------------------------------------------- heads


def test_a_frozen_head_gets_no_gradient() -> None:
    case = make_case()
    case.head.weight_VH.requires_grad_(False)
    case.head.bias_V.requires_grad_(False)
    (3 * case.loss().loss).backward()
    assert case.head.weight_VH.grad is None
    assert case.head.bias_V.grad is None
    trainable = make_case()
    (3 * trainable.loss().loss).backward()
    close(case.hidden.grad, trainable.hidden.grad)


def test_a_frozen_head_saves_no_buffer_of_its_size() -> None:
    case = make_case()
    case.head.weight_VH.requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        case.loss()
    assert sorted(tensor.shape for tensor in saved) == sorted([case.hidden.shape, case.head.bias_V.shape])


def test_a_frozen_body_still_trains_the_head() -> None:
    case, both = make_case(), make_case()
    case.hidden = case.hidden.detach()
    case.loss().loss.backward()
    close(case.head.weight_VH.grad, both.gradients()[1])


def test_a_tied_head_sums_both_uses() -> None:
    """The weight is embedding and head; its gradient is that of the definition, in which autograd sees both uses."""
    case = make_case(bias=False)
    tokens = torch.arange(POSITIONS)
    case.hidden = case.head.weight_VH[tokens].tanh()
    case.loss(nll_weight=0.5).loss.backward()
    case.hidden = case.head.weight_VH[tokens].tanh()
    (expected,) = torch.autograd.grad(reference(case, nll_weight=0.5)["loss"], [case.head.weight_VH])
    close(case.head.weight_VH.grad, expected)


def test_without_grad_mode_only_values_are_computed() -> None:
    case = make_case()
    with torch.no_grad():
        loss = case.loss()
    assert not loss.loss.requires_grad
    close(loss.loss, case.loss().loss.detach())


def test_only_the_loss_has_a_gradient_and_only_once() -> None:
    loss = make_case().loss()
    tensors = [value for value in vars(loss).values() if isinstance(value, Tensor)]
    assert [tensor.requires_grad for tensor in tensors] == [True] + [False] * (len(tensors) - 1)
    loss.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.loss.backward()


def test_gradients_scale_with_what_comes_in() -> None:
    case = make_case()
    expected = [7 * gradient for gradient in case.gradients()]
    close(list(torch.autograd.grad(7 * case.loss().loss, case.parameters())), expected)


# ---------------------------------------------------------------- numbers


@every_setting
@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"), [(torch.float32, 1e-6, 3e-6), (torch.bfloat16, 1e-2, 2e-2), (torch.float16, 2e-3, 3e-3)]
)
def test_narrow_types_stay_within_their_budget(setting: str, dtype: torch.dtype, loss_error: float, gradient_error: float) -> None:
    """Relative to the norm; the reference takes the same rounded inputs in float64, so only computing counts."""
    kind, settings = SETTINGS[setting]
    case = make_case(kind, dtype=dtype)
    expected = reference(case, **settings)["loss"]
    if kind != "chosen_token":
        assert abs(case.loss(**settings).loss / expected - 1) < loss_error
    assert case.loss(**settings).loss.dtype == torch.float32
    for found, wanted in zip(case.gradients(**settings), torch.autograd.grad(expected, case.parameters()), strict=True):
        assert found.dtype == dtype
        assert (found.double() - wanted.double()).norm() < gradient_error * wanted.double().norm()


def test_float16_keeps_gradients_of_improbable_tokens() -> None:
    """V equally probable tokens: each gets a gradient of 40.5 times float16's smallest number, 1.2 % from the next it has."""
    vocab_size = 2**25 // 81
    weight = torch.full((vocab_size, 2), 1e-3, dtype=torch.float16)
    weight[7] = 0
    hidden = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    targets = SparseTargets("top_k", torch.tensor([[7]]), torch.tensor([[0.0]]), torch.tensor([-math.inf]))
    distillation_loss(hidden, StudentHead(weight), torch.tensor([7]), targets).loss.mul(1024).backward()
    close(hidden.grad.double(), torch.full((1, 2), 1024 * float(weight[0, 0]), dtype=torch.float64), rtol=2e-3, atol=0)


def test_autocast_computes_in_its_type() -> None:
    case = make_case(dtype=torch.float32)
    narrow = make_case(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss()
    close(loss.loss, narrow.loss().loss.detach(), rtol=1e-3, atol=0)
    loss.loss.backward()
    assert case.hidden.grad.dtype == case.head.weight_VH.grad.dtype == torch.float32


@pytest.mark.parametrize("log_rest", [-1e-9, -0.5, -math.log(2), -5.0, -12.0, -15.0])
def test_log_remainder(log_rest: float) -> None:
    held = math.log(-math.expm1(log_rest))
    log_probs = torch.tensor([[held - math.log(2), -math.inf, held - math.log(2)]])
    found = float(log_remainder(log_probs)[0])
    # float32's resolution of the candidates, 6e-8, is an error of the rest relative to its mass.
    assert found == pytest.approx(log_rest, abs=3e-7 / math.exp(log_rest) + 1e-6)


def test_log_remainder_of_all_and_of_nothing() -> None:
    all_and_more = torch.tensor([[0.0, -math.inf], [-math.log(2), -math.log(2)], [-0.69, -0.69], [-math.inf, -math.inf]])
    assert log_remainder(all_and_more).tolist() == pytest.approx([math.log(2**-23)] * 3 + [0.0])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("log_rest", [None, -math.inf, -80.0, -1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rests_stay_finite(divergence: str, log_rest: float | None, dtype: torch.dtype) -> None:
    """A teacher with all its mass in the candidates or next to none, a student that is as sure of the opposite."""
    held = 0.0 if log_rest is None or log_rest < -1 else math.log(-math.expm1(log_rest))
    targets = SparseTargets(
        "top_k",
        torch.tensor([[2, 5]] * 3),
        torch.tensor([[held + math.log(0.75), held + math.log(0.25)]] * 3),
        None if log_rest is None else torch.full((3,), log_rest),
    )
    weight = torch.zeros(9, 9, dtype=dtype).fill_diagonal_(1).requires_grad_()
    hidden = torch.zeros(3, 9, dtype=dtype)
    hidden[0, [2, 5]] = 40.0  # the student's rest is e^-40: less than float32 could take from 1
    hidden[1, 7] = 40.0
    hidden.requires_grad_()
    beta = 0.5 if divergence == "jsd" else None
    loss = distillation_loss(hidden, StudentHead(weight), torch.tensor([2, 7, 0]), targets, divergence=divergence, jsd_beta=beta)
    loss.loss.backward()
    for value in (loss.loss, loss.student_entropy, loss.kl_lower_bound, hidden.grad, weight.grad):
        assert torch.isfinite(value).all()
    assert loss.kd <= 3 * 88, "an impossible rest counts as exp(-88)"
    # Gradients by the logits sum to 0 at each position.
    assert hidden.grad.sum(1).abs().max() < 1e-5 * max(1.0, float(hidden.grad.abs().max()))


def test_a_small_rest_of_the_student_is_exact_in_float32() -> None:
    """log q(rest) = -40 for a rest that 1 - Σ q would round to 0; the forward KL grows by p(rest) times it."""
    hidden = torch.zeros(1, 4)
    hidden[0, 1] = 40.0
    targets = SparseTargets("top_k", torch.tensor([[1]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)]))
    loss = distillation_loss(hidden, StudentHead(torch.eye(4)), torch.tensor([1]), targets)
    close(loss.kd, torch.tensor(math.log(0.5) - 0.5 * (math.log(3) - 40)), rtol=1e-6, atol=0)


def test_large_logits_do_not_overflow() -> None:
    case = make_case(dtype=torch.float32)
    case.hidden = (1e4 * case.hidden.detach()).requires_grad_()
    assert all(torch.isfinite(gradient).all() for gradient in case.gradients(nll_weight=1.0))


# ---------------------------------------------------------------- refusals


def refused(case: Case, error: type[DistillError], message: str, **settings: Any) -> None:
    with pytest.raises(error, match=message):
        case.loss(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sampled", {"divergence": "reverse_kl"}, "only what is linear"),
        ("sampled", {"divergence": "jsd", "jsd_beta": 0.5}, "only what is linear"),
        ("chosen_token", {"divergence": "forward_kl"}, "the log-probability of one token"),
        ("top_k", {"divergence": "policy_gradient"}, "'forward_kl' or 'reverse_kl' or 'jsd'"),
        ("top_k", {"divergence": "jsd"}, "jsd_beta goes with"),
        ("top_k", {"divergence": "forward_kl", "jsd_beta": 0.5}, "jsd_beta goes with"),
        ("top_k", {"divergence": "jsd", "jsd_beta": 1.0}, "between 0 and 1"),
        ("top_k", {"temperature": 0.0}, "must be positive"),
        ("sampled", {"temperature": 2.0}, "not defined for sampled"),
        ("chosen_token", {"divergence": "policy_gradient", "temperature": 2.0}, "not defined for chosen_token"),
        ("top_k", {"nll_weight": -1.0}, "nll_weight must not be negative"),
        ("top_k", {"kd_weight": math.nan}, "kd_weight must not be negative"),
        ("top_k", {"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(kind: str, settings: dict[str, Any], message: str) -> None:
    refused(make_case(kind), RecipeError, message, **settings)


def test_temperature_needs_all_candidates() -> None:
    refused(make_case(k=VOCAB_SIZE - 1), DataError, f"fewer than {VOCAB_SIZE} candidates", temperature=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replace(t, ids_NK=t.ids_NK.clone().index_fill_(1, torch.tensor([0]), VOCAB_SIZE)), "candidate outside"),
        (lambda t: replace(t, ids_NK=t.ids_NK.clone().index_fill_(1, torch.tensor([0]), -7)), "candidate outside"),
        (lambda t: replace(t, ids_NK=t.ids_NK[:, :1].expand(-1, 5)), "same candidate twice"),
        (lambda t: replace(t, log_probs_NK=t.log_probs_NK + 8), "above 0, or NaN"),
        (lambda t: replace(t, log_probs_NK=t.log_probs_NK * math.nan), "above 0, or NaN"),
        (lambda t: replace(t, log_rest_N=t.log_rest_N * 0), "don't sum to 1"),
        (lambda t: replace(t, log_probs_NK=t.log_probs_NK / 3, log_rest_N=None), "don't sum to 1"),
        (lambda t: replace(t, ids_NK=t.ids_NK[:, :4]), "Give \\(N, K\\)"),
        (lambda t: replace(t, log_rest_N=t.log_rest_N[:3]), "Give \\(N, K\\)"),
        (lambda t: t.take(torch.arange(4)), "Give \\(N, K\\)"),
        (lambda t: replace(t, kind="chosen_token"), "chosen_token targets"),
        (lambda t: replace(t, ids_NK=t.ids_NK.float()), "Give integers and floats"),
        (lambda t: replace(t, ids_NK=t.ids_NK.to("meta")), "on 2 devices"),
    ],
)
def test_targets_that_do_not_fit(change: Any, message: str) -> None:
    case = make_case()
    case.targets = change(case.targets)
    refused(case, DataError, message, divergence="policy_gradient" if case.targets.kind == "chosen_token" else "forward_kl")


@pytest.mark.parametrize("label", [VOCAB_SIZE, -1])
def test_labels_outside_the_vocabulary(label: int) -> None:
    case = make_case()
    case.labels[4] = label
    refused(case, DataError, "at 1 of 11 positions")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden": torch.zeros(POSITIONS, HIDDEN + 1)}, ModelError),
        ({"hidden": torch.zeros(POSITIONS - 1, HIDDEN)}, DataError),
        ({"labels": torch.zeros(POSITIONS)}, DataError),
        ({"head": StudentHead(torch.zeros(VOCAB_SIZE, HIDDEN), None, VOCAB_SIZE + 1)}, ModelError),
        ({"head": StudentHead(torch.zeros(VOCAB_SIZE, HIDDEN), torch.zeros(3))}, ModelError),
        ({"head": StudentHead(torch.zeros(VOCAB_SIZE, HIDDEN), softcap=0.0)}, ModelError),
        ({"head": StudentHead(torch.zeros(VOCAB_SIZE, HIDDEN, device="meta"))}, DataError),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, Any], error: type[DistillError]) -> None:
    refused(replace(make_case(), **change), error, "loss: ")


def test_position_weights_of_another_shape() -> None:
    refused(make_case(), DataError, "position weights", position_weights_N=torch.ones(3))


# ---------------------------------------------------------------- a head sharded over ranks


def sharded_rank(rank: int, folder: Path) -> None:
    """One of two processes: its own half of the positions, and half of the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    case = make_case()
    part = torch.arange(POSITIONS)[rank::2]
    weight = distribute_tensor(case.head.weight_VH.detach(), mesh, [Shard(0)]).requires_grad_()
    bias = distribute_tensor(case.head.bias_V.detach(), mesh, [Shard(0)]).requires_grad_()
    head = replace(case.head, weight_VH=weight, bias_V=bias)
    own = Case(case.hidden.detach()[part].requires_grad_(), head, case.labels[part], case.targets.take(part))
    own.loss().loss.backward()
    assert weight.grad.to_local().shape != weight.shape
    torch.save((weight.grad.full_tensor(), bias.grad.full_tensor()), folder / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # the mesh outlives the group, and a thread of gloo that still holds a tensor aborts a finalizing interpreter


def test_a_sharded_head_averages_its_gradient_over_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sharded_rank, (tmp_path,), nprocs=2)
    _, weight, bias = make_case().gradients()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        close(list(found), [weight / 2, bias / 2])


def test_ties_are_no_agreement_and_no_hit() -> None:
    """A student that knows nothing finds all tokens equally probable: it agrees with nobody."""
    for kind in ("top_k", "sampled"):
        case = make_case(kind)
        case.head.weight_VH.data.zero_()
        case.head.bias_V.data.zero_()
        assert case.loss().top1_agreements == case.loss().hits == 0
        first, second = case.targets.ids_NK[0, :2].tolist()
        case.head.bias_V.data[first] = 1  # one token is the most probable one, then two are
        assert case.loss().top1_agreements > 0
        case.head.bias_V.data[second] = 1
        assert case.loss().top1_agreements == 0
        case.head.bias_V.data[second] = 0
        others = set(range(VOCAB_SIZE)) - set(case.targets.ids_NK[0].tolist()) - {int(case.labels[0])}
        case.head.bias_V.data[min(others)] = 1  # tied with one that is no candidate
        assert (
            replace(case, labels=case.labels[:1], hidden=case.hidden[:1], targets=case.targets.take(torch.tensor([0])))
            .loss()
            .top1_agreements
            == 0
        )


def test_a_tie_of_the_teacher_is_no_agreement() -> None:
    case = make_case("sampled")
    case.head.weight_VH.data.zero_()
    case.head.bias_V.data.zero_()
    case.targets.log_probs_NK[:, 0] = case.targets.log_probs_NK[:, 1] = 0.0
    case.head.bias_V.data[int(case.targets.ids_NK[0, 0])] = 3
    alone = replace(case, labels=case.labels[:1], hidden=case.hidden[:1], targets=case.targets.take(torch.tensor([0])))
    assert alone.loss().top1_agreements == 0
