"""Continuous batching on a model's own cache: a sequence that has ended makes room for the next one at once."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from distill.models.loading import free_memory
from distill.run.log import say

Draw = Callable[[Tensor, Tensor], Tensor]
"""(B,) next tokens from (B, V) logits of the last position and (B,) uniform numbers."""
_PATIENCE = 0.5  # passes of the model that empty slots may have taken in vain, before one is spent on filling them
_ROOM = 64  # columns behind the last one when the cache is laid out, at least


class Job(NamedTuple):
    """One sequence to be written."""

    prompt_ids: list[int]
    seed: int


@dataclass(eq=False)
class _Slot:
    """A sequence under way. The cache holds all of it but its last token."""

    place: int
    """Among the jobs."""
    job: Job
    written: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def ids(self) -> list[int]:
        return self.job.prompt_ids + self.written


class RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, so that a step writes one column and copies none."""

    _key_room: Tensor | None = None
    _value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds (B, H, t, D) columns; all there are, as views."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._key_room, self.keys = _appended(self._key_room, self.keys, key_states)
        self._value_room, self.values = _appended(self._value_room, self.values, value_states)
        return self.keys, self.values

    def lay_out(self, kept: Tensor, length: int, added: DynamicLayer, rows: Tensor) -> None:
        """Keeps some sequences and puts others below them, all with the same last column.

        Args:
            kept: Numbers of the sequences that stay.
            length: Columns there will be.
            added: Where the others are; it is empty afterwards.
            rows: Of `added`, one a sequence.
        """
        if not (self.is_initialized or added.is_initialized):
            return  # a layer that uses the keys and values of another
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = added.dtype, added.device, True
        self._key_room, self.keys = _laid_out(self.keys, kept, length, added.keys, rows)
        added.keys = None
        self._value_room, self.values = _laid_out(self.values, kept, length, added.values, rows)
        added.values = None


