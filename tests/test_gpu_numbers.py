"""What 16-bit numbers on a GPU cost the loss and the targets, against float64 on the same rounded inputs."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from on_device import DEVICE, MARKS, NARROW, WIDENS, cast, dtype_id, logit_error, pick, relative, roundoff, sharpen
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill.engines.scored import ScoredRow
from distill.engines.scoring import score_rows
from distill.losses.distillation import DistillationLoss, StudentHead, distillation_loss
from distill.losses.sparse import SparseTargets
from distill.models.chat import IGNORE
from distill.models.vocabulary import AlignedRow, VocabularyMap
from distill.targets import kinds
from distill.targets.codec import Codec, Targets
from distill.targets.compare import Verification
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

pytestmark = MARKS
Record = Any  # pytest's record_property
every_type = pytest.mark.parametrize("dtype", NARROW, ids=dtype_id)

# ---------------------------------------------------------------- the loss

POSITIONS, VOCAB_SIZE, ROWS, WIDTH = pick((384, 151_665, 151_936, 1024), (48, 991, 1000, 64))
CHUNK = POSITIONS // 2 - 1  # two of this size, and two positions
SPECS: dict[str, TargetSpec] = {"top_k": TopK(k=64), "sampled": Sampled(draws=50), "chosen_token": ChosenToken(), "nll": TopK(k=8)}
HEADS = {"plain": (1.0, None), "scaled and capped": (1 / 16, 30.0)}


class Problem(NamedTuple):
    """Inputs of one loss, rounded to 16 bits, and what the definition makes of them in float64."""

    hidden_NH: Tensor
    head: StudentHead
    labels_N: Tensor
    targets: SparseTargets
    settings: dict[str, Any]
    loss: float
    gradients: list[Tensor]
    """By hidden states and head."""
    first_order: float
    """Sum over all logits of |gradient · logit|: what the loss moves by if all logits are off by a share of themselves."""
    largest: float
    """The largest logit."""
    sensitivity: float
    """What the gradient by the logits moves by, relative to its norm, if every logit moves by one of its own sign."""


def logits_of(hidden_NH: Tensor, weight_VH: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits_NV = scale * hidden_NH @ weight_VH[:VOCAB_SIZE].T
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def targets_of(spec: TargetSpec, logits_NV: Tensor, labels_N: Tensor) -> SparseTargets:
    if isinstance(spec, TopK):
        found = kinds.top_k(logits_NV, spec, VOCAB_SIZE)
    elif isinstance(spec, Sampled):
        found = kinds.sampled(logits_NV, spec, VOCAB_SIZE, kinds.uniforms(spec, "a trace", len(logits_NV)))
    else:
        found = kinds.chosen_token(logits_NV, labels_N, VOCAB_SIZE)
    ids, log_probs, log_rest = (torch.from_numpy(array).to(DEVICE) for array in (found.ids, found.log_probs, found.log_rest))
    return SparseTargets(spec.kind, ids, log_probs, log_rest if isinstance(spec, TopK) else None)


def definition(kind: str, log_q_NV: Tensor, labels_N: Tensor, targets: SparseTargets) -> Tensor:
    """(N,) the losses from the definition, over the whole vocabulary."""
    log_written_N = log_q_NV.gather(1, labels_N[:, None])[:, 0]
    if kind == "nll":
        return -log_written_N
    if kind == "chosen_token":
        return (targets.log_probs_NK[:, 0].double() - log_written_N) ** 2 / 2
    filled_NK, ids_NK = targets.ids_NK >= 0, targets.ids_NK.clamp(min=0).long()
    p_NK, log_q_NK = targets.log_probs_NK.double().exp(), log_q_NV.gather(1, ids_NK)
    if kind == "sampled":
        return -(p_NK * log_q_NK * filled_NK).sum(1)
    assert targets.log_rest_N is not None and filled_NK.all()
    p_NR = torch.cat([p_NK, targets.log_rest_N.double().exp()[:, None]], 1)
    p_NR = p_NR / p_NR.sum(1, keepdim=True)
    log_rest_N1 = log_q_NV.scatter(1, ids_NK, -math.inf).logsumexp(1, keepdim=True)
    return (p_NR * (p_NR.log() - torch.cat([log_q_NK, log_rest_N1], 1))).sum(1)


@functools.lru_cache(maxsize=1)
def problem(kind: str, dtype: torch.dtype, head: str) -> Problem:
    """A student of a language model's entropy (1 to 2 nats), and a teacher whose logits are one nat away from its own."""
    scale, softcap = HEADS[head]
    generator = torch.Generator(DEVICE).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=DEVICE)
    spread = math.sqrt(2 * math.log(VOCAB_SIZE))  # of normal logits; above it the entropy would vanish
    hidden_NH = (random(POSITIONS, WIDTH) / scale).to(dtype)
    weight_VH = (random(ROWS, WIDTH) * spread / math.sqrt(WIDTH)).to(dtype)
    hidden64_NH, weight64_VH = (tensor.double().requires_grad_() for tensor in (hidden_NH, weight_VH))
    logits_NV = logits_of(hidden64_NH, weight64_VH, scale, softcap)
    logits_NV.retain_grad()
    teacher_NV = logits_NV.detach().float() + random(POSITIONS, VOCAB_SIZE)
    labels_N = torch.multinomial(teacher_NV.softmax(-1), 1, generator=generator)[:, 0]
    targets = targets_of(SPECS[kind], teacher_NV, labels_N)
    labels_N[[1, POSITIONS - 1]] = IGNORE
    rows = labels_N != IGNORE
    losses = definition(kind, logits_NV.log_softmax(-1)[rows], labels_N[rows], targets.take(rows.nonzero()[:, 0]))
    losses.sum().backward()
    assert logits_NV.grad is not None and hidden64_NH.grad is not None and weight64_VH.grad is not None
    settings = {"divergence": "policy_gradient"} if kind == "chosen_token" else {}
    settings |= {"kd_weight": 0.0, "nll_weight": 1.0} if kind == "nll" else {}
    logits_NV, gradient_NV = logits_NV.detach(), logits_NV.grad
    return Problem(
        hidden_NH,
        StudentHead(weight_VH, None, VOCAB_SIZE, scale, softcap),
        labels_N,
        targets,
        settings,
        float(losses.detach().sum()),
        [hidden64_NH.grad, weight64_VH.grad],
        float((gradient_NV * logits_NV).abs().sum()),
        float(logits_NV.abs().max()),
        sensitivity(kind, logits_NV[rows], gradient_NV[rows], losses.detach()),
    )


