"""Continuous batching: slots that are filled again change no token, stay full, and survive a lack of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.engines.decoding import Decoder, Job, can_refill
from distill.engines.drawing import Sampler
from distill.engines.hf import HFEngine
from distill.models.loading import load_chat_format, load_model
from distill.recipe.base import Sampling
from distill.recipe.models import ModelSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> HFEngine:
    spec = ModelSpec(model=str(tiny_model_dir))
    return HFEngine(load_model(spec, CPU), load_chat_format(spec), Sampling(max_new_tokens=40, temperature=1.0, top_p=1.0, batch_size=6))


def jobs(count: int, longest: int = 12) -> list[Job]:
    rng = np.random.default_rng(3)
    return [Job(rng.integers(5, 60, int(rng.integers(1, longest))).tolist(), seed) for seed in range(count)]


def test_slots_that_are_filled_again_write_what_transformers_own_loop_writes(engine: HFEngine) -> None:
    """Ends at different lengths, by tokens that stop and by the limit; some prompts asked for twice."""
    asked = [*jobs(20), *(Job(job.prompt_ids, job.seed + 100) for job in jobs(5))]
    stops = [*engine._chat.stop_ids, *range(10, 20)]
    decoder = Decoder(engine._model, engine._sampler, stops, engine._chat.pad_id, 40, num_slots=6)
    written = dict(pair for ended in decoder.run(asked) for pair in ended)
    assert sorted(written) == list(range(25))
    assert len({len(ids) for ids in written.values()}) > 8 and max(map(len, written.values())) == 40
    for place, ids in enumerate(engine._complete(asked)):
        assert ids[: len(written[place])] == written[place]


class Ends:
    """Draws as a sampler does, but ends each sequence at a length that was chosen for it, known by its random numbers."""

    def __init__(self, lengths: list[int], longest: int, stop_id: int) -> None:
        self._stop_id = stop_id
        streams = [np.random.default_rng(seed).random(longest, dtype=np.float32) for seed in range(len(lengths))]
        self._last = {float(stream[length - 1]) for stream, length in zip(streams, lengths, strict=True)}

    def __call__(self, logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([float(uniform) in self._last for uniform in uniforms_B])
        return torch.where(ends, self._stop_id, 7)


def test_little_is_padding_however_lengths_scatter(engine: HFEngine) -> None:
    """Lognormal lengths, as those of reasoning are: batches that wait for their longest would be padding by more than a half."""
    lengths = np.random.default_rng(0).lognormal(2.5, 1.0, 300).astype(int).clip(1, 200).tolist()
    decoder = Decoder(engine._model, Ends(lengths, 200, 1), [1], 0, 200, num_slots=24)
    written = dict(pair for ended in decoder.run([Job([5, 6], seed) for seed in range(300)]) for pair in ended)
    assert [len(written[place]) for place in range(300)] == lengths
    assert decoder.tokens == sum(lengths)
    assert 1 - decoder.tokens / decoder.slot_steps < 0.1
    waiting_for_the_longest = sum(24 * max(lengths[start : start + 24]) for start in range(0, 300, 24))
    assert 1 - sum(lengths) / waiting_for_the_longest > 0.5


@pytest.mark.parametrize("limit", [60, 25])
def test_memory_that_runs_out_costs_no_token(engine: HFEngine, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A forward over more than so many columns fails: at the start, or when sequences have grown, some of them ended."""
    asked = jobs(16, longest=4)
    sampler = Sampler(engine._sampling, 60)
    stops = list(range(10, 14))

    def run(slots: int) -> tuple[dict[int, list[int]], Decoder]:
        decoder = Decoder(engine._model, sampler, stops, 0, 12, slots)
        return dict(pair for ended in decoder.run(asked) for pair in ended), decoder

    expected, _ = run(6)

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["attention_mask"].numel() > limit:
            raise torch.OutOfMemoryError("too much")

    hook = engine._model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        found, decoder = run(6)
        assert found == expected
        assert decoder._num_slots < 6 and "out of memory" in capsys.readouterr().out
        with pytest.raises(torch.OutOfMemoryError):
            list(Decoder(engine._model, sampler, stops, 0, 12, 6).run([Job([5] * (limit + 1), 0), *asked]))
    finally:
        hook.remove()


def test_models_whose_cache_is_more_than_keys_and_values_go_batch_by_batch() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "state_size": 4, "pad_token_id": 0}
    built = {kind: AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small)) for kind in ("mamba", "phi3", "qwen3")}
    assert {kind: can_refill(model) for kind, model in built.items()} == {"mamba": False, "phi3": False, "qwen3": True}


def test_a_prompt_that_is_longer_than_all_that_stay_leaves_no_trace(engine: HFEngine) -> None:
    """The longest prompt ends with its first token, so what was read in beside it needs fewer columns than were read."""
    decoder = Decoder(engine._model, Ends([1, 9, 5], 9, 1), [1], 0, 9, num_slots=3)
    asked = [Job([5] * 30, 0), Job([6] * 3, 1), Job([6] * 2, 2)]
    assert {place: len(ids) for ended in decoder.run(asked) for place, ids in ended} == {0: 1, 1: 9, 2: 5}