def _appended(room: Tensor | None, there: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
    before = 0 if there is None else there.shape[2]
    length = before + columns.shape[2]
    if room is None or length > room.shape[2]:
        room = columns.new_empty((*columns.shape[:2], length + max(_ROOM, length // 4), columns.shape[3]))
        if there is not None:
            room[:, :, :before] = there
    room[:, :, before:length] = columns
    return room, room[:, :, :length]


def _laid_out(there: Tensor | None, kept: Tensor, length: int, added: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    like = there if there is not None else added
    assert like is not None
    room = like.new_empty((len(kept) + len(rows), like.shape[1], length + max(_ROOM, length // 4), like.shape[3]))
    room[:, :, :length] = 0  # because what a mask hides is still multiplied
    for part, source, numbers in ((room[: len(kept)], there, kept), (room[len(kept) :], added, rows)):
        if source is not None:
            last = min(length, source.shape[2])  # it is longer where the longest has ended
            part[:, :, length - last : length] = source[numbers, :, source.shape[2] - last :]
    return room, room[:, :, :length]


def _plain(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def can_refill(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model's cache is keys and values alone, so that sequences can be put into it and taken out.

    Recurrent states, chunks counted from a fixed column, and models that prepare a step in a way of their own can't be.
    """
    plain = _plain(model)
    config = plain.config.get_text_config(decoder=True)
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return (
        layers <= {DynamicLayer, DynamicSlidingWindowLayer}
        and "chunked_attention" not in (getattr(config, "layer_types", None) or ())
        and "position_ids" in inspect.signature(plain.forward).parameters
        and not plain.config.is_encoder_decoder
        and type(plain).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    )


class Decoder:
    """Writes sequences in slots that are filled again as they fall empty.

    Sequences are padded on the left of a common last column, like any batch, so every attention kernel works. Samples of one prompt
    share its first pass. When memory runs out what is written is kept, half as many go on, and the others wait: later a sequence is
    read in with what it has, and goes on with its own next number.

    Args:
        model: In evaluation mode, on its device; `can_refill` holds.
        draw: Chooses next tokens.
        stop_ids: Tokens that end a sequence.
        pad_id: Stands where a prompt is shorter than its neighbours.
        max_new_tokens: Most of a sequence.
        num_slots: Sequences at once.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, draw: Draw, stop_ids: Sequence[int], pad_id: int, max_new_tokens: int, num_slots: int
    ) -> None:
        self._model: Any = model
        self._draw, self._stop_ids, self._pad_id, self._max_new_tokens = draw, frozenset(stop_ids), pad_id, max_new_tokens
        self._num_slots = num_slots
        named = inspect.signature(_plain(model).forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        self._slots: list[_Slot] = []
        self._cache = DynamicCache()
        self._finished: list[tuple[int, list[int]]] = []
        self.slot_steps = 0
        """Tokens drawn, those of slots whose sequence has ended among them."""
        self.tokens = 0
        """Of those, the ones that belong to a sequence."""

    def run(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, list[int]]]]:
        """The tokens of each job, with its place among them, as they end; the longest prompts are begun first.

        Raises:
            torch.OutOfMemoryError: a single sequence does not fit.
        """
        order = sorted(range(len(jobs)), key=lambda place: len(jobs[place].prompt_ids), reverse=True)
        waiting = deque(_Slot(place, jobs[place]) for place in order)
        wasted = 0  # slot steps since the slots were filled
        while waiting or self._slots:
            vacant = sum(slot.ended for slot in self._slots)
            wasted += vacant
            anew = vacant == len(self._slots) or wasted > _PATIENCE * len(self._slots)
            wasted = 0 if anew else wasted
            room = self._num_slots - len(self._slots) + vacant if anew else 0
            entered = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            failure = ""
            try:
                if anew:
                    self._lay_out(entered)
                else:
                    self._step()
            except torch.OutOfMemoryError as error:
                failure = str(error)  # not the error itself: it holds on to what filled the memory
            if failure:
                self._halve(waiting, entered, failure)
            if self._finished:
                yield self._finished
                self._finished = []

    def _halve(self, waiting: deque[_Slot], entered: list[_Slot], failure: str) -> None:
        under_way = [slot for slot in dict.fromkeys([*self._slots, *entered]) if not slot.ended]
        if len(under_way) <= 1:
            raise torch.OutOfMemoryError(failure)
        self._num_slots = len(under_way) // 2
        waiting.extendleft(reversed(under_way))
        self._slots, self._cache = [], DynamicCache()
        free_memory()
        say(f"out of memory: going on with {self._num_slots} sequences at once")

    @torch.inference_mode()
    def _lay_out(self, entered: list[_Slot]) -> None:
        """Drops the slots whose sequence has ended, lets others in with a token, and lays the cache out for both."""
        added, rows = self._read_in(entered)
        kept = [number for number, slot in enumerate(self._slots) if not slot.ended]
        stay = [number for number, slot in enumerate(entered) if not slot.ended]
        slots = [*(self._slots[number] for number in kept), *(entered[number] for number in stay)]
        self._slots = slots  # before the cache is: when memory runs out here both are made anew
        if not slots:
            self._cache = DynamicCache()
            return

        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self._model.device)

        if not self._cache.layers:
            self._cache.layers = [RoomyLayer() for _ in added.layers]  # type: ignore[no-untyped-call]
        lengths = [len(slot.ids) - 1 for slot in slots]
        kept_k, rows_n = numbers(kept), numbers([rows[number] for number in stay])
        for number, layer in enumerate(cast(list[RoomyLayer], self._cache.layers)):
            layer.lay_out(kept_k, max(lengths), cast(DynamicLayer, added.layers[number]) if entered else DynamicLayer(), rows_n)
        self._tokens_B1 = numbers([slot.written[-1] for slot in slots])[:, None]
        self._lengths_B = numbers(lengths)
        self._steps_B = numbers([len(slot.written) for slot in slots])
        self._uniforms_BT = self._uniforms(slots)

    def _read_in(self, entered: list[_Slot]) -> tuple[DynamicCache, list[int]]:
        """Reads what sequences have so far, equal ones once, and writes a token to each; the cache and each one's row in it."""
        cache = DynamicCache()
        if not entered:
            return cache, []
        distinct: dict[tuple[int, ...], int] = {}
        rows = [distinct.setdefault(tuple(slot.ids), len(distinct)) for slot in entered]
        longest = max(map(len, distinct))
        device = self._model.device
        ids_RT = torch.tensor([[self._pad_id] * (longest - len(ids)) + list(ids) for ids in distinct], device=device)
        mask_RT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in distinct], device=device)
        logits_RV = self._logits(ids_RT, mask_RT, (mask_RT.cumsum(-1) - 1).clamp(min=0), cache)
        steps_n = torch.tensor([len(slot.written) for slot in entered], device=device)
        self._write(entered, self._draw(logits_RV[rows], self._uniforms(entered).gather(1, steps_n[:, None])[:, 0]))
        return cache, rows

    @torch.inference_mode()
    def _step(self) -> None:
        """Writes a token to every sequence."""
        columns_T = torch.arange(self._cache.get_seq_length() + 1, device=self._lengths_B.device)
        mask_BT = (columns_T >= len(columns_T) - 1 - self._lengths_B[:, None]).long()
        logits_BV = self._logits(self._tokens_B1, mask_BT, self._lengths_B[:, None], self._cache)
        next_B = self._draw(logits_BV, self._uniforms_BT.gather(1, self._steps_B[:, None])[:, 0])
        self._tokens_B1 = next_B[:, None]
        self._lengths_B += 1
        self._steps_B = (self._steps_B + 1).clamp(max=self._max_new_tokens - 1)  # which a slot without a sequence would pass
        self._write(self._slots, next_B)

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """(B, V) of the last column."""
        found: Tensor = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **self._last_only
        ).logits
        return found[:, -1]

    def _write(self, slots: list[_Slot], tokens_B: Tensor) -> None:
        self.slot_steps += len(slots)
        for slot, token in zip(slots, tokens_B.tolist(), strict=True):
            if slot.ended:
                continue
            self.tokens += 1
            slot.written.append(token)
            slot.ended = token in self._stop_ids or len(slot.written) == self._max_new_tokens
            if slot.ended:
                self._finished.append((slot.place, slot.written))

    def _uniforms(self, slots: list[_Slot]) -> Tensor:
        """(B, T) numbers in [0, 1) of each sequence's own stream."""
        drawn = [np.random.default_rng(slot.job.seed).random(self._max_new_tokens, dtype=np.float32) for slot in slots]
        return torch.from_numpy(np.stack(drawn)).to(self._model.device)
