"""A model in this process reads rows, and is compared at every token with what the teacher thinks there.

One forward of its backbone a batch, then its head a chunk of positions at a time, as in `scoring`; what comes out are numbers, not
distributions. Knows nothing of folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from distill.engines.batching import MemoryGuard, by_length
from distill.engines.scoring import LARGEST_BUFFER
from distill.losses.budget import buffer_elements
from distill.losses.divergences import forward_kl
from distill.models.chat import IGNORE
from distill.models.heads import backbone, head_of, logits_of
from distill.models.loading import free_memory
from distill.models.probes import check_head
from distill.models.vocabulary import Ids
from distill.targets.codec import Targets
from distill.targets.kinds import exact_type, refuse_broken

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What is read, in the model's own ids."""

    input_ids: Ids
    labels: Ids
    """Not shifted; `IGNORE` where a token is not looked at."""
    teacher: Targets | None = None
    """`top_k` targets of the teacher, one a token that is looked at; null compares nothing."""


class Opinion(NamedTuple):
    """What a model thinks of a row; an entry a token that is looked at."""

    log_probs: Numbers
    """Of the written tokens, in nats."""
    best: Ids
    """The most probable tokens."""
    ranks: Ids
    """Of the written tokens among all: 1 more than there are tokens with a larger logit, so that equal ones share the best rank."""
    kl_nats: Numbers
    """KL(teacher ‖ model) over the teacher's candidates and one outcome for all other tokens; NaN where the teacher has no candidate."""


