"""Score against the bare forward: tokens/s, bytes a stored token, and what another thread takes off the one that reads.

The teacher is a random model of Qwen2.5's shape at 1.5B and 7B in bf16. It reads batches of 8 rows of 1,024 to 2,048 tokens, an
eighth of each a prompt, the longest first as the stage does; so many that the rows of the last one, which are made and written
when the GPU is done, weigh little, as they do in a run of thousands. Both sides are those of `bench_score.py`: the bare forward
is backbone and head at the supervised positions, and scoring makes targets of the logits, measures, encodes and writes them.
"""

from __future__ import annotations

import statistics
import time
from functools import cached_property, partial
from typing import NamedTuple

import bench_score
import torch
from transformers import PreTrainedModel

from distill.models.vocabulary import AlignedRow
from distill.targets.spec import ChosenToken, TargetSpec
from gpu_sections.frame import Bench, Case, Cases, Figures
from gpu_sections.shapes import DRAWS, TOP_K, build_model, shape_of

_BATCH, _REPEATS, _PADDING = 8, 3, 271  # Qwen2.5's head has 271 rows behind its tokens
_SPREAD = 6.0
"""Standard deviation of the logits: gives an entropy of 2.5 nats at V = 151,936, and 16 distinct tokens in 50 draws."""


class _Plan(NamedTuple):
    shape: str
    lengths: list[int]
    """Of the rows of each batch."""
    targets: dict[str, TargetSpec]


def cases(bench: Bench) -> Cases:
    """A case for each size of teacher and kind of target."""
    for plan in _plans(bench.rehearse):
        teacher = _Teacher(bench, plan)
        for name, target in plan.targets.items():
            yield Case(f"{plan.shape}, {name}", partial(_measure, bench, teacher, target))


def _plans(rehearse: bool) -> list[_Plan]:
    targets: dict[str, TargetSpec] = {"top_k 64": TOP_K, "sampled 50": DRAWS}
    chosen: dict[str, TargetSpec] = {"chosen_token": ChosenToken()}
    if rehearse:
        return [_Plan("1.5B", [64, 32], targets | chosen), _Plan("7B", [32], targets)]
    return [_Plan("1.5B", [2048] * 4 + [1536] * 4 + [1024] * 4, targets | chosen), _Plan("7B", [2048] * 2 + [1024] * 2, targets)]


class _Teacher:
    """A model and what it reads; built by the first case that asks for it, so that it fails as a case."""

    def __init__(self, bench: Bench, plan: _Plan) -> None:
        # Apart, so that the head can be scaled alone: a tied one would mostly repeat the token it reads.
        self._shape = shape_of(plan.shape, bench.rehearse)._replace(tie_word_embeddings=False)
        self._device = bench.device
        self.vocab_size = self._shape.vocab_size - _PADDING
        self.vocabulary = bench_score.own_vocabulary(self.vocab_size)
        rows = bench_score.make_rows([length for length in plan.lengths for _ in range(_BATCH)], self.vocab_size)
        self.batches: list[list[AlignedRow]] = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        self.tokens = sum(len(row.teacher_ids) for row in rows)
        self.supervised = sum(len(row.positions) for row in rows)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Random, but as sure of itself as a language model, and warm."""
        model: PreTrainedModel = build_model(self._shape, self._device, torch.bfloat16).eval()
        # The last norm gives the hidden states a mean square of 1.
        spread = model.config.initializer_range * self._shape.hidden_size**0.5
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(_SPREAD / spread)
        for batch in self.batches:
            bench_score.bare(model, [batch], self.vocab_size)
        return model


def _measure(bench: Bench, teacher: _Teacher, target: TargetSpec) -> Figures:
    """Medians of the two, run in turn; `tokens_per_s` counts prompts, `bytes_per_token` the supervised tokens alone.

    `writer_share` is what the thread that encodes and writes computes, as a share of scoring's wall time: by so much longer
    would scoring take if the thread that reads did it itself.
    """
    model = teacher.model
    bench_score.scoring(model, teacher.batches[:1], target, teacher.vocabulary)
    plain: list[float] = []
    scored: list[float] = []
    written: list[bench_score.Written] = []
    while len(scored) < (1 if bench.rehearse or (scored and bench.allowance.left_s <= 0) else _REPEATS):
        plain.append(bench_score.timed(lambda: bench_score.bare(model, teacher.batches, teacher.vocab_size))[0])
        start = time.perf_counter()
        written.append(bench_score.scoring(model, teacher.batches, target, teacher.vocabulary))
        scored.append(time.perf_counter() - start)
    seconds, bare_s = statistics.median(scored), statistics.median(plain)
    return {
        "tokens_per_s": teacher.tokens / seconds,
        "bare_tokens_per_s": teacher.tokens / bare_s,
        "of_bare": bare_s / seconds,
        "bytes_per_token": written[-1].size_bytes / teacher.supervised,
        "writer_share": statistics.median(part.writer_s / wall for part, wall in zip(written, scored, strict=True)),
    }
