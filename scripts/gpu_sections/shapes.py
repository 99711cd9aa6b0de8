"""Random models, rows and stored targets of real sizes: what costs time and memory is real, what is written is noise."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from distill.models.chat import IGNORE
from distill.targets.codec import Targets
from distill.targets.files import TargetWriter
from distill.targets.spec import Sampled, TargetHeader, TargetSpec, TopK
from distill.trainers.targets import StoredTargets, TargetSource

TOP_K, DRAWS = TopK(k=64), Sampled(draws=50)
_DIGESTS = ("tokenizer_digest", "template_digest", "teacher_tokenizer_digest", "teacher_template_digest", "traces_digest")


class Shape(NamedTuple):
    """A model's size, as Qwen2.5's configs give it."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = True
    vocab_size: int = 151_936


SHAPES = {
    "0.5B": Shape("0.5B", 896, 4864, 24, 14, 2),
    "1.5B": Shape("1.5B", 1536, 8960, 28, 12, 2),
    "7B": Shape("7B", 3584, 18_944, 28, 28, 4, tie_word_embeddings=False),
}
TINY = Shape("tiny", 64, 128, 2, 2, 1, vocab_size=1024)


def shape_of(name: str, rehearse: bool) -> Shape:
    """A size by its name; in a rehearsal always the tiny one."""
    return TINY if rehearse else SHAPES[name]


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """A random model of a shape, built where it will stand."""
    torch.manual_seed(0)
    config = Qwen2Config(**shape._asdict(), max_position_embeddings=131_072)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model


@functools.cache
def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """What a trainer asks a tokenizer for: ids for padding and the end of a turn."""
    vocabulary = {"<pad>": 0, "<end>": 1, **{f"t{place}": place for place in range(2, vocab_size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def trace_lengths(count: int, limit: int) -> list[int]:
    """Lengths as reasoning traces have them: log-normal around 1,500 tokens, at most `limit`."""
    drawn = np.random.default_rng(0).lognormal(np.log(1500), 0.6, count)
    return [int(length) for length in np.clip(drawn * min(1, limit / 4096), 16, limit)]


def make_rows(lengths: list[int], vocab_size: int, stored: StoredTargets | None = None) -> Dataset:
    """Rows of random ids, an eighth of each a prompt; with targets, where each token's is stored."""
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        input_ids = rng.integers(2, vocab_size, length)
        labels = np.where(np.arange(length) < length // 8, IGNORE, input_ids)
        row = {"input_ids": input_ids, "labels": labels}
        if stored is not None:
            places = np.flatnonzero(labels != IGNORE)
            row["target_index"] = np.full(length, -1)
            row["target_index"][places] = stored.indices(0, f"{number}/0", len(places))
        rows.append(row)
    return Dataset.from_list(rows)


def store_targets(folder: Path, lengths: list[int], target: TargetSpec, vocab_size: int) -> StoredTargets:
    """Targets for `make_rows`, written and opened again as `score` and `train` do it."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / f"{target.kind}.targets"
    known = dict.fromkeys(_DIGESTS, "0" * 64)
    header = TargetHeader(target=target, vocab_size=vocab_size, teacher_model="random", teacher_revision=None, **known)
    rng = np.random.default_rng(2)
    with TargetWriter(shard, header) as writer:
        for number, length in enumerate(lengths):
            writer.append(f"{number}/0", _random_targets(rng, length - length // 8, target, vocab_size))
        writer.close()
    return StoredTargets([TargetSource([shard], known["traces_digest"], teacher_wrote=True)])


def _random_targets(rng: np.random.Generator, count: int, target: TargetSpec, vocab_size: int) -> Targets:
    """Of `count` tokens: k candidates, or as many distinct draws as a language model gives of 50, about 17."""
    width = min(target.k if isinstance(target, TopK) else 17, vocab_size // 2)
    first = rng.integers(vocab_size, size=(count, 1))
    ids = ((first + np.arange(width) * (vocab_size // width)) % vocab_size).astype(np.int32)
    if isinstance(target, TopK):
        logits = np.sort(3 * rng.standard_normal((count, width + 1)), axis=1)[:, ::-1]
        log_p = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
        return Targets(ids, log_p[:, :-1], log_p[:, -1])
    counts = _counts(rng, count, width)
    # As `sampled` orders them: the heaviest first, equal ones by id.
    order = np.lexsort((ids, -counts), axis=1)
    ids, counts = np.take_along_axis(ids, order, 1), np.take_along_axis(counts, order, 1)
    return Targets(ids, np.log(counts / 50).astype(np.float32), np.full(count, -np.inf, np.float32))


def _counts(rng: np.random.Generator, count: int, width: int) -> NDArray[np.int64]:
    """How often each of `width` tokens was drawn; 50 draws together."""
    share = 1 / np.arange(1, width + 1)
    found: NDArray[np.int64] = 1 + rng.multinomial(50 - width, share / share.sum(), size=count)
    return found
