"""What scoring costs beside the teacher's bare forward, on a random model of a real shape. Prints Markdown.

    python scripts/bench_score.py                       # Qwen2.5-0.5B's shape, some minutes on two cores
    python scripts/bench_score.py --device cuda --layers 28 --hidden 1536 --rows 64 --length 1024

The bare forward reads the same batches through the same backbone, and gives the head the same supervised positions, a
chunk at a time: what no way of scoring can avoid. Scoring also makes targets of the logits, measures them, encodes them
and writes them to disk, through the functions that the stage runs. Both are repeated in turn, so that other work on the
machine meets both alike; the ratio is of median seconds. The head of a random model gives nearly
equal probabilities to all tokens; its weight is scaled up here, to no language model's measure. The journal is not written.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from distill.engines.scored import ScoredRow
from distill.engines.scoring import LARGEST_BUFFER, TeacherScorer
from distill.losses.budget import buffer_elements
from distill.models.chat import IGNORE
from distill.models.heads import backbone, head_of, logits_of
from distill.models.vocabulary import AlignedRow, Tokens, VocabularyMap
from distill.targets.files import TargetWriter
from distill.targets.spec import ChosenToken, Sampled, TargetHeader, TargetSpec, TopK

ROWS, TOKENS = 151_936, 151_665  # rows of Qwen2.5's head, and tokens of its tokenizer
SPECS: dict[str, TargetSpec] = {
    "top_k, 64": TopK(k=64),
    "top_k, 16": TopK(k=16),
    "sampled, 50 draws": Sampled(),
    "chosen_token": ChosenToken(),
}


def build_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """A random Qwen2 of the shape asked for."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 38 // 7,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = Qwen2ForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


class Written(NamedTuple):
    """What scoring put on disk, and what that cost."""

    size_bytes: int
    """Of the shard."""
    writer_s: float
    """Processor seconds of the thread that encodes and writes."""


def make_rows(lengths: Sequence[int], vocab_size: int) -> list[AlignedRow]:
    """Rows of random ids, an eighth of each a prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for index, length in enumerate(lengths):
        ids = rng.integers(0, vocab_size, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 8, IGNORE, ids).astype(np.int32)
        rows.append(AlignedRow(f"{index}/0", ids, labels, ids, np.arange(length // 8, length, dtype=np.int32)))
    return rows


def own_vocabulary(vocab_size: int) -> VocabularyMap:
    """Of a teacher and a student with one tokenizer."""
    ids = np.arange(vocab_size, dtype=np.int32)
    nothing = Tokens([], {}, frozenset(), frozenset(), on_bytes=True)
    return VocabularyMap(ids, ids, True, True, nothing, nothing)


def bare(model: PreTrainedModel, batches: list[list[AlignedRow]], vocab_size: int) -> None:
    """The forward alone: backbone, and head at the supervised positions. The rows of a batch have one length."""
    head = head_of(model, vocab_size)
    chunk = buffer_elements(model.device, LARGEST_BUFFER) // head.weight_VH.shape[0]
    with torch.inference_mode():
        for batch in batches:
            ids = torch.from_numpy(np.stack([row.teacher_ids for row in batch]).astype(np.int64)).to(model.device)
            hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
            start = int(batch[0].positions[0]) - 1
            for part in hidden[:, start:-1].reshape(-1, hidden.shape[-1]).split(chunk):
                logits_of(part, head)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def scoring(model: PreTrainedModel, batches: list[list[AlignedRow]], spec: TargetSpec, vocabulary: VocabularyMap) -> Written:
    """What the stage does with the same batches: read, make targets, encode, write."""
    digests = ("tokenizer_digest", "template_digest", "teacher_tokenizer_digest", "teacher_template_digest", "traces_digest")
    known = dict.fromkeys(digests, "0" * 64)
    header = TargetHeader(target=spec, vocab_size=vocabulary.student_size, teacher_model="random", teacher_revision=None, **known)
    scorer = TeacherScorer(model, spec, vocabulary)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as disk,
        TargetWriter(Path(folder) / "targets-00000.targets", header) as writer,
    ):
        stored = [disk.submit(_append, writer, row) for batch in scorer.read(batches) for row in batch]
        writer_s = sum(future.result() for future in stored)
        writer.close()
        return Written(writer.path.stat().st_size, writer_s)


def _append(writer: TargetWriter, row: ScoredRow) -> float:
    start = time.thread_time()
    writer.append(row.key, row.targets)
    return time.thread_time() - start


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and processor seconds of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model, rows, vocabulary = build_model(arguments), make_rows([arguments.length] * arguments.rows, TOKENS), own_vocabulary(TOKENS)
    batches = [rows[start : start + arguments.batch_size] for start in range(0, len(rows), arguments.batch_size)]
    tokens = sum(len(row.teacher_ids) for row in rows)
    parameters = sum(weight.numel() for weight in model.parameters())
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {where}, {arguments.dtype}, torch {torch.__version__}, Python {platform.python_version()};")
    print(f"{parameters / 1e6:,.0f}M parameters, V = {ROWS:,}, {len(rows)} rows of {arguments.length} tokens, ", end="")
    print(f"{arguments.batch_size} at once, medians of {arguments.repeats}\n")
    print("| target | bare forward, tokens/s | scoring, tokens/s | ratio of wall time | ratio of processor time |")
    print("| --- | ---: | ---: | ---: | ---: |")
    bare(model, batches[:1], TOKENS)
    for name, spec in SPECS.items():
        plain, scored = [], []
        for _ in range(arguments.repeats):
            plain.append(timed(lambda: bare(model, batches, TOKENS)))
            scored.append(timed(lambda spec=spec: scoring(model, batches, spec, vocabulary)))  # type: ignore[misc]
        walls, processors = ([statistics.median(run[kind] for run in runs) for runs in (plain, scored)] for kind in (0, 1))
        ratios = f"{walls[0] / walls[1]:.2f} | {processors[0] / processors[1]:.2f}"
        print(f"| {name} | {tokens / walls[0]:,.1f} | {tokens / walls[1]:,.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
