"""What reading gave: the tensors of a batch, once they are in memory, as its rows and what they sum up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.models.vocabulary import NONE, AlignedRow, Ids, VocabularyMap
from distill.targets.codec import Floats, Targets
from distill.targets.kinds import Found, MassSummary, refuse_broken, to_targets
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

MIN_CARRIED = 0.5
"""Least probability that the student's tokens must hold at a position for it to get a target."""
KS, DRAWS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (50,)
"""Sizes of targets whose worth is measured on the way."""


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
    unseen: float = 0.0
    """Probability beside `carried` of which it is not known whether the student has its tokens; 0 where whole distributions are read."""
    profiled: int = 0
    """Positions in `profile`."""
    profile: list[float] = field(default_factory=list)
    """Sums of `targets.kinds.mass_profile`; shorter where the larger k and the draws could not be measured."""
    device_s: float = 0.0
    """Seconds of the device."""

    def add(self, other: Statistics) -> None:
        """Counts other rows in."""
        for name in ("tokens", "positions", "aligned", "stored", "carried", "unseen", "profiled", "device_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.profiled:
            self.profile = (np.array(self.profile or [0.0] * len(other.profile)) + other.profile).tolist()

    @property
    def aligned_share(self) -> float:
        """Share of the supervised tokens that got a target."""
        return self.stored / max(self.positions, 1)

    @property
    def carried_mass(self) -> float:
        """Share of the teacher's probability that lies on tokens the student has, over the aligned positions."""
        return self.carried / max(self.aligned, 1)

    @property
    def most_carried(self) -> float:
        """The largest share that it can be: all of what is not known counts."""
        return (self.carried + self.unseen) / max(self.aligned, 1)

    def facts(self, vocab_size: int) -> dict[str, Any]:
        """What a manifest says of it; masses and distinct ids are averages a position, empty where none was profiled. Null is unknown.

        Args:
            vocab_size: Number of the teacher's token ids.
        """
        sizes = [k for k in KS if k <= vocab_size]
        whole = len(self.profile) == len(sizes) + len(DRAWS)
        draws = DRAWS if whole else ()
        summary = MassSummary(vocab_size, sizes if whole else sizes[: len(self.profile)], draws)
        between = {"carried_mass_between": [round(self.carried_mass, 6), round(min(self.most_carried, 1.0), 6)]} if self.unseen else {}
        if self.profiled:
            summary.add_profile(np.array(self.profile), self.profiled)
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "targets": self.stored,
            "aligned_share": round(self.aligned_share, 6),
            "carried_mass": None if self.unseen else round(self.carried_mass, 6),
            **between,
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
class Batch:
    """Rows that are read together."""

    target: TargetSpec
    vocabulary: VocabularyMap
    rows: Sequence[AlignedRow]
    places: list[NDArray[np.int64]]
    """The aligned among the supervised tokens of each row: n in all."""
    profiled_n: NDArray[np.bool_]
    """Which of them are measured."""


class Arrival:
    """Tensors on their way into memory. From a GPU they come when it has made them, whatever it was given to do since."""

    def __init__(self, tensors: list[Tensor]) -> None:
        device = tensors[0].device
        self._done: torch.cuda.Event | None = None
        self._tensors = tensors
        if device.type == "cuda":
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(device))

    def wait(self) -> list[Tensor]:
        """The tensors, on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return [tensor.cpu() for tensor in self._tensors]


class Pending:
    """A batch that the device works on.

    Args:
        batch: Its rows.
        arrival: The fields of `Found`, the (n,) mass on tokens that the student has, and what was measured, a row a
            position; null where there are no positions.
    """

    def __init__(self, batch: Batch, arrival: Arrival | None) -> None:
        self._batch = batch
        self._arrival = arrival

    def finish(self) -> list[ScoredRow]:
        """The rows, when the device is done with them.

        Raises:
            ModelError: the teacher's logits make no distribution.
        """
        if self._arrival is None:
            return self._split(_nothing(self._batch.target), np.empty(0), np.empty((0, 0)))
        *found, carried_n, profile_mc = self._arrival.wait()
        refuse_broken(carried_n.isnan())
        targets = self._targets(Found(*found), np.flatnonzero((carried_n >= MIN_CARRIED).numpy()))
        return self._split(targets, carried_n.double().numpy(), profile_mc.double().numpy())

    def _targets(self, found: Found, kept: NDArray[np.int64]) -> Targets:
        """(n,) targets in the student's ids, none where it has too few of the tokens."""
        target, n = self._batch.target, len(found.ids_nK)
        if len(kept) < n:
            found = Found(*(tensor[torch.from_numpy(kept)] for tensor in found))
        targets = to_targets(found, target)
        if isinstance(target, TopK) and not self._batch.vocabulary.identical:
            targets = _mapped(targets, self._batch.vocabulary.student_ids)
        return spread(targets, kept, n, target)

    def _split(self, targets: Targets, carried_n: NDArray[np.float64], profile_mc: NDArray[np.float64]) -> list[ScoredRow]:
        """The positions of the batch as its rows."""
        scored, start, measured = [], 0, 0
        for row, found in zip(self._batch.rows, self._batch.places, strict=True):
            part = slice(start, start + len(found))
            start = part.stop
            whole = spread(targets[part], found, len(row.positions), self._batch.target)
            profiled = int(self._batch.profiled_n[part].sum())
            statistics = Statistics(
                tokens=len(row.teacher_ids),
                positions=len(row.positions),
                aligned=len(found),
                stored=int((whole.log_probs > -np.inf).any(1).sum()),
                carried=float(carried_n[part].sum()),
                profiled=profiled,
                profile=profile_mc[measured : measured + profiled].sum(0).tolist(),
            )
            measured += profiled
            scored.append(ScoredRow(row.key, whole, statistics))
        return scored


