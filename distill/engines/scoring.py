"""The teacher reads rows: one forward of its backbone a batch, then its head a chunk of positions at a time.

No tensor of positions x vocabulary is ever held for a whole sequence. What comes out is in the student's ids, one entry
for every supervised token of the student's row. Knows nothing of folders.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill.engines.batching import MemoryGuard, by_length
from distill.engines.scored import DRAWS, KS, Arrival, Batch, Pending, ScoredRow
from distill.losses.budget import buffer_elements
from distill.models.heads import backbone, head_of, logits_of
from distill.models.loading import free_memory
from distill.models.probes import check_head
from distill.models.vocabulary import NONE, AlignedRow, VocabularyMap
from distill.targets.kinds import Found, exact_type, find_chosen_token, find_mass_profile, find_sampled, find_top_k, uniforms
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

LARGEST_BUFFER = 2**28
"""Logits of a chunk at most; see `batching.buffer_elements`."""
PROFILED_EVERY = 16
"""One position in so many is measured: it costs several passes over the vocabulary."""


class TeacherScorer:
    """Reads batches of rows with a model that is in memory.

    Args:
        model: The teacher, in evaluation mode, on its device.
        target: What is kept of its distributions.
        vocabulary: Its tokens as the student's.
        buffer: Number of logits of a chunk; null takes what suits the device.

    Raises:
        ModelError: the model's logits are not those of its head.
    """

    def __init__(self, model: PreTrainedModel, target: TargetSpec, vocabulary: VocabularyMap, buffer: int | None = None) -> None:
        self.target = target
        self.vocabulary = vocabulary
        check_head(model)
        self._backbone = backbone(model)
        self._head = head_of(model, vocabulary.teacher_size)
        self._device = self._head.weight_VH.device
        self._ahead = int(self._device.type == "cuda")
        self.chunk = max(1, (buffer or buffer_elements(self._device, LARGEST_BUFFER)) // self._head.weight_VH.shape[0])
        """Positions that go through the head together."""
        self.exact = self._head.weight_VH.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        """Whether the model computes in float32, so that the size of a batch changes next to nothing."""
        self._ks = [k for k in KS if k <= vocabulary.teacher_size]
        to_student, to_teacher = vocabulary.student_ids, vocabulary.teacher_ids
        self._lost = torch.from_numpy(np.flatnonzero(to_student == NONE)).to(self._device)
        self._columns = torch.from_numpy(np.maximum(to_teacher, 0).astype(np.int64)).to(self._device)
        self._absent = torch.from_numpy(to_teacher == NONE).to(self._device)

    def read(self, batches: Iterable[Sequence[AlignedRow]]) -> Iterator[list[ScoredRow]]:
        """What the teacher thinks of the rows of each batch, or of one part of it after another where memory runs out.

        A GPU is given the next batch before it is done with one, so that it works while the CPU makes rows of the last.

        Raises:
            ModelError: the teacher's logits make no distribution.
            torch.OutOfMemoryError: a single row is too large.
        """
        start = time.perf_counter()
        for pending in self._launched(batches):
            scored = pending.finish()
            for row in scored:
                row.statistics.device_s = (time.perf_counter() - start) / len(scored)
            yield scored
            start = time.perf_counter()

    def _launched(self, batches: Iterable[Sequence[AlignedRow]]) -> Iterator[Pending]:
        """Batches to be finished; on a GPU the one behind each is launched by then."""
        guard: MemoryGuard[AlignedRow, Pending] = MemoryGuard(lambda rows: [self.launch(rows)], free_memory)
        waiting: deque[Pending] = deque()
        for batch in batches:
            for pending in guard.run(list(batch)):
                waiting.append(pending)
                if len(waiting) > self._ahead:
                    yield waiting.popleft()
        yield from waiting

    def score(self, rows: Sequence[AlignedRow]) -> list[ScoredRow]:
        """What the teacher thinks of some rows, in their order; how they are put together changes only rounding.

        Raises:
            ModelError: the teacher's logits make no distribution.
            torch.OutOfMemoryError: the batch is too large.
        """
        return self.launch(rows).finish()

    @torch.inference_mode()
    def launch(self, rows: Sequence[AlignedRow]) -> Pending:
        """Some rows as the device reads them: on a GPU this comes back at once, and waits for nothing.

        Raises:
            torch.OutOfMemoryError: the batch is too large.
        """
        places = [np.flatnonzero(row.positions >= 0) for row in rows]
        wanted = np.concatenate([_profiled(row.key, found) for row, found in zip(rows, places, strict=True)])
        batch = Batch(self.target, self.vocabulary, rows, places, wanted)
        if not len(wanted):
            return Pending(batch, None)
        # Whatever the device needs is sent first: a copy that comes later would wait for all that was launched before.
        written_n = self._send(np.concatenate([row.teacher_ids[row.positions[found]] for row, found in zip(rows, places, strict=True)]))
        uniforms_nN = self._uniforms(rows, places)
        measured = np.flatnonzero(wanted)
        measured_m = self._send(measured)
        hidden_nH = self._read(rows, [len(found) for found in places])
        results: list[list[Tensor]] = []
        for start in range(0, len(hidden_nH), self.chunk):
            part = slice(start, start + self.chunk)
            logits_nV = logits_of(hidden_nH[part], self._head)
            first, last = np.searchsorted(measured, [part.start, part.stop]).tolist()
            profile_mc = torch.empty((0, len(self._ks) + len(DRAWS)), device=self._device)
            if last > first:
                measured_mV = logits_nV[measured_m[first:last] - start]
                profile_mc = find_mass_profile(measured_mV, self.vocabulary.teacher_size, self._ks, DRAWS)
            carried_n, logits_nV = self._carried(logits_nV)
            found = self._find(logits_nV, written_n[part], None if uniforms_nN is None else uniforms_nN[part])
            results.append([*found, carried_n, profile_mc])
        return Pending(batch, Arrival([torch.cat(tensors) for tensors in zip(*results, strict=True)]))

    def _send(self, array: NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, dtype, non_blocking=True)
        return tensor.to(self._device, dtype)

    def _read(self, rows: Sequence[AlignedRow], counts: list[int]) -> Tensor:
        """(n, H) hidden states that predict the aligned tokens of all rows.

        Rows are padded on the right, where a causal model never looks from a token before; so no mask is needed, and
        attention takes its fastest way.
        """
        longest = max(len(row.teacher_ids) for row in rows)
        ids_BT = np.zeros((len(rows), longest), np.int64)
        for place, row in enumerate(rows):
            ids_BT[place, : len(row.teacher_ids)] = row.teacher_ids
        before_n = np.concatenate([row.positions[row.positions >= 0] for row in rows]).astype(np.int64) - 1
        chosen_n = self._send(np.repeat(np.arange(len(rows)), counts) * longest + before_n)
        return self._backbone(input_ids=self._send(ids_BT), use_cache=False).last_hidden_state.flatten(0, 1)[chosen_n]  # type: ignore[no-any-return]

    def _uniforms(self, rows: Sequence[AlignedRow], places: list[NDArray[np.int64]]) -> Tensor | None:
        """Numbers of the draws: of a trace's key and the place of the token in it, whatever it is scored beside."""
        if not isinstance(self.target, Sampled):
            return None
        numbers = [uniforms(self.target, row.key, len(row.positions))[found] for row, found in zip(rows, places, strict=True)]
        return self._send(np.concatenate(numbers), exact_type(self._device))

    def _carried(self, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) mass on tokens that the student has, and the logits."""
        if not len(self._lost):
            return torch.ones(len(logits_nV), device=self._device), logits_nV
        logits_nV = logits_nV.float()
        return -torch.expm1((logits_nV[:, self._lost].logsumexp(-1) - logits_nV.logsumexp(-1)).clamp(max=0)), logits_nV

    def _find(self, logits_nV: Tensor, written_n: Tensor, uniforms_nN: Tensor | None) -> Found:
        size = self.vocabulary.teacher_size
        if isinstance(self.target, ChosenToken):
            return find_chosen_token(logits_nV, written_n, size)
        if isinstance(self.target, TopK):
            return find_top_k(logits_nV, self.target, size)
        assert uniforms_nN is not None
        if not self.vocabulary.identical:
            # In the student's order, so that the ids of tokens drawn equally often rise as they must.
            logits_nV = logits_nV[:, self._columns].masked_fill(self._absent, -torch.inf)
        return find_sampled(logits_nV, self.target, self.vocabulary.student_size, uniforms_nN)


def score_rows(
    model: PreTrainedModel, rows: Sequence[AlignedRow], target: TargetSpec, vocabulary: VocabularyMap, batch_size: int = 8
) -> list[ScoredRow]:
    """What a loaded model thinks of some rows, in their order, in the student's ids; nothing is written.

    For a model's own thoughts in its own ids, align the traces with itself: `align(trace, chat, chat, own)`, where
    `own = vocabulary_map(chat, chat)`.
    """
    batches = by_length(range(len(rows)), lambda place: len(rows[place].teacher_ids), batch_size)
    places = [place for batch in batches for place in batch]
    scored = TeacherScorer(model, target, vocabulary).read([rows[place] for place in batch] for batch in batches)
    found = dict(zip(places, (row for part in scored for row in part), strict=True))
    return [found[place] for place in range(len(rows))]


def _profiled(key: str, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of a row's positions are measured: a function of the row alone."""
    chosen: NDArray[np.bool_] = (places + zlib.crc32(key.encode())) % PROFILED_EVERY == 0
    return chosen
