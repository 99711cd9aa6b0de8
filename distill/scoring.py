"""The teacher reads rows: one forward of its backbone a batch, then its head a chunk of positions at a time.

No tensor of positions x vocabulary is ever held for a whole sequence. What comes out is in the student's ids, one entry
for every supervised token of the student's row. Knows nothing of folders.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill.batching import MemoryGuard, by_length
from distill.heads import backbone, head_of, logits_of
from distill.models import free_memory
from distill.targets.codec import Floats, Targets, concatenate
from distill.targets.kinds import MassSummary, chosen_token, mass_profile, sampled, top_k, uniforms
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK
from distill.vocabulary import NONE, AlignedRow, Ids, VocabularyMap

MIN_CARRIED = 0.5
"""Least probability that the student's tokens must hold at a position for it to get a target."""
KS, DRAWS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (50,)
"""Sizes of targets whose worth is measured on the way."""
PROFILED_EVERY = 16
"""One position in so many is measured: it costs several passes over the vocabulary."""
BUFFER_BYTES = 128 << 20
"""Size of the float32 logits of a chunk; a few such copies exist at a time."""


@dataclass
class Statistics:
    """What reading rows gave, summed over rows; sums of sums are statistics again."""

    tokens: int = 0
    """Read by the teacher, prompts included."""
    positions: int = 0
    """Supervised tokens of the student."""
    aligned: int = 0
    """Those that the teacher writes with the same token."""
    stored: int = 0
    """Those that got a target."""
    carried: float = 0.0
    """Probability that lies on tokens the student has, summed over the aligned."""
    profiled: int = 0
    """Positions in `profile`."""
    profile: list[float] = field(default_factory=list)
    """Sums of `targets.kinds.mass_profile`."""
    device_s: float = 0.0
    """Seconds of the device."""

    def add(self, other: Statistics) -> None:
        """Counts other rows in."""
        for name in ("tokens", "positions", "aligned", "stored", "carried", "profiled", "device_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.profiled:
            self.profile = (np.array(self.profile or [0.0] * len(other.profile)) + other.profile).tolist()

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a journal."""
        return asdict(self)

    @property
    def aligned_share(self) -> float:
        """Share of the supervised tokens that got a target."""
        return self.stored / max(self.positions, 1)

    @property
    def carried_mass(self) -> float:
        """Share of the teacher's probability that lies on tokens the student has, over the aligned positions."""
        return self.carried / max(self.aligned, 1)

    def facts(self, vocab_size: int) -> dict[str, Any]:
        """What a manifest says of it; masses and distinct ids are averages a position, empty where none was profiled.

        Args:
            vocab_size: Number of the teacher's token ids.
        """
        summary = MassSummary(vocab_size, KS, DRAWS)
        if self.profiled:
            summary.add_profile(np.array(self.profile), self.profiled)
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "targets": self.stored,
            "aligned_share": round(self.aligned_share, 6),
            "carried_mass": round(self.carried_mass, 6),
            "captured_mass": {str(k): round(mass, 6) for k, mass in summary.captured_mass.items()} if self.profiled else {},
            "distinct_ids": {str(n): round(number, 3) for n, number in summary.distinct_ids.items()} if self.profiled else {},
            "profiled_positions": self.profiled,
            "device_s": round(self.device_s, 2),
        }


@dataclass(frozen=True)
class ScoredRow:
    """What the teacher thinks of a row."""

    key: str
    targets: Targets
    """One entry a supervised token, in the student's ids; without candidates (or -inf) where there is no target."""
    statistics: Statistics


@dataclass(frozen=True)
class _Chunk:
    """Positions of a batch that go through the head together."""

    hidden_nH: Tensor
    written_n: Ids
    """The teacher's ids of the written tokens."""
    uniforms_nN: NDArray[np.float64] | None
    """For `sampled` targets."""