def _nothing(target: TargetSpec) -> Targets:
    width = int(isinstance(target, ChosenToken))
    return Targets(np.empty((0, 0), np.int32), np.empty((0, width), np.float32), np.empty(0, np.float32))


def spread(targets: Targets, places: NDArray[np.int64], n: int, target: TargetSpec) -> Targets:
    """(n,) positions with the targets at some places and none elsewhere.

    Args:
        targets: Of the places.
        places: Rising.
        n: Positions in all.
        target: What is kept of a distribution.
    """
    if len(places) == n:
        return targets
    ids = np.full((n, targets.ids.shape[1]), NONE, np.int32)
    log_probs = np.full((n, targets.log_probs.shape[1]), -np.inf, np.float32)
    log_rest = np.full(n, -np.inf if isinstance(target, Sampled) else 0.0, np.float32)
    ids[places], log_probs[places], log_rest[places] = targets.ids, targets.log_probs, targets.log_rest
    first_lost = None
    if targets.first_lost is not None:
        first_lost = np.zeros(n, np.bool_)
        first_lost[places] = targets.first_lost
    return Targets(ids, log_probs, log_rest, first_lost)


def _mapped(targets: Targets, student_ids: Ids) -> Targets:
    """`top_k` targets in the student's ids; the mass of tokens it lacks goes to the rest."""
    filled = targets.ids >= 0
    ids = np.where(filled, student_ids[np.maximum(targets.ids, 0)], NONE)
    lost = filled & (ids == NONE)
    if not lost.any():
        return Targets(ids, targets.log_probs, targets.log_rest)
    return without(Targets(ids, targets.log_probs, targets.log_rest), lost)


def without(targets: Targets, lost: NDArray[np.bool_]) -> Targets:
    """`top_k` targets without some candidates, whose mass goes to the rest.

    Args:
        targets: With `NONE` for ids of the lost.
        lost: (n, K), which these are.
    """
    ids = targets.ids
    masses: Floats = np.where(lost, np.exp(targets.log_probs), 0).sum(1) + np.exp(targets.log_rest)
    with np.errstate(divide="ignore"):
        log_rest = np.where(lost.any(1), np.minimum(np.log(masses), 0), targets.log_rest).astype(np.float32)
    order = np.argsort(ids == NONE, axis=1, kind="stable")
    log_probs = np.where(ids == NONE, -np.inf, targets.log_probs).astype(np.float32)
    return Targets(np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1), log_rest, lost[:, 0])