class Comparer:
    """Reads rows with a model that is in memory.

    Args:
        model: In evaluation mode, on its device.
        vocab_size: Number of its token ids, without rows that pad the head.
        buffer: Number of logits of a chunk; null takes what suits the device.

    Raises:
        ModelError: the model's logits are not those of its head.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, buffer: int | None = None) -> None:
        check_head(model)
        self._backbone, self._head = backbone(model), head_of(model, vocab_size)
        self._device = self._head.weight_VH.device
        self._chunk = max(1, (buffer or buffer_elements(self._device, LARGEST_BUFFER)) // self._head.weight_VH.shape[0])

    def read(self, rows: Sequence[Row], batch_size: int = 8) -> list[Opinion]:
        """What the model thinks of some rows, in their order.

        Args:
            rows: What is read.
            batch_size: Rows at once; fewer where memory runs out.

        Raises:
            ModelError: the model's logits make no distribution.
            torch.OutOfMemoryError: a single row is too large.
        """
        guard: MemoryGuard[Row, Opinion] = MemoryGuard(self._read, free_memory)
        batches = by_length(range(len(rows)), lambda place: len(rows[place].input_ids), batch_size)
        found = {place: opinion for places in batches for place, opinion in self._numbered(guard, rows, places)}
        return [found[place] for place in range(len(rows))]

    @staticmethod
    def _numbered(guard: MemoryGuard[Row, Opinion], rows: Sequence[Row], places: list[int]) -> Iterator[tuple[int, Opinion]]:
        yield from zip(places, guard.run([rows[place] for place in places]), strict=True)

    @torch.inference_mode()
    def _read(self, rows: list[Row]) -> list[Opinion]:
        places = [np.flatnonzero(row.labels != IGNORE) for row in rows]
        written_n = np.concatenate([row.labels[found] for row, found in zip(rows, places, strict=True)])
        hidden_nH = self._hidden(rows, places)
        ids_nK, log_p_nO = self._teacher(rows, places)
        parts = []
        for start in range(0, len(written_n), self._chunk):
            part = slice(start, start + self._chunk)
            parts.append(self._compare(hidden_nH[part], written_n[part], ids_nK[part], log_p_nO[part]))
        numbers = [np.concatenate(columns) for columns in zip(*parts, strict=True)] if parts else [np.empty(0)] * 4
        cuts = np.cumsum([len(found) for found in places])[:-1]
        refuse_broken(torch.from_numpy(np.isnan(numbers[0])))
        columns = (np.split(column, cuts) for column in numbers)
        return [Opinion(*opinion) for opinion in zip(*columns, strict=True)]

    def _hidden(self, rows: list[Row], places: list[NDArray[np.int64]]) -> Tensor:
        """(n, H) hidden states that predict the tokens looked at; padded on the right, where a causal model never looks."""
        longest = max(len(row.input_ids) for row in rows)
        ids_BT = np.zeros((len(rows), longest), np.int64)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row.input_ids)] = row.input_ids
        before_n = np.concatenate([found - 1 + number * longest for number, found in enumerate(places)])
        output = self._backbone(input_ids=torch.from_numpy(ids_BT).to(self._device), use_cache=False)
        hidden_nH: Tensor = output.last_hidden_state.flatten(0, 1)[torch.from_numpy(before_n).to(self._device)]
        return hidden_nH

    @staticmethod
    def _teacher(rows: list[Row], places: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], Numbers]:
        """(n, K) candidates of all rows, -1 where there is none, and (n, K + 1) log-probabilities of these and of the rest."""
        width = max((row.teacher.ids.shape[1] for row in rows if row.teacher is not None), default=0)
        number = sum(map(len, places))
        ids_nK, log_p_nO = np.full((number, width), -1, np.int64), np.full((number, width + 1), -np.inf)
        start = 0
        for row, found in zip(rows, places, strict=True):
            part, start = slice(start, start + len(found)), start + len(found)
            if row.teacher is not None:
                own = row.teacher.ids.shape[1]
                ids_nK[part, :own], log_p_nO[part, :own] = row.teacher.ids, row.teacher.log_probs
                log_p_nO[part, -1] = row.teacher.log_rest
        return ids_nK, log_p_nO

    def _compare(
        self, hidden_nH: Tensor, written_n: NDArray[np.int64], ids_nK: NDArray[np.int64], log_p_nO: Numbers
    ) -> tuple[Numbers, Ids, Ids, Numbers]:
        logits_nV = logits_of(hidden_nH, self._head).float()
        log_total_n1 = logits_nV.logsumexp(-1, keepdim=True)
        written_n1 = torch.from_numpy(written_n.astype(np.int64)).to(self._device)[:, None]
        logits_n1 = logits_nV.gather(1, written_n1)
        log_probs_n = (logits_n1 - log_total_n1)[:, 0]
        best_n, ranks_n = logits_nV.argmax(-1).int(), (logits_nV > logits_n1).sum(-1).int() + 1
        kl_n = torch.full_like(log_probs_n, torch.nan)
        has_n = torch.from_numpy((ids_nK >= 0).any(1)).to(self._device)
        if ids_nK.shape[1] and bool(has_n.any()):
            ids = torch.from_numpy(ids_nK).to(self._device)[has_n]
            log_p = torch.from_numpy(log_p_nO).to(self._device, exact_type(self._device))[has_n]
            kl_n[has_n] = _divergence(logits_nV[has_n], log_total_n1[has_n], ids, log_p).to(kl_n.dtype)
        return log_probs_n.cpu().double().numpy(), best_n.cpu().numpy(), ranks_n.cpu().numpy(), kl_n.cpu().double().numpy()


def _divergence(logits_nV: Tensor, log_total_n1: Tensor, ids_nK: Tensor, log_p_nO: Tensor) -> Tensor:
    """(n,) KL over the candidates and the rest; each position has at least one candidate."""
    filled_nK = ids_nK >= 0
    ids_nK = torch.where(filled_nK, ids_nK, ids_nK[:, :1])
    log_q_nK = (logits_nV.gather(1, ids_nK) - log_total_n1).masked_fill(~filled_nK, -torch.inf)
    # The rest is summed over the others rather than taken from 1, where a small one would drown in rounding.
    rest_n1 = logits_nV.scatter(1, ids_nK, -torch.inf).logsumexp(-1, keepdim=True) - log_total_n1
    log_q_nO = torch.cat([log_q_nK, rest_n1], 1).to(log_p_nO.dtype)
    return forward_kl(log_p_nO, log_q_nO)[0]
