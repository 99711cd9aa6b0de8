"""Stored targets on their way into a batch: read by row, put together for the supervised tokens, never held whole.

A row of training data carries a column `target_index`: for every supervised token a number that says where its target
is stored, else -1. It goes through packing, cutting and shuffling like the ids beside it, so none of them can part a
token from its target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import IntegrityError
from distill.losses.sparse import SparseTargets
from distill.models.chat import IGNORE
from distill.targets.codec import Targets, concatenate
from distill.targets.files import TargetReader
from distill.targets.spec import TargetSpec

NO_TARGET = -1
_REMAKE = "Run `distill score` with --redo."
_PLACE_BITS = 24  # of an index: the token within its trace; above them the row


class TargetSource(NamedTuple):
    """Stored targets of one table of traces."""

    shards: list[Path]
    traces_digest: str
    """Digest of the traces as they are now."""
    teacher_wrote: bool
    """Whether the teacher wrote the traces, so that a token without a target is learned from as it stands."""


class StepTargets:
    """The targets of a batch's supervised tokens, in the order of its rows. `M` supervised tokens.

    A plain class: FSDP looks into tuples, mappings and dataclasses, and rounds what it finds there to the type of the weights,
    which would cost log-probabilities all but three digits.

    Args:
        sparse: What the teacher stored.
        falls_back_M: Whether a token without a target is learned from as it stands.
        weights_M: Factors of the loss; None for 1.
    """

    def __init__(self, sparse: SparseTargets, falls_back_M: Tensor, weights_M: Tensor | None) -> None:
        self.sparse, self.falls_back_M, self.weights_M = sparse, falls_back_M, weights_M

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepTargets:
        """The same on another device."""

        def moved(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        sparse = self.sparse
        there = replace(sparse, ids_NK=moved(sparse.ids_NK), log_probs_NK=moved(sparse.log_probs_NK), log_rest_N=moved(sparse.log_rest_N))
        return StepTargets(there, moved(self.falls_back_M), moved(self.weights_M))


class StoredTargets:
    """All targets a student learns from, addressed by one number a token. Pickles as its paths, for a loader's workers.

    Args:
        sources: At least one; their shards hold targets of one kind in one vocabulary.

    Raises:
        IntegrityError: shards are gone or altered, or the sources don't belong together.
    """

    def __init__(self, sources: Sequence[TargetSource]) -> None:
        self._sources = list(sources)
        self._readers = [TargetReader(source.shards) for source in sources]
        self._starts = np.cumsum([0, *(len(reader) for reader in self._readers)])
        first = self._readers[0].header
        self.target, self.vocab_size = first.target, first.vocab_size
        for reader, source in zip(self._readers, sources, strict=True):
            other = reader.header
            if (other.target, other.vocab_size, other.tokenizer_digest) != (first.target, first.vocab_size, first.tokenizer_digest):
                raise IntegrityError(f"{source.shards[0]}: holds other targets than {sources[0].shards[0]}. {_REMAKE}")

    def __reduce__(self) -> tuple[type[StoredTargets], tuple[list[TargetSource]]]:
        return StoredTargets, (self._sources,)

    @property
    def places_digest(self) -> str:
        """Of where each trace's targets are: equal where `indices` gives equal numbers."""
        found = hashlib.sha256()
        for reader in self._readers:
            found.update(reader.places_digest.encode())
        return found.hexdigest()

    def check(self, target: TargetSpec, tokenizer_digest: str, template_digest: str) -> None:
        """Compares what was asked for, and the traces, tokenizer and template that the targets were stored for.

        Args:
            target: What the recipe asks to be stored.
            tokenizer_digest: Of the student.
            template_digest: Of the student.

        Raises:
            IntegrityError: they are others.
        """
        for reader, source in zip(self._readers, self._sources, strict=True):
            if reader.header.target != target:
                raise IntegrityError(f"{source.shards[0]}: holds {reader.header.target!r}, the recipe asks for {target!r}. {_REMAKE}")
            if reader.header.traces_digest != source.traces_digest:
                raise IntegrityError(f"{source.shards[0]}: was scored for other traces than are there now. {_REMAKE}")
            found = reader.header.tokenizer_digest, reader.header.template_digest
            if found != (tokenizer_digest, template_digest):
                what = "tokenizer" if found[0] != tokenizer_digest else "chat template"
                raise IntegrityError(f"{source.shards[0]}: was scored for a student with another {what}. {_REMAKE}")

    def indices(self, source: int, key: str, count: int) -> NDArray[np.int64]:
        """`(count,)` where the targets of a trace's supervised tokens are stored.

        Args:
            source: Number of the source.
            key: Of the trace.
            count: How many supervised tokens the trace has.

        Raises:
            IntegrityError: the trace was not scored, or has another number of tokens than then.
        """
        reader = self._readers[source]
        try:
            row = reader.find(key)
        except KeyError:
            raise IntegrityError(f"{self._sources[source].shards[0]}: has no targets of trace {key}. {_REMAKE}") from None
        stored = int(reader.positions[row])
        if stored != count:
            raise IntegrityError(
                f"{self._sources[source].shards[0]}: trace {key} has {stored} targets, but {count} supervised tokens. "
                f"It was scored for another tokenizer, template or max_length: run `distill score` with --redo."
            )
        return ((int(self._starts[source]) + row) << _PLACE_BITS) + np.arange(count)

    def gather(self, indices_M: NDArray[np.int64], half_life: int | None = None) -> StepTargets:
        """The targets at M tokens.

        Args:
            indices_M: From `indices`.
            half_life: Tokens into an answer after which a token counts half; None weighs all alike.
        """
        rows_M, places_M = indices_M >> _PLACE_BITS, indices_M & ((1 << _PLACE_BITS) - 1)
        rows, which_M = np.unique(rows_M, return_inverse=True)
        source_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[source_of_row]
        stored = [self._readers[int(source)][int(place)] for source, place in np.stack([source_of_row, places], 1)]
        starts = np.cumsum([0, *(len(targets) for targets in stored)])
        # Nothing, but in the shape that the loss takes where no token of a batch has a target.
        width = int(self.target.kind != "chosen_token")
        nothing = Targets(np.empty((0, width), np.int32), np.empty((0, 1), np.float32), np.empty(0, np.float32))
        together = concatenate([*stored, nothing])
        taken_M = starts[which_M] + places_M
        teacher_wrote = np.array([source.teacher_wrote for source in self._sources], dtype=np.bool_)
        sparse = SparseTargets(
            self.target.kind,
            torch.from_numpy(together.ids[taken_M]),
            torch.from_numpy(together.log_probs[taken_M]),
            torch.from_numpy(together.log_rest[taken_M]) if self.target.kind == "top_k" else None,
        )
        weights = None if half_life is None else torch.from_numpy(np.exp2(-places_M / half_life).astype(np.float32))
        return StepTargets(sparse, torch.from_numpy(teacher_wrote[source_of_row][which_M]), weights)