class TeacherScorer:
    """Reads batches of rows with a model that is in memory.

    Args:
        model: The teacher, in evaluation mode, on its device.
        target: What is kept of its distributions.
        vocabulary: Its tokens as the student's.
        buffer_bytes: See `BUFFER_BYTES`.
    """

    def __init__(self, model: PreTrainedModel, target: TargetSpec, vocabulary: VocabularyMap, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.target = target
        self.vocabulary = vocabulary
        self._backbone = backbone(model)
        self._head = head_of(model, vocabulary.teacher_size)
        self._device = self._head.weight_VH.device
        self._chunk = max(1, buffer_bytes // (4 * self._head.weight_VH.shape[0]))
        self.exact = self._head.weight_VH.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        """Whether the model computes in float32, so that the size of a batch changes next to nothing."""
        self._ks = [k for k in KS if k <= vocabulary.teacher_size]
        to_student, to_teacher = vocabulary.student_ids, vocabulary.teacher_ids
        self._lost = torch.from_numpy(np.flatnonzero(to_student == NONE)).to(self._device)
        self._columns = torch.from_numpy(np.maximum(to_teacher, 0).astype(np.int64)).to(self._device)
        self._absent = torch.from_numpy(to_teacher == NONE).to(self._device)

    @torch.inference_mode()
    def score(self, rows: Sequence[AlignedRow]) -> list[ScoredRow]:
        """What the teacher thinks of some rows, in their order; how they are put together changes only rounding.

        Raises:
            ModelError: the teacher's logits make no distribution.
            torch.OutOfMemoryError: the batch is too large.
        """
        places = [np.flatnonzero(row.positions >= 0) for row in rows]
        counts = [len(found) for found in places]
        parts, carried = [_nothing(self.target)], [np.empty(0)]
        profile: list[NDArray[np.float64]] = [np.empty((0, len(self._ks) + len(DRAWS)))]
        wanted = np.concatenate([_profiled(row.key, found) for row, found in zip(rows, places, strict=True)])
        if sum(counts):
            hidden_nH = self._read(rows, counts)
            written_n = np.concatenate([row.teacher_ids[row.positions[found]] for row, found in zip(rows, places, strict=True)])
            numbers_nN = self._uniforms(rows, places)
            for start in range(0, len(hidden_nH), self._chunk):
                part = slice(start, start + self._chunk)
                chunk = _Chunk(hidden_nH[part], written_n[part], None if numbers_nN is None else numbers_nN[part])
                logits_nV = logits_of(chunk.hidden_nH, self._head)
                found, mass_n = self._targets(logits_nV, chunk)
                parts.append(found)
                carried.append(mass_n)
                if wanted[part].any():
                    measured_nV = logits_nV[torch.from_numpy(wanted[part]).to(self._device)]
                    profile.append(mass_profile(measured_nV, self.vocabulary.teacher_size, self._ks, DRAWS))
        return self._split(rows, places, concatenate(parts), np.concatenate(carried), np.concatenate(profile), wanted)

    def _read(self, rows: Sequence[AlignedRow], counts: list[int]) -> Tensor:
        """(n, H) hidden states that predict the aligned tokens of all rows.

        Rows are padded on the right, where a causal model never looks from a token before; so no mask is needed, and
        attention takes its fastest way.
        """
        longest = max(len(row.teacher_ids) for row in rows)
        ids_BT = np.zeros((len(rows), longest), np.int64)
        for place, row in enumerate(rows):
            ids_BT[place, : len(row.teacher_ids)] = row.teacher_ids
        hidden_BTH = self._backbone(input_ids=torch.from_numpy(ids_BT).to(self._device), use_cache=False).last_hidden_state
        before_n = np.concatenate([row.positions[row.positions >= 0] for row in rows]).astype(np.int64) - 1
        row_n = np.repeat(np.arange(len(rows)), counts)
        return hidden_BTH[torch.from_numpy(row_n).to(self._device), torch.from_numpy(before_n).to(self._device)]  # type: ignore[no-any-return]

    def _uniforms(self, rows: Sequence[AlignedRow], places: list[NDArray[np.int64]]) -> NDArray[np.float64] | None:
        """Numbers of the draws: of a trace's key and the place of the token in it, whatever it is scored beside."""
        if not isinstance(self.target, Sampled):
            return None
        return np.concatenate([uniforms(self.target, row.key, len(row.positions))[found] for row, found in zip(rows, places, strict=True)])

    def _targets(self, logits_nV: Tensor, chunk: _Chunk) -> tuple[Targets, NDArray[np.float64]]:
        """(n,) targets in the student's ids, and the mass on tokens that the student has."""
        if not len(self._lost):
            return self._own_targets(logits_nV, chunk), np.ones(len(logits_nV))
        logits_nV = logits_nV.float()
        carried_n = -torch.expm1((logits_nV[:, self._lost].logsumexp(-1) - logits_nV.logsumexp(-1)).clamp(max=0))
        carries_n = (carried_n >= MIN_CARRIED).cpu().numpy()
        kept = np.flatnonzero(carries_n)
        if len(kept) < len(carries_n):
            numbers_nN = chunk.uniforms_nN
            logits_nV = logits_nV[torch.from_numpy(kept).to(self._device)]
            chunk = _Chunk(chunk.hidden_nH, chunk.written_n[kept], None if numbers_nN is None else numbers_nN[kept])
        found = self._own_targets(logits_nV, chunk)
        return _spread(found, kept, len(carries_n), self.target), carried_n.double().cpu().numpy()

    def _own_targets(self, logits_nV: Tensor, chunk: _Chunk) -> Targets:
        size = self.vocabulary.teacher_size
        if isinstance(self.target, ChosenToken):
            return chosen_token(logits_nV, torch.from_numpy(chunk.written_n.astype(np.int64)), size)
        if isinstance(self.target, TopK):
            found = top_k(logits_nV, self.target, size)
            return found if self.vocabulary.identical else _mapped(found, self.vocabulary.student_ids)
        assert chunk.uniforms_nN is not None
        if not self.vocabulary.identical:
            # In the student's order, so that the ids of tokens drawn equally often rise as they must.
            logits_nV = logits_nV[:, self._columns].masked_fill(self._absent, -torch.inf)
        return sampled(logits_nV, self.target, self.vocabulary.student_size, chunk.uniforms_nN)

    def _split(
        self,
        rows: Sequence[AlignedRow],
        places: list[NDArray[np.int64]],
        targets: Targets,
        carried_n: NDArray[np.float64],
        profile: NDArray[np.float64],
        wanted_n: NDArray[np.bool_],
    ) -> list[ScoredRow]:
        """The aligned positions of a batch as its rows."""
        scored, start, measured = [], 0, 0
        for row, found in zip(rows, places, strict=True):
            part = slice(start, start + len(found))
            start = part.stop
            whole = _spread(targets[part], found, len(row.positions), self.target)
            profiled = int(wanted_n[part].sum())
            statistics = Statistics(
                tokens=len(row.teacher_ids),
                positions=len(row.positions),
                aligned=len(found),
                stored=int((whole.log_probs > -np.inf).any(1).sum()),
                carried=float(carried_n[part].sum()),
                profiled=profiled,
                profile=profile[measured : measured + profiled].sum(0).tolist(),
            )
            measured += profiled
            scored.append(ScoredRow(row.key, whole, statistics))
        return scored


def score_rows(
    model: PreTrainedModel, rows: Sequence[AlignedRow], target: TargetSpec, vocabulary: VocabularyMap, batch_size: int = 8
) -> list[ScoredRow]:
    """What a loaded model thinks of some rows, in their order, in the student's ids; nothing is written.

    For a model's own thoughts in its own ids, align the traces with itself: `align(trace, chat, chat, own)`, where
    `own = vocabulary_map(chat, chat)`.
    """
    guard = MemoryGuard(TeacherScorer(model, target, vocabulary).score, free_memory)
    batches = by_length(range(len(rows)), lambda place: len(rows[place].teacher_ids), batch_size)
    found: dict[int, ScoredRow] = {}
    for batch in batches:
        found |= dict(zip(batch, guard.run([rows[place] for place in batch]), strict=True))
    return [found[place] for place in range(len(rows))]


def _profiled(key: str, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of a row's positions are measured: a function of the row alone."""
    chosen: NDArray[np.bool_] = (places + zlib.crc32(key.encode())) % PROFILED_EVERY == 0
    return chosen


def _nothing(target: TargetSpec) -> Targets:
    width = int(isinstance(target, ChosenToken))
    return Targets(np.empty((0, 0), np.int32), np.empty((0, width), np.float32), np.empty(0, np.float32))


def _spread(targets: Targets, places: NDArray[np.int64], n: int, target: TargetSpec) -> Targets:
    """(n,) positions with the targets at some places and none elsewhere."""
    if len(places) == n:
        return targets
    ids = np.full((n, targets.ids.shape[1]), NONE, np.int32)
    log_probs = np.full((n, targets.log_probs.shape[1]), -np.inf, np.float32)
    log_rest = np.full(n, -np.inf if isinstance(target, Sampled) else 0.0, np.float32)
    ids[places], log_probs[places], log_rest[places] = targets.ids, targets.log_probs, targets.log_rest
    return Targets(ids, log_probs, log_rest)


def _mapped(targets: Targets, student_ids: Ids) -> Targets:
    """`top_k` targets in the student's ids; the mass of tokens it lacks goes to the rest."""
    filled = targets.ids >= 0
    ids = np.where(filled, student_ids[np.maximum(targets.ids, 0)], NONE)
    lost = filled & (ids == NONE)
    if not lost.any():
        return Targets(ids, targets.log_probs, targets.log_rest)
    masses: Floats = np.where(lost, np.exp(targets.log_probs), 0).sum(1) + np.exp(targets.log_rest)
    with np.errstate(divide="ignore"):
        log_rest = np.where(lost.any(1), np.minimum(np.log(masses), 0), targets.log_rest).astype(np.float32)
    order = np.argsort(ids == NONE, axis=1, kind="stable")
    log_probs = np.where(ids == NONE, -np.inf, targets.log_probs).astype(np.float32)
    return Targets(np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1), log_rest)