def sensitivity(kind: str, logits_NV: Tensor, gradient_NV: Tensor, losses_N: Tensor) -> float:
    """If logits move by δ, q - p moves by q (δ - q · δ): at most √2 ‖q‖ δ. A (q - 1) moves by A's change of √2 δ, too."""
    moved_N, norm_N = logits_NV.softmax(-1).norm(dim=1), gradient_NV.norm(dim=1)
    if kind == "chosen_token":
        advantage_N = (2 * losses_N).sqrt().clamp(min=1e-12)
        moved_N = advantage_N * moved_N + norm_N / advantage_N
    return math.sqrt(2) * float(moved_N.norm() / norm_N.norm())


def share_of_logits(dtype: torch.dtype) -> float:
    """By which share of itself a logit may be off.

    A tensor core adds at least eight exact products at once to a float32 sum, and may truncate it: by 2^-23 of what is
    there, half the result on average. Where products are rounded to 16 bits, that is what counts.
    """
    return WIDTH / 8 * 2**-23 / 2 if WIDENS else roundoff(dtype) / math.sqrt(3)


def budgets(case: Problem, dtype: torch.dtype) -> tuple[float, float]:
    """Relative errors that rounding explains, of the loss and of the gradients."""
    share = share_of_logits(dtype)
    # Softmax and sums in float32: a dozen roundings of numbers like the logarithm of V. The second order is δ² a token at most.
    evaluation = 12 * 2**-24 * math.log(VOCAB_SIZE)
    loss = share * case.first_order + POSITIONS * (evaluation + (share * case.largest) ** 2)
    # The gradient is rounded to 16 bits before the second product, and that product once more on its way out: √2 u / √3.
    return loss / case.loss, math.sqrt(2 / 3) * roundoff(dtype) + share * case.largest * case.sensitivity


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])  # fastest, so that a problem is made once
@every_type
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_and_its_gradients_are_the_definitions(
    kind: str, dtype: torch.dtype, head: str, trainable: bool, record_property: Record
) -> None:
    case = problem(kind, dtype, head)
    hidden_NH, weight_VH = case.hidden_NH.clone().requires_grad_(), case.head.weight_VH.clone().requires_grad_(trainable)
    plain = StudentHead(weight_VH, None, VOCAB_SIZE, case.head.logit_scale, case.head.softcap)
    found: DistillationLoss = distillation_loss(hidden_NH, plain, case.labels_N, case.targets, chunk_size=CHUNK, **case.settings)
    found.loss.backward()
    loss_error = abs(float(found.loss.detach()) / case.loss - 1)
    loss_budget, budget = budgets(case, dtype)
    record_property("loss_relative_error", loss_error)
    record_property("loss_relative_budget", loss_budget)
    record_property("gradient_relative_budget", budget)
    assert loss_error < loss_budget
    for name, tensor, expected in zip(("hidden", "head"), (hidden_NH, weight_VH), case.gradients, strict=True):
        if not tensor.requires_grad:
            assert tensor.grad is None
            continue
        assert tensor.grad is not None and tensor.grad.dtype == dtype
        error = relative(tensor.grad, expected)
        record_property(f"{name}_gradient_relative_error", error)
        assert error < budget
    assert weight_VH.grad is None or not weight_VH.grad[VOCAB_SIZE:].any(), "padding is no token"