class TargetCollator:
    """TRL's collator, and the targets of the batch it makes under the key `distillation`.

    Args:
        collate: TRL's, padding or flattening.
        stored: Where `target_index` points to.
        half_life: See `StoredTargets.gather`.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], stored: StoredTargets, half_life: int | None) -> None:
        self._collate = collate
        self._stored = stored
        self._half_life = half_life

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows with `input_ids`, `labels` and `target_index`; of rows without the last, TRL's alone."""
        batch = self._collate(examples)
        if "target_index" not in examples[0]:  # sft has targets for its validation rows only
            return batch
        labels_BT = batch["labels"]
        index_BT = torch.full_like(labels_BT, NO_TARGET, dtype=torch.int64)
        rows = [torch.tensor(example["target_index"], dtype=torch.int64) for example in examples]
        if len(labels_BT) == 1 and len(rows) > 1:  # flattened
            rows = [torch.cat(rows)]
        for place, row in enumerate(rows):
            index_BT[place, : len(row)] = row
        index_M = index_BT[:, 1:][labels_BT[:, 1:] != IGNORE]
        if (index_M == NO_TARGET).any():
            raise IntegrityError(f"train: a supervised token has no place among the targets. {_REMAKE}")
        return {**batch, "distillation": self._stored.gather(index_M.numpy(), self._half_life)}