def test_float16_keeps_the_gradients_of_improbable_tokens(record_property: Record) -> None:
    """V equally probable tokens: each has a gradient of 40.5 times float16's smallest number, 1.2 % from the next it has."""
    vocab_size = 2**25 // 81
    weight_VH = torch.full((vocab_size, 2), 1e-3, dtype=torch.float16, device=DEVICE)
    weight_VH[7] = 0
    weight_VH.requires_grad_()
    hidden_NH = torch.tensor([[1.0, -1.0]], dtype=torch.float16, device=DEVICE, requires_grad=True)  # all logits are 0
    candidate, nothing = torch.tensor([[7]], device=DEVICE), torch.tensor([-math.inf], device=DEVICE)
    targets = SparseTargets("top_k", candidate, torch.zeros(1, 1, device=DEVICE), nothing)
    distillation_loss(hidden_NH, StudentHead(weight_VH), candidate[0], targets).loss.mul(1024).backward()
    assert hidden_NH.grad is not None and weight_VH.grad is not None
    hidden_error = relative(hidden_NH.grad, 1024 * (1 - 1 / vocab_size) * weight_VH[:1].detach().double())
    others_VH = weight_VH.grad[torch.arange(vocab_size, device=DEVICE) != 7]
    head_error = relative(others_VH, (1024 / vocab_size * hidden_NH.detach().double()).expand_as(others_VH))
    record_property("hidden_gradient_relative_error", hidden_error)
    record_property("head_gradient_relative_error", head_error)
    # Two roundings, the same ones for every token, and the sum of V equal numbers, eight at a time, truncated as above.
    assert head_error < 2 * roundoff(torch.float16)
    assert hidden_error < 2 * roundoff(torch.float16) + vocab_size / 8 * 2**-23 / 2


# ---------------------------------------------------------------- targets

LAYERS, TEACHER_VOCAB, TEACHER_WIDTH = pick((8, 151_936, 1024), (4, 1000, 64))
TRACES, PROMPT, LONGEST = pick((24, 16, 160), (16, 4, 40))
ENTROPY = 1.2  # nats a token
TEACHER_SPECS: list[TargetSpec] = [TopK(k=64), ChosenToken(), Sampled(draws=50)]
LOG_SEEN = math.log(1e-4)  # less probable tokens are not compared by `score`, either


@pytest.fixture(scope="module")
def teacher() -> Any:
    """A random model with the entropy of a language model, in float32."""
    config = Qwen3Config(
        vocab_size=TEACHER_VOCAB,
        hidden_size=TEACHER_WIDTH,
        intermediate_size=3 * TEACHER_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=TEACHER_WIDTH // 8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.8 / math.sqrt(TEACHER_WIDTH),
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3ForCausalLM(config).eval()
    sharpen(model, torch.randint(TEACHER_VOCAB, (4, 64), device=DEVICE), ENTROPY)
    return model


@pytest.fixture(scope="module")
def rows(teacher: Any) -> list[AlignedRow]:
    """What the teacher itself writes, in rows of different lengths."""
    torch.manual_seed(1)
    prompts = torch.randint(TEACHER_VOCAB, (TRACES, PROMPT), device=DEVICE)
    mask = torch.ones_like(prompts)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": LONGEST - PROMPT, "pad_token_id": 0}
    written = teacher.generate(prompts, attention_mask=mask, **options).cpu().numpy().astype(np.int32)
    found = []
    for place, ids in enumerate(written):
        ids = ids[: LONGEST - place % 9 * (LONGEST // 16)]
        labels = np.concatenate([np.full(PROMPT, IGNORE, np.int32), ids[PROMPT:]])
        found.append(AlignedRow(f"{place}/0", ids, labels, ids, np.arange(PROMPT, len(ids), dtype=np.int32)))
    return found


@pytest.fixture(scope="module")
def own_vocabulary() -> VocabularyMap:
    ids = np.arange(TEACHER_VOCAB, dtype=np.int32)
    nothing: Any = None  # texts are only for aligning, which has been done
    return VocabularyMap(ids, ids, True, True, nothing, nothing)


@torch.no_grad()
def exact(model: Any, row: AlignedRow) -> Tensor:
    """(n, V) log-probabilities of the supervised tokens' positions in float64; rotations and root mean squares are float32."""
    logits_TV = model(torch.from_numpy(row.teacher_ids[None].astype(np.int64)).to(DEVICE), use_cache=False).logits[0]
    return logits_TV[torch.from_numpy(row.positions.astype(np.int64) - 1).to(DEVICE)].log_softmax(-1)


@every_type
def test_stored_log_probabilities_are_those_of_the_rounded_teacher(
    dtype: torch.dtype, teacher: Any, rows: list[AlignedRow], own_vocabulary: VocabularyMap, record_property: Record
) -> None:
    narrow = cast(teacher, dtype)
    scored = score_rows(narrow, rows, TEACHER_SPECS[0], own_vocabulary)
    wide = cast(narrow, torch.float64)
    errors, entropies, spreads, largest = [], [], [], 0.0
    for row, found in zip(rows, scored, strict=True):
        log_p_nV = exact(wide, row)
        ids_nK = torch.from_numpy(found.targets.ids).long().to(DEVICE)
        log_p_nK = log_p_nV.gather(1, ids_nK)
        seen_nK = log_p_nK > LOG_SEEN
        errors.append((torch.from_numpy(found.targets.log_probs).to(DEVICE) - log_p_nK)[seen_nK])
        entropies.append(-(log_p_nV.exp() * log_p_nV).sum(1))
        spreads.append(log_p_nV.std(1))
        largest = max(largest, float((log_p_nV - log_p_nV.mean(1, keepdim=True)).max()))
    error = torch.cat(errors)
    entropy = float(torch.cat(entropies).mean())
    quantile = float(np.quantile(error.abs().cpu().numpy(), 0.99))
    record_property("entropy_nats", entropy)
    record_property("rms_error_nats", float(error.square().mean().sqrt()))
    record_property("p99_abs_error_nats", quantile)
    record_property("max_abs_error_nats", float(error.abs().max()))
    record_property("mean_error_nats", float(error.mean()))
    assert 0.5 < entropy < 2.5
    # The logit itself is rounded to 16 bits, too; and the normaliser, a mean of such logits, is off by as much at most: √2.
    logit = math.hypot(logit_error(dtype, LAYERS, float(torch.cat(spreads).mean())), roundoff(dtype) / math.sqrt(3) * largest)
    record_property("rms_budget_nats", math.sqrt(2) * logit)
    assert float(error.square().mean().sqrt()) < math.sqrt(2) * logit
    assert quantile < 2.6 * math.sqrt(2) * logit  # normal errors: 1 % lie beyond 2.6 standard deviations
    assert float(error.abs().max()) < 6 * math.sqrt(2) * logit


def differences(one: Targets, other: Targets) -> np.ndarray:
    """Of the log-probabilities above LOG_SEEN that both sides have."""
    if not one.ids.shape[1]:
        seen = one.log_probs > LOG_SEEN
        return np.abs(one.log_probs - other.log_probs)[seen]
    found = []
    for place in range(len(one)):
        _, left, right = np.intersect1d(one.ids[place], other.ids[place], return_indices=True)
        values = one.log_probs[place][left]
        found.append(np.abs(values - other.log_probs[place][right])[values > LOG_SEEN])
    return np.concatenate(found)


def stored(scored: ScoredRow, spec: TargetSpec) -> Targets:
    """As they come back from the disk."""
    codec = Codec(spec, TEACHER_VOCAB)
    return codec.decode(codec.encode(scored.targets))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("spec", TEACHER_SPECS, ids=lambda spec: spec.kind)
def test_a_batch_of_eight_and_a_row_alone_agree_within_what_score_allows(
    spec: TargetSpec, dtype: torch.dtype, teacher: Any, rows: list[AlignedRow], own_vocabulary: VocabularyMap, record_property: Record
) -> None:
    """What `score.verify_rows` compares: stored from batches, read again alone. Those of the next position are found out."""
    model = cast(teacher, dtype)
    together, alone = (score_rows(model, rows, spec, own_vocabulary, size) for size in (8, 1))
    verification, shifted = (Verification(spec, exact=dtype == torch.float32) for _ in range(2))
    for one, other in zip(together, alone, strict=True):
        verification.add(stored(one, spec), other.targets)
        shifted.add(stored(one, spec)[1:], other.targets[:-1])
    assert not shifted.holds
    if verification.agreement is not None:
        record_property("equal_draws_share", verification.agreement)
        record_property("equal_draws_share_of_next_position", float(shifted.agreement or 0))
    else:
        difference = np.concatenate([differences(a.targets, b.targets) for a, b in zip(together, alone, strict=True)])
        record_property("max_abs_difference_nats", float(difference.max()))
        record_property("p99_abs_difference_nats", float(np.quantile(difference, 0.99)))
        record_property("largest_stored_difference_nats", verification.largest)
        record_property("beyond_share", verification.beyond / verification.compared)
        record_property("beyond_share_of_next_position", shifted.beyond / shifted.compared)
        assert verification.compared > len(difference) / 2 > 50
    assert verification.holds, str(verification)
